"""Schedules of the published orders at random budgets, against the scheduler in words.

`literal_schedule` follows docs/methods.md (HeatKV) word by word with sets of atoms: half a second for the 2B, two
for the 8B. The package's own is compared atom by atom.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from test_schedules import geometry_of, orders_of
from torch import Tensor

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry
from heatkv_cli.methods.heatkv.orders import Orders
from heatkv_cli.methods.heatkv.scheduler import removal_schedule

MODELS = ("infinity-2b", "infinity-8b")
Atom = tuple[int, int, int]  # source, layer, head


def literal_counts(geometry: Geometry, beta: float) -> list[int]:
    offsets, slots, sinks = geometry.schedule.offsets, geometry.heads, geometry.sink_tokens
    counts = []
    for t in range(geometry.num_scales):
        over = offsets[t] - beta * geometry.schedule.peak_tokens
        enough = over <= 0 or offsets[t] <= sinks
        counts.append(0 if enough else min(slots, math.ceil(slots * over / (offsets[t] - sinks))))
    return counts


def literal_schedule(geometry: Geometry, budget: Budget, orders: Orders) -> tuple[list[int], list[list[int]], Tensor]:
    """Counts, early activations (t, trigger layer, layer, source, head), first target at which an atom is absent."""
    N, K, L, H = geometry.schedule.lengths, geometry.num_scales, geometry.num_layers, geometry.num_heads
    ranked = {
        s: [(s, layer, head) for head, layer in pairs.tolist()]
        for s, pairs in zip(geometry.sources, orders.order, strict=True)
    }
    rank = {atom: place for pairs in ranked.values() for place, atom in enumerate(pairs)}
    counts = literal_counts(geometry, budget.as_float)
    threshold = budget.as_float * geometry.heads * geometry.schedule.peak_tokens
    absent = torch.full((K, L, H), K)
    early: list[list[int]] = []
    active: set[Atom] = set()
    for t in range(K - 1):
        due = {atom for s in geometry.sources if s <= t for atom in ranked[s][: counts[t + 1]]}
        waiting = sorted(
            (atom for atom in due - active if atom[0] < t), key=lambda atom: (-atom[1], -atom[0], rank[atom])
        )
        total = geometry.heads * geometry.schedule.offsets[t] - sum(N[atom[0]] for atom in active)
        for layer in range(L):
            total += H * N[t] * (t >= geometry.sink_scales)  # a quirk of the official scheduler: never the peak
            new = {atom for atom in due - active if atom[1] <= layer}
            total -= sum(N[atom[0]] for atom in new)
            active |= new
            for atom in waiting:
                if total <= threshold:
                    break
                if atom in active or atom[1] <= layer:
                    continue
                active.add(atom)
                total -= N[atom[0]]
                early.append([t, layer, atom[1], atom[0], atom[2]])
                absent[atom[0], atom[1], atom[2]] = t
            assert total <= threshold
        assert active == due
        for source, layer, head in due:
            absent[source, layer, head] = min(int(absent[source, layer, head]), t + 1)
    return counts, early, absent


def check(model: str, text: str) -> None:
    geometry, budget = geometry_of(model), Budget.parse(text)
    orders = orders_of(model)
    counts, early, absent = literal_schedule(geometry, budget, orders)
    schedule = removal_schedule(geometry, budget, orders)
    assert list(schedule.counts) == counts
    assert schedule.early.tolist() == early
    assert torch.equal(schedule.first_absent.long(), absent)


def some_budgets(model: str, count: int) -> list[str]:
    dice = random.Random(model)
    smallest = 21 / 6425
    return ["21/6425", *(f"{smallest + (1 - smallest) * dice.random() ** 2 + 1e-9:.9f}" for _ in range(count - 1))]


@pytest.mark.golden
@pytest.mark.parametrize(("model", "text"), [(model, text) for model in MODELS for text in some_budgets(model, 3)])
def test_it_equals_the_literal_one(model: str, text: str) -> None:
    check(model, text)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_it_equals_the_literal_one_at_fifty_budgets(model: str) -> None:
    for text in some_budgets(model, 50):
        check(model, text)
