"""Inception score: are the images of a set each of some class, and all together of many?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from heatkv_cli.metrics.base import Spec, Value
from heatkv_cli.metrics.inception.network import OnInception
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.statistics import Rows

_SHUFFLE_SEED = 2020
"""torch-fidelity's; with another one its split means cannot be compared."""


@dataclass(frozen=True)
class InceptionScore(OnInception):
    """exp of the mean KL between an image's class distribution and its split's, mean over splits.

    Rule: logits without bias, float64, splits of the shuffled list. The standard error is that of the mean over
    splits; the value beside it in ``std`` is the spread over splits, which is what papers print.

    Args:
        splits: parts of the list.
        shuffle: draw the splits at random (torch-fidelity) rather than in order (ADM's evaluator).

    Source: Salimans et al., arXiv 1606.03498; behaviour of torch-fidelity 0.4.0.
    """

    SPEC: ClassVar[Spec] = Spec("isc", "1", "", higher_is_better=True, kind="set")

    splits: int = parameter(10, least=1, most=10_000)
    shuffle: bool = parameter(True)

    def statistics(self) -> Rows:
        """Return empty rows."""
        return Rows()

    def compute(self, images: Rows, reference: None = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        """Return the mean over splits.

        Raises:
            ValueError: fewer images than splits.
        """
        n = images.n
        if n < self.splits:
            raise ValueError(f"{n} images cannot be parted into {self.splits} splits")
        features = images.ordered()
        if self.shuffle:
            features = features[np.random.RandomState(_SHUFFLE_SEED).permutation(n)]
        return [split_score(self.variant, self.extractor.logits(features), self.splits, bootstrap)]


def split_score(variant: str, logits: Tensor, splits: int, bootstrap: Bootstrap) -> Value:
    """Return the mean over splits of exp of the mean KL between an image's class distribution and its split's.

    Args:
        variant: of the row.
        logits: (n, classes), in the order in which they are parted; n is at least `splits`.
        splits: parts of the list; with one there is no standard error.
        bootstrap: its confidence is that of the interval.
    """
    n, logits = len(logits), logits.double()
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    scores = []
    for i in range(splits):
        part = slice(i * n // splits, (i + 1) * n // splits)
        marginal = p[part].mean(0, keepdim=True)
        scores.append((p[part] * (log_p[part] - marginal.log())).sum(1).mean().exp().item())
    mean, std = float(np.mean(scores)), float(np.std(scores))
    stderr = std / math.sqrt(splits - 1) if splits > 1 else math.nan
    half, extra = bootstrap.normal * stderr, {"std": std, "splits": float(splits)}
    return Value(variant, mean, stderr, mean - half, mean + half, n, extra)
