"""FID in named modes: three preprocessings are all called FID, and only values of one mode compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heatkv_cli.metrics.base import Spec, Value
from heatkv_cli.metrics.frechet import frechet_value
from heatkv_cli.metrics.inception.network import DIM, Mode, OnInception
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.statistics import Gaussian, Moments


@dataclass(frozen=True)
class FID(OnInception):
    """Frechet distance of Inception pool3 features between the run's images and a reference.

    Rule: moments in float64, covariance over n - 1, see ``frechet_distance``. The row's variant is the mode; the
    interval is a delete-a-group jackknife over the run's images. Up to 2,048 images the covariance has not full rank,
    so that the metric is skipped unless ``min_images`` says otherwise.

    Args:
        mode: ``clean`` (clean-fid: ScaleKV, DistriFusion, MJHQ), ``tf1`` (torch-fidelity, ADM's evaluator: ImageNet)
            or ``antialias`` (torchmetrics' default).
        reference: ``full`` for the full run's images of the same prompts, a folder of images, or an npz file with
            ``mu`` and ``sigma`` of the same mode.

    Source: Heusel et al., arXiv 1706.08500; Parmar et al., arXiv 2104.11222 (modes).
    """

    SPEC: ClassVar[Spec] = Spec("fid", "1", "", higher_is_better=False, kind="set")

    mode: Mode = parameter("clean")
    reference: str = parameter("full")

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
        return [frechet_value(self.variant, images, reference, bootstrap)]
