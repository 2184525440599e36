"""From a plan of configs to work that can begin: resolved jobs, checks before any work, byte plans, the dry run.

`job` resolves a run once; `preflight` finds everything that would stop it later; `footprint` and `byte_plan` count its
bytes; `preview` prints all of it. Nothing here runs a model's numbers or writes a result.
"""
