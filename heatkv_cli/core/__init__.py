"""The engine: scales, budgets, the slot pool, the cache and its attention, the policy contract, the ledger.

Pure torch. It knows no model, method, metric, benchmark or command. Reading order: `scales` (what is cached), `budget`
(how much of it may stay), `policy` (who decides), `cache` (one visit from q, k, v to storage), `pool` and `table`
(where tokens are), `attention`, `ledger` (what it cost), `timeline` (where time went).
"""
