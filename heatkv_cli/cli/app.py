"""The Typer app, its help, and how it ends; the commands are in the modules beside this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from heatkv_cli import __version__
from heatkv_cli.errors import EXIT_CODES, ConfigError
from heatkv_cli.interrupts import INTERRUPTED

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
_HELP = """KV-cache compression for visual autoregressive image models, measured in bytes that are really freed.

\b
Examples:
  heatkv eval experiment=demo                                   # five methods, three budgets, a few minutes on a CPU
  heatkv eval method=heatkv budget=0.15                         # runs every missing stage first
  heatkv eval method=full,streaming,heatkv budget=0.2,0.1,0.04  # a comma list is a sweep
  heatkv build-schedule model=infinity-2b budget=0.1 --orders infinity-2b.json
  heatkv ls methods
  heatkv models                                                 # which model files are there
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


class Command(TyperCommand):
    """A command that refuses an option which is given twice, as it refuses a key: nobody can tell which is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; a usage error names an option with several values."""
        if not ctx.resilient_parsing:
            order = self.make_parser(ctx).parse_args(args=list(args))[2]
            for option in order:
                if order.count(option) > 1 and not getattr(option, "is_flag", True):
                    ctx.fail(f"{option.opts[0]} is given twice: keep one of them")
        return super().parse_args(ctx, args)


command = partial(app.command, cls=Command)
"""Registers a command; every module of commands uses it."""


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


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    try:
        code = app(args=argv, prog_name="heatkv", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage(error, sys.argv[1:] if argv is None else argv)
    return code if isinstance(code, int) else 0


_KEYS = {
    "seed": "seed=0",
    "device": "runtime=gpu, or runtime=cpu",
    "gpu": "runtime=gpu",
    "metric": "metric=kl,psnr",
    "metrics": "metric=kl,psnr",
    "prompts": "benchmark=prompts benchmark.file=FILE",
    "prompt": "benchmark=prompts benchmark.file=FILE",
    "rho": "rho=0.7",
    "batch-size": "runtime.batch_size=8",
    "threads": "runtime.threads=2",
    "resolution": "resolution=1M",
    "experiment": "experiment=demo",
    "schedule": "schedule=FILE",
    "calibration": "calibration=FILE",
    "memory": "memory=24GiB",
}
"""Keys that people take for options, and how they are written."""


def _usage(error: Any, argv: Sequence[str]) -> int:
    """Say what is wrong with the words of a command line."""
    from heatkv_cli.console import Console
    from heatkv_cli.errors import HeatKVError

    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "heatkv"
    option = str(getattr(error, "option_name", "")).lstrip("-")
    fix = f"{path} -h lists the options; overrides have no dashes: key=value"
    if option in _KEYS:
        fix = f"it is an override, without dashes: {_KEYS[option]}"
    code = int(getattr(error, "exit_code", ConfigError.exit_code))
    console = Console(as_json="--json" in argv)
    console.error(HeatKVError(error.format_message(), fix))
    errors = [{"error": error.format_message(), "fix": fix}]
    console.failed(code, errors)
    return code
