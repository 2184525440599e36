"""The commands about files: models, download."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from heatkv_cli.cli.app import command
from heatkv_cli.cli.options import Debug, DryRun, Json, Weights, complete
from heatkv_cli.errors import ConfigError, SetupError, did_you_mean

Name = Annotated[Optional[str], typer.Argument(metavar="[MODEL]", autocompletion=complete("model"), show_default=False)]


def _downloads(incomplete: str) -> list[str]:
    """Complete a model's name, or benchmark=NAME."""
    from heatkv_cli.config import choices

    words = [*choices("model"), *(f"benchmark={name}" for name in choices("benchmark"))]
    return [word for word in words if word.startswith(incomplete)]


@command()
def models(
    model: Name = None,
    weights: Weights = None,
    deep: Annotated[bool, typer.Option("--deep", help="Compare digests too: reads every file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show model files: present, missing or corrupt.

    Also size, licence and where to get them.

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


@command()
def download(
    what: Annotated[str, typer.Argument(metavar="MODEL|benchmark=NAME", autocompletion=_downloads, show_default=False)],
    weights: Weights = None,
    images: Annotated[
        bool, typer.Option("--images", help="Of a benchmark: also the images it is compared with (gigabytes).")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model's files or a benchmark's prompts.

    From the hub, and nothing else.

    \b
    Examples:
      heatkv download infinity-2b --dry-run                 # what, how large, from where
      heatkv download infinity-2b --weights ~/weights
      heatkv download infinity-2b                           # into the hub's cache (HF_HOME)
      heatkv download benchmark=hpsv2                       # into HEATKV_DATA, else ./data
      heatkv download benchmark=mjhq30k --images            # 3.6 GB more, to compare with

    An interrupted download goes on where it stopped.
    """
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, debug=debug)
    with console.guard(f"heatkv download {what}") as outcome:
        from heatkv_cli.config import compose
        from heatkv_cli.pipeline import files

        kind, _, name = what.rpartition("=")
        if kind not in ("", "model", "benchmark"):
            raise ConfigError(f"'{kind}' cannot be downloaded", did_you_mean(kind, ["model", "benchmark"]))
        if kind == "benchmark":
            if weights is not None:
                raise ConfigError("--weights is for the files of models", "prompts go to the folder HEATKV_DATA")
            run = compose([what], command="download").first
            report = files.download_benchmark(run, console, dry_run, images)
        else:
            if images:
                raise ConfigError("--images is for benchmarks", "leave it away, or: heatkv download benchmark=NAME")
            run = compose([], command="download", options={"model": name, "weights": weights}).first
            report = files.download(run, console, dry_run)
        console.result({"status": "planned" if dry_run else "done", **report})
        if not dry_run:
            console.next(f"heatkv doctor {what}" if kind == "benchmark" else f"heatkv models {name}")
    raise typer.Exit(outcome.code)
