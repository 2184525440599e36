"""Numbers of a set of pictures on the classifier's features, against the shipped statistics of the real test set.

They are the twins of ImageNet's scores, by the same formulas, and compare with no number of another network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from heatkv_cli.metrics.base import SetMetric, Spec, Value
from heatkv_cli.metrics.fashion.network import DIM, OnFashion
from heatkv_cli.metrics.frechet import frechet_value
from heatkv_cli.metrics.inception.isc import split_score
from heatkv_cli.metrics.inception.precision_recall import manifold_values
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.statistics import Moments, Rows


@dataclass(frozen=True)
class FashionFD(OnFashion, SetMetric):
    """Frechet distance of the classifier's features to those of the 10,000 real test pictures.

    Few pictures bias it upwards, as they do FID; values of one n compare. Real training pictures are at 0.1 (n = 1000).

    Args:
        min_images: with fewer it is skipped.
    """

    SPEC: ClassVar[Spec] = Spec("fashion_fd", "1", "", higher_is_better=False, kind="set")

    min_images: int = parameter(16, least=2)

    def statistics(self) -> Moments:
        """Return empty moments."""
        return Moments(DIM)

    def compute(self, images: Moments, reference: None = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        """Return the distance.

        Raises:
            ValueError: fewer than two images.
        """
        return [frechet_value("", images, self.extractor.judge.moments, bootstrap)]


@dataclass(frozen=True)
class FashionScore(OnFashion, SetMetric):
    """Inception score with the classifier in Inception's place: 1 to 10.

    Args:
        splits: parts of the list, in order; one has no bias of small parts, and no standard error.
        min_images: with fewer it is skipped.
    """

    SPEC: ClassVar[Spec] = Spec("fashion_score", "1", "", higher_is_better=True, kind="set")

    splits: int = parameter(1, least=1, most=10_000)
    min_images: int = parameter(16, least=2)

    def statistics(self) -> Rows:
        """Return empty rows."""
        return Rows()

    def compute(self, images: Rows, reference: None = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        """Return the mean over splits.

        Raises:
            ValueError: fewer images than splits.
        """
        if images.n < self.splits:
            raise ValueError(f"{images.n} images cannot be parted into {self.splits} splits")
        return [split_score("", self.extractor.logits(images.ordered()), self.splits, bootstrap)]


@dataclass(frozen=True)
class FashionPrecisionRecall(OnFashion, SetMetric):
    """Improved precision and recall against 1,000 real test pictures, 100 of each class.

    Args:
        neighbours: k.
        min_images: with fewer it is skipped.
    """

    SPEC: ClassVar[Spec] = Spec("fashion_precision_recall", "1", "fraction", higher_is_better=True, kind="set")

    neighbours: int = parameter(3, least=1, most=100)
    min_images: int = parameter(16, least=2)

    def statistics(self) -> Rows:
        """Return empty rows."""
        return Rows()

    def compute(self, images: Rows, reference: None = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        """Return precision, then recall.

        Raises:
            ValueError: no more images than neighbours.
        """
        if images.n <= self.neighbours:
            raise ValueError(f"{self.neighbours} neighbours need more than as many images")
        ours = torch.from_numpy(images.ordered()).to(self.device)
        return manifold_values(ours, self.extractor.judge.features, self.neighbours, bootstrap)
