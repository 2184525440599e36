"""The `heatkv` command, and `python -m heatkv_cli`."""

from __future__ import annotations

import sys

from heatkv_cli.interrupts import leave_at_once


def main() -> None:
    """Run one command line and exit with its code."""
    leave_at_once()  # before anything else is imported
    from heatkv_cli.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
