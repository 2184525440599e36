"""Frechet distance of two sets of features, with a bound of its rounding error and a jackknife.

The distance is small where two large traces nearly cancel, and its root is steep where a covariance is singular: the
textbook formula, eigenvalues of a product of covariances, loses half of all digits there and gives one number on one
processor and another on the next. Here the trace of the root is a sum of singular values, each of which is good to
machine precision, and the error that remains is bounded from the data.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.scores import Value
from heatkv_cli.metrics.statistics import Gaussian, Matrix, Moments, rounding

_NEGATIVE = 1e-3
"""Eigenvalues below minus this share of the largest one are no rounding error: that matrix is no covariance."""


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared Frechet distance of two Gaussians: ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    Rule: with factors ``S = L L^T`` the trace of the root is the sum of the singular values of ``L_a^T L_b``. A
    distance that does not exceed its rounding error (see ``frechet``) is 0; so it is never negative.

    Source: Heusel et al., arXiv 1706.08500, equation 6.

    Raises:
        ArtifactError: the two have different dimensions, or a matrix is no covariance.
    """
    value, error = frechet(a, b)
    return value if value > error else 0.0


def frechet(a: Gaussian, b: Gaussian) -> tuple[float, float]:
    """Return the squared distance as computed, which may be negative, and a bound of its rounding error.

    The bound: the trace of the root grows with either covariance. So with errors of at most e_a and e_b it lies
    between its values for ``S_a - e_a, S_b - e_b`` and ``S_a + e_a, S_b + e_b``, which are computed likewise. Products,
    singular values and traces of order d add at most ``8 d u`` of the traces. All of this is about 1e-12 of the traces
    where covariances have full rank, or the rank that their number of images gives them. It is up to 1e-8 of them, the
    root of u, where one is singular for another reason and the other is not.

    Raises:
        ArtifactError: as ``frechet_distance``.
    """
    return _Spectrum.of(a).distance(_Spectrum.of(b))


@dataclass(frozen=True)
class _Factored:
    """A Gaussian with a factor of its covariance.

    Attributes:
        mu: (d,) mean, in the whole space.
        trace: trace of the covariance in the whole space.
        factor: (r, k) L with ``S = L L^T``, in the coordinates that are compared.
    """

    mu: Matrix
    trace: float
    factor: Matrix

    def distance(self, other: _Factored) -> float:
        """Return the squared distance."""
        gap = self.mu - other.mu
        root_trace = np.linalg.svd(self.factor.T @ other.factor, compute_uv=False).sum()
        return float(gap @ gap + self.trace + other.trace - 2 * root_trace)


@dataclass(frozen=True)
class _Spectrum:
    """A Gaussian with its covariance as eigenvalues and eigenvectors.

    Attributes:
        mu: (d,) mean, in the whole space.
        mu_error: bound of its error.
        values: (k,) eigenvalues in the coordinates that are compared, largest last; none is negative.
        vectors: (r, k) eigenvectors, as columns.
        trace: trace of the covariance in the whole space.
        error: bound of the error of the covariance, its decomposition included.
    """

    mu: Matrix
    mu_error: float
    values: Matrix
    vectors: Matrix
    trace: float
    error: float

    @classmethod
    def of(cls, g: Gaussian, inside: Gaussian | None = None) -> Self:
        """Decompose a Gaussian.

        A covariance of n rows has rank n - 1. Eigenvalues beyond that are rounding errors of 0, and are left out.

        Args:
            g: the Gaussian in the whole space.
            inside: the same in the coordinates of a subspace that holds all of the other side's variance; None is the
                whole space.
        """
        chosen = g if inside is None else inside
        values, vectors = np.linalg.eigh((chosen.sigma + chosen.sigma.T) / 2)
        largest = max(float(values[-1]), 0.0)
        if values[0] < -max(_NEGATIVE * largest, chosen.sigma_error):
            raise ArtifactError(
                f"the covariance is none: it has the eigenvalue {values[0]:.3g}, its largest is {largest:.3g}",
                "make the reference again from its images",
            )
        error = chosen.sigma_error + rounding(len(values) ** 2) * largest
        beyond = len(values) - (g.n - 1 if g.n else len(values))
        cut = int((values[: max(beyond, 0)] <= error).sum())
        return cls(g.mu, g.mu_error, values[cut:].clip(0), vectors[:, cut:], float(g.sigma.trace()), error)

    @property
    def factored(self) -> _Factored:
        """The Gaussian with a factor of its covariance."""
        return _Factored(self.mu, self.trace, self.vectors * np.sqrt(self.values))

    def distance(self, other: _Spectrum) -> tuple[float, float]:
        """Return the squared distance and a bound of its error."""
        _check_sizes(len(self.mu), len(other.mu))
        between = self.vectors.T @ other.vectors
        low, middle, high = (_root_trace(self, other, between, shift) for shift in (-1, 0, 1))
        gap = self.mu - other.mu
        far, traces = float(gap @ gap), self.trace + other.trace
        drift = self.mu_error + other.mu_error
        error = 2 * max(high - middle, middle - low) + self.error + other.error  # of the root, of the traces
        error += 2 * math.sqrt(far) * drift + drift**2 + rounding(len(self.mu) ** 2) * (traces + far)
        return far + traces - 2 * middle, error


