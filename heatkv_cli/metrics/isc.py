"""Inception score: are the images of a set each of some class, and all together of many?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from heatkv_cli.metrics.base import Kind, Pass, Value
from heatkv_cli.metrics.inception import Mode, OnInception
from heatkv_cli.metrics.moments import Rows

_SHUFFLE_SEED = 2020
"""torch-fidelity's; with another one its split means cannot be compared."""


@dataclass(frozen=True)
class InceptionScore(OnInception):
    """exp of the mean KL between an image's class distribution and its split's, mean over splits.

    Rule: logits without bias, float64, splits of the shuffled list. The standard error is that of the mean over
    splits; the value beside it in ``std`` is the spread over splits, which is what papers print.

    Args:
        mode: preprocessing, see ``Inception``.
        splits: parts of the list.
        shuffle: draw the splits at random (torch-fidelity) rather than in order (ADM's evaluator).
        min_images: with fewer the metric is skipped.
        batch_size, weights, device, weights_folder: of Inception.

    Source: Salimans et al., arXiv 1606.03498; behaviour of torch-fidelity 0.4.0.
    """

    mode: Mode = "tf1"
    splits: int = 10
    shuffle: bool = True
    min_images: int = 2048
    batch_size: int = 32
    weights: str | None = None
    device: str = "cpu"
    weights_folder: Path | None = None
    name: str = "isc"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "set"
    needs: ClassVar[Pass] = "free"
    reference: ClassVar[None] = None

    def statistics(self) -> Rows:
        """Empty rows."""
        return Rows()

    def compute(self, images: Rows, reference: None = None) -> list[Value]:
        """Mean over splits.

        Raises:
            ValueError: fewer images than splits.
        """
        n = images.n
        if n < self.splits:
            raise ValueError(f"{n} images cannot be parted into {self.splits} splits")
        features = images.ordered()
        if self.shuffle:
            features = features[np.random.RandomState(_SHUFFLE_SEED).permutation(n)]
        logits = self.extractor.logits(features).double()
        p, log_p = logits.softmax(1), logits.log_softmax(1)
        scores = []
        for i in range(self.splits):
            part = slice(i * n // self.splits, (i + 1) * n // self.splits)
            marginal = p[part].mean(0, keepdim=True)
            scores.append((p[part] * (log_p[part] - marginal.log())).sum(1).mean().exp().item())
        mean, std = float(np.mean(scores)), float(np.std(scores))
        stderr = std / math.sqrt(self.splits - 1) if self.splits > 1 else math.nan
        extra = {"std": std, "splits": float(self.splits)}
        return [Value(self.mode, mean, stderr, mean - 1.96 * stderr, mean + 1.96 * stderr, n, extra)]
