"""What every method and every model shares: scales, budgets, the slot pool, attention, schedules, artifacts.

Pure torch, no third-party configuration or console. This layer knows no model, no method, no metric and no benchmark;
it may import `results` and `errors` only. Reading order: `scales` (what is cached), `budget` (how much of it may stay),
`orders` and `schedule` (which head-scale atoms go, and when), `artifacts` (the two files), `stability` (can a
calibration be trusted).
"""
