"""Metrics of what is in a picture: GenEval, and the shapes score with its exact detector."""
