"""HeatKV schedules on random small geometries and orders, against a slow literal simulation.

The simulation below follows docs/methods.md (HeatKV) sentence by sentence with sets of atoms, and shares no code
with `methods/heatkv` but the data classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heatkv_cli.core.budget import Budget, decimal_up
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.heatkv.orders import random_orders
from heatkv_cli.methods.heatkv.scheduler import removal_schedule, smallest_budget

Atom = tuple[int, int, int]  # source, head, layer


@dataclass
class Literal:
    """One pass of the strict scheduler, and then one of a runtime that follows it."""

    geometry: Geometry
    budget: Fraction
    orders: dict[int, list[list[int]]]  # source -> [[head, layer], ...]
    attended: dict[tuple[int, int], set[Atom]] = field(default_factory=dict)  # (target, layer) -> history atoms
    early: list[tuple[int, ...]] = field(default_factory=list)
    final: dict[int, set[Atom]] = field(default_factory=dict)
    scheduler: dict[tuple[int, int], int] = field(default_factory=dict)
    official: dict[tuple[int, int], int] = field(default_factory=dict)
    physical: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = self.geometry
        self.N = [height * width for height, width in g.schedule.sizes]
        self.C = [sum(self.N[:t]) for t in range(len(self.N) + 1)]
        self.K, self.S, self.P = len(self.N), g.sink_scales, self.C[len(self.N) - 1]
        self.layers, self.heads = range(g.num_layers), range(g.num_heads)
        self.x = [self.count(t) for t in range(self.K)]
        self.schedule()
        self.run()

    def count(self, t: int) -> int:
        beta, slots = float(self.budget), self.geometry.num_layers * self.geometry.num_heads
        if self.C[t] <= beta * self.P or self.C[t] <= self.C[self.S]:
            return 0
        x = math.ceil(slots * (self.C[t] - beta * self.P) / (self.C[t] - min(self.C[self.S], self.C[t])))
        return max(0, min(slots, x))

    def removed_after(self, t: int) -> set[Atom]:
        if t < 0:
            return set()
        t = min(t, self.K - 2)
        sources = range(self.S, t + 1)
        return {(s, head, layer) for s in sources for head, layer in self.orders[s][: self.x[t + 1]]}

    def tokens(self, t: int, layer: int, active: set[Atom], quirk: bool) -> int:
        """Tokens of all layers after `layer` appended scale t, atom by atom."""
        total = 0
        for at in self.layers:
            for head in self.heads:
                for s in range(t + 1):
                    unwritten = s == t and (at > layer or (quirk and t < self.S))
                    if not unwritten and (s, head, at) not in active:
                        total += self.N[s]
        return total

    def schedule(self) -> None:
        g = self.geometry
        threshold = float(self.budget) * g.num_layers * g.num_heads * self.P
        exact = self.budget * g.num_layers * g.num_heads * self.P
        for t in range(self.K - 1):
            active, due = self.removed_after(t - 1), self.removed_after(t)
            early: set[Atom] = set()
            for layer in self.layers:
                active |= {atom for atom in due if atom[2] <= layer}
                candidates = sorted(
                    (atom for atom in due - active if atom[2] > layer and atom[0] < t),
                    key=lambda atom: (-atom[2], -atom[0], self.orders[atom[0]].index([atom[1], atom[2]])),
                )
                while self.tokens(t, layer, active, True) > threshold and candidates:
                    source, head, at = candidates.pop(0)
                    active.add((source, head, at))
                    early.add((source, head, at))
                    self.early.append((t, layer, at, source, head))
                self.official[t, layer] = self.tokens(t, layer, active, True)
                self.scheduler[t, layer] = self.tokens(t, layer, active, False)
                assert self.official[t, layer] <= threshold or self.official[t, layer] <= exact
            assert active == due
            self.final[t] = due
            self.attend(t, self.removed_after(t - 1) | early)
        self.final[self.K - 1] = self.removed_after(self.K - 2)
        self.attend(self.K - 1, self.removed_after(self.K - 2))

    def attend(self, t: int, absent: set[Atom]) -> None:
        for layer in self.layers:
            written = {(s, head, layer) for s in range(t) for head in self.heads}
            self.attended[t, layer] = written - absent

    def run(self) -> None:
        """A runtime: at each visit attend, drop what the next scale does not attend, write the heads that keep."""
        stored: dict[int, set[Atom]] = {layer: set() for layer in self.layers}
        for t in range(self.K):
            for layer in self.layers:
                assert stored[layer] == self.attended[t, layer]  # nothing that was dropped is needed again
                if t == self.K - 1:
                    continue
                following = self.attended[t + 1, layer]
                current = {(t, head, layer) for head in self.heads}
                assert following <= stored[layer] | current
                stored[layer] = following
                self.physical[t, layer] = sum(self.N[s] for atoms in stored.values() for s, _, _ in atoms)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    side = st.integers(1, 5)
    sizes = draw(st.lists(st.tuples(side, side), min_size=2, max_size=6))
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Geometry("random", layers, heads, 8, ScaleSchedule(tuple(sizes)), draw(st.integers(0, len(sizes) - 1)))


def budget_between(geometry: Geometry, position: Fraction) -> Budget:
    """A budget at `position` (0..1) between the smallest feasible one and 1."""
    smallest = max(smallest_budget(geometry), Fraction(1, 500))  # without sinks anything above 0 is feasible
    return Budget.parse(smallest + position * (1 - smallest))


positions = st.one_of(
    st.sampled_from([Fraction(0), Fraction(1), Fraction(1, 2)]), st.fractions(0, 1, max_denominator=1000)
)
seeds = st.integers(0, 2**31)


def literal_of(geometry: Geometry, budget: Budget, seed: int) -> Literal:
    order = random_orders(geometry, seed).order.tolist()
    return Literal(geometry, budget.ratio, dict(zip(geometry.sources, order, strict=True)))


@given(geometries(), positions, seeds)
@settings(deadline=None, max_examples=150)
def test_it_equals_the_literal_simulation(geometry: Geometry, position: Fraction, seed: int) -> None:
    budget = budget_between(geometry, position)
    schedule = removal_schedule(geometry, budget, random_orders(geometry, seed))
    literal = literal_of(geometry, budget, seed)
    K, layers = geometry.num_scales, range(geometry.num_layers)

    assert list(schedule.counts) == literal.x
    assert [tuple(event) for event in schedule.early.tolist()] == literal.early
    finals = [[t, layer, s, head] for t in range(K) for s, head, layer in literal.final[t]]
    assert schedule.final_removals() == sorted(finals)
    for target in range(K):
        for layer in layers:
            kept = schedule.kept(target, layer)
            attended = {(s, head, layer) for head, s in kept[:, :target].nonzero().tolist()}
            assert attended == literal.attended[target, layer]
    for mine, theirs in (
        (schedule.scheduler_trace(), literal.scheduler),
        (schedule.scheduler_trace(exact=False), literal.official),
        (schedule.physical_trace(), literal.physical),
    ):
        assert mine.tolist() == [[theirs[t, layer] for layer in layers] for t in range(K - 1)]


@given(geometries(), positions, seeds)
@settings(deadline=None)
def test_the_budget_holds_at_every_checkpoint(geometry: Geometry, position: Fraction, seed: int) -> None:
    budget = budget_between(geometry, position)
    schedule = removal_schedule(geometry, budget, random_orders(geometry, seed))
    assert int(schedule.scheduler_trace().max()) <= budget.ratio * geometry.full_tokens
    assert schedule.physical_peak_tokens <= schedule.scheduled_peak_tokens
    assert bool((schedule.physical_trace() <= schedule.scheduler_trace()).all())
    for rows in (1, 2):
        assert schedule.physical_peak_tokens <= budget.slots(geometry, rows)


@given(geometries(), positions, seeds)
@settings(deadline=None)
def test_no_removed_atom_returns(geometry: Geometry, position: Fraction, seed: int) -> None:
    schedule = removal_schedule(geometry, budget_between(geometry, position), random_orders(geometry, seed))
    for layer in range(geometry.num_layers):
        kept = torch.stack([schedule.kept(target, layer) for target in range(geometry.num_scales)])
        assert bool((kept[1:] <= kept[:-1]).all())
        assert bool(kept[:, :, : geometry.sink_scales].all())
        for target in range(geometry.num_scales):
            assert bool(kept[target, :, target:].all())  # the current scale is attended by every head


@given(geometries(), positions, positions, seeds)
@settings(deadline=None)
def test_budgets_nest(geometry: Geometry, first: Fraction, second: Fraction, seed: int) -> None:
    """Counts and final sets nest, so what is left after each scale, and attended at the last, does not fall."""
    orders = random_orders(geometry, seed)
    small, large = (
        removal_schedule(geometry, budget_between(geometry, position), orders) for position in sorted([first, second])
    )
    assert all(more >= less for more, less in zip(small.counts, large.counts, strict=True))
    assert bool((small.removed_from <= large.removed_from).all())
    assert bool((small.held_tokens[-1] <= large.held_tokens[-1]).all())
    ends = [schedule.scheduler_trace()[:, -1] for schedule in (small, large)]
    assert bool((ends[0] <= ends[1]).all())


@given(geometries(), seeds)
@settings(deadline=None)
def test_the_smallest_budget_is_feasible_exactly(geometry: Geometry, seed: int) -> None:
    smallest = smallest_budget(geometry)
    if smallest == 0:
        return
    orders = random_orders(geometry, seed)
    schedule = removal_schedule(geometry, Budget.parse(str(smallest)), orders)
    assert int(schedule.held_tokens[-1].sum()) == geometry.heads * geometry.sink_tokens
    assert schedule.physical_peak_tokens == geometry.heads * geometry.sink_tokens
    removal_schedule(geometry, Budget.parse(decimal_up(smallest)), orders)


@given(geometries(), seeds)
@settings(deadline=None)
def test_budget_one_removes_nothing(geometry: Geometry, seed: int) -> None:
    schedule = removal_schedule(geometry, Budget.parse(1), random_orders(geometry, seed))
    assert bool((schedule.first_absent == geometry.num_scales).all())
    assert not any(schedule.counts)
    assert schedule.physical_peak_tokens == geometry.full_tokens


@given(geometries(), positions, seeds, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_renaming_heads_renames_the_result(geometry: Geometry, position: Fraction, seed: int, shuffle: object) -> None:
    budget, order = budget_between(geometry, position), random_orders(geometry, seed).order
    names = torch.tensor(sorted(range(geometry.num_heads), key=lambda _: shuffle.random()))  # type: ignore[attr-defined]
    renamed = order.clone()
    renamed[..., 0] = names[order[..., 0]]
    mine, theirs = (removal_schedule(geometry, budget, orders) for orders in (order, renamed))
    assert torch.equal(theirs.first_absent[:, :, names], mine.first_absent)
