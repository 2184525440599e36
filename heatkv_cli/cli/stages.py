"""The commands that run a stage: calibrate, build-schedule, generate, eval, bench."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from heatkv_cli import interrupts
from heatkv_cli.cli.app import command as register
from heatkv_cli.cli.options import FLAGS, SETTINGS, Overrides
from heatkv_cli.errors import PartialResultError

if TYPE_CHECKING:
    from heatkv_cli.config import Plan


def stage(command: str, *settings: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a command that runs a stage; the function gives its help text alone.

    Args:
        command: the command's name.
        settings: the options it takes beside `--plugin`, `--out` and the flags of all stages.
    """
    names = [name for name in SETTINGS if name in (*settings, "plugin", "out")]

    def add(documented: Callable[[], None]) -> Callable[[], None]:
        def run(overrides: list[str] | None = None, **given: Any) -> None:
            options = {name: given[name] for name in names}
            if "yes" in options:
                options["yes"] = "true" if options["yes"] else None
            _stage(command, overrides, options, **{name: given[name] for name in FLAGS})

        hints = {"overrides": Overrides, **{name: SETTINGS[name] for name in names}, **FLAGS}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(name, kind, annotation=hint, default=False if name in (*FLAGS, "yes") else None)
                for name, hint in hints.items()
            ]
        )
        run.__annotations__, run.__doc__ = hints, documented.__doc__
        register(command)(run)
        return documented

    return add


@stage("calibrate", "model", "benchmark", "weights", "yes")
def calibrate() -> None:
    """Measure what each head attends to, once per model.

    \b
    Examples:
      heatkv calibrate --model tiny
      heatkv calibrate benchmark=shapes-calibration-b       # other calibration prompts

    Writes OUT/calibration/NAME/calibration.safetensors and prints how stable the head orders are.
    """


@stage("build-schedule", "model", "method", "budget", "orders")
def build_schedule() -> None:
    """Decide which source scale of which head goes when.

    \b
    Examples:
      heatkv build-schedule budget=0.1
      heatkv build-schedule model=infinity-2b budget=0.1 --orders infinity-2b.json --json   # needs no weights

    Writes OUT/schedules/NAME/schedule.safetensors and prints the counts per scale and the peak.
    """


@stage("generate", "model", "method", "budget", "benchmark", "limit", "shard", "weights", "yes")
def generate() -> None:
    """Make images with a compressed cache.

    \b
    Examples:
      heatkv generate method=heatkv budget=0.1 --limit 16
      heatkv generate method=heatkv budget=0.1 --limit all --shard 0/4    # one of four processes

    Writes OUT/images/NAME/free/*.png and manifest.jsonl, batch by batch; for benchmark=geneval and hpsv2 also the
    folder that their original scorers read, OUT/images/NAME/geneval or hpsv2.
    """


@stage("eval", "model", "method", "budget", "benchmark", "limit", "shard", "weights", "yes")
def evaluate() -> None:
    """Measure methods; make whatever is missing first.

    \b
    Examples:
      heatkv eval method=heatkv budget=0.15
      heatkv eval method=full,streaming,heatkv budget=0.2,0.1,0.04 --limit 64
      heatkv eval experiment=demo
      heatkv eval method=heatkv metric=kl,psnr --dry-run                  # plan, bytes, missing files
      heatkv eval --plugin mine.py method=mine:Latest budget=0.5          # a method of your own

    Writes OUT/results.csv, one row per number, and prints a table.
    """


@stage("bench", "model", "method", "budget", "orders")
def bench() -> None:
    """Measure seconds per scale and stage, and bytes.

    \b
    Examples:
      heatkv bench method=heatkv budget=0.2,0.1,0.04                      # the full cache is always measured too
      heatkv bench model=infinity-2b weights=random resolution=0.25M budget=0.1 --orders infinity-2b.json
      heatkv bench method=random runtime.batch_size=4 repeats=5 warmup=2

    Methods and budgets take turns. Writes OUT/bench/NAME/bench.csv (after every pass) and bench.md, and prints both
    tables. One image a batch unless runtime.batch_size says otherwise. weights=random: real dimensions without files.
    """


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
        from heatkv_cli.library import run_stage

        plan = compose(overrides or [], command=command, options=options, dry_run=dry_run)
        outcome.again, outcome.folder = plan.command_line, plan.first.out
        if dry_run:
            from heatkv_cli.planning.preview import preview

            document = preview(plan, console)
            outcome.code = document["exit_code"]
            console.result(document)
        else:
            with interrupts.orderly():
                document = run_stage(plan, console)
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


_FOLLOWS = {"calibrate": "build-schedule", "build-schedule": "generate", "generate": "eval"}


def _next_command(plan: Plan) -> str:
    """Return the stage that takes up what was made, for the same choices; an experiment as a whole is evaluated."""
    if plan.command in _FOLLOWS:
        stage = "eval" if plan.experiment else _FOLLOWS[plan.command]
        if stage == "build-schedule" and any(run.method.object.plan_type is None for run in plan.runs):
            stage = "generate"  # nothing is planned ahead
        given = list(plan.overrides)
        if plan.command == "calibrate":  # elsewhere, benchmark is what is drawn
            given = [f"calibration_prompts={t.partition('=')[2]}" if t.startswith("benchmark=") else t for t in given]
            if not plan.experiment and not any(t.startswith(("budget=", "rho=")) for t in given):
                given += [] if all(run.method.budgetless for run in plan.runs) else ["budget=0.1"]
        return shlex.join(["heatkv", stage, *given])
    if plan.command == "eval":
        return shlex.join(["heatkv", "report", "table", str(plan.first.out / "results.csv")])
    return "heatkv ls experiments"
