"""Statistics of feature sets: moments for Frechet distances, plain rows for what needs every image.

Both are additive: batches and shards in any order give the statistics of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.metrics.scores import Features

Matrix = NDArray[np.float64]
GROUPS = 10
"""Groups of the delete-a-group jackknife."""
ROUNDING = 2.0**-53
"""u: largest relative error of one operation in double precision."""


def rounding(additions: int) -> float:
    """Return the relative rounding error of a sum of many numbers, relative to the sum of their absolute values.

    The sure bound is ``additions u``, met only if all errors point one way. Taken as independent they stay below
    ``8 sqrt(additions) u`` but with probability 2 exp(-32) (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), theorem
    2.4), in whatever order and with whatever instructions a library adds.
    """
    return 8 * max(additions, 1) ** 0.5 * ROUNDING


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of feature rows.

    Attributes:
        mu: (d,) mean.
        sigma: (d, d) covariance, with n - 1 in the denominator.
        n: number of rows; 0 where it is not known.
        sigma_error: bound of the rounding error of ``sigma``, in the spectral norm.
        mu_error: bound of the rounding error of ``mu``, as a length.
    """

    mu: Matrix
    sigma: Matrix
    n: int
    sigma_error: float = 0.0
    mu_error: float = 0.0

    @property
    def dim(self) -> int:
        """Features per row."""
        return len(self.mu)


class Moments:
    """Count, sums and products of features, apart for each of ``groups`` groups of images, for the jackknife.

    The image at place i of the list belongs to group i % groups, so that groups depend on neither batches nor shards.
    Memory is ``8 groups d^2`` bytes whatever the number of images.

    Args:
        dim: features per image.
        groups: groups of the delete-a-group jackknife; at least 2.

    Attributes:
        counts: (groups,) images.
        sums: (groups, d) sums of features.
        products: (groups, d, d) sums of outer products.
        additions: numbers behind an entry beyond one per image, for error bounds.
    """

    def __init__(self, dim: int, groups: int = GROUPS) -> None:
        if groups < 2:
            raise ValueError(f"the jackknife needs at least 2 groups, got {groups}")
        self.counts = np.zeros(groups, np.int64)
        self.sums = np.zeros((groups, dim))
        self.products = np.zeros((groups, dim, dim))
        self.additions = groups

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.counts.sum())

    @property
    def dim(self) -> int:
        """Features per image."""
        return int(self.sums.shape[1])

    def add(self, index: Sequence[int], features: Features) -> None:
        """Add images by their places in the list and their (n, d) features."""
        group = np.asarray(index, np.int64) % len(self.counts)
        for g in np.unique(group):
            rows = features[group == g].astype(np.float64)
            self.counts[g] += len(rows)
            self.sums[g] += rows.sum(0)
            self.products[g] += rows.T @ rows

    def merge(self, other: Self) -> None:
        """Add the statistics of other images."""
        self.counts += other.counts
        self.sums += other.sums
        self.products += other.products

    def projected(self, basis: Matrix) -> Moments:
        """Return the same in the coordinates of orthonormal columns (d, r)."""
        moments = Moments(basis.shape[1], len(self.counts))
        moments.counts, moments.sums = self.counts, self.sums @ basis
        moments.products = basis.T @ self.products @ basis
        moments.additions += 4 * basis.size  # two products with columns of length d; errors of r columns add up
        return moments

    def gaussian(self, without: int | None = None) -> Gaussian:
        """Return mean and covariance, of all images or of all but one group's.

        Raises:
            ValueError: fewer than two images remain.
        """
        n, total, products = self.counts.sum(), self.sums.sum(0), self.products.sum(0)
        if without is not None:
            n = n - self.counts[without]
            total, products = total - self.sums[without], products - self.products[without]
        if n < 2:
            raise ValueError(f"a covariance needs at least two images, got {n}")
        mu = total / n
        sigma = (products - n * np.outer(mu, mu)) / (n - 1)
        # A product of two float32 numbers is exact, so only sums round. n |mu|^2 is at most the trace of the products,
        # so that the trace bounds the error of both terms; mu stands in the second one twice.
        energy, error = float(self.products.sum(0).trace()), rounding(self.n + self.additions)
        return Gaussian(mu, (sigma + sigma.T) / 2, int(n), 4 * error * energy / (n - 1), error * (energy / n) ** 0.5)


class Rows:
    """The features themselves, for what is not a sum (Inception score, precision and recall): 4 n d bytes."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], Features]] = []

    @property
    def n(self) -> int:
        """Number of images."""
        return sum(len(index) for index, _ in self._parts)

    def add(self, index: Sequence[int], features: Features) -> None:
        """Add images by their places in the list and their (n, d) features."""
        self._parts.append((np.asarray(index, np.int64), features))

    def merge(self, other: Self) -> None:
        """Add the rows of other images."""
        self._parts += other._parts

    def ordered(self) -> Features:
        """Return (n, d) features in the order of the list, whatever the order of arrival."""
        index, features = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return features[np.argsort(index, kind="stable")]
