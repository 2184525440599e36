"""Perceptual distance on EfficientNet-Lite0 features: LPIPS' idea without learned heads, for machines without a hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from heatkv_cli.metrics.base import Kind, Pass, Sample, Score, Value, pair_of
from heatkv_cli.metrics.efficientnet_lite0 import OnLite0
from heatkv_cli.metrics.summary import Bootstrap, mean_value


@dataclass(frozen=True)
class PDEfficientNetLite0(OnLite0):
    """Distance of an image to the full cache's image of the same prompt and seed; 0 for identical images.

    Rule: at five resolutions a pixel's features are scaled to unit length; squared differences are summed over
    channels, averaged over pixels and over resolutions.

    Args:
        batch_size, weights, device: of the network.
        resamples, confidence, seed: of the bootstrap over prompts.

    Differs: LPIPS (Zhang et al., arXiv 1801.03924) weighs channels with heads trained on human judgements; here all
        count alike, so values compare among themselves only.
    """

    batch_size: int = 16
    weights: str | None = None
    device: str = "cpu"
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: str = "pd_efficientnet_lite0"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[Kind] = "paired"
    needs: ClassVar[Pass] = "free"

    def score(self, sample: Sample) -> Score:
        """Distance of one image; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    @torch.inference_mode()
    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Distance of each image.

        Raises:
            SetupError: the package is missing.
            ArtifactError: image or reference is missing, or sizes differ.
        """
        pairs = [pair_of(self.name, sample) for sample in samples]
        extractor = self.extractor
        sides = [extractor.network.taps(extractor.prepare(side)) for side in zip(*pairs, strict=True)]
        gaps = [
            ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).sum(1).mean((1, 2))
            for a, b in zip(*sides, strict=True)
        ]
        values = torch.stack(gaps).mean(0).tolist()
        return [Score(s.prompt_id, s.index, v) for s, v in zip(samples, values, strict=True)]

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over images."""
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        return [mean_value("", scores, baseline, bootstrap)]
