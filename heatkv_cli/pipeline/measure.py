"""One metric over many images: batched, resumed at the image where it stopped, and never the end of the other metrics.

Used by `eval` (images of a run) and `score` (images of anybody). What is known of an image is written batch by batch
under a folder named after everything the number depends on: scores as rows, features as blocks. Images are loaded one
batch at a time, so memory does not grow with their number, but for about 1 kB of bookkeeping each.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from heatkv_cli.config import MetricConfig, config_hash
from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, HeatKVError, SetupError
from heatkv_cli.metrics.base import (
    Extractor,
    Features,
    ImageMetric,
    Metric,
    Sample,
    Score,
    SetMetric,
    Value,
    score_batch,
)
from heatkv_cli.metrics.geneval import GenEval
from heatkv_cli.metrics.moments import Gaussian
from heatkv_cli.results import RunFolder

T = TypeVar("T")
Status = Literal["ok", "partial", "skipped", "failed"]

SCORE_ROWS = ("image_id", "key", "prompt_id", "sample", "value", "stratum", "parts_json", "note", "status")
FEATURE_ROWS = ("image_id", "key", "block", "place", "status")
_NOT_IN_SCORES = {
    "resamples", "confidence", "seed", "batch_size", "device", "timeout", "python", "detections",
    "weights", "detector_weights", "clip_weights", "vocabulary", "med_config",
}  # fmt: skip
"""Parameters that change intervals, speed or places, but no image's number (weights count by their digest)."""
_ROWS = 1024
"""Features handed to the statistics at once."""


@dataclass(frozen=True)
class Item:
    """One image to measure.

    Attributes:
        image_id: unique among the images.
        key: changes whenever the image, its reference or its prompt does.
        load: reads it; raises ArtifactError where it cannot be read.
    """

    image_id: str
    key: str
    load: Callable[[], Sample]


@dataclass(frozen=True)
class Measured:
    """What came out of one metric.

    Attributes:
        values: headline first; none where the metric was skipped or failed.
        scores: of the images, for metrics that have them.
        status: ``ok``; ``partial``, some images could not be measured; ``skipped``, something is missing; ``failed``.
        reason: why it is not ok, with what to do.
        weights_sha256: of the metric's network, '' where it has none.
    """

    values: list[Value] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    status: Status = "ok"
    reason: str = ""
    weights_sha256: str = ""


class _MetricError(Exception):
    """A metric cannot be had; unlike a folder that cannot be written, this ends the one metric alone."""

    def __init__(self, status: Status, error: HeatKVError) -> None:
        super().__init__(f"{error.message}; {error.hint}" if error.hint else error.message)
        self.status: Status = status


