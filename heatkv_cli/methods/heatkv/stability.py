"""Can a calibration be trusted? Rank statistics of removal orders over prompt subsets and between calibrations.

Two numbers are reported: Kendall's tau per source scale (do the orders agree as rankings?) and the Jaccard index of the
finally removed sets at a few budgets (would the same atoms go?). Half splits of the prompts show how much of an order
is the prompts' choice; a comparison of two calibrations shows what another prompt style, model or guidance changes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import ArtifactError, BudgetError
from heatkv_cli.methods.heatkv.orders import Orders, ascending_orders, calibrated_orders, order_ranks
from heatkv_cli.methods.heatkv.scheduler import prune_counts

BUDGETS = ("0.2", "0.1", "0.04")
"""Budgets at which removed sets are compared."""


@dataclass(frozen=True)
class Stability:
    """Agreement of pairs of removal orders.

    Args:
        num_pairs: pairs that were compared; 0 when there was nothing to split, then all values are None.
        sources: the source scales, in the order of `tau` and `tau_min`.
        tau: Kendall's tau per source scale, mean over the pairs; tau_min: the worst pair.
        jaccard: per budget text, Jaccard index of the finally removed sets, mean over the pairs (1 when neither
            removes anything); jaccard_min: the worst pair. None where the model cannot meet the budget.
    """

    num_pairs: int
    sources: tuple[int, ...]
    tau: tuple[float | None, ...]
    tau_min: tuple[float | None, ...]
    jaccard: dict[str, float | None]
    jaccard_min: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, for a header or meta.json."""
        return asdict(self)


def half_split_stability(
    calibration: Calibration, budgets: Sequence[str] = BUDGETS, num_splits: int = 20, seed: int = 0
) -> Stability:
    """Compare the orders of the two halves of the prompts, over random splits.

    Args:
        calibration: with at least two prompts; with one there is nothing to compare (num_pairs = 0).
        budgets: kept fractions at which removed sets are compared.
        num_splits: splits to draw; all distinct ones when there are fewer.
        seed: seed of the draw.
    """
    scores = calibration.prompt_scores()  # (P, num_sources, L, H)
    pairs = []
    for half, rest in _half_splits(len(scores), num_splits, seed):
        halves = (scores[half].mean(0), scores[rest].mean(0))
        first, second = (Orders(ascending_orders(score), "half", calibration.geometry.schedule) for score in halves)
        pairs.append((first, second))
    return _summary(calibration.geometry, pairs, budgets)


def compare_calibrations(first: Calibration, second: Calibration, budgets: Sequence[str] = BUDGETS) -> Stability:
    """Compare the orders of two calibrations of the same layers, heads and scales; one pair.

    Raises:
        ArtifactError: they cover other layers, heads, sinks or scales. The model's name may differ.
    """
    mine, other = first.geometry, second.geometry
    key = ("num_layers", "num_heads", "schedule", "sink_scales")
    if any(getattr(mine, name) != getattr(other, name) for name in key):
        raise ArtifactError(
            f"calibrations of {mine} and {other} cannot be compared", "compare calibrations of one architecture"
        )
    return _summary(mine, [(calibrated_orders(first), calibrated_orders(second))], budgets)


def kendall_tau(first: Orders, second: Orders, geometry: Geometry) -> list[float]:
    """Return Kendall's tau between two orders for each source scale, in -1..1 (1: the same ranking).

    1 - 4 * inversions / (n (n-1)): an order is a permutation, so there are no ties.
    """
    taus = []
    for order, ranks in zip(first.order, order_ranks(second.order, geometry), strict=True):
        permutation = ranks[order[:, 1], order[:, 0]].numpy()  # the second's ranks, in the first's order
        inversions = int(np.triu(permutation[:, None] > permutation, 1).sum())
        pairs = geometry.heads * (geometry.heads - 1) / 2
        taus.append(1 - 2 * inversions / pairs if pairs else 1.0)
    return taus


def removed_jaccard(first: Orders, second: Orders, geometry: Geometry, budget: Budget) -> float:
    """Return the Jaccard index of the atoms that two orders have finally removed entering the last scale.

    All source scales together; 1 when the budget removes nothing.

    Raises:
        BudgetError: below the smallest feasible budget.
    """
    count = prune_counts(geometry, budget)[-1]
    both = either = 0
    for mine, other in zip(order_ranks(first.order, geometry), order_ranks(second.order, geometry), strict=True):
        both += int(((mine < count) & (other < count)).sum())
        either += int(((mine < count) | (other < count)).sum())
    return both / either if either else 1.0


def _half_splits(num_prompts: int, num_splits: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield distinct splits into halves; for an odd number the second half has one prompt more."""
    if num_prompts < 2:
        return
    size = num_prompts // 2
    # With an even number each split is found twice, once from either half: fix the half of prompt 0.
    fixed = num_prompts % 2 == 0
    number = math.comb(num_prompts - fixed, size - fixed)
    if number <= num_splits:
        chosen = {prompts for prompts in combinations(range(num_prompts), size) if not fixed or 0 in prompts}
    else:
        generator, chosen = random.Random(seed), set()
        while len(chosen) < num_splits:
            half = set(generator.sample(range(num_prompts), size))
            if fixed and 0 not in half:
                half = set(range(num_prompts)) - half
            chosen.add(tuple(sorted(half)))
    for chosen_half in sorted(chosen):
        yield list(chosen_half), [prompt for prompt in range(num_prompts) if prompt not in chosen_half]


def _summary(geometry: Geometry, pairs: list[tuple[Orders, Orders]], budgets: Sequence[str]) -> Stability:
    taus = [kendall_tau(first, second, geometry) for first, second in pairs]
    jaccards: dict[str, list[float]] = {}
    for text in budgets:
        budget = Budget.parse(text)
        try:
            jaccards[text] = [removed_jaccard(first, second, geometry, budget) for first, second in pairs]
        except BudgetError:  # a small model may not reach 4 %: nothing to compare there
            jaccards[text] = []
    per_source = [[tau[index] for tau in taus] for index in range(len(geometry.sources))]
    return Stability(
        num_pairs=len(pairs),
        sources=tuple(geometry.sources),
        tau=tuple(_mean(values) for values in per_source),
        tau_min=tuple(min(values, default=None) for values in per_source),
        jaccard={text: _mean(values) for text, values in jaccards.items()},
        jaccard_min={text: min(values, default=None) for text, values in jaccards.items()},
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
