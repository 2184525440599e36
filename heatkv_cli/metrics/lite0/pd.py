"""Perceptual distance on EfficientNet-Lite0 features: LPIPS' idea without learned heads, for machines without a hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from heatkv_cli.metrics.base import ImageMetric, Sample, Score, Spec
from heatkv_cli.metrics.lite0.network import OnLite0
from heatkv_cli.metrics.parameters import aside
from heatkv_cli.metrics.scores import pair_of


@dataclass(frozen=True)
class PDEfficientNetLite0(OnLite0, ImageMetric):
    """Distance of an image to the full cache's image of the same prompt and seed; 0 for identical images.

    Rule: at five resolutions a pixel's features are scaled to unit length; squared differences are summed over
    channels, averaged over pixels and over resolutions.

    Differs: LPIPS (Zhang et al., arXiv 1801.03924) weighs channels with heads trained on human judgements; here all
        count alike, so values compare among themselves only.
    """

    SPEC: ClassVar[Spec] = Spec("pd_efficientnet_lite0", "1", "", higher_is_better=False, kind="paired")

    batch_size: int = aside(16, least=1)

    @torch.inference_mode()
    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the distance of each image.

        Raises:
            SetupError: the package is missing.
            ArtifactError: image or reference is missing, or sizes differ.
        """
        pairs = [pair_of(self.spec.name, sample) for sample in samples]
        extractor = self.extractor
        sides = [extractor.network.taps(extractor.prepare(side)) for side in zip(*pairs, strict=True)]
        gaps = [
            ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).sum(1).mean((1, 2))
            for a, b in zip(*sides, strict=True)
        ]
        values = torch.stack(gaps).mean(0).tolist()
        return [Score(s.prompt_id, s.index, v) for s, v in zip(samples, values, strict=True)]
