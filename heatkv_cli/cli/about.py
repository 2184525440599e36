"""The commands that tell what there is: ls, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from heatkv_cli.cli.app import command
from heatkv_cli.cli.options import Debug, Json, Model, Out, Overrides, Weights
from heatkv_cli.errors import ConfigError, SetupError, did_you_mean

if TYPE_CHECKING:
    from heatkv_cli.console import Console


@command("ls")
def list_group(
    what: Annotated[
        Optional[str],
        typer.Argument(metavar="[methods|models|benchmarks|metrics|experiments|runs]", show_default=False),
    ] = None,
    out: Out = None,
    stale: Annotated[bool, typer.Option("--stale", help="Of runs: only those of other code than today's.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the stale runs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List what there is to choose from, or what was made.

    \b
    Examples:
      heatkv ls methods
      heatkv ls models --json
      heatkv ls runs                                        # below ./runs, or --out DIR
      heatkv ls runs --stale --remove                       # clears the images that earlier code made
    """
    from heatkv_cli.config import GROUPS, catalogue
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard("heatkv ls") as outcome:
        known = [f"{group}s" for group in GROUPS]
        if what == "runs":
            _runs(console, out, stale, remove)
            raise typer.Exit(0)
        if stale or remove or out is not None:
            raise ConfigError("--out, --stale and --remove are for runs", "heatkv ls runs --stale")
        if what is not None and what not in known and f"{what}s" not in known:
            raise ConfigError(f"there is no list of '{what}'", did_you_mean(what, [*known, "runs"]))
        asked = known if what is None else [what if what in known else f"{what}s"]
        found = {name: catalogue(name[:-1]) for name in asked}
        for name, records in found.items():
            sources = any(record["paper"] for record in records)
            rows = [[record["name"], record["note"], *([record["paper"]] if sources else [])] for record in records]
            console.table((name, "", *(["source"] if sources else [])), rows)
        console.result(found)
    raise typer.Exit(outcome.code)


def _runs(console: Console, out: str | None, stale: bool, remove: bool) -> None:
    from heatkv_cli.config import compose
    from heatkv_cli.pipeline.runs import list_runs

    folder = compose([], command="ls", options={"out": out}).first.out
    console.result({"status": "done", **list_runs(folder, console, stale=stale, remove=remove)})


@command()
def doctor(
    overrides: Overrides = None,
    model: Model = None,
    weights: Weights = None,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the installation; what fails prints its fix.

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

        plan = compose(overrides or [], command="doctor", options={"model": model, "weights": weights, "out": out})
        report = checks.run(plan, console)
        console.result(report)
        outcome.code = 0 if report["status"] == "done" else SetupError.exit_code
    raise typer.Exit(outcome.code)
