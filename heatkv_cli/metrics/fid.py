"""FID in named modes: three preprocessings are all called FID, and only values of one mode compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from heatkv_cli.metrics.base import Kind, Pass, Value
from heatkv_cli.metrics.inception import DIM, Mode, OnInception
from heatkv_cli.metrics.moments import Gaussian, Moments, frechet_value


@dataclass(frozen=True)
class FID(OnInception):
    """Frechet distance of Inception pool3 features between the run's images and a reference.

    Rule: moments in float64, covariance over n - 1, see ``frechet_distance``. The row's variant is the mode; the
    interval is a delete-a-group jackknife over the run's images.

    Args:
        mode: ``clean`` (clean-fid: ScaleKV, DistriFusion, MJHQ), ``tf1`` (torch-fidelity, ADM's evaluator: ImageNet)
            or ``antialias`` (torchmetrics' default).
        reference: ``full`` for the full run's images of the same prompts, a folder of images, or an npz file with
            ``mu`` and ``sigma`` of the same mode.
        min_images: with fewer on either side the metric is skipped: up to 2,048 the covariance has not full rank.
        groups: of the jackknife.
        batch_size: images per pass through the network.
        weights: Inception's file; None for the usual places.
        device: of the network; never changes which number is meant.
        weights_folder: the first of the usual places.

    Source: Heusel et al., arXiv 1706.08500; Parmar et al., arXiv 2104.11222 (modes).
    """

    mode: Mode = "clean"
    reference: str = "full"
    min_images: int = 2048
    groups: int = 10
    batch_size: int = 32
    weights: str | None = None
    device: str = "cpu"
    weights_folder: Path | None = None
    name: str = "fid"
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
        return [frechet_value(self.mode, images, reference)]
