"""One metric over many images: batched, resumed at the image where it stopped, and never the end of the other metrics.

Used by `eval` (images of a run) and `score` (images of anybody). Scores and features are written batch by batch, as
rows and blocks, under a folder named after everything the number depends on. Images are loaded one batch at a time, so
memory does not grow with their number, but for about 1 kB of bookkeeping each.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from heatkv_cli.config import config_hash
from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, HeatKVError, SetupError
from heatkv_cli.metrics.base import Extractor, ImageMetric, Metric, Sample, Score, SetMetric, Value
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.scores import Features
from heatkv_cli.results import Fields, RunFolder

T = TypeVar("T")
Status = Literal["ok", "partial", "skipped", "failed"]

SCORE_FIELDS: Fields = {
    "image_id": str,
    "key": str,
    "prompt_id": str,
    "sample": int,
    "value": float | int | str,
    "stratum": str,
    "parts": dict,
    "note": str,
    "sha256_row": str,
    "status": str,
}
"""A line of a folder of scores; numbers that are not finite are texts."""
FEATURE_FIELDS: Fields = {"image_id": str, "key": str, "block": str, "place": int, "status": str}
"""A line of a folder of features: the file, and the row of it, that holds an image's features."""
_SIGNED = tuple(field for field in SCORE_FIELDS if field not in ("sha256_row", "status"))
"""Fields of a score that its digest covers: a row that somebody edited counts as not there."""
_BLOCK_NAME = re.compile(r"[0-9a-f]{16}\.npy")
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
    """The outcome of one metric.

    Attributes:
        values: headline first; none where the metric was skipped or failed.
        scores: scores of the images, for metrics that have them.
        status: ``ok``; ``partial``, some images could not be measured; ``skipped``, something is missing; ``failed``.
        reason: why it is not ok, with what to do.
        weights_sha256: digest of the metric's network, '' where it has none.
        elsewhere: the only thing that lacks is images that other shards make.
    """

    values: list[Value] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    status: Status = "ok"
    reason: str = ""
    weights_sha256: str = ""
    elsewhere: bool = False


class _MetricError(Exception):
    """A metric cannot be had; unlike a folder that cannot be written, this ends the one metric alone."""

    def __init__(self, status: Status, error: HeatKVError) -> None:
        super().__init__(f"{error.message}; {error.hint}" if error.hint else error.message)
        self.status: Status = status


def measure(
    metric: Metric,
    items: Sequence[Item],
    folder: Path,
    ui: Console,
    *,
    baseline: Sequence[Score] | None = None,
    reference: Callable[[SetMetric], Any] | None = None,
    shard: tuple[int, int] = (0, 1),
    bootstrap: Bootstrap = DEFAULT,
    asked: int | None = None,
) -> Measured:
    """Return the values of a metric; whatever it lacks is a status and a reason.

    Args:
        metric: the metric to measure.
        items: images in the order of their list.
        folder: folder that keeps scores and features of these images.
        ui: console that shows progress.
        baseline: scores of the run to compare with.
        reference: gives a set metric's reference its statistics.
        shard: (i, n) of this process.
        bootstrap: the run's way of drawing intervals.
        asked: number of images that were asked for; fewer make the values partial. None for those in `items`.

    Raises:
        ConfigError: the prompt list lacks what the metric needs, or an option of the metric makes no network.
        SetupError: the folder cannot be written.
    """
    metric = metric.writing_to(folder, shard)
    try:
        digest = _attempt(metric.digest)
        errors: dict[str, str] = {}
        if isinstance(metric, SetMetric):
            values = _values_of_set(metric, items, folder, ui, errors, reference, shard, bootstrap)
            return _of_all(_complete(metric, values, [], errors, digest), len(items), asked, shard)
        if not isinstance(metric, ImageMetric):
            raise TypeError(f"{type(metric).__name__} is neither an ImageMetric nor a SetMetric")
        if not items:
            raise _MetricError("skipped", SetupError("0 images", "make some, or ask for another shard"))
        place = folder / "scores" / f"{metric.spec.name}-{config_hash(_attempt(metric.identity))[:8]}"
        scores = _scores(metric, items, place, ui, errors, shard)
        values = _attempt(lambda: metric.summarise(scores, baseline, bootstrap)) if scores else []
        return _of_all(_complete(metric, values, scores, errors, digest), len(items), asked, shard)
    except _MetricError as error:
        return Measured(status=error.status, reason=str(error))


