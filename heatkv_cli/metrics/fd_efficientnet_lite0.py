"""Frechet distance on EfficientNet-Lite0 features: FID's formula without FID's network, and so not FID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heatkv_cli.metrics.base import Kind, Pass, Value
from heatkv_cli.metrics.efficientnet_lite0 import DIM, OnLite0
from heatkv_cli.metrics.moments import Gaussian, Moments, frechet_value


@dataclass(frozen=True)
class FDEfficientNetLite0(OnLite0):
    """Frechet distance of pooled EfficientNet-Lite0 features between the run's images and a reference.

    For comparisons of runs with the same n on machines without a hub. Few images bias it upwards, as they do FID;
    it is not skipped then, since no published number is at stake, but n stands in the row.

    Args:
        reference: ``full`` for the full run's images, a folder, or an npz file with ``mu`` and ``sigma``.
        min_images: with fewer on either side it is skipped.
        groups: of the jackknife.
        batch_size, weights, device: of the network.
    """

    reference: str = "full"
    min_images: int = 16
    groups: int = 10
    batch_size: int = 32
    weights: str | None = None
    device: str = "cpu"
    name: str = "fd_efficientnet_lite0"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[Kind] = "set"
    needs: ClassVar[Pass] = "free"

    def statistics(self) -> Moments:
        """Empty moments."""
        return Moments(DIM, self.groups)

    def compute(self, images: Moments, reference: Moments | Gaussian) -> list[Value]:
        """The distance; raises ValueError with fewer than two images on a side."""
        return [frechet_value("", images, reference)]
