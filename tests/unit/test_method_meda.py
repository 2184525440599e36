"""MEDA against a literal re-statement: entropies in loops, shares by hand, LOOK-M inside a layer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import test_method_lookm as lookm
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_cache import LiteralVisit, Rule, Token, compare

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.lookm import LookM
from heatkv_cli.methods.meda import MEDA, clamped_shares
from heatkv_cli.methods.toolkit.heavy_hitters import STATE_BYTES
from heatkv_cli.methods.toolkit.selecting import grid_queries, recent_queries

TOY = Geometry("toy", 4, 2, 6, ScaleSchedule(((1, 1), (2, 2), (2, 3), (3, 3), (4, 5))), 1)
LARGE = Geometry("thirteen", 2, 1, 4, ScaleSchedule.squares((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)), 3)


def split(weights: list[float], total: int, floors: list[int], ceilings: list[int]) -> list[int]:
    """clamp(lambda w, floor, ceiling) that sums to the total, in rationals: lambda lies behind the last breakpoint."""
    if sum(ceilings) <= total:
        return ceilings
    triples = [(Fraction(w), f, c) for w, f, c in zip(weights, floors, ceilings, strict=True)]

    def clamped(factor: Fraction) -> list[Fraction]:
        return [min(max(factor * w, Fraction(f)), Fraction(c)) for w, f, c in triples]

    points = [Fraction(0), *(Fraction(bound) / w for w, f, c in triples for bound in (f, c))]
    below = max(point for point in points if sum(clamped(point)) <= total)
    slope = sum(w for w, f, c in triples if f <= below * w < c)
    exact = clamped(below + (total - sum(clamped(below))) / slope if slope else below)
    whole = [math.floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def rule(method: MEDA, geometry: Geometry, budget: Budget, rows: int) -> tuple[Rule, list[list[int]]]:
    """The rule, and the caps it will have given, [visit] -> caps that it would like all layers to have."""
    L, offsets = geometry.num_layers, geometry.schedule.offsets
    total, attended = budget.slots(geometry, rows, STATE_BYTES) // geometry.num_heads, budget.cap(geometry.schedule) * L
    mean = total // L
    window = min(32, max(1, mean // 4)) if method.window == "auto" else int(method.window)
    text = geometry.sink_tokens if method.text == "scales" else int(method.text)
    held, entropies, wishes = [0] * L, [math.nan] * L, []
    inner = LookM(merge=method.merge, text=text, share_cfg=method.share_cfg, n_obs=method.n_obs)

    def entropy(visit: LiteralVisit) -> float:
        heights, widths = geometry.schedule.sizes[visit.scale]
        values = []
        for head in visit.heads.values():
            history = len(head.tokens) - head.current
            if not history:
                return 0.0
            places = (
                grid_queries((heights, widths), window)
                if method.obs == "grid"
                else recent_queries(heights * widths, window)
            )
            for query in places.tolist():
                row = head.weights(query)[:history]
                mass = sum(row)
                values.append(-sum(w / mass * math.log(w / mass) for w in row if w))
        return sum(values) / len(values)

    def cap(visit: LiteralVisit) -> int:
        layer, tokens = visit.layer, next(iter(visit.heads.values())).current
        ahead = offsets[min(visit.scale + 2, geometry.num_scales)]
        if L * ahead <= total:
            return held[layer] + tokens
        entropies[layer] = entropy(visit)
        known = [e for e in entropies if not math.isnan(e)]
        filled = [sum(known) / len(known) if math.isnan(e) else e for e in entropies]
        weights = [math.exp(e) / sum(math.exp(x) for x in filled) for e in filled]
        lengths = [held[i] + (tokens if i >= layer else 0) for i in range(L)]
        allowed = attended if visit.last else total
        floors = [min(n, max(text + window, min(math.ceil(n / 100), allowed // L))) for n in lengths]
        if visit.last:
            left = attended - sum(held[:layer])
            wishes.append(split(weights[layer:], left, floors[layer:], lengths[layer:]))
            return wishes[-1][0]
        wishes.append(split(weights, allowed, floors, lengths))
        others = sum(held[i] if i < layer else max(held[i], floors[i]) for i in range(L) if i != layer)
        return min(wishes[-1][layer], allowed - others)

    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        size = cap(visit)
        held[visit.layer] = min(size, visit.length)
        if not visit.last:
            assert sum(held) <= total
        elif visit.layer == L - 1:
            assert sum(held) == min(attended, L * geometry.schedule.num_tokens)
        return lookm.rule(inner, geometry, size)(visit)

    return decide, wishes


VARIANTS = {
    "paper": MEDA(),
    "last queries": MEDA(obs="recent"),
    "window of two": MEDA(window=2),
    "without merging": MEDA(merge="none"),
    "average": MEDA(merge="average"),
    "no text": MEDA(text=0),
    "shared": MEDA(share_cfg=True),
    "before": MEDA(timing="before"),
}


@pytest.mark.parametrize("text", ["0.6", "0.4", "0.25"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_papers_rule(name: str, text: str) -> None:
    method, budget = VARIANTS[name], Budget.parse(text)
    literal, wishes = rule(method, TOY, budget, 2)
    policy = method.policy(Setting(TOY, budget, 2))
    assert compare(TOY, policy, literal, method.timing, seed=2, sharpness=3.0)
    assert any(len(set(caps)) > 1 for caps in wishes), "all layers always got the same"


def test_thirteen_scales() -> None:
    """Sums over a few queries: over all of them loops take minutes."""
    budget, method = Budget.parse("0.02"), MEDA(n_obs=4, window=4, merge="none")
    literal, wishes = rule(method, LARGE, budget, 1)
    assert compare(LARGE, method.policy(Setting(LARGE, budget, 1)), literal, "after", rows=1, outputs=2)
    assert any(len(set(caps)) > 1 for caps in wishes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_shares_are_exact_and_within_bounds(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    weights = data.draw(st.lists(st.floats(1e-6, 1), min_size=count, max_size=count))
    ceilings = data.draw(st.lists(st.integers(1, 500), min_size=count, max_size=count))
    floors = [data.draw(st.integers(0, c)) for c in ceilings]
    total = data.draw(st.integers(sum(floors), sum(ceilings) + 10))
    found = clamped_shares(weights, total, floors, ceilings)
    assert sum(found) == min(total, sum(ceilings))
    assert all(f <= x <= c for f, x, c in zip(floors, found, ceilings, strict=True))
    free = [i for i in range(count) if floors[i] < found[i] < ceilings[i]]
    for i in free:
        for j in free:
            assert (found[i] - 1) / weights[i] <= (found[j] + 1) / weights[j] * (1 + 1e-9)


def test_the_smallest_budget_is_named() -> None:
    with pytest.raises(BudgetError, match="smallest feasible budget"):
        MEDA().policy(Setting(TOY, Budget.parse("0.05"), 2))
    assert MEDA().policy(Setting(TOY, Budget.parse("1"), 2)).state_bytes == 0


@pytest.mark.parametrize("bad", [{"merge": "mean"}, {"text": -1}, {"window": 0}, {"window": "x"}, {"obs": "x"}])
def test_parameters_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="method meda"):
        MEDA(**bad)  # type: ignore[arg-type]
