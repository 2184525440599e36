"""PSNR of a run's images against the full cache's images of the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from heatkv_cli.metrics.base import Image, Kind, Sample, Score, Value, pair_of, paired_difference
from heatkv_cli.metrics.intervals import bootstrap_interval


@dataclass(frozen=True)
class PSNR:
    """Peak signal-to-noise ratio in dB, per image, against the full cache.

    Rule: ``10 log10(data_range^2 / MSE)``, MSE over all pixels and channels of the 8-bit images; infinite for
    identical images. The headline is the mean over the finite values, with the numbers of identical and of finite
    pairs beside it; it is infinite only where all pairs are identical. The median is over all pairs.

    Args:
        name: ``psnr`` or ``psnr_layout`` in the result rows.
        needs: ``free`` (ordinary generation) or ``layout`` (the full run's bits copied at the layout scales, so that
            the value measures detail and not whether another picture was drawn).
        data_range: largest possible difference, 255 for 8-bit images.
        resamples, confidence, seed: of the bootstrap over prompts.
    """

    name: str = "psnr"
    needs: Literal["free", "layout"] = "free"
    data_range: float = 255.0
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "dB"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "paired"

    def score(self, sample: Sample) -> Score:
        """PSNR of one image.

        Raises:
            ArtifactError: image or reference is missing, or their sizes differ.
        """
        value = compute_psnr(*pair_of(self.name, sample), self.data_range)
        return Score(sample.prompt_id, sample.index, value)

    def self_check(self) -> str:
        """'' where two pictures that differ by one step everywhere are 48.13 dB apart, else what is wrong."""
        black = np.zeros((2, 2, 3), np.uint8)
        found = compute_psnr(black, black + np.uint8(1), 255.0)
        return "" if abs(found - 48.1308) < 1e-4 else f"one step is {found:.4f} dB, not 48.1308"

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over finite values (headline) and median over all.

        Raises:
            ValueError: no scores.
        """
        if not scores:
            raise ValueError("no scores to summarise")
        finite = [s for s in scores if math.isfinite(s.value)]
        extra: dict[str, float] = {"identical": len(scores) - len(finite), "finite": len(finite)}
        extra |= paired_difference(
            scores, baseline, resamples=self.resamples, confidence=self.confidence, seed=self.seed
        )
        # np.median averages the two middle values, and inf + inf is inf: no special case for identical pairs.
        median = float(np.median([s.value for s in scores]))
        rest = Value("median", median, math.nan, math.nan, math.nan, len(scores))
        if not finite:
            return [Value("", math.inf, math.nan, math.nan, math.nan, len(scores), extra), rest]
        interval = bootstrap_interval(
            [s.value for s in finite],
            [s.prompt_id for s in finite],
            resamples=self.resamples,
            confidence=self.confidence,
            seed=self.seed,
        )
        headline = Value("", interval.mean, interval.stderr, interval.low, interval.high, len(scores), extra)
        return [headline, rest]


def compute_psnr(image: Image, reference: Image, data_range: float) -> float:
    """PSNR in dB of two (H, W, 3) images; inf if they are identical.

    >>> black = np.zeros((2, 2, 3), np.uint8)
    >>> compute_psnr(black, black + np.uint8(255), 255.0)
    0.0
    """
    mse = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)