def measure(
    metric: Metric,
    config: MetricConfig,
    items: Sequence[Item],
    folder: Path,
    ui: Console,
    *,
    baseline: Sequence[Score] | None = None,
    reference: Callable[[SetMetric], Any] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Measured:
    """Values of a metric; whatever it lacks is a status and a reason.

    Args:
        metric, config: the object and what it was built from.
        items: images in the order of their list.
        folder: where scores and features of these images are kept.
        ui: for progress.
        baseline: scores of the run to compare with.
        reference: gives a set metric's reference its statistics.
        shard: of this process.

    Raises:
        ConfigError: the prompt list lacks what the metric needs.
        SetupError: the folder cannot be written.
    """
    if isinstance(metric, GenEval):
        metric = metric.writing_to(folder / "detections" / f"{shard[0]}-of-{shard[1]}.jsonl")
    try:
        digest = _attempt(lambda: str(getattr(metric, "weights_sha256", "")))
        errors: dict[str, str] = {}
        if isinstance(metric, SetMetric):
            _enough(metric, len(items), "images")
            statistics = statistics_of(metric, items, folder / "features", ui, errors, shard)
            _enough(metric, statistics.n, "images")
            target = () if metric.reference is None or reference is None else (_attempt(lambda: reference(metric)),)
            for side in target:
                _enough(metric, side.n, "reference images")
            return _complete(_attempt(lambda: metric.compute(statistics, *target)), [], errors, digest)
        if not items:
            raise _MetricError("skipped", SetupError("0 images", "make some, or ask for another shard"))
        identity = {k: v for k, v in config.params.items() if k not in _NOT_IN_SCORES}
        identity = {"target": config.target, "params": identity, "version": metric.version, "weights": digest}
        place = folder / "scores" / f"{metric.name}-{config_hash(identity)[:8]}"
        scores = _scores(metric, items, place, ui, errors, shard)
        return _complete(metric.summarise(scores, baseline) if scores else [], scores, errors, digest)
    except _MetricError as error:
        return Measured(status=error.status, reason=str(error))


def _attempt(action: Callable[[], T]) -> T:
    """Call into a metric; what it lacks skips it, what is wrong with its files fails it."""
    try:
        return action()
    except SetupError as error:
        raise _MetricError("skipped", error) from error
    except ArtifactError as error:
        raise _MetricError("failed", error) from error
    except ValueError as error:  # too few images for the formula itself
        raise _MetricError("skipped", HeatKVError(str(error))) from error


def _enough(metric: SetMetric, number: int, what: str) -> None:
    """Skip a metric with too few images; 0 in a reference is a file that does not tell."""
    if number < metric.min_images and (number or what == "images"):
        text = f"{number} {what}, at least {metric.min_images} are needed"
        hint = f"make more, or set metric.{metric.name}.min_images={max(number, 2)}"
        raise _MetricError("skipped", SetupError(text, hint))


def _complete(values: list[Value], scores: list[Score], errors: dict[str, str], digest: str) -> Measured:
    if not errors:
        return Measured(values, scores, weights_sha256=digest)
    first = next(iter(errors.values()))
    reason = f"{len(errors)} images could not be measured, the first: {first}"
    return Measured(values, scores, "partial" if values else "failed", reason, digest)


def _scores(
    metric: ImageMetric,
    items: Sequence[Item],
    place: Path,
    ui: Console,
    errors: dict[str, str],
    shard: tuple[int, int],
) -> list[Score]:
    with RunFolder(place, shard, SCORE_ROWS) as folder:
        for samples in _new_batches(folder, metric.name, getattr(metric, "batch_size", 1), items, ui, errors):
            folder.append_batch(list(_score_rows(metric, samples, errors)), {})
        rows = [folder.row(item.image_id) for item in items if item.image_id not in errors]
        return [_score(row) for row in rows if row is not None]


def _score_rows(
    metric: ImageMetric, samples: list[tuple[Item, Sample]], errors: dict[str, str]
) -> Iterator[dict[str, Any]]:
    for (item, _), score in _score_apart(metric, samples, errors):
        yield {
            "image_id": item.image_id, "key": item.key, "prompt_id": score.prompt_id, "sample": score.index,
            "value": score.value, "stratum": score.stratum, "parts_json": json.dumps(dict(score.parts)),
            "note": score.note, "status": "ok",
        }  # fmt: skip


def _score_apart(
    metric: ImageMetric, samples: list[tuple[Item, Sample]], errors: dict[str, str]
) -> list[tuple[tuple[Item, Sample], Score]]:
    """Scores of a batch; where an image spoils it, of each of the others."""
    try:
        return list(zip(samples, score_batch(metric, [sample for _, sample in samples]), strict=True))
    except SetupError as error:
        raise _MetricError("skipped", error) from error
    except ArtifactError as error:
        if len(samples) == 1:
            errors[samples[0][0].image_id] = error.message
            return []
    found = [pair for one in samples for pair in _score_apart(metric, [one], errors)]
    reasons = {errors[item.image_id] for item, _ in samples if item.image_id in errors}
    if not found and len(reasons) == 1:  # not the images: the weights, say
        raise _MetricError("failed", ArtifactError(reasons.pop()))
    return found


def _score(row: dict[str, str]) -> Score:
    parts = json.loads(row["parts_json"])
    return Score(row["prompt_id"], int(row["sample"]), float(row["value"]), row["stratum"], parts, row["note"])


def _new_batches(
    folder: RunFolder, label: str, size: int, items: Sequence[Item], ui: Console, errors: dict[str, str]
) -> Iterator[list[tuple[Item, Sample]]]:
    """Load what is not in the folder yet, batch by batch."""
    todo = [i for i in items if (row := folder.row(i.image_id)) is None or row["key"] != i.key]
    with ui.progress(label, len(todo), "img") as progress:
        for start in range(0, len(todo), size):
            batch, loaded = todo[start : start + size], []
            for item in batch:
                try:
                    loaded.append((item, item.load()))
                except ArtifactError as error:
                    errors[item.image_id] = error.message
            if loaded:
                yield loaded
            progress.advance(len(batch))


def statistics_of(
    metric: SetMetric,
    items: Sequence[Item],
    place: Path,
    ui: Console,
    errors: dict[str, str],
    shard: tuple[int, int] = (0, 1),
) -> Any:
    """Statistics of the images, their features made or found.

    Args:
        metric: whose.
        items: the images.
        place: folder of features, one below it per extractor.
        ui: for progress.
        errors: what could not be read is added here, by image.
        shard: of this process.
    """
    extractor = metric.extractor
    place = place / f"{extractor.name}-{_attempt(lambda: extractor.weights_sha256)[:8]}"
    size = int(getattr(metric, "batch_size", 32))
    statistics = metric.statistics()
    with RunFolder(place, shard, FEATURE_ROWS) as folder:
        for samples in _new_batches(folder, extractor.name, size, items, ui, errors):
            _append_features(folder, extractor, samples)
        for index, features in _blocks(folder, items):
            statistics.add(index, features)
    return statistics


def _append_features(folder: RunFolder, extractor: Extractor, samples: list[tuple[Item, Sample]]) -> None:
    pixels = [sample.image for _, sample in samples if sample.image is not None]
    features = _attempt(lambda: extractor(pixels))
    block = f"{config_hash({item.image_id: item.key for item, _ in samples})[:16]}.npy"
    buffer = io.BytesIO()
    np.save(buffer, features)
    rows = [
        {"image_id": item.image_id, "key": item.key, "block": block, "place": i, "status": "ok"}
        for i, (item, _) in enumerate(samples)
    ]
    folder.append_batch(rows, {block: buffer.getvalue()})


def _blocks(folder: RunFolder, items: Sequence[Item]) -> Iterator[tuple[list[int], Features]]:
    """Features in the order of the items, with their places in the list; one file open at a time."""
    index: list[int] = []
    parts: list[Features] = []
    name, block = "", np.empty((0, 0), np.float32)
    for i, item in enumerate(items):
        row = folder.row(item.image_id)
        if row is None or row["key"] != item.key:
            continue
        if row["block"] != name:
            name, block = row["block"], np.load(folder.path / row["block"], allow_pickle=False)
        index.append(i)
        parts.append(block[int(row["place"])])
        if len(index) == _ROWS:
            yield index, np.stack(parts)
            index, parts = [], []
    if index:
        yield index, np.stack(parts)


def read_gaussian(path: Path) -> Gaussian:
    """Mean and covariance of a reference, from an npz file with ``mu`` and ``sigma`` (also ADM's and clean-fid's).

    Raises:
        ArtifactError: it cannot be read, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            n = int(stored["n"]) if "n" in stored else 0
            return Gaussian(stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64), n)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} holds no 'mu' and 'sigma': {error}", "name another reference") from error


def metric_rows(metric: Metric, measured: Measured) -> Iterator[dict[str, Any]]:
    """Result columns of a metric: a row per value, or one that says why there is none."""
    common = {
        "metric": metric.name, "metric_version": metric.version, "metric_weights_sha256": measured.weights_sha256,
        "metric_settings": getattr(metric, "settings", ""), "unit": metric.unit,
        "higher_is_better": metric.higher_is_better, "status": measured.status, "reason": measured.reason,
    }  # fmt: skip
    for value in measured.values:
        yield {
            **common, "variant": value.variant, "value": value.value, "stderr": value.stderr, "low": value.low,
            "high": value.high, "n": value.n, **value.extra,
        }  # fmt: skip
    if not measured.values:
        yield {**common, "variant": "", "n": 0}


def incomplete(measured: Sequence[tuple[str, dict[str, Measured]]], ui: Console) -> dict[str, Any]:
    """Say which metrics are not whole, each reason once; the entry of the report that says so too."""
    found = [
        {"run_id": run_id, "metric": name, "status": item.status, "reason": item.reason}
        for run_id, metrics in measured
        for name, item in metrics.items()
        if item.status != "ok"
    ]
    for status, name, reason in dict.fromkeys((f["status"], f["metric"], f["reason"]) for f in found):
        ui.warn(f"{name} {status}: {reason}")
    return {"status": "partial", "incomplete": found} if found else {}
