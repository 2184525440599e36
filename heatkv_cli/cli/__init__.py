"""The `heatkv` command: options, help, exit codes. Everything else happens in the functions it calls.

Options are sugar for overrides; overrides (`method=heatkv budget=0.15`) are accepted by every command in any order.
Nothing heavy is imported before a command runs, so that help and completion are quick. One module holds related
commands (`stages`, `score`, `report`, `about`, `files`); importing it here puts them into the help, in this order.
"""

from __future__ import annotations

from heatkv_cli.cli import stages, score, report, about, files  # isort: skip
from heatkv_cli.cli.app import run
from heatkv_cli.cli.options import complete_override

__all__ = ["about", "complete_override", "files", "report", "run", "score", "stages"]
