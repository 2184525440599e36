"""The command for images that somebody else made: score."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from heatkv_cli import interrupts
from heatkv_cli.cli.app import command
from heatkv_cli.cli.options import Debug, Json, Out, Overrides, Quiet, Verbose, Weights
from heatkv_cli.errors import PartialResultError


@command()
def score(
    overrides: Overrides = None,
    images: Annotated[
        Path, typer.Option("--images", help="Folder of images.", metavar="DIR", show_default=False)
    ] = ...,  # type: ignore[assignment]
    reference: Annotated[
        Optional[Path],
        typer.Option("--reference", help="Images to compare with: of the same names, or a set.", metavar="DIR"),
    ] = None,
    prompts: Annotated[
        Optional[Path],
        typer.Option("--prompts", help="txt, jsonl or csv; ids are the names of images.", metavar="FILE"),
    ] = None,
    weights: Weights = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compute metrics of images that somebody else made.

    \b
    Examples:
      heatkv score --images theirs --reference full metric=psnr,ssim,lpips
      heatkv score --images theirs --prompts prompts.txt metric=clip_score
      heatkv score --images theirs metric=fid metric.fid.reference=photos            # a folder

    Image is compared with image by name (psnr, ssim, lpips), set with set whatever names and number (fid, ...). Images
    may lie in folders (GenEval's tree). Writes OUT/score/results.csv, one row per number, and prints a table.
    """
    from heatkv_cli.console import Console

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    paths = {"--images": images, "--reference": reference, "--prompts": prompts}
    words = [f"{key}={path}" for key, path in paths.items() if path is not None]
    with console.guard(shlex.join(["heatkv", "score", *words, *(overrides or [])])) as outcome:
        from heatkv_cli.config import compose
        from heatkv_cli.pipeline.score import Sources, command_line, run
        from heatkv_cli.results import ensure_writable

        plan = compose(overrides or [], command="score", options={"weights": weights, "out": out})
        sources = Sources(images, reference, prompts)
        outcome.again, outcome.folder = command_line(plan, sources), plan.first.out
        with interrupts.orderly():
            ensure_writable(plan.first.out)
            document = run(plan, console, sources)
            interrupts.check()
        console.result({"status": "done", "command": outcome.again, **document})
        outcome.code = PartialResultError.exit_code if document.get("incomplete") else 0
    raise typer.Exit(outcome.code)
