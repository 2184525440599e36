"""One family = one file or folder; a model knows `cache.attend` and `cache.end_step`, and no method."""
