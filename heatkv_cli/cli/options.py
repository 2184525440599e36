"""The options that commands share, and their completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer


def complete_override(incomplete: str) -> list[str]:
    """Complete `key=value`: keys first, then the files of a group."""
    from heatkv_cli.config import GROUPS, choices
    from heatkv_cli.config.sweep import SHORT

    key, equals, start = incomplete.partition("=")
    if not equals:
        return [
            f"{name}="
            for name in (*GROUPS, "budget", "rho", "seed", "limit", "out", "shard", "weights", "memory", *SHORT)
            if name.startswith(key)
        ]
    typed, comma, last = start.rpartition(",")
    group = "benchmark" if key.startswith("calibration_") else key
    names = choices(group) if group in GROUPS else []
    return [f"{key}={typed}{comma}{name}" for name in names if name.startswith(last)]


def complete(group: str) -> Callable[[str], list[str]]:
    """Complete the names of a group."""

    def names(incomplete: str) -> list[str]:
        from heatkv_cli.config import choices

        return [name for name in choices(group) if name.startswith(incomplete)]

    return names


Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, such as method.window=8.",
        autocompletion=complete_override,
        show_default=False,
    ),
]
Model = Annotated[Optional[str], typer.Option("--model", help="model=NAME", autocompletion=complete("model"))]
Method = Annotated[Optional[str], typer.Option("--method", help="method=NAME,...", autocompletion=complete("method"))]
Budget = Annotated[Optional[str], typer.Option("--budget", help="budget=FRACTION,... kept of the full KV cache")]
Weights = Annotated[
    Optional[str],
    typer.Option(
        "--weights",
        help="Folder with files of models and metrics (else HEATKV_WEIGHTS_DIR, the hub's cache).",
        metavar="DIR",
    ),
]
Benchmark = Annotated[
    Optional[str],
    typer.Option("--benchmark", help="benchmark=NAME: the prompts", autocompletion=complete("benchmark")),
]
Limit = Annotated[
    Optional[str],
    typer.Option(
        "--limit",
        help="First N prompts only (64, or all of a benchmark that is named); all for every prompt.",
        metavar="N",
    ),
]
Shard = Annotated[Optional[str], typer.Option("--shard", help="Share the work: this is process I of N.", metavar="I/N")]
Orders = Annotated[
    Optional[str], typer.Option("--orders", help="Removal orders in the upstream file format.", metavar="FILE")
]
Plugin = Annotated[
    Optional[str],
    typer.Option("--plugin", help="Python file with a method of your own: method=STEM:Class.", metavar="FILE"),
]
Out = Annotated[Optional[str], typer.Option("--out", "-o", help="Folder for everything written.", metavar="DIR")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and what is missing; touch nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Run a large model on a CPU all the same.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results, warnings and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More details.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]

SETTINGS: dict[str, Any] = {
    "model": Model,
    "method": Method,
    "budget": Budget,
    "benchmark": Benchmark,
    "limit": Limit,
    "shard": Shard,
    "orders": Orders,
    "weights": Weights,
    "plugin": Plugin,
    "out": Out,
    "yes": Yes,
}
"""Options that stand for a key of the config."""

FLAGS: dict[str, Any] = {
    "dry_run": DryRun,
    "as_json": Json,
    "quiet": Quiet,
    "verbose": Verbose,
    "debug": Debug,
}
"""Options that every command which runs a stage has."""
