"""Scores of images to rows of results, for metrics whose headline is a mean: with interval and paired difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heatkv_cli.metrics.base import Score, Value, paired_difference
from heatkv_cli.metrics.intervals import bootstrap_interval


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: repetitions, mass, seed."""

    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0


def mean_value(
    variant: str,
    scores: Sequence[Score],
    baseline: Sequence[Score] | None,
    bootstrap: Bootstrap,
    *,
    stratified: bool = False,
    extra: Mapping[str, float] | None = None,
) -> Value:
    """The mean of ``scores`` as a row, with the paired difference to ``baseline`` in ``extra``.

    Args:
        variant: of the row.
        scores: at least one.
        baseline: scores of the run to compare with.
        bootstrap: of both intervals, over prompts.
        stratified: unweighted mean over strata, prompts resampled within them; else the mean over images.
        extra: further numbers.

    Raises:
        ValueError: no scores.
    """
    draw = {"resamples": bootstrap.resamples, "confidence": bootstrap.confidence, "seed": bootstrap.seed}
    interval = bootstrap_interval(
        [s.value for s in scores],
        [s.prompt_id for s in scores],
        strata=[s.stratum for s in scores] if stratified else None,
        **draw,  # type: ignore[arg-type]
    )
    difference = paired_difference(scores, baseline, **draw, stratified=stratified)  # type: ignore[arg-type]
    return Value.of(variant, interval, {**(extra or {}), **difference})


def by_stratum(
    scores: Sequence[Score], baseline: Sequence[Score] | None, bootstrap: Bootstrap, order: Sequence[str] = ()
) -> list[Value]:
    """One row per stratum that occurs, those named in ``order`` first; none where images have no strata."""
    present = {s.stratum for s in scores} - {""}
    names = [name for name in order if name in present] + sorted(present - set(order))
    return [mean_value(name, [s for s in scores if s.stratum == name], baseline, bootstrap) for name in names]
