"""Models of human preference for a picture and its prompt: HPSv2 and ImageReward."""
