"""The `heatkv` command: options, help, exit codes. Everything else happens in the functions it calls.

Options are sugar for overrides; overrides (`method=heatkv budget=0.15`) are accepted by every command in any order.
Nothing heavy is imported before a command runs, so that help and completion are quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from heatkv_cli import __version__
from heatkv_cli.errors import EXIT_CODES, INTERRUPTED, ConfigError, SetupError, did_you_mean

if TYPE_CHECKING:
    from heatkv_cli.config import Plan
    from heatkv_cli.console import Console

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
_HELP = """KV-cache compression for visual autoregressive image models, measured in bytes that are really freed.

\b
Examples:
  heatkv eval experiment=demo                                   # five methods, three budgets, a few minutes on a CPU
  heatkv eval method=heatkv budget=0.15                         # runs every missing stage first
  heatkv eval method=full,streaming,heatkv budget=0.2,0.1,0.04  # a comma list is a sweep
  heatkv build-schedule model=infinity-2b budget=0.1 --orders infinity-2b.json
  heatkv ls methods
  heatkv doctor

Files go below ./runs (--out DIR, or HEATKV_OUT). The same command goes on where it was interrupted.
"""

app = typer.Typer(
    name="heatkv",
    help=_HELP,
    epilog=_EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def complete_override(incomplete: str) -> list[str]:
    """Complete `key=value`: keys first, then the files of a group."""
    from heatkv_cli.config import GROUPS, choices

    key, equals, start = incomplete.partition("=")
    if not equals:
        return [
            f"{name}=" for name in (*GROUPS, "budget", "rho", "seed", "limit", "out", "shard") if name.startswith(key)
        ]
    typed, comma, last = start.rpartition(",")
    group = "benchmark" if key.startswith("calibration_") else key
    names = choices(group) if group in GROUPS else []
    return [f"{key}={typed}{comma}{name}" for name in names if name.startswith(last)]


def _complete(group: str) -> Callable[[str], list[str]]:
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
Model = Annotated[Optional[str], typer.Option("--model", help="model=NAME", autocompletion=_complete("model"))]
Method = Annotated[Optional[str], typer.Option("--method", help="method=NAME,...", autocompletion=_complete("method"))]
Budget = Annotated[Optional[str], typer.Option("--budget", help="budget=FRACTION,... kept of the full KV cache")]
Benchmark = Annotated[
    Optional[str],
    typer.Option("--benchmark", help="benchmark=NAME: the prompts", autocompletion=_complete("benchmark")),
]
Limit = Annotated[Optional[str], typer.Option("--limit", help="First prompts only; all for every prompt.", metavar="N")]
Shard = Annotated[Optional[str], typer.Option("--shard", help="Share the work: this is process I of N.", metavar="I/N")]
Orders = Annotated[
    Optional[str], typer.Option("--orders", help="Removal orders in the upstream file format.", metavar="FILE")
]
Out = Annotated[Optional[str], typer.Option("--out", "-o", help="Folder for everything written.", metavar="DIR")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and what is missing; touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results, warnings and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More details.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show versions and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: as JSON.", hidden=True)] = False,
) -> None:
    """Show versions or, with nothing else to do, help."""
    if version:
        from heatkv_cli.console import Console
        from heatkv_cli.results import environment

        made_with = environment()
        Console(as_json=as_json).result(made_with)
        if not as_json:
            sha = (made_with["git_sha"] or "no checkout")[:12] + ("+" if made_with["git_dirty"] else "")
            torch = made_with["packages"].get("torch", "missing")
            typer.echo(f"heatkv {__version__} ({sha}), python {made_with['python']}, torch {torch}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def calibrate(
    overrides: Overrides = None,
    model: Model = None,
    benchmark: Benchmark = None,
    out: Out = None,
    dry_run: DryRun = False,
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
    options = {"model": model, "benchmark": benchmark, "out": out}
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
    out: Out = None,
    dry_run: DryRun = False,
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

    Writes OUT/images/NAME/free/*.png and manifest.csv, batch by batch.
    """
    options = {"model": model, "method": method, "budget": budget, "benchmark": benchmark}
    options |= {"limit": limit, "shard": shard, "out": out}
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
    out: Out = None,
    dry_run: DryRun = False,
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
    options |= {"limit": limit, "shard": shard, "out": out}
    _stage("eval", overrides, options, dry_run, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)


@app.command("ls")
def list_group(
    what: Annotated[
        Optional[str], typer.Argument(metavar="[methods|models|benchmarks|metrics|experiments]", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List what there is to choose from.

    \b
    Examples:
      heatkv ls methods
      heatkv ls models --json
    """
    from heatkv_cli.config import GROUPS, catalogue
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard("heatkv ls") as outcome:
        known = [f"{group}s" for group in GROUPS]
        if what is not None and what not in known and f"{what}s" not in known:
            raise ConfigError(f"there is no list of '{what}'", did_you_mean(what, known))
        asked = known if what is None else [what if what in known else f"{what}s"]
        found = {name: catalogue(name[:-1]) for name in asked}
        for name, records in found.items():
            rows = [[record["name"], record["note"], record["paper"]] for record in records]
            console.table((name, "", "source"), rows)
        console.result(found)
    raise typer.Exit(outcome.code)


@app.command()
def doctor(
    overrides: Overrides = None, model: Model = None, out: Out = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Check the installation; every failing check prints its fix.

    \b
    Examples:
      heatkv doctor
      heatkv doctor --model infinity-2b
      heatkv doctor --json                                                # for a bug report
    """
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard("heatkv doctor") as outcome:
        from heatkv_cli import doctor as checks
        from heatkv_cli.config import compose

        plan = compose(overrides or [], command="doctor", options={"model": model, "out": out})
        report = checks.run(plan, console)
        console.result(report)
        outcome.code = 0 if report["status"] == "done" else SetupError.exit_code
    raise typer.Exit(outcome.code)


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
            from heatkv_cli.doctor import preview

            document = preview(plan, console)
            outcome.code = SetupError.exit_code if document["missing"] else 0
            console.result(document)
        else:
            ensure_writable(plan.first.out)
            document = _stage_function(command)(plan, console)
            following = console.following or _next_command(plan)
            about = {"status": "done", "command": plan.command_line, "seconds": round(console.elapsed, 3)}
            console.result({**about, **document, "next": following})
            if document.get("path") and Path(document["path"]).absolute() not in console.written:
                console.wrote(Path(document["path"]))
            if not console.following:
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
    else:
        from heatkv_cli.pipeline.evaluate import run
    return run


def _next_command(plan: Plan) -> str:
    model = "" if plan.first.model.name == "tiny" else f" model={plan.first.model.name}"
    if plan.command == "calibrate":
        return f"heatkv build-schedule{model} budget=0.1"
    if plan.command == "build-schedule":
        return f"heatkv eval{model} method={plan.first.method.name} budget={plan.first.budget or 0.1}"
    if plan.command == "generate":
        return plan.command_line.replace("heatkv generate", "heatkv eval", 1)
    return "heatkv ls experiments" if plan.experiment else "heatkv eval experiment=demo"


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    try:
        code = app(args=argv, prog_name="heatkv", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader has seen enough; nothing to complain about
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "heatkv"
        typer.echo(f"error: {error.format_message()}", err=True)
        typer.echo(f"fix: {path} -h lists the options; overrides have no dashes: key=value", err=True)
        return int(getattr(error, "exit_code", ConfigError.exit_code))
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `heatkv` command."""
    sys.exit(run())
