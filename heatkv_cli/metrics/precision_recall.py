"""Improved precision and recall: how many images look real, and how much of the real set is covered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.metrics.base import Kind, Pass, Value
from heatkv_cli.metrics.inception import Mode, OnInception
from heatkv_cli.metrics.intervals import bootstrap_interval
from heatkv_cli.metrics.moments import Rows

_BLOCK = 2048
"""Rows of a distance matrix held at once."""


@dataclass(frozen=True)
class PrecisionRecall(OnInception):
    """Share of images inside the reference's manifold (precision) and the other way round (recall).

    Rule: the manifold of a set is the union of balls around its features, each as wide as the distance to the k-th
    nearest other one. Intervals are bootstraps over the judged images, with manifolds fixed.

    Args:
        mode: preprocessing, see ``Inception``; ``tf1`` with pool3 is that of ADM's evaluator, though not its program.
        neighbours: k.
        reference: ``full`` for the full run's images, or a folder.
        min_images: with fewer on either side the metric is skipped.
        batch_size, weights, device, weights_folder: of Inception.
        resamples, confidence, seed: of the bootstrap.

    Source: Kynkaanniemi et al., arXiv 1904.06991; behaviour of torch-fidelity 0.4.0 with
        ``feature_extractor="inception-v3-compat", feature_layer_prc="2048"``.
    """

    mode: Mode = "tf1"
    neighbours: int = 3
    reference: str = "full"
    min_images: int = 2048
    batch_size: int = 32
    weights: str | None = None
    device: str = "cpu"
    weights_folder: Path | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: str = "precision_recall"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "fraction"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "set"
    needs: ClassVar[Pass] = "free"

    def statistics(self) -> Rows:
        """Empty rows."""
        return Rows()

    def compute(self, images: Rows, reference: Rows) -> list[Value]:
        """Precision, then recall.

        Raises:
            ValueError: a side has no more than ``neighbours`` images.
        """
        if min(images.n, reference.n) <= self.neighbours:
            raise ValueError(f"{self.neighbours} neighbours need more than as many images on either side")
        ours, real = (torch.from_numpy(rows.ordered()).to(self.device) for rows in (images, reference))
        bootstrap: dict[str, Any] = {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}
        inside = {"precision": _inside(ours, real, self.neighbours), "recall": _inside(real, ours, self.neighbours)}
        extra = {"reference_n": float(reference.n)}
        return [Value.of(name, bootstrap_interval(hits, **bootstrap), extra) for name, hits in inside.items()]


def _inside(judged: Tensor, manifold: Tensor, neighbours: int) -> np.ndarray[Any, Any]:
    """(n,) 1 where a judged feature lies in a ball of the manifold, else 0."""
    blocks = manifold.split(_BLOCK)
    # The nearest one is the feature itself.
    radii = torch.cat([torch.cdist(block, manifold).kthvalue(neighbours + 1).values for block in blocks])
    hits = [(torch.cdist(block, manifold) <= radii).any(1) for block in judged.split(_BLOCK)]
    return torch.cat(hits).double().cpu().numpy()
