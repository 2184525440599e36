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
from numpy.typing import NDArray

from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.base import Sample, SetMetric
from heatkv_cli.metrics.pictures import irregular, printable, read_image
from heatkv_cli.metrics.statistics import Gaussian, Moments
from heatkv_cli.pipeline.measure import Item, statistics_of
from heatkv_cli.results import RunFolder, sha256_file, write_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def scan(folder: Path) -> dict[str, Path]:
    """Return the images below a folder by id, sorted; the id is the printable path below it without the ending.

    A thing with the name of an image that is none (a pipe, a broken link, a folder) is found too: reading it says so.

    Raises:
        SetupError: there is no such folder, or no image in it.
        ArtifactError: two images have one id, or the images are of several runs.
    """
    if not folder.is_dir():
        raise SetupError(f"{printable(folder)} is not a folder", "name a folder of images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SetupError(f"{printable(folder)} holds no images", f"it should hold {', '.join(SUFFIXES)} files")
    _check_runs(folder, files)
    found: dict[str, Path] = {}
    for path in files:
        image_id = printable(path.relative_to(folder).with_suffix("").as_posix())
        if image_id in found:
            names = f"{printable(found[image_id].name)} and {printable(path.name)}"
            raise ArtifactError(
                f"{printable(folder)}: two images are called {image_id}: {names}",
                "images are known by their names without the ending: remove one of them",
            )
        found[image_id] = path
    return found


def _check_runs(folder: Path, files: list[Path]) -> None:
    """Check that a folder that `generate` wrote is one run's, and holds nothing else."""
    parents = {path.parent for path in files}
    runs = sorted(parent for parent in parents if any(not irregular(path) for path in parent.glob("manifest*.jsonl")))
    if not runs:
        return
    if len(runs) > 1 or len(parents) > 1:
        names = ", ".join(printable(parent.relative_to(folder)) for parent in sorted(parents)[:4])
        raise ArtifactError(
            f"{printable(folder)} holds the images of several runs: {names}", f"name one of them: {printable(runs[0])}"
        )
    known = {row["file"] for row in RunFolder.reading(runs[0]).listed()}
    strangers = [printable(path.name) for path in files if path.name not in known]
    if strangers:
        raise ArtifactError(
            f"{printable(runs[0])} holds {len(strangers)} images that are not in its manifest, the first: "
            f"{strangers[0]}",
            "they are of another run: move them away",
        )


def stamp(path: Path) -> str:
    """Return what changes when a file does, without reading it; of what is no file, what it is."""
    if wrong := irregular(path):
        return wrong
    found = path.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"


def digest_of(files: Mapping[str, Path]) -> str:
    """Return the sha256 of the ids and contents of images.

    Raises:
        SetupError: one of them is no regular file.
    """
    total = hashlib.sha256()
    for image_id, path in files.items():
        if wrong := irregular(path):
            raise SetupError(f"{printable(path)} is no picture: {wrong}", "move it out of the folder of references")
        total.update(f"{image_id} {sha256_file(path)}\n".encode())
    return total.hexdigest()


def reference_of(path: Path, out: Path, ui: Console) -> Callable[[SetMetric], Any]:
    """Return what gives a set metric the statistics of a reference: a folder of images, or an npz file.

    A folder's features are kept below ``out/references``, under the sha256 of its images and the extractor (its mode
    and weights); its mean and covariance are written there too, as an npz file that serves as a reference by itself.

    Args:
        path: a folder, or an npz file with ``mu`` and ``sigma``.
        out: the command's folder.
        ui: console that shows progress.
    """
    return partial(_reference, path, out, ui)


def _reference(path: Path, out: Path, ui: Console, metric: SetMetric) -> Any:
    empty = metric.statistics()
    if path.suffix == ".npz":
        if not isinstance(empty, Moments):
            name = metric.spec.name
            raise ArtifactError(f"{name} cannot compare with {path.name}: it needs the images", "name a folder")
        return read_gaussian(path)
    files = scan(path)
    place = out / "references" / digest_of(files)[:16]
    kept = place / f"{metric.extractor.name}-{metric.extractor.digest()[:8]}.npz"
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


def read_gaussian(path: Path) -> Gaussian:
    """Return mean and covariance of a reference: an npz file with ``mu`` and ``sigma``, as ADM and clean-fid have it.

    Raises:
        ArtifactError: it cannot be read, or holds something else than a mean and a covariance.
    """
    if wrong := irregular(path):
        raise ArtifactError(f"cannot read {printable(path)}: {wrong}", _ANOTHER)
    try:
        with np.load(path, allow_pickle=False) as stored:
            mu, sigma, n = stored["mu"], stored["sigma"], stored["n"] if "n" in stored else np.array(0)
    except MemoryError:
        raise
    except Exception as error:  # readers raise whatever the bytes lead them to
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise ArtifactError(f"{printable(path)} holds no 'mu' and 'sigma': {reason}", _ANOTHER) from error
    if wrong := _no_gaussian(mu, sigma, n):
        raise ArtifactError(f"{printable(path)}: {wrong}", _ANOTHER)
    rounded = float(np.finfo(sigma.dtype).eps * np.linalg.norm(sigma.astype(np.float64)))
    mean_rounded = float(np.finfo(mu.dtype).eps * np.linalg.norm(mu.astype(np.float64)))
    sigma = sigma.astype(np.float64)
    return Gaussian(mu.astype(np.float64), (sigma + sigma.T) / 2, int(n), rounded, mean_rounded)


_ANOTHER = "name another reference: a folder of images, or an npz file with mu (d,) and sigma (d, d)"
_ASYMMETRY = 1e-4
"""Largest asymmetry of a covariance, as a share of its largest entry; sums in float32 leave 1e-5."""


def _no_gaussian(mu: NDArray[Any], sigma: NDArray[Any], n: NDArray[Any]) -> str:
    """'' where arrays are a mean, a covariance and a number of images, else what is wrong with them."""
    if not all(isinstance(each, np.ndarray) and each.dtype.kind == "f" for each in (mu, sigma)):
        return "'mu' and 'sigma' are no floating-point numbers"
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        return f"'mu' has shape {mu.shape} and 'sigma' {sigma.shape}, expected (d,) and (d, d)"
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "'mu' or 'sigma' holds numbers that are not finite"
    if (variances := sigma.diagonal()).min() < 0:
        return f"'sigma' has the variance {variances.min():g}"
    if np.abs(sigma - sigma.T).max() > _ASYMMETRY * np.abs(sigma).max():
        return "'sigma' is not symmetric"
    if n.shape != () or n.dtype.kind not in "iuf" or not np.isfinite(n) or n != np.floor(n) or n < 0:
        return f"'n' is {n.tolist()!r}, not a number of images"
    return ""
