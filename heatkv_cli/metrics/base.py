"""What a metric is: images (or numbers recorded with them) in, values with intervals out.

Two shapes exist, because a set metric has no number per image:

* ``ImageMetric`` gives each image a ``Score``; ``summarise`` turns all scores of a run into values. Scores are plain
  rows, so a run can be resumed, sharded, or compared with another run image by image.
* ``SetMetric`` (FID) goes from images to features to additive statistics to values. Features are one row per image, so
  they are resumed and sharded as scores are, and metrics with the same extractor share them.

The evaluation stage loads images, hands out samples and writes values; metrics read no images and know neither models
nor methods. ``needs`` names the generation pass whose images a metric wants. A metric whose weights or packages are
missing raises ``SetupError`` when it is first used; the stage turns that into a row with ``status=skipped``.

What a metric may have besides: ``score_batch`` and ``batch_size``; ``weights_sha256`` and ``settings`` (what else
decides the number), for the rows; ``device`` and ``weights_folder``, taken from the run; ``self_check``, '' or what is
wrong, for ``doctor``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.intervals import Interval, paired_interval

Kind = Literal["paired", "set", "prompt"]
"""An image against the full run's image of the same seed; many images against many; an image against its prompt."""
Pass = Literal["free", "layout", "forced"]
"""Ordinary generation; the full run's bits copied at the layout scales; teacher-forced on all of the full run's."""
Image = NDArray[np.uint8]
Features = NDArray[np.float32]


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


class Extractor(Protocol):
    """Images to features, one row per image; what it needs is loaded on the first call."""

    @property
    def name(self) -> str:
        """Network and preprocessing, for folder names."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights; raises SetupError where there are none."""
        ...

    def self_check(self) -> str:
        """'' where the weights are what they say and the network works, else what is wrong; raises as an extraction."""
        ...

    def __call__(self, images: Sequence[Image]) -> Features:
        """(n, d) features of n images, which may differ in size."""
        ...


class Extracting:
    """Base of metrics whose weights are their extractor's."""

    @property
    def extractor(self) -> Extractor:
        """Where the features come from."""
        raise NotImplementedError

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights; raises SetupError where there are none."""
        return self.extractor.weights_sha256

    def self_check(self) -> str:
        """'' where the weights are what they say and the network works, else what is wrong; raises as an extraction."""
        return self.extractor.self_check()


class Statistics(Protocol):
    """What a set metric keeps of a set: additive, so that batches and shards give what the whole would."""

    def add(self, index: Sequence[int], features: Features) -> None:
        """Add images: their places in the list of all images, and their (n, d) features."""
        ...

    def merge(self, other: Self) -> None:
        """Add the statistics of other images."""
        ...


@runtime_checkable
class SetMetric(_Described, Protocol):
    """A metric of a whole set of images (kind ``set``)."""

    @property
    def min_images(self) -> int:
        """With fewer images on either side the metric is skipped."""
        ...

    @property
    def reference(self) -> str | None:
        """``full`` (the full run's images), a folder, a file of statistics; None where nothing is compared."""
        ...

    @property
    def extractor(self) -> Extractor:
        """Where its features come from."""
        ...

    def statistics(self) -> Any:
        """New, empty ``Statistics``."""
        ...

    def compute(self, images: Any, reference: Any = None) -> list[Value]:
        """Values of a set, headline first.

        Args:
            images: ``Statistics`` of the generated images.
            reference: those of the reference; None for a metric without one.
        """
        ...


Metric = ImageMetric | SetMetric


def score_batch(metric: ImageMetric, samples: Sequence[Sample]) -> list[Score]:
    """Scores of several images: in one pass through the network where the metric has a ``score_batch`` of its own."""
    together = getattr(metric, "score_batch", None)
    return together(samples) if together else [metric.score(sample) for sample in samples]


def pair_of(metric: str, sample: Sample) -> tuple[Image, Image]:
    """Image and reference of a sample.

    Raises:
        ArtifactError: one is missing, or their sizes differ.
    """
    if sample.image is None or sample.reference is None:
        missing = "reference" if sample.image is not None else "image"
        raise ArtifactError(
            f"{metric}: prompt {sample.prompt_id} has no {missing}",
            "run the same command with method=full first, or let 'heatkv eval' make what is missing",
        )
    if sample.image.shape != sample.reference.shape:
        raise ArtifactError(
            f"{metric}: prompt {sample.prompt_id}: image has size {sample.image.shape} but its reference has "
            f"{sample.reference.shape}",
            "both must come from the same model and resolution; remove the older run folder",
        )
    return sample.image, sample.reference


def image_of(metric: str, sample: Sample) -> Image:
    """Image of a sample.

    Raises:
        ArtifactError: it has none.
    """
    if sample.image is None:
        raise ArtifactError(f"{metric}: prompt {sample.prompt_id} has no image", "run 'heatkv generate' first")
    return sample.image


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
