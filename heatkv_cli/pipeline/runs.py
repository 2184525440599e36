"""The runs below a folder, and whether other code than today's made them (`heatkv ls runs`)."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heatkv_cli.console import Console, size_text
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.results import read_meta
from heatkv_cli.results.code import run_code_sha256


@dataclass(frozen=True)
class Made:
    """A run's folder.

    Args:
        run_id: its name.
        path: its folder.
        created: when it was begun, UTC.
        images: pictures in it.
        bytes: size of all its files.
        stale: whether other code than today's made it, or its record cannot be read.
    """

    run_id: str
    path: str
    created: str
    images: int
    bytes: int
    stale: bool


def list_runs(out: Path, ui: Console, *, stale: bool, remove: bool) -> dict[str, Any]:
    """Print the runs below a folder; with `remove` delete the stale ones.

    Args:
        out: the folder that commands were given with --out.
        ui: console that shows the table.
        stale: only runs of other code.
        remove: delete them.

    Raises:
        ConfigError: everything would be removed.
        SetupError: a folder cannot be removed.
    """
    if remove and not stale:
        raise ConfigError("--remove without --stale would remove every run", "add --stale")
    found = [_made(folder) for folder in sorted((out / "images").glob("*")) if folder.is_dir()]
    found = [made for made in found if made.stale or not stale]
    rows = [
        [made.run_id, made.created, made.images, size_text(made.bytes), "stale" if made.stale else "current"]
        for made in found
    ]
    ui.table(("run", "created", "images", "size", "code"), rows)
    if remove:
        for made in found:
            _remove(Path(made.path))
        ui.say(f"removed {len(found)} runs, {size_text(sum(made.bytes for made in found))}")
    return {"runs": [asdict(made) for made in found], "removed": len(found) if remove else 0}


def _made(folder: Path) -> Made:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    try:
        meta = read_meta(folder) or {}
        config = meta["config"]
        code = run_code_sha256(config["method"]["target"], config["model"]["target"])
        stale = meta.get("code_sha256") != code
    except (ArtifactError, ConfigError, KeyError, TypeError):
        meta, stale = {}, True
    return Made(
        folder.name,
        str(folder.absolute()),
        str(meta.get("created_utc", "")),
        sum(path.suffix == ".png" and path.parent.name == "free" for path in files),
        sum(path.stat().st_size for path in files),
        stale,
    )


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise SetupError(f"cannot remove {folder}: {error.strerror or error}", "remove it by hand") from error
