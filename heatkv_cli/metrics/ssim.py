"""SSIM of a run's images against the full cache's images of the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Image, Kind, Pass, Sample, Score, Value, pair_of
from heatkv_cli.metrics.images import by_size, sample_pictures, stack
from heatkv_cli.metrics.summary import Bootstrap, mean_value

_SIGMA, _RADIUS = 1.5, 5
"""Gaussian window of 11 x 11 pixels."""


@dataclass(frozen=True)
class SSIM:
    """Structural similarity per image, mean over pixels and channels; 1 for identical images.

    Rule: Gaussian window (sigma 1.5, 11 x 11), K = (0.01, 0.03), population covariances, borders mirrored without
    repeating the edge: torchmetrics' definition and defaults. scikit-image with ``gaussian_weights=True,
    use_sample_covariance=False`` has the same map but leaves the border out of the mean.

    Args:
        data_range: largest possible difference, 255 for 8-bit images.
        batch_size: images at a time.
        device: where it is computed.
        resamples, confidence, seed: of the bootstrap over prompts.

    Source: Wang et al. 2004, equation 13; behaviour of torchmetrics 1.9.0.
    """

    data_range: float = 255.0
    batch_size: int = 16
    device: str = "cpu"
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: str = "ssim"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "paired"
    needs: ClassVar[Pass] = "free"

    def self_check(self) -> str:
        """'' where a picture is 1 to itself and less to another, else what is wrong."""
        a, b = sample_pictures()
        same, other = (self.score(Sample("", image=a, reference=side)).value for side in (a, b))
        return "" if abs(same - 1) < 1e-9 and other < 1 else f"a picture is {same} to itself and {other} to another"

    def score(self, sample: Sample) -> Score:
        """SSIM of one image; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """SSIM of each image.

        Raises:
            ArtifactError: image or reference is missing, sizes differ, or a picture is smaller than half the window.
        """
        pairs = [pair_of(self.name, sample) for sample in samples]
        for sample, (image, _) in zip(samples, pairs, strict=True):
            if min(image.shape[:2]) <= _RADIUS:
                raise ArtifactError(
                    f"{self.name}: prompt {sample.prompt_id}: {image.shape[0]} x {image.shape[1]} pixels are too few",
                    f"pictures need more than {_RADIUS} pixels a side",
                )
        values = by_size(self._values, [image for image, _ in pairs], [reference for _, reference in pairs])
        return [Score(s.prompt_id, s.index, v) for s, v in zip(samples, values.tolist(), strict=True)]

    def _values(self, images: Sequence[Image], references: Sequence[Image]) -> Tensor:
        return ssim(stack(images, self.device).double(), stack(references, self.device).double(), self.data_range)

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over images."""
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        return [mean_value("", scores, baseline, bootstrap)]


def ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """(n,) SSIM of two (n, c, H, W) float tensors."""
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
