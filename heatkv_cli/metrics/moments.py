"""Statistics of feature sets: moments for Frechet distances, plain rows for what needs every image.

Both are additive: batches and shards in any order give the statistics of the whole. Used by the set metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.metrics.base import Features, Value

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of n feature rows, with n - 1 in the denominator."""

    mu: Matrix
    sigma: Matrix
    n: int


class Moments:
    """Count, sums and products of features, apart for each of ``groups`` groups of images, for the jackknife.

    The image at place i of the list belongs to group i % groups, so that groups depend on neither batches nor shards.
    Memory is ``8 groups d^2`` bytes whatever the number of images.

    Args:
        dim: features per image.
        groups: of the delete-a-group jackknife; at least 2.
    """

    def __init__(self, dim: int, groups: int = 10) -> None:
        if groups < 2:
            raise ValueError(f"the jackknife needs at least 2 groups, got {groups}")
        self.counts = np.zeros(groups, np.int64)
        self.sums = np.zeros((groups, dim))
        self.products = np.zeros((groups, dim, dim))

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.counts.sum())

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
        """The same in the coordinates of orthonormal columns (d, r)."""
        moments = Moments(basis.shape[1], len(self.counts))
        moments.counts, moments.sums = self.counts, self.sums @ basis
        moments.products = basis.T @ self.products @ basis
        return moments

    def gaussian(self, without: int | None = None) -> Gaussian:
        """Mean and covariance, of all images or of all but one group's.

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
        return Gaussian(mu, (products - n * np.outer(mu, mu)) / (n - 1), int(n))


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
        """(n, d) in the order of the list, whatever the order of arrival."""
        index, features = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return features[np.argsort(index, kind="stable")]


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians: ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    Rule: the trace of the root is the sum of the roots of the eigenvalues of ``S_b^(1/2) S_a S_b^(1/2)``, which is
    symmetric; eigenvalues that rounding made negative count as 0.

    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    return _Target.of(b).distance(a)


@dataclass(frozen=True)
class _Target:
    """A Gaussian made ready for distances from many others, in the coordinates of a subspace that holds those.

    What lies outside of the subspace meets nothing there: its trace and its part of the mean are a constant.
    """

    mu: Matrix
    sigma: Matrix
    root: Matrix
    outside: float

    @classmethod
    def of(cls, b: Gaussian, basis: Matrix | None = None) -> Self:
        """See from orthonormal columns (d, r); None for the whole space."""
        mu, sigma = (b.mu, b.sigma) if basis is None else (b.mu @ basis, basis.T @ b.sigma @ basis)
        values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
        root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        outside = 0.0 if basis is None else np.trace(b.sigma) - np.trace(sigma) + b.mu @ b.mu - mu @ mu
        return cls(mu, sigma, root, float(outside))

    def distance(self, a: Gaussian) -> float:
        """Squared distance of a Gaussian in the same coordinates."""
        inner = self.root @ a.sigma @ self.root
        eigenvalues = np.linalg.eigvalsh((inner + inner.T) / 2)
        cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
        gap = a.mu - self.mu
        return float(gap @ gap + np.trace(a.sigma) + np.trace(self.sigma) - 2 * cross) + self.outside


def frechet_value(variant: str, images: Moments, reference: Moments | Gaussian) -> Value:
    """Frechet distance of a set to a reference, with a delete-a-group jackknife.

    The interval is the normal 95 % one. Against moments of as many images it is paired: a group is left out on both
    sides. Against a fixed reference it says what another draw of as many images would give. It does not say how far the
    distance is from that of infinitely many images: small sets are biased upwards, so only values of one n compare.

    Raises:
        ValueError: fewer than two images on a side.
    """
    basis = None
    if images.n < images.sums.shape[1]:  # few images: all happens in the subspace that they span
        basis = _span(images.products.sum(0))
        images = images.projected(basis)
    whole = reference.gaussian() if isinstance(reference, Moments) else reference
    target = _Target.of(whole, basis)
    distance = target.distance(images.gaussian())
    groups = [int(g) for g in np.flatnonzero(images.counts)]
    extra = {"reference_n": float(whole.n)}
    if len(groups) < 2 or images.n - images.counts.max() < 2:
        return Value(variant, distance, math.nan, math.nan, math.nan, images.n, extra)
    left = []
    for g in groups:
        if isinstance(reference, Moments) and np.array_equal(images.counts, reference.counts):
            target = _Target.of(reference.gaussian(g), basis)
        left.append(target.distance(images.gaussian(g)))
    stderr = math.sqrt((len(left) - 1) * float(np.var(left)))
    return Value(variant, distance, stderr, distance - 1.96 * stderr, distance + 1.96 * stderr, images.n, extra)


def _span(products: Matrix) -> Matrix:
    """Orthonormal columns that span a few features in many dimensions; nothing is lost but time and rounding."""
    values, vectors = np.linalg.eigh(products)
    return vectors[:, values > 1e-12 * values[-1]]
