"""Metrics on EfficientNet-Lite0, whose weights come in a package: for machines without a hub."""
