"""Rank statistics against scipy and by hand."""

from __future__ import annotations

import json

import pytest
import torch
from scipy.stats import kendalltau

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, BudgetError
from heatkv_cli.methods.heatkv.orders import Orders, calibrated_orders, order_ranks, random_orders
from heatkv_cli.methods.heatkv.scheduler import prune_counts
from heatkv_cli.methods.heatkv.stability import (
    compare_calibrations,
    half_split_stability,
    kendall_tau,
    removed_jaccard,
)

TOY = Geometry("toy", 4, 8, 8, ScaleSchedule.squares((1, 2, 3, 4, 5, 6)), 1)


def calibration(prompts: int, noise: float = 0.1, seed: int = 0, geometry: Geometry = TOY) -> Calibration:
    """Scores that all prompts share, plus noise of their own."""
    P, L, H, K = prompts, geometry.num_layers, geometry.num_heads, geometry.num_scales
    shared = torch.rand(1, L, H, K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    own = torch.rand(P, L, H, K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(P, L, H, K)
    scas = (shared + noise * own) / (1 + noise)  # attention mass is at most 1
    return Calibration(geometry, "0" * 64, tuple(range(P)), scas, zeros[..., 0], zeros[:, :, 0], zeros, zeros)


def test_tau_agrees_with_scipy() -> None:
    first, second = random_orders(TOY, 1), random_orders(TOY, 2)
    ranks = zip(order_ranks(first.order, TOY), order_ranks(second.order, TOY), strict=True)
    expected = [kendalltau(mine.ravel(), other.ravel()).statistic for mine, other in ranks]
    # A quotient of whole numbers, at most 1: scipy divides by two roots, which makes six roundings.
    assert kendall_tau(first, second, TOY) == pytest.approx(expected, abs=6 * 2.0**-52)
    assert kendall_tau(first, first, TOY) == [1.0] * 4
    backwards = Orders(first.order.flip(1), "backwards", TOY.schedule)
    assert kendall_tau(first, backwards, TOY) == [-1.0] * 4


def test_jaccard_by_hand() -> None:
    first, second, budget = random_orders(TOY, 1), random_orders(TOY, 2), Budget.parse("0.3")
    count = prune_counts(TOY, budget)[-1]

    def removed(orders: Orders) -> set[tuple[int, ...]]:
        return {(i, *pair) for i, entries in enumerate(orders.order.tolist()) for pair in entries[:count]}

    mine, other = removed(first), removed(second)
    assert 0 < len(mine & other) < len(mine)
    assert removed_jaccard(first, second, TOY, budget) == len(mine & other) / len(mine | other)
    assert removed_jaccard(first, first, TOY, budget) == 1
    assert removed_jaccard(first, second, TOY, Budget.parse(1)) == 1  # nothing is removed
    with pytest.raises(BudgetError):
        removed_jaccard(first, second, TOY, Budget.parse("0.001"))


def test_noise_lowers_stability() -> None:
    quiet, loud = (half_split_stability(calibration(6, noise)) for noise in (0.01, 3.0))
    assert quiet.sources == (1, 2, 3, 4)
    for better, worse in zip(quiet.tau, loud.tau, strict=True):
        assert better is not None
        assert worse is not None
        assert better > worse
    assert (quiet.jaccard["0.2"] or 0) > (loud.jaccard["0.2"] or 0) > 0
    assert quiet.jaccard["0.04"] == 1  # only the sinks are left: the order no longer matters
    same = half_split_stability(calibration(6, 0.0))
    assert same.tau_min == (1.0,) * 4
    assert set(same.jaccard_min.values()) == {1.0}


@pytest.mark.parametrize(("prompts", "pairs"), [(1, 0), (2, 1), (3, 3), (4, 3), (5, 10), (6, 10), (7, 20), (10, 20)])
def test_splits_are_distinct(prompts: int, pairs: int) -> None:
    found = half_split_stability(calibration(prompts))
    assert found.num_pairs == pairs  # all there are, or 20
    assert found == half_split_stability(calibration(prompts))
    if not pairs:
        assert found.tau == (None,) * 4
        assert found.jaccard == {"0.2": None, "0.1": None, "0.04": None}


def test_a_split_compares_the_two_halves() -> None:
    both = calibration(2)
    found = half_split_stability(both)
    assert list(found.tau) == kendall_tau(calibrated_orders(both, [0]), calibrated_orders(both, [1]), TOY)


def test_budgets_out_of_reach_are_left_out() -> None:
    large_sink = Geometry("toy", 2, 2, 8, ScaleSchedule.squares((2, 3, 4, 5)), 1)  # 4 of 29 tokens
    found = half_split_stability(calibration(4, geometry=large_sink))
    assert found.jaccard["0.1"] is None
    assert found.jaccard["0.2"] is not None


def test_two_calibrations() -> None:
    first, second = calibration(3), calibration(5, seed=1)
    found = compare_calibrations(first, second)
    assert found.num_pairs == 1
    assert list(found.tau) == kendall_tau(calibrated_orders(first), calibrated_orders(second), TOY)
    assert found.tau == found.tau_min
    assert json.loads(json.dumps(found.as_dict()))["num_pairs"] == 1
    other = Geometry("toy", 4, 8, 8, ScaleSchedule.squares((1, 2, 3, 4, 5, 7)), 1)
    with pytest.raises(ArtifactError, match="cannot be compared"):
        compare_calibrations(first, calibration(3, geometry=other))
