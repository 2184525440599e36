"""Frechet distance on EfficientNet-Lite0 features: FID's formula without FID's network, and so not FID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heatkv_cli.metrics.base import SetMetric, Spec, Value
from heatkv_cli.metrics.frechet import frechet_value
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.lite0.network import DIM, OnLite0
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.statistics import Gaussian, Moments


@dataclass(frozen=True)
class FDEfficientNetLite0(OnLite0, SetMetric):
    """Frechet distance of pooled EfficientNet-Lite0 features between the run's images and a reference.

    For comparisons of runs with the same n on machines without a hub. Few images bias it upwards, as they do FID;
    it is not skipped then, since no published number is at stake, but n stands in the row.

    Args:
        reference: ``full`` for the full run's images, a folder, or an npz file with ``mu`` and ``sigma``.
        min_images: with fewer on either side it is skipped.
    """

    SPEC: ClassVar[Spec] = Spec("fd_efficientnet_lite0", "1", "", higher_is_better=False, kind="set")

    reference: str = parameter("full")
    min_images: int = parameter(16, least=2)

    def statistics(self) -> Moments:
        """Return empty moments."""
        return Moments(DIM)

    def compute(
        self, images: Moments, reference: Moments | Gaussian | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the distance.

        Raises:
            ValueError: fewer than two images on a side, or no reference.
            ArtifactError: the reference is of another network, or its matrix is no covariance.
        """
        return [frechet_value("", images, reference, bootstrap)]
