"""Metrics of sets on Inception's features: FID, Inception score, precision and recall."""