def _values_of_set(
    metric: SetMetric,
    items: Sequence[Item],
    folder: Path,
    ui: Console,
    errors: dict[str, str],
    reference: Callable[[SetMetric], Any] | None,
    shard: tuple[int, int],
    bootstrap: Bootstrap,
) -> list[Value]:
    _enough(metric, len(items), "images")
    statistics = statistics_of(metric, items, folder / "features", ui, errors, shard)
    _enough(metric, statistics.n, "images")
    target = None if metric.reference is None or reference is None else _attempt(lambda: reference(metric))
    if target is not None:
        _enough(metric, target.n, "reference images")
    return _attempt(lambda: metric.compute(statistics, target, bootstrap))


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
        hint = f"make more, or set metric.{metric.spec.name}.min_images={max(number, 2)}"
        raise _MetricError("skipped", SetupError(text, hint))


def _complete(
    metric: Metric, values: list[Value], scores: list[Score], errors: dict[str, str], digest: str
) -> Measured:
    """Return values with what they lack; each must have images, and be a number where the metric wants one."""
    for value in values:
        if not _is_number(metric, value.value) or value.n < 1:
            name = f"{metric.spec.name} {value.variant}".strip()
            raise _MetricError("failed", ArtifactError(f"{name} is {value.value} over {value.n} images"))
    if not errors:
        return Measured(values, scores, "ok" if values else "failed", "" if values else "no image was measured", digest)
    first = next(iter(errors.values()))
    reason = f"{len(errors)} images could not be measured, the first: {first}"
    return Measured(values, scores, "partial" if values else "failed", reason, digest)


def _of_all(measured: Measured, there: int, asked: int | None, shard: tuple[int, int]) -> Measured:
    """Return the outcome, partial where there are fewer images than were asked for."""
    if asked is None or there >= asked or measured.status not in ("ok", "partial"):
        return measured
    reason = f"{there} of {asked} images are there"
    whole = f"{reason}; {measured.reason}" if measured.reason else reason
    elsewhere = shard[1] > 1 and measured.status == "ok"
    return replace(measured, status="partial", reason=whole, elsewhere=elsewhere)


def _scores(
    metric: ImageMetric,
    items: Sequence[Item],
    place: Path,
    ui: Console,
    errors: dict[str, str],
    shard: tuple[int, int],
) -> list[Score]:
    with RunFolder(place, shard, SCORE_FIELDS) as folder:
        todo = [item for item in items if _score(folder, item) is None]
        for samples in _batches(metric.spec.name, metric.batch_size, todo, ui, errors):
            folder.append_batch(list(_score_rows(metric, samples, errors)), {})
        found = (_score(folder, item) for item in items if item.image_id not in errors)
        return [score for score in found if score is not None]


def _score_rows(
    metric: ImageMetric, samples: list[tuple[Item, Sample]], errors: dict[str, str]
) -> Iterator[dict[str, Any]]:
    for (item, _), score in _score_apart(metric, samples, errors):
        row = {
            "image_id": item.image_id,
            "key": item.key,
            "prompt_id": score.prompt_id,
            "sample": score.index,
            "value": _text_if_infinite(score.value),
            "stratum": score.stratum,
            "parts": {name: _text_if_infinite(value) for name, value in score.parts.items()},
            "note": score.note,
        }
        yield {**row, "sha256_row": _signature(row), "status": "ok"}


def _text_if_infinite(value: float) -> float | str:
    return float(value) if math.isfinite(value) else repr(float(value))


def _signature(row: Mapping[str, Any]) -> str:
    signed = json.dumps([row[field] for field in _SIGNED], sort_keys=True)
    return hashlib.sha256(signed.encode("utf-8", "surrogatepass")).hexdigest()


def _score_apart(
    metric: ImageMetric, samples: list[tuple[Item, Sample]], errors: dict[str, str]
) -> list[tuple[tuple[Item, Sample], Score]]:
    """Return the scores of a batch; where an image spoils it, those of each of the others."""
    try:
        scores = metric.score_batch([sample for _, sample in samples])
        for score in scores:
            if not _is_number(metric, score.value):
                raise ArtifactError(f"{metric.spec.name}: the number of prompt {score.prompt_id} is {score.value}")
        return list(zip(samples, scores, strict=True))
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


def _is_number(metric: Metric, value: float) -> bool:
    """Return whether a value is a number: not NaN, and infinite only where the metric says so."""
    return math.isfinite(value) or (metric.INFINITE and not math.isnan(value))


def _score(folder: RunFolder, item: Item) -> Score | None:
    """Return the score of an image as it was written; None where there is none, or where it was changed since."""
    row = folder.row(item.image_id)
    if row is None or row["key"] != item.key or row["sha256_row"] != _signature(row):
        return None
    parts = {name: float(value) for name, value in row["parts"].items()}
    return Score(row["prompt_id"], row["sample"], float(row["value"]), row["stratum"], parts, row["note"])


