"""The numbers around a metric: samples go in, scores of images and rows of results come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.errors import ArtifactError

Pixels = NDArray[np.uint8]
"""(H, W, 3) pixels, 8 bit."""
Features = NDArray[np.float32]
"""(n, d): one row per image."""


@dataclass(frozen=True)
class Sample:
    """One generated image as a metric sees it.

    Attributes:
        prompt_id: id of the prompt in its list.
        prompt: text of the prompt.
        meta: further fields of the prompt in its list (GenEval's tag and include, a class index, ...).
        image: (H, W, 3); None in the forced pass, which makes no image.
        reference: (H, W, 3), the full run's image of the same prompt and seed; None where there is none.
        recorded: numbers that the pass recorded for this image (the forced pass: the KL, in all and per scale).
        index: number of the image among those of its prompt.
    """

    prompt_id: str
    prompt: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    image: Pixels | None = None
    reference: Pixels | None = None
    recorded: Mapping[str, float] = field(default_factory=dict)
    index: int = 0


@dataclass(frozen=True)
class Score:
    """A metric's number for one image.

    Attributes:
        prompt_id: id of the image's prompt.
        index: number of the image among those of its prompt; two runs are paired by both.
        value: the number; infinite only where the metric says so (PSNR of identical images).
        stratum: the group that the image counts towards (its task); '' where all images count alike.
        parts: further numbers of the same image (KL per scale).
        note: the reason in words, for the table of images.
    """

    prompt_id: str
    index: int
    value: float
    stratum: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Interval:
    """A mean with its uncertainty.

    Attributes:
        mean: unweighted mean over strata of the means over values.
        stderr: standard deviation of the bootstrap means.
        low: lower percentile bound.
        high: upper percentile bound.
        n: number of values.

    ``stderr``, ``low`` and ``high`` are nan where a stratum has fewer than two groups: one prompt says nothing about
    the spread over prompts.
    """

    mean: float
    stderr: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Value:
    """One row of results.

    Attributes:
        variant: name of this number of the metric; '' for the headline.
        value: the number.
        stderr: standard error; nan where unknown.
        low: lower bound of the run's interval; nan where unknown.
        high: upper bound; nan where unknown.
        n: number of images it was computed from.
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
        """Return the row of a mean with its interval."""
        return cls(variant, interval.mean, interval.stderr, interval.low, interval.high, interval.n, extra or {})


def pair_of(metric: str, sample: Sample) -> tuple[Pixels, Pixels]:
    """Return image and reference of a sample.

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


def image_of(metric: str, sample: Sample) -> Pixels:
    """Return the image of a sample.

    Raises:
        ArtifactError: it has none.
    """
    if sample.image is None:
        raise ArtifactError(f"{metric}: prompt {sample.prompt_id} has no image", "run 'heatkv generate' first")
    return sample.image
