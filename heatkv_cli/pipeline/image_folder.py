"""Folders of images that somebody made: what is in them, reading it, and the statistics of a reference.

Used by `score`, and by `eval` where a metric compares with a folder.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pixels

from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.base import Image, Sample, SetMetric
from heatkv_cli.metrics.moments import Moments
from heatkv_cli.pipeline.measure import Item, read_gaussian, statistics_of
from heatkv_cli.results import read_csv, sha256_file, write_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def scan(folder: Path) -> dict[str, Path]:
    """Images below a folder by id, sorted: the id is the path below the folder without its ending.

    Raises:
        SetupError: there is no such folder, or no image in it.
        ArtifactError: two images have one id, or the images are of several runs.
    """
    if not folder.is_dir():
        raise SetupError(f"{folder} is not a folder", "name a folder of images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SetupError(f"{folder} holds no images", f"it should hold {', '.join(SUFFIXES)} files")
    _check_runs(folder, files)
    found: dict[str, Path] = {}
    for path in files:
        image_id = path.relative_to(folder).with_suffix("").as_posix()
        if image_id in found:
            raise ArtifactError(
                f"{folder}: two images are called {image_id}: {found[image_id].name} and {path.name}",
                "images are known by their names without the ending: remove one of them",
            )
        found[image_id] = path
    return found


def _check_runs(folder: Path, files: list[Path]) -> None:
    """A folder that `generate` wrote must be one run's, and hold nothing else."""
    parents = {path.parent for path in files}
    runs = sorted(parent for parent in parents if any(parent.glob("manifest*.csv")))
    if not runs:
        return
    if len(runs) > 1 or len(parents) > 1:
        names = ", ".join(str(parent.relative_to(folder)) for parent in sorted(parents)[:4])
        raise ArtifactError(f"{folder} holds the images of several runs: {names}", f"name one of them: {runs[0]}")
    known = {row.get("file", "") for manifest in runs[0].glob("manifest*.csv") for row in read_csv(manifest)}
    strangers = [path.name for path in files if path.name not in known]
    if strangers:
        raise ArtifactError(
            f"{runs[0]} holds {len(strangers)} images that are not in its manifest, the first: {strangers[0]}",
            "they are of another run: move them away",
        )


def read_image(path: Path) -> Image:
    """(H, W, 3) uint8 of an image file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        with Pixels.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise ArtifactError(
            f"cannot read {path}: {' '.join(str(error).split())}", "make the image again, or remove it"
        ) from error


def stamp(path: Path) -> str:
    """What changes when a file does, without reading it."""
    found = path.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"


def digest_of(files: Mapping[str, Path]) -> str:
    """sha256 of the ids and contents of images."""
    lines = (f"{image_id} {sha256_file(path)}\n" for image_id, path in files.items())
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode())
    return total.hexdigest()


def reference_of(path: Path, out: Path, ui: Console) -> Callable[[SetMetric], Any]:
    """Statistics of a reference for a set metric: of a folder of images, or from an npz file.

    A folder's features are kept below ``out/references``, under the sha256 of its images and the extractor (its mode
    and weights); its mean and covariance are written there too, as an npz file that serves as a reference by itself.

    Args:
        path: a folder, or an npz file with ``mu`` and ``sigma``.
        out: of the command.
        ui: for progress.
    """
    return partial(_reference, path, out, ui)


def _reference(path: Path, out: Path, ui: Console, metric: SetMetric) -> Any:
    empty = metric.statistics()
    if path.suffix == ".npz":
        if not isinstance(empty, Moments):
            raise ArtifactError(f"{metric.name} cannot compare with {path.name}: it needs the images", "name a folder")
        return read_gaussian(path)
    files = scan(path)
    place = out / "references" / digest_of(files)[:16]
    kept = place / f"{metric.extractor.name}-{metric.extractor.weights_sha256[:8]}.npz"
    if isinstance(empty, Moments) and kept.is_file():
        return read_gaussian(kept)
    errors: dict[str, str] = {}
    items = [Item(i, "", partial(_sample, i, file)) for i, file in files.items()]
    statistics = statistics_of(metric, items, place, ui, errors)
    if errors:
        first = next(iter(errors.values()))
        raise ArtifactError(
            f"{len(errors)} of the reference's images cannot be used, the first: {first}", "repair them"
        )
    if not isinstance(statistics, Moments):
        return statistics
    gaussian = statistics.gaussian()
    buffer = io.BytesIO()
    np.savez(buffer, mu=gaussian.mu, sigma=gaussian.sigma, n=np.array(gaussian.n))
    write_file(kept, buffer.getvalue())
    return gaussian


def _sample(image_id: str, path: Path) -> Sample:
    return Sample(image_id, image=read_image(path))
