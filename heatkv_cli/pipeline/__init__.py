"""The straight lines from files to files. Each stage is one module with `run(plan, ui)`, read top to bottom."""
