"""Bootstrap intervals over prompts: deterministic, vectorised, shared by all metrics.

Rule: values of one group (the samples of one prompt) are drawn together, since they are not independent; groups are
drawn with replacement within their stratum (a task). The statistic is the unweighted mean over strata of the mean over
values. Intervals are percentile intervals.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22
"""Draws held in memory at once (32 MB of indices)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its uncertainty.

    Attributes:
        mean: unweighted mean over strata of the means over values.
        stderr: standard deviation of the bootstrap means.
        low, high: percentile bounds.
        n: number of values.

    ``stderr``, ``low`` and ``high`` are nan where a stratum has fewer than two groups: one prompt says nothing about
    the spread over prompts.
    """

    mean: float
    stderr: float
    low: float
    high: float
    n: int


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.floating],
    groups: Sequence[Hashable] | None = None,
    *,
    strata: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` with a bootstrap interval.

    Args:
        values: finite numbers, one per image.
        groups: what was drawn independently, per value (prompt ids); None makes every value its own group. Equal
            labels in different strata are different groups.
        strata: within what to resample, per value (tasks); None is one stratum.
        resamples: bootstrap repetitions.
        confidence: mass of the interval, in (0, 1).
        seed: of the draws; the same arguments give the same interval.

    Raises:
        ValueError: no values, values that are not finite, lengths that differ, no resamples, or a confidence
            outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    groups = list(range(len(data))) if groups is None else list(groups)
    strata = [None] * len(data) if strata is None else list(strata)
    _check(data, groups, strata, resamples, confidence)
    rng = np.random.default_rng(seed)
    means: list[float] = []
    draws = np.zeros(resamples)
    enough = True
    for stratum in dict.fromkeys(strata):
        index = [i for i, s in enumerate(strata) if s == stratum]
        sums, counts = _group_sums(data[index], [groups[i] for i in index])
        means.append(float(sums.sum() / counts.sum()))
        enough = enough and len(sums) > 1
        if enough:
            draws += _resampled_means(sums, counts, resamples, rng)
    mean = math.fsum(means) / len(means)
    if not enough:
        return Interval(mean, math.nan, math.nan, math.nan, len(data))
    draws /= len(means)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(mean, float(draws.std(ddof=1)), float(low), float(high), len(data))


def paired_interval(
    a: Sequence[float] | NDArray[np.floating],
    b: Sequence[float] | NDArray[np.floating],
    groups: Sequence[Hashable] | None = None,
    *,
    strata: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean difference ``a - b`` of values of the same images; arguments as ``bootstrap_interval``.

    Raises:
        ValueError: as ``bootstrap_interval``, and if ``a`` and ``b`` differ in length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values differ in number: {len(first)} and {len(second)}")
    return bootstrap_interval(
        first - second, groups, strata=strata, resamples=resamples, confidence=confidence, seed=seed
    )


def _check(
    data: NDArray[np.float64],
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    resamples: int,
    confidence: float,
) -> None:
    if data.ndim != 1 or len(data) == 0:
        raise ValueError(f"expected a non-empty list of values, got shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("values must be finite")
    if not len(groups) == len(strata) == len(data):
        raise ValueError(f"{len(data)} values, {len(groups)} groups, {len(strata)} strata")
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(f"resamples must be at least 2 and confidence in (0, 1), got {resamples}, {confidence}")


def _group_sums(data: NDArray[np.float64], groups: Sequence[Hashable]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum and number of the values of each group, in order of first appearance."""
    order: dict[Hashable, int] = {}
    codes = np.array([order.setdefault(group, len(order)) for group in groups])
    sums = np.bincount(codes, weights=data, minlength=len(order)).astype(np.float64)
    return sums, np.bincount(codes, minlength=len(order)).astype(np.int64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) means of as many groups drawn with replacement."""
    n = len(sums)
    rows = max(1, _CHUNK // n)
    out = np.empty(resamples)
    for start in range(0, resamples, rows):
        index = rng.integers(0, n, size=(min(rows, resamples - start), n))
        out[start : start + len(index)] = sums[index].sum(1) / counts[index].sum(1)
    return out


def crossed_interval(
    differences: NDArray[np.floating], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of paired differences of one method against several seeds of another, resampling both.

    Prompts and seeds are crossed: every seed saw every prompt. Each bootstrap repetition draws prompts and, on its own,
    seeds with replacement; so the interval covers what other prompts and what other seeds would have given.

    Args:
        differences: (seeds, prompts); nan where a pair has no difference (identical images).
        resamples, confidence, seed: as in ``bootstrap_interval``.

    Raises:
        ValueError: fewer than two prompts or seeds, or a prompt or seed without any difference.
    """
    data = np.asarray(differences, dtype=np.float64)
    valid = np.isfinite(data)
    if data.ndim != 2 or min(data.shape) < 2 or not (valid.any(0).all() and valid.any(1).all()):
        raise ValueError(f"expected (seeds, prompts) with at least two of each, got {data.shape}")
    rng = np.random.default_rng(seed)
    num_seeds, num_prompts = data.shape
    seeds = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=resamples).astype(np.float64)
    prompts = rng.multinomial(num_prompts, [1 / num_prompts] * num_prompts, size=resamples).astype(np.float64)
    sums = ((seeds @ np.where(valid, data, 0.0)) * prompts).sum(1)
    counts = ((seeds @ valid.astype(np.float64)) * prompts).sum(1)
    draws = sums / counts
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(data[valid].mean()), float(draws.std(ddof=1)), float(low), float(high), int(valid.sum()))
