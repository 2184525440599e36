"""Improved precision and recall: how many images look real, and how much of the real set is covered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv_cli.metrics.base import Spec, Value
from heatkv_cli.metrics.inception.network import OnInception
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, bootstrap_interval
from heatkv_cli.metrics.networks import check_device
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.statistics import Rows

_BLOCK = 2048
"""Rows of a distance matrix held at once."""


@dataclass(frozen=True)
class PrecisionRecall(OnInception):
    """Share of images inside the reference's manifold (precision) and the other way round (recall).

    Rule: the manifold of a set is the union of balls around its features, each as wide as the distance to the k-th
    nearest other one. Intervals are bootstraps over the judged images, with manifolds fixed. ``mode=tf1`` with pool3 is
    that of ADM's evaluator, though not its program.

    Args:
        neighbours: k.
        reference: ``full`` for the full run's images, or a folder.

    Source: Kynkaanniemi et al., arXiv 1904.06991; behaviour of torch-fidelity 0.4.0 with
        ``feature_extractor="inception-v3-compat", feature_layer_prc="2048"``.
    """

    SPEC: ClassVar[Spec] = Spec("precision_recall", "1", "fraction", higher_is_better=True, kind="set")

    neighbours: int = parameter(3, least=1, most=10_000)
    reference: str = parameter("full")

    def statistics(self) -> Rows:
        """Return empty rows."""
        return Rows()

    def compute(self, images: Rows, reference: Rows | None = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        """Return precision, then recall.

        Raises:
            ValueError: a side has no more than ``neighbours`` images, or there is no reference.
        """
        if reference is None:
            raise ValueError("precision and recall need a reference")
        if min(images.n, reference.n) <= self.neighbours:
            raise ValueError(f"{self.neighbours} neighbours need more than as many images on either side")
        check_device(self.device)
        ours, real = (torch.from_numpy(rows.ordered()).to(self.device) for rows in (images, reference))
        return manifold_values(ours, real, self.neighbours, bootstrap)


def manifold_values(ours: Tensor, real: Tensor, neighbours: int, bootstrap: Bootstrap) -> list[Value]:
    """Return precision, then recall, of features ``ours`` (n, d) against ``real`` (m, d); see ``PrecisionRecall``."""
    inside = {"precision": _inside(ours, real, neighbours), "recall": _inside(real, ours, neighbours)}
    extra = {"reference_n": float(len(real))}
    return [Value.of(name, bootstrap_interval(hits, bootstrap=bootstrap), extra) for name, hits in inside.items()]


def _inside(judged: Tensor, manifold: Tensor, neighbours: int) -> NDArray[np.float64]:
    """(n,) 1 where a judged feature lies in a ball of the manifold, else 0."""
    blocks = manifold.split(_BLOCK)
    # The nearest one is the feature itself.
    radii = torch.cat([torch.cdist(block, manifold).kthvalue(neighbours + 1).values for block in blocks])
    hits = [(torch.cdist(block, manifold) <= radii).any(1) for block in judged.split(_BLOCK)]
    found: NDArray[np.float64] = torch.cat(hits).double().cpu().numpy()
    return found
