"""Frechet distances against 60-digit arithmetic: the error stays below the bound that comes with each distance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_pictures import moments

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.frechet import frechet, frechet_distance, frechet_value
from heatkv_cli.metrics.intervals import Bootstrap
from heatkv_cli.metrics.statistics import ROUNDING, Gaussian, Moments

mp: Any = pytest.importorskip("mpmath")
mp.mp.dps = 60
RNG = np.random.default_rng(0)
DIM = 10
DECAY = np.diag(10.0 ** -np.arange(DIM))
ALIVE = np.arange(DIM) < 6
BASE, FEW = RNG.normal(size=(40, DIM)), RNG.normal(size=(4, DIM))


def exact(x: np.ndarray, y: np.ndarray) -> Any:
    """The distance from the float32 features themselves, in 60 digits."""
    means, covariances = [], []
    for rows in (x, y):
        matrix = mp.matrix(rows.astype(np.float64).tolist())
        mean = [sum(matrix[:, j]) / len(rows) for j in range(DIM)]
        for j in range(DIM):
            for i in range(len(rows)):
                matrix[i, j] -= mean[j]
        means.append(mean)
        covariances.append(matrix.T * matrix / (len(rows) - 1))
    a, b = covariances
    values, vectors = mp.eigsy(a)
    root = vectors * mp.diag([mp.sqrt(max(value, 0)) for value in values]) * vectors.T
    shared = sum(mp.sqrt(max(value, 0)) for value in mp.eigsy(root * b * root, eigvals_only=True))
    trace = sum(a[i, i] + b[i, i] for i in range(DIM))
    return sum((p - q) ** 2 for p, q in zip(*means, strict=True)) + trace - 2 * shared


CASES = {
    "full rank": (BASE, RNG.normal(0.3, 1.3, (40, DIM)), 1e-12),
    "the same": (BASE, BASE, 1e-12),
    "almost the same": (BASE, BASE + 1e-5 * RNG.normal(size=BASE.shape), 1e-12),
    "fewer images than features": (FEW, RNG.normal(size=(40, DIM)), 1e-12),
    "fewer reference images than features": (BASE, FEW, 1e-12),
    "few on both sides": (FEW, RNG.normal(size=(5, DIM)), 1e-12),
    "few and the same": (FEW, FEW, 1e-12),
    "few and almost the same": (FEW, FEW + 1e-4 * RNG.normal(size=FEW.shape), 1e-12),
    "a spectrum over ten decades": (BASE @ DECAY, RNG.normal(size=(40, DIM)) @ DECAY, 1e-12),
    "that against a flat one": (BASE @ DECAY, RNG.normal(size=(40, DIM)), 1e-6),
    "dead features on both sides": (BASE * ALIVE, RNG.normal(size=(40, DIM)) * ALIVE, 1e-12),
    "dead features on one side": (BASE * ALIVE, RNG.normal(size=(40, DIM)), 1e-6),
    "images twice": (np.repeat(FEW, 2, 0), RNG.normal(size=(40, DIM)), 1e-6),
    "a large mean": (100 + BASE, 100 + RNG.normal(size=(40, DIM)), 1e-8),
}


@pytest.mark.parametrize("name", CASES)
def test_error_stays_below_its_bound_and_the_bound_is_small(name: str) -> None:
    x, y, share = CASES[name]
    x, y = x.astype(np.float32), y.astype(np.float32)
    truth = exact(x, y)
    a, b = moments(x).gaussian(), moments(y).gaussian()
    value, error = frechet(a, b)
    assert abs(value - truth) <= error <= share * 10 * (np.trace(a.sigma) + np.trace(b.sigma) + 1)
    assert frechet_distance(a, b) == (value if value > error else 0)
    in_span = frechet_value("", moments(x), moments(y)).value  # the way that a metric takes, in the images' subspace
    assert abs(in_span - truth) <= 2 * error + 1e-11
    assert min(in_span, frechet_distance(b, a)) >= 0


def test_a_set_is_at_no_distance_from_itself() -> None:
    for rows in (BASE, FEW, BASE * ALIVE, 1e6 * FEW, np.repeat(FEW, 3, 0), np.zeros((5, DIM))):
        found = frechet_value("", moments(rows.astype(np.float32)), moments(rows.astype(np.float32)))
        assert (found.value, found.stderr, found.low, found.high) == (0, 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 2**32 - 1), st.floats(0, 2), st.floats(-4, 4))
def test_distance_is_symmetric_never_negative_and_scales(n: int, m: int, seed: int, gap: float, power: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    y = (rng.normal(size=(m, DIM)) + gap).astype(np.float32)
    a, b = moments(x).gaussian(), moments(y).gaussian()
    value, error = frechet(a, b)
    assert frechet(b, a)[0] == pytest.approx(value, abs=2 * error)
    assert value > -error
    scale = 2.0 ** round(power)  # exact in binary: nothing is rounded anew
    larger = frechet(Gaussian(scale * a.mu, scale**2 * a.sigma, n), Gaussian(scale * b.mu, scale**2 * b.sigma, m))
    assert larger[0] == pytest.approx(scale**2 * value, abs=3 * scale**2 * error)


def test_known_spectra_in_a_turned_frame() -> None:
    """Covariances that commute: the distance is the sum over directions of (sqrt(l) - sqrt(m))^2."""
    turn, _ = np.linalg.qr(RNG.normal(size=(200, 200)))
    for ours, theirs in ((np.linspace(0.1, 5, 200), np.linspace(5, 0.1, 200)), (np.logspace(-6, 2, 200), np.ones(200))):
        a, b = (Gaussian(np.zeros(200), (turn * values) @ turn.T, 0) for values in (ours, theirs))
        value, error = frechet(a, b)
        # The products that make the input round too: 200 additions an entry, over 200 directions.
        rounded = 200 * 200 * ROUNDING * (ours.max() + theirs.max()) * math.sqrt(theirs.max() / ours.min())
        assert value == pytest.approx(((np.sqrt(ours) - np.sqrt(theirs)) ** 2).sum(), abs=error + rounded)


def test_moments_know_their_error() -> None:
    rows = (50 + RNG.normal(size=(3000, 6))).astype(np.float32)
    whole = Moments(6)
    for start in range(0, 3000, 7):
        whole.add(range(start, min(start + 7, 3000)), rows[start : start + 7])
    found = whole.gaussian()
    precise = rows.astype(np.longdouble)
    centred = precise - precise.mean(0)
    gap = np.linalg.norm((found.sigma - centred.T @ centred / 2999).astype(np.float64), 2)
    assert gap <= found.sigma_error <= 1e-7
    assert np.linalg.norm((found.mu - precise.mean(0)).astype(np.float64)) <= found.mu_error <= 1e-9


@pytest.mark.parametrize("count", [60, 8])
def test_the_jackknife_is_that_of_the_distances_without_a_group(count: int) -> None:
    """By Cholesky for many images, in their subspace for few; here by eigenvalues in the whole space."""
    x, y = (RNG.normal(gap, 1, (count, DIM)).astype(np.float32) for gap in (0, 0.5))
    a, b = moments(x, 4), moments(y, 4)
    for reference in (b, b.gaussian()):
        left = [
            frechet(a.gaussian(g), b.gaussian(g) if isinstance(reference, Moments) else reference) for g in range(4)
        ]
        stderr = math.sqrt(3 * np.var([value for value, _ in left]))
        assert frechet_value("", a, reference).stderr == pytest.approx(stderr, rel=1e-6)


def test_intervals_take_the_confidence_of_the_run() -> None:
    a, b = moments(BASE.astype(np.float32)), moments((BASE + 1).astype(np.float32)).gaussian()
    usual, wide = (frechet_value("", a, b, Bootstrap(confidence=c)) for c in (0.95, 0.99))
    assert usual.high - usual.value == pytest.approx(1.96 * usual.stderr)
    assert wide.high - wide.value == pytest.approx(2.58 * wide.stderr) and wide.value == usual.value


def test_what_is_no_pair_of_gaussians() -> None:
    a = moments(BASE.astype(np.float32))
    with pytest.raises(ArtifactError, match="10 dimensions on one side and 3 on the other"):
        frechet_value("", a, Gaussian(np.zeros(3), np.eye(3), 9))
    with pytest.raises(ArtifactError, match="the covariance is none: it has the eigenvalue -2"):
        frechet_value("", a, Gaussian(np.zeros(DIM), np.diag([-2.0] + [1.0] * (DIM - 1)), 9))
    with pytest.raises(ValueError, match="needs a reference"):
        frechet_value("", a, None)
    with pytest.raises(ValueError, match="at least two images"):
        frechet_value("", moments(BASE[:1].astype(np.float32)), a)
