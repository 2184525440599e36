"""Compression methods: one paper, one file (or folder), one frozen dataclass; and what a new one imports.

A method knows the engine (`core`) and the statistics of `calibration`, and no model, metric or other method. What
several share stands in `toolkit`.
"""

from __future__ import annotations

from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.methods.base import Method, Setting

__all__ = ["Keep", "Method", "Policy", "Setting", "Visit"]
