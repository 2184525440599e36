"""Metrics: images in, numbers out. One file per metric; none knows a model or a method."""
