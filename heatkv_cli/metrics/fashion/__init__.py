"""Metrics on a small classifier of Fashion-MNIST that comes with the package: what tiny-var's pictures are worth."""
