"""Benchmarks: prompt sets. Knows neither models nor metrics; a benchmark's YAML names its default metrics by name."""
