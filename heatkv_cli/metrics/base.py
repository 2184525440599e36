"""What a metric is: images (or numbers recorded with them) in, values with intervals out.

Two shapes exist, because a set metric has no number per image:

* ``ImageMetric`` gives each image a ``Score``; ``summarise`` turns all scores of a run into values. Scores are plain
  rows, so a run can be resumed, sharded, or compared with another run image by image.
* ``SetMetric`` gathers additive state (``update``, ``merge``) and computes values at the end (FID).

The evaluation stage loads images, hands out samples and writes values; metrics read no files and know neither models
nor methods. ``needs`` names the generation pass whose images a metric wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.metrics.intervals import Interval, paired_interval

Kind = Literal["paired", "set", "prompt"]
"""An image against the full run's image of the same seed; many images against many; an image against its prompt."""
Pass = Literal["free", "layout", "forced"]
"""Ordinary generation; the full run's bits copied at the layout scales; teacher-forced on all of the full run's."""
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """One generated image as a metric sees it.

    Attributes:
        prompt_id: id of the prompt in its list.
        prompt: text of the prompt.
        meta: what the prompt list says besides (GenEval's tag and include, a class index, ...).
        image: (H, W, 3); None in the forced pass, which makes no image.
        reference: (H, W, 3), the full run's image of the same prompt and seed; None where there is none.
        recorded: numbers that the pass recorded for this image (the forced pass: KL per bit, in all and per scale).
        index: number of the image among those of its prompt.
    """

    prompt_id: str
    prompt: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    image: Image | None = None
    reference: Image | None = None
    recorded: Mapping[str, float] = field(default_factory=dict)
    index: int = 0


@dataclass(frozen=True)
class Score:
    """A metric's number for one image.

    Attributes:
        prompt_id, index: the image; scores of two runs are paired by them.
        value: the number; may be infinite (PSNR of identical images).
        stratum: what the image counts towards (its task), '' where all images count alike.
        parts: further numbers of the same image (KL per scale).
        note: why, in words, for the table of images.
    """

    prompt_id: str
    index: int
    value: float
    stratum: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Value:
    """One row of results.

    Attributes:
        variant: which number of the metric, '' for the headline.
        value: the number.
        stderr, low, high: standard error and bounds of the 95 % interval (or as configured); nan where unknown.
        n: images it was computed from.
        extra: further numbers for the row; ``difference*`` is the paired comparison with the baseline run.
    """

    variant: str
    value: float
    stderr: float
    low: float
    high: float
    n: int
    extra: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, variant: str, interval: Interval, extra: Mapping[str, float] | None = None) -> Self:
        """The row of a mean with its interval."""
        return cls(variant, interval.mean, interval.stderr, interval.low, interval.high, interval.n, extra or {})


class _Described(Protocol):
    """What the result rows say about a metric. ``version`` changes whenever the same images give another number."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def needs(self) -> Pass: ...


@runtime_checkable
class ImageMetric(_Described, Protocol):
    """A metric with a number per image (kinds ``paired`` and ``prompt``)."""

    def score(self, sample: Sample) -> Score:
        """The number of one image.

        Raises:
            ConfigError: the prompt list lacks what the metric needs.
            ArtifactError: image and reference do not belong together.
        """
        ...

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Values of a run, headline first.

        Args:
            scores: of all images, at least one.
            baseline: scores of the run to compare with (the full cache), for paired intervals; images that only
                one of the two runs has are left out of the comparison.
        """
        ...


@runtime_checkable
class SetMetric(_Described, Protocol):
    """A metric of a whole set of images (kind ``set``); one object per set."""

    def update(self, sample: Sample) -> None:
        """Add one image to the state."""
        ...

    def merge(self, other: Self) -> None:
        """Add another object's state, as if its images had been added here."""
        ...

    def compute(self) -> list[Value]:
        """Values of the set, headline first."""
        ...


Metric = ImageMetric | SetMetric


def paired_difference(
    scores: Sequence[Score],
    baseline: Sequence[Score] | None,
    *,
    resamples: int,
    confidence: float,
    seed: int,
    stratified: bool = False,
) -> dict[str, float]:
    """``scores - baseline`` over the images that both have, as entries of ``Value.extra``.

    Pairs with an infinite value on either side have no difference and are left out; ``difference_n`` says how many
    remain. Empty without a baseline or without a pair.

    Args:
        scores: of the run.
        baseline: of the run to compare with.
        resamples: bootstrap repetitions.
        confidence: mass of the interval.
        seed: of the bootstrap.
        stratified: unweighted mean over strata instead of the mean over images.
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
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    return {
        "difference": interval.mean,
        "difference_stderr": interval.stderr,
        "difference_low": interval.low,
        "difference_high": interval.high,
        "difference_n": interval.n,
    }
