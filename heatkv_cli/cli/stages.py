"""The commands that run a stage: calibrate, build-schedule, generate, eval, bench."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from heatkv_cli import interrupts
from heatkv_cli.cli.app import app
from heatkv_cli.cli.options import (
    Benchmark,
    Budget,
    Debug,
    DryRun,
    Json,
    Limit,
    Method,
    Model,
    Orders,
    Out,
    Overrides,
    Quiet,
    Shard,
    Verbose,
    Weights,
    Yes,
)
from heatkv_cli.errors import PartialResultError

if TYPE_CHECKING:
    from heatkv_cli.config import Plan
    from heatkv_cli.console import Console


@app.command()
def calibrate(
    overrides: Overrides = None,
    model: Model = None,
    benchmark: Benchmark = None,
    weights: Weights = None,
    out: Out = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure what each head attends to, once per model.

    \b
    Examples:
      heatkv calibrate --model tiny
      heatkv calibrate benchmark=shapes-calibration-b       # other calibration prompts

    Writes OUT/calibration/NAME/calibration.safetensors and prints how stable the head orders are.
    """
    options = {"model": model, "benchmark": benchmark, "weights": weights, "out": out}
    options["yes"] = "true" if yes else None
    _stage("calibrate", overrides, options, dry_run, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)


@app.command("build-schedule")
def build_schedule(
    overrides: Overrides = None,
    model: Model = None,
    method: Method = None,
    budget: Budget = None,
    orders: Orders = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Decide which source scale of which head goes when.

    \b
    Examples:
      heatkv build-schedule budget=0.1
      heatkv build-schedule model=infinity-2b budget=0.1 --orders infinity-2b.json --json   # needs no weights

    Writes OUT/schedules/NAME/schedule.safetensors and prints the counts per scale and the peak.
    """
    options = {"model": model, "method": method, "budget": budget, "orders": orders, "out": out}
    _stage("build-schedule", overrides, options, dry_run, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)


@app.command()
def generate(
    overrides: Overrides = None,
    model: Model = None,
    method: Method = None,
    budget: Budget = None,
    benchmark: Benchmark = None,
    limit: Limit = None,
    shard: Shard = None,
    weights: Weights = None,
    out: Out = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make images with a compressed cache.

    \b
    Examples:
      heatkv generate method=heatkv budget=0.1 --limit 16
      heatkv generate method=heatkv budget=0.1 --limit all --shard 0/4    # one of four processes

    Writes OUT/images/NAME/free/*.png and manifest.csv, batch by batch; for benchmark=geneval and hpsv2 also the folder
    that their original scorers read, OUT/images/NAME/geneval or hpsv2.
    """
    options = {"model": model, "method": method, "budget": budget, "benchmark": benchmark}
    options |= {"limit": limit, "shard": shard, "weights": weights, "out": out}
    options["yes"] = "true" if yes else None
    _stage("generate", overrides, options, dry_run, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)


@app.command("eval")
def evaluate(
    overrides: Overrides = None,
    model: Model = None,
    method: Method = None,
    budget: Budget = None,
    benchmark: Benchmark = None,
    limit: Limit = None,
    shard: Shard = None,
    weights: Weights = None,
    out: Out = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure methods; make whatever is missing first.

    \b
    Examples:
      heatkv eval method=heatkv budget=0.15
      heatkv eval method=full,streaming,heatkv budget=0.2,0.1,0.04 --limit 64
      heatkv eval experiment=demo
      heatkv eval method=heatkv metric=kl,psnr --dry-run                  # plan, bytes, missing files

    Writes OUT/results.csv, one row per number, and prints a table.
    """
    options = {"model": model, "method": method, "budget": budget, "benchmark": benchmark}
    options |= {"limit": limit, "shard": shard, "weights": weights, "out": out}
    options["yes"] = "true" if yes else None
    _stage("eval", overrides, options, dry_run, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)


@app.command()
def bench(
    overrides: Overrides = None,
    model: Model = None,
    method: Method = None,
    budget: Budget = None,
    orders: Orders = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure seconds per scale and stage, and bytes.

    \b
    Examples:
      heatkv bench method=heatkv budget=0.2,0.1,0.04                      # the full cache is always measured too
      heatkv bench model=infinity-2b weights=random resolution=0.25M budget=0.1 --orders infinity-2b.json
      heatkv bench method=random runtime.batch_size=4 repeats=5 warmup=2

    Methods and budgets take turns. Writes OUT/bench/NAME/bench.csv (after every pass) and bench.md, and prints both
    tables. One image a batch unless runtime.batch_size says otherwise. weights=random: real dimensions without files.
    """
    options = {"model": model, "method": method, "budget": budget, "orders": orders, "out": out}
    _stage("bench", overrides, options, dry_run, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)


def _stage(
    command: str,
    overrides: Sequence[str] | None,
    options: dict[str, str | None],
    dry_run: bool,
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Compose the plan, run one stage, say what was written and what to type next."""
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    with console.guard(shlex.join(["heatkv", command, *given, *(overrides or [])])) as outcome:
        from heatkv_cli.config import compose
        from heatkv_cli.results import ensure_writable

        plan = compose(overrides or [], command=command, options=options, dry_run=dry_run)
        outcome.again, outcome.folder = plan.command_line, plan.first.out
        if dry_run:
            from heatkv_cli.planning.preview import preview

            document = preview(plan, console)
            outcome.code = document["exit_code"]
            console.result(document)
        else:
            stage = _stage_function(command)
            with interrupts.orderly():
                ensure_writable(plan.first.out)
                document = stage(plan, console)
                interrupts.check()
            following = _next_command(plan)
            about = {"status": "done", "command": plan.command_line, "seconds": round(console.elapsed, 3)}
            document = {**about, **document, "next": following}
            outcome.code = PartialResultError.exit_code if document["status"] == "partial" else 0
            console.result(document)
            if document.get("path") and Path(document["path"]).absolute() not in console.written:
                console.wrote(Path(document["path"]))
            console.next(following)
    raise typer.Exit(outcome.code)


def _stage_function(command: str) -> Callable[[Plan, Console], dict[str, Any]]:
    """Import one stage, and torch with it."""
    if command == "calibrate":
        from heatkv_cli.pipeline.calibrate import run
    elif command == "build-schedule":
        from heatkv_cli.pipeline.build_schedule import run
    elif command == "generate":
        from heatkv_cli.pipeline.generate import run
    elif command == "eval":
        from heatkv_cli.pipeline.evaluate import run
    else:
        from heatkv_cli.pipeline.bench import run
    return run


_FOLLOWS = {"calibrate": "build-schedule", "build-schedule": "generate", "generate": "eval"}


def _next_command(plan: Plan) -> str:
    """The stage that takes up what was made, for the same choices; an experiment as a whole is evaluated."""
    if plan.command in _FOLLOWS:
        stage = "eval" if plan.experiment else _FOLLOWS[plan.command]
        following = plan.command_line.replace(f"heatkv {plan.command}", f"heatkv {stage}", 1)
        chosen = plan.experiment or any(given.startswith(("budget=", "rho=")) for given in plan.overrides)
        return following if chosen or plan.command != "calibrate" else f"{following} budget=0.1"
    return "heatkv ls experiments" if plan.experiment else "heatkv eval experiment=demo"