def _batches(
    label: str, size: int, todo: Sequence[Item], ui: Console, errors: dict[str, str]
) -> Iterator[list[tuple[Item, Sample]]]:
    """Load images batch by batch; those that cannot be read are errors."""
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
    """Return the statistics of the images, their features made or found.

    Args:
        metric: the metric that the statistics are for.
        items: the images.
        place: folder of features, one below it per extractor.
        ui: console that shows progress.
        errors: reason of each image that could not be read; added to.
        shard: (i, n) of this process.
    """
    extractor = metric.extractor
    place = place / f"{extractor.name}-{_attempt(extractor.digest)[:8]}"
    statistics = metric.statistics()
    with RunFolder(place, shard, FEATURE_FIELDS) as folder:
        blocks = _Blocks(folder)
        todo = [item for item in items if blocks.place(item) is None]
        for samples in _batches(extractor.name, metric.batch_size, todo, ui, errors):
            _append_features(folder, extractor, samples)
        for index, features in _features(_Blocks(folder), items):
            statistics.add(index, features)
    return statistics


def _append_features(folder: RunFolder, extractor: Extractor, samples: list[tuple[Item, Sample]]) -> None:
    pixels = [sample.image for _, sample in samples if sample.image is not None]
    features = _attempt(lambda: extractor(pixels))
    if not np.isfinite(features).all():
        raise _MetricError("failed", ArtifactError(f"{extractor.name} gives features that are not finite"))
    block = f"{config_hash({item.image_id: item.key for item, _ in samples})[:16]}.npy"
    buffer = io.BytesIO()
    np.save(buffer, features)
    rows = [
        {"image_id": item.image_id, "key": item.key, "block": block, "place": i, "status": "ok"}
        for i, (item, _) in enumerate(samples)
    ]
    folder.append_batch(rows, {block: buffer.getvalue()})


class _Blocks:
    """Features in a folder, one file of them in memory at a time. A file that cannot be read counts as not there."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._name, self._block = folder, "", np.empty((0, 0), np.float32)

    def place(self, item: Item) -> int | None:
        """Open the block of an image, and return its row there; None where there is none."""
        row = self._folder.row(item.image_id)
        if row is None or row["key"] != item.key or row["place"] < 0:
            return None
        if row["block"] != self._name:
            self._name, self._block = row["block"], self._read(row["block"])
        place: int = row["place"]
        return place if place < len(self._block) else None

    def row(self, place: int) -> Features:
        """Return the features at a row of the open block."""
        return self._block[place]

    def _read(self, name: str) -> Features:
        if _BLOCK_NAME.fullmatch(name):
            try:
                found = np.load(self._folder.path / name, allow_pickle=False)
            except Exception:  # readers raise whatever the bytes lead them to; then it is made again
                found = None
            whole = isinstance(found, np.ndarray) and found.ndim == 2 and found.dtype == np.float32
            if whole and np.isfinite(found).all():
                return found
        return np.empty((0, 0), np.float32)


def _features(blocks: _Blocks, items: Sequence[Item]) -> Iterator[tuple[list[int], Features]]:
    """Features in the order of the items, with their places in the list."""
    index: list[int] = []
    parts: list[Features] = []
    for i, item in enumerate(items):
        place = blocks.place(item)
        if place is None:
            continue
        index.append(i)
        parts.append(blocks.row(place))
        if len(index) == _ROWS:
            yield index, np.stack(parts)
            index, parts = [], []
    if index:
        yield index, np.stack(parts)


def metric_rows(metric: Metric, measured: Measured) -> Iterator[dict[str, Any]]:
    """Result columns of a metric: a row per value, or one that says why there is none."""
    spec = metric.spec
    common = {
        "metric": spec.name,
        "metric_version": spec.version,
        "metric_weights_sha256": measured.weights_sha256,
        "metric_settings": metric.settings(),
        "unit": spec.unit,
        "higher_is_better": spec.higher_is_better,
        "status": measured.status,
        "reason": measured.reason,
    }
    for value in measured.values:
        yield {
            **common,
            "variant": value.variant,
            "value": value.value,
            "stderr": value.stderr,
            "low": value.low,
            "high": value.high,
            "n": value.n,
            **value.extra,
        }
    if not measured.values:
        yield {**common, "variant": "", "n": 0}


def incomplete(measured: Sequence[tuple[str, dict[str, Measured]]], ui: Console) -> dict[str, Any]:
    """Say which metrics are not whole, each reason once; the entry of the report that says so too."""
    found = [
        {"run_id": run_id, "metric": name, "status": item.status, "reason": item.reason}
        for run_id, metrics in measured
        for name, item in metrics.items()
        if item.status != "ok" and not item.elsewhere
    ]
    for status, name, reason in dict.fromkeys((f["status"], f["metric"], f["reason"]) for f in found):
        ui.warn(f"{name} {status}: {reason}")
    return {"status": "partial", "incomplete": found} if found else {}