def _check_sizes(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ArtifactError(
            f"features have {ours} dimensions on one side and {theirs} on the other",
            "compare with a reference of the same network",
        )


def _root_trace(a: _Spectrum, b: _Spectrum, between: Matrix, shift: int) -> float:
    """Return the trace of ``(S_a S_b)^(1/2)``, with ``shift`` times the error of each covariance added to it."""
    left, right = (np.sqrt((side.values + shift * side.error).clip(0)) for side in (a, b))
    return float(np.linalg.svd(left[:, None] * between * right, compute_uv=False).sum())


def frechet_value(
    variant: str, images: Moments, reference: Moments | Gaussian | None, bootstrap: Bootstrap = DEFAULT
) -> Value:
    """Return the Frechet distance of a set to a reference as a row, with a delete-a-group jackknife.

    The interval is the normal one. Against moments of as many images it is paired: a group is left out on both sides.
    Against a fixed reference it says what another draw of as many images would give. It does not say how far the
    distance is from that of infinitely many images: small sets are biased upwards, so only values of one n compare.

    Args:
        variant: variant of the row.
        images: moments of the set.
        reference: moments of the set it is compared with.
        bootstrap: its confidence is that of the interval; the jackknife draws nothing.

    Raises:
        ValueError: fewer than two images on a side, or no reference.
        ArtifactError: as ``frechet_distance``.
    """
    if reference is None:
        raise ValueError("a Frechet distance needs a reference")
    _check_sizes(images.dim, reference.dim)
    ours, theirs = _Side.of(images, images), _Side.of(reference, images)
    whole = theirs.spectrum()
    distance, error = ours.spectrum().distance(whole)
    groups = [int(g) for g in np.flatnonzero(images.counts)]
    value, extra = _at_least(distance, error), {"reference_n": float(theirs.n)}
    if len(groups) < 2 or images.n - images.counts.max() < 2:
        return Value(variant, value, math.nan, math.nan, math.nan, images.n, extra)
    paired = isinstance(reference, Moments) and np.array_equal(images.counts, reference.counts)
    target, left = whole.factored, []
    for g in groups:
        target = theirs.factored(g) if paired else target
        left.append(_at_least(ours.factored(g).distance(target), error))
    stderr = math.sqrt((len(left) - 1) * float(np.var(left)))
    half = bootstrap.normal * stderr
    return Value(variant, value, stderr, value - half, value + half, images.n, extra)


def _at_least(distance: float, error: float) -> float:
    return distance if distance > error else 0.0


@dataclass(frozen=True)
class _Side:
    """One side of a distance, in the whole space and, where the judged images are few, in the subspace they span.

    A direction outside of that subspace holds no variance of the images, so nothing there adds to the trace of the
    root. All decompositions are then of the size of the number of images.
    """

    whole: Moments | Gaussian
    inside: Moments | Gaussian | None

    @classmethod
    def of(cls, side: Moments | Gaussian, images: Moments) -> Self:
        """See a side from the images that are judged."""
        if images.n > images.dim:
            return cls(side, None)
        basis = _span(images)
        if isinstance(side, Moments):
            return cls(side, side.projected(basis))
        error = side.sigma_error + rounding(4 * basis.size) * float(side.sigma.trace())
        return cls(side, Gaussian(side.mu @ basis, basis.T @ side.sigma @ basis, side.n, error))

    @property
    def n(self) -> int:
        return self.whole.n

    def spectrum(self, without: int | None = None) -> _Spectrum:
        """Decompose the side, without one group where it has groups."""
        return _Spectrum.of(*self._gaussians(without))

    def factored(self, without: int) -> _Factored:
        """Factor the side without one group: by Cholesky, a tenth of the time, where its covariance has full rank."""
        whole, inside = self._gaussians(without)
        chosen = whole if inside is None else inside
        if chosen.n > chosen.dim:
            with contextlib.suppress(np.linalg.LinAlgError):
                lower = np.asarray(np.linalg.cholesky(chosen.sigma), np.float64)
                return _Factored(whole.mu, float(whole.sigma.trace()), lower)
        return _Spectrum.of(whole, inside).factored

    def _gaussians(self, without: int | None) -> tuple[Gaussian, Gaussian | None]:
        return _gaussian(self.whole, without), None if self.inside is None else _gaussian(self.inside, without)


def _gaussian(side: Moments | Gaussian, without: int | None) -> Gaussian:
    return side.gaussian(without) if isinstance(side, Moments) else side


def _span(images: Moments) -> Matrix:
    """Return orthonormal columns (d, n - 1) that span the differences of n images."""
    _, vectors = np.linalg.eigh(images.gaussian().sigma)
    return np.asarray(vectors[:, vectors.shape[1] - (images.n - 1) :])
