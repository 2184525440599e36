"""PSNR and SSIM: pixels of a run's image against those of the full cache's image of the same prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import ImageMetric, Sample, Score, Spec, Value
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, mean_value
from heatkv_cli.metrics.parameters import DEVICE, aside, parameter
from heatkv_cli.metrics.pictures import by_size, sample_pictures, stack
from heatkv_cli.metrics.scores import Pixels, pair_of

_SIGMA, _RADIUS = 1.5, 5
"""Gaussian window of 11 x 11 pixels."""
_SLIGHTEST, _WIDEST = 1e-3, 65535
"""Bounds of ``data_range``: far beyond use, and far from where its square is no number."""


@dataclass(frozen=True)
class PSNR(ImageMetric):
    """Peak signal-to-noise ratio in dB, per image, against the full cache.

    Rule: ``10 log10(data_range^2 / MSE)``, MSE over all pixels and channels of the 8-bit images; infinite for
    identical images. The headline is the mean over the finite values, with the numbers of identical and of finite
    pairs beside it; it is infinite only where all pairs are identical. The median is over all pairs.

    Args:
        needs: ``free`` (ordinary generation) or ``layout`` (the full run's codes copied at the layout scales, so that
            the value measures detail and not whether another picture was drawn).
        data_range: largest possible difference, 255 for 8-bit images.
    """

    SPEC: ClassVar[Spec] = Spec("psnr", "1", "dB", higher_is_better=True, kind="paired")
    INFINITE: ClassVar[bool] = True

    needs: Literal["free", "layout"] = parameter("free")
    data_range: float = parameter(255.0, least=_SLIGHTEST, most=_WIDEST)

    @property
    def spec(self) -> Spec:
        """The images are those of the pass that ``needs`` names."""
        return replace(super().spec, needs=self.needs)

    def score(self, sample: Sample) -> Score:
        """Return the PSNR of one image.

        Raises:
            ArtifactError: image or reference is missing, or their sizes differ.
        """
        value = compute_psnr(*pair_of(self.spec.name, sample), self.data_range)
        return Score(sample.prompt_id, sample.index, value)

    def self_check(self) -> str:
        """Return '' where two pictures that differ by one step everywhere are 48.13 dB apart, else what is wrong."""
        black = np.zeros((2, 2, 3), np.uint8)
        found = compute_psnr(black, black + np.uint8(1), 255.0)
        return "" if abs(found - 48.1308) < 1e-4 else f"one step is {found:.4f} dB, not 48.1308"

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the mean over finite values (headline) and the median over all.

        Raises:
            ValueError: no scores.
        """
        if not scores:
            raise ValueError("no scores to summarise")
        finite = [s for s in scores if math.isfinite(s.value)]
        extra: dict[str, float] = {"identical": len(scores) - len(finite), "finite": len(finite)}
        # np.median averages the two middle values, and inf + inf is inf: no special case for identical pairs.
        median = float(np.median([s.value for s in scores]))
        rest = Value("median", median, math.nan, math.nan, math.nan, len(scores))
        if not finite:
            return [Value("", math.inf, math.nan, math.nan, math.nan, len(scores), extra), rest]
        return [replace(mean_value("", finite, baseline, bootstrap, extra=extra), n=len(scores)), rest]


def compute_psnr(image: Pixels, reference: Pixels, data_range: float) -> float:
    """Return the PSNR in dB of two (H, W, 3) images; inf if they are identical.

    >>> black = np.zeros((2, 2, 3), np.uint8)
    >>> compute_psnr(black, black + np.uint8(255), 255.0)
    0.0
    """
    mse = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)


@dataclass(frozen=True)
class SSIM(ImageMetric):
    """Structural similarity per image, mean over pixels and channels; 1 for identical images.

    Rule: Gaussian window (sigma 1.5, 11 x 11), K = (0.01, 0.03), population covariances, borders mirrored without
    repeating the edge: torchmetrics' definition and defaults. scikit-image with ``gaussian_weights=True,
    use_sample_covariance=False`` has the same map but leaves the border out of the mean.

    Args:
        data_range: largest possible difference, 255 for 8-bit images.
        batch_size: images at a time.
        device: device of the computation.

    Source: Wang et al. 2004, equation 13; behaviour of torchmetrics 1.9.0.
    """

    SPEC: ClassVar[Spec] = Spec("ssim", "1", "", higher_is_better=True, kind="paired")

    data_range: float = parameter(255.0, least=_SLIGHTEST, most=_WIDEST)
    batch_size: int = aside(16, least=1)
    device: str = aside("cpu", form=DEVICE, words="cpu, cuda or cuda:N")

    def self_check(self) -> str:
        """Return '' where a picture is 1 to itself and less to another, else what is wrong."""
        a, b = sample_pictures()
        same, other = (self.score(Sample("", image=a, reference=side)).value for side in (a, b))
        return "" if abs(same - 1) < 1e-9 and other < 1 else f"a picture is {same} to itself and {other} to another"

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the SSIM of each image.

        Raises:
            ArtifactError: image or reference is missing, sizes differ, or a picture is smaller than half the window.
        """
        pairs = [pair_of(self.spec.name, sample) for sample in samples]
        for sample, (image, _) in zip(samples, pairs, strict=True):
            if min(image.shape[:2]) <= _RADIUS:
                raise ArtifactError(
                    f"{self.spec.name}: prompt {sample.prompt_id}: {image.shape[0]} x {image.shape[1]} pixels are too "
                    "few",
                    f"pictures need more than {_RADIUS} pixels a side",
                )
        values = by_size(self._values, [image for image, _ in pairs], [reference for _, reference in pairs])
        return [Score(s.prompt_id, s.index, v) for s, v in zip(samples, values.tolist(), strict=True)]

    def _values(self, images: Sequence[Pixels], references: Sequence[Pixels]) -> Tensor:
        return ssim(stack(images, self.device).double(), stack(references, self.device).double(), self.data_range)


def ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Return the (n,) SSIM of two (n, c, H, W) float tensors."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-((offsets / _SIGMA) ** 2) / 2)
    window = torch.outer(window, window) / window.sum() ** 2
    channels = x.shape[1]
    kernel = window.expand(channels, 1, -1, -1)

    def blurred(image: Tensor) -> Tensor:
        return conv2d(pad(image, (_RADIUS,) * 4, mode="reflect"), kernel, groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return ((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure).mean((1, 2, 3))
