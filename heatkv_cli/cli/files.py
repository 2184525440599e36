"""The commands about model files: models, download."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from heatkv_cli.cli.app import app
from heatkv_cli.cli.options import Debug, DryRun, Json, Weights, complete
from heatkv_cli.errors import SetupError

Name = Annotated[Optional[str], typer.Argument(metavar="[MODEL]", autocompletion=complete("model"), show_default=False)]


@app.command()
def models(
    model: Name = None,
    weights: Weights = None,
    deep: Annotated[bool, typer.Option("--deep", help="Compare digests too: reads every file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show model files: size, licence, where to get them; present, missing or corrupt.

    \b
    Examples:
      heatkv models
      heatkv models infinity-2b --weights ~/weights         # exit code 3 if anything is missing or corrupt
      heatkv models infinity-2b --deep                      # also digests
    """
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard("heatkv models") as outcome:
        from heatkv_cli.config import choices, compose
        from heatkv_cli.pipeline.files import inventory

        names = choices("model") if model is None else [model]
        runs = [compose([], command="models", options={"model": name, "weights": weights}).first for name in names]
        report = inventory(runs, console, deep)
        if model is not None and not report["complete"]:
            outcome.code = SetupError.exit_code
            if any(record["urls"] for record in report["files"]):
                console.next(f"heatkv download {model}")
        console.result({"status": "done" if outcome.code == 0 else "incomplete", **report})
    raise typer.Exit(outcome.code)


@app.command()
def download(
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=complete("model"), show_default=False)],
    weights: Weights = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch the files of a model from the hub, and nothing else.

    \b
    Examples:
      heatkv download infinity-2b --dry-run                 # what, how large, from where
      heatkv download infinity-2b --weights ~/weights
      heatkv download infinity-2b                           # into the hub's cache (HF_HOME)

    An interrupted download goes on where it stopped.
    """
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard(f"heatkv download {model}") as outcome:
        from heatkv_cli.config import compose
        from heatkv_cli.pipeline import files

        run = compose([], command="download", options={"model": model, "weights": weights}).first
        report = files.download(run, console, dry_run)
        console.result({"status": "planned" if dry_run else "done", **report})
        if not dry_run:
            console.next(f"heatkv models {model}")
    raise typer.Exit(outcome.code)
