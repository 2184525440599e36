"""`python -m heatkv_cli` is the `heatkv` command."""

from __future__ import annotations

from heatkv_cli.cli import main

if __name__ == "__main__":
    main()
