"""Bootstrap intervals over prompts: deterministic, vectorised, shared by all metrics.

Rule: values of one group (the samples of one prompt) are drawn together, since they are not independent; groups are
drawn with replacement within their stratum (a task). The statistic is the unweighted mean over strata of the mean over
values. Intervals are percentile intervals.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.metrics.bootstrap import DEFAULT, Bootstrap
from heatkv_cli.metrics.scores import Interval, Score, Value

_CHUNK = 1 << 22
"""Draws held in memory at once (32 MB of indices)."""


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.floating],
    groups: Sequence[Hashable] | None = None,
    *,
    strata: Sequence[Hashable] | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> Interval:
    """Return the mean of ``values`` with a bootstrap interval.

    Args:
        values: finite numbers, one per image.
        groups: per value the label of what was drawn independently (its prompt's id); None makes every value its own
            group. Equal labels in different strata are different groups.
        strata: per value the label of the set to resample within (its task); None is one stratum.
        bootstrap: number, confidence and seed of the draws.

    Raises:
        ValueError: no values, values that are not finite, or lengths that differ.
    """
    data = np.asarray(values, dtype=np.float64)
    groups = list(range(len(data))) if groups is None else list(groups)
    strata = [None] * len(data) if strata is None else list(strata)
    _check(data, groups, strata)
    rng = np.random.default_rng(bootstrap.seed)
    means: list[float] = []
    draws = np.zeros(bootstrap.resamples)
    enough = True
    for stratum in dict.fromkeys(strata):
        index = [i for i, s in enumerate(strata) if s == stratum]
        sums, counts = _group_sums(data[index], [groups[i] for i in index])
        means.append(float(sums.sum() / counts.sum()))
        enough = enough and len(sums) > 1
        if enough:
            draws += _resampled_means(sums, counts, bootstrap.resamples, rng)
    mean = math.fsum(means) / len(means)
    if not enough:
        return Interval(mean, math.nan, math.nan, math.nan, len(data))
    draws /= len(means)
    low, high = np.quantile(draws, bootstrap.tails)
    return Interval(mean, float(draws.std(ddof=1)), float(low), float(high), len(data))


def paired_interval(
    a: Sequence[float] | NDArray[np.floating],
    b: Sequence[float] | NDArray[np.floating],
    groups: Sequence[Hashable] | None = None,
    *,
    strata: Sequence[Hashable] | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> Interval:
    """Return the interval of the mean difference ``a - b``; the arguments are those of ``bootstrap_interval``.

    Raises:
        ValueError: as ``bootstrap_interval``, and if ``a`` and ``b`` differ in length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values differ in number: {len(first)} and {len(second)}")
    return bootstrap_interval(first - second, groups, strata=strata, bootstrap=bootstrap)


def crossed_interval(differences: NDArray[np.floating], *, bootstrap: Bootstrap = DEFAULT) -> Interval:
    """Return the mean of paired differences of one method against several seeds of another, resampling both.

    Prompts and seeds are crossed: every seed saw every prompt. Each bootstrap repetition draws prompts and, on its own,
    seeds with replacement; so the interval covers other prompts as well as other seeds.

    Args:
        differences: (seeds, prompts); nan where a pair has no difference (identical images).
        bootstrap: number, confidence and seed of the draws.

    Raises:
        ValueError: fewer than two prompts or seeds, or a prompt or seed without any difference.
    """
    data = np.asarray(differences, dtype=np.float64)
    valid = np.isfinite(data)
    if data.ndim != 2 or min(data.shape) < 2 or not (valid.any(0).all() and valid.any(1).all()):
        raise ValueError(f"expected (seeds, prompts) with at least two of each, got {data.shape}")
    rng = np.random.default_rng(bootstrap.seed)
    drawn = []
    for number in data.shape:
        drawn.append(rng.multinomial(number, [1 / number] * number, size=bootstrap.resamples).astype(np.float64))
    seeds, prompts = drawn
    sums = ((seeds @ np.where(valid, data, 0.0)) * prompts).sum(1)
    counts = ((seeds @ valid.astype(np.float64)) * prompts).sum(1)
    draws = sums / counts
    low, high = np.quantile(draws, bootstrap.tails)
    return Interval(float(data[valid].mean()), float(draws.std(ddof=1)), float(low), float(high), int(valid.sum()))


def _check(data: NDArray[np.float64], groups: Sequence[Hashable], strata: Sequence[Hashable]) -> None:
    if data.ndim != 1 or len(data) == 0:
        raise ValueError(f"expected a non-empty list of values, got shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("values must be finite")
    if not len(groups) == len(strata) == len(data):
        raise ValueError(f"{len(data)} values, {len(groups)} groups, {len(strata)} strata")


def _group_sums(data: NDArray[np.float64], groups: Sequence[Hashable]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return sum and number of the values of each group, in order of first appearance."""
    order: dict[Hashable, int] = {}
    codes = np.array([order.setdefault(group, len(order)) for group in groups])
    sums = np.bincount(codes, weights=data, minlength=len(order)).astype(np.float64)
    return sums, np.bincount(codes, minlength=len(order)).astype(np.int64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return (resamples,) means, each of as many groups drawn with replacement."""
    n = len(sums)
    rows = max(1, _CHUNK // n)
    out = np.empty(resamples)
    for start in range(0, resamples, rows):
        index = rng.integers(0, n, size=(min(rows, resamples - start), n))
        out[start : start + len(index)] = sums[index].sum(1) / counts[index].sum(1)
    return out


# ------------------------------------------------------------------------------------------ scores of images to rows


def mean_value(
    variant: str,
    scores: Sequence[Score],
    baseline: Sequence[Score] | None,
    bootstrap: Bootstrap,
    *,
    stratified: bool = False,
    extra: Mapping[str, float] | None = None,
) -> Value:
    """Return the mean of ``scores`` as a row, with the paired difference to ``baseline`` in ``extra``.

    Args:
        variant: variant of the row.
        scores: scores of the run, at least one, all finite.
        baseline: scores of the run to compare with; None where there is none.
        bootstrap: draws of both intervals, over prompts.
        stratified: take the unweighted mean over strata and resample prompts within them; else the mean over images.
        extra: further numbers.

    Raises:
        ValueError: no scores.
    """
    interval = bootstrap_interval(
        [s.value for s in scores],
        [s.prompt_id for s in scores],
        strata=[s.stratum for s in scores] if stratified else None,
        bootstrap=bootstrap,
    )
    difference = paired_difference(scores, baseline, bootstrap, stratified=stratified)
    return Value.of(variant, interval, {**(extra or {}), **difference})


def by_stratum(
    scores: Sequence[Score], baseline: Sequence[Score] | None, bootstrap: Bootstrap, order: Sequence[str] = ()
) -> list[Value]:
    """Return a row per stratum that occurs, those named in ``order`` first; none where images have no strata."""
    present = {s.stratum for s in scores} - {""}
    names = [name for name in order if name in present] + sorted(present - set(order))
    return [mean_value(name, [s for s in scores if s.stratum == name], baseline, bootstrap) for name in names]


def paired_difference(
    scores: Sequence[Score], baseline: Sequence[Score] | None, bootstrap: Bootstrap, *, stratified: bool = False
) -> dict[str, float]:
    """Return ``scores - baseline`` over the images that both have, as entries of ``Value.extra``.

    Pairs with an infinite value on either side have no difference and are left out; ``difference_n`` says how many
    remain. Empty without a baseline or without a pair.

    Args:
        scores: scores of the run.
        baseline: scores of the run to compare with.
        bootstrap: draws of the interval, over prompts.
        stratified: take the unweighted mean over strata instead of the mean over images.
    """
    other = {(s.prompt_id, s.index): s.value for s in baseline or ()}
    pairs = [(s, other[key]) for s in scores if (key := (s.prompt_id, s.index)) in other]
    pairs = [(s, value) for s, value in pairs if np.isfinite([s.value, value]).all()]
    if not pairs:
        return {}
    interval = paired_interval(
        [s.value for s, _ in pairs],
        [value for _, value in pairs],
        [s.prompt_id for s, _ in pairs],
        strata=[s.stratum for s, _ in pairs] if stratified else None,
        bootstrap=bootstrap,
    )
    return {
        "difference": interval.mean,
        "difference_stderr": interval.stderr,
        "difference_low": interval.low,
        "difference_high": interval.high,
        "difference_n": interval.n,
    }
