"""cake against its rule, written out over the attention of single queries; and the shares of layers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_cache import (
    COND,
    GEOMETRY,
    ROWS,
    SHARPNESS,
    Head,
    LiteralVisit,
    Token,
    best,
    compare,
    grid,
    pooled,
    shared,
    visits,
)

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.cake import CAKE
from heatkv_cli.methods.toolkit.caps import shares

LAYERS, HEADS, LAST = GEOMETRY.num_layers, GEOMETRY.num_heads, GEOMETRY.num_scales - 1
LENGTHS, PEAK = GEOMETRY.schedule.lengths, GEOMETRY.schedule.peak_tokens


def split(weights: list[float], total: int, available: list[int]) -> list[int]:
    """Proportional shares in exact rationals: capped, excess spread evenly, largest remainders rounded up."""
    if sum(available) <= total:
        return available
    exact = [Fraction(w) for w in weights] if any(weights) else [Fraction(1)] * len(weights)
    wanted = [total * w / sum(exact) for w in exact]
    while any(w > a for w, a in zip(wanted, available, strict=True)):
        excess = sum(max(w - a, Fraction(0)) for w, a in zip(wanted, available, strict=True))
        wanted = [min(w, Fraction(a)) for w, a in zip(wanted, available, strict=True)]
        open_ = [i for i, a in enumerate(available) if wanted[i] < a]
        for i in open_:
            wanted[i] += excess / len(open_)
    out = [math.floor(w) for w in wanted]
    for i in sorted(range(len(out)), key=lambda i: (out[i] - wanted[i], i))[: total - sum(out)]:
        out[i] += 1
    return out


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_shares(weights: list[int], data: st.DataObject) -> None:
    available = data.draw(st.lists(st.integers(0, 30), min_size=len(weights), max_size=len(weights)))
    total = data.draw(st.integers(0, 60))
    found = shares([float(w) for w in weights], total, available)
    assert sum(found) == min(total, sum(available))
    assert all(0 <= x <= a for x, a in zip(found, available, strict=True))
    wanted = split([float(w) for w in weights], total, available)
    assert all(abs(x - y) <= 1 for x, y in zip(found, wanted, strict=True))  # a remainder of 1/2 rounds either way


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=40), st.integers(0, 10**6))
def test_shares_of_any_numbers_are_exact(weights: list[float], total: int) -> None:
    found = shares(weights, total, [10**6] * len(weights))
    assert sum(found) == total
    if sum(weights) > 1e-3:
        assert all(abs(x - total * w / sum(weights)) <= 1 for x, w in zip(found, weights, strict=True))


class Literal:
    """The rule, one row and head at a time.

    Args:
        method: with its parameters.
        total: tokens that all layers may store together.
        everything: tokens that all layers may attend to together at the last scale, where nothing is stored.
    """

    def __init__(self, method: CAKE, total: int, everything: int):
        self.method, self.total, self.everything = method, total, everything
        self.window = max(1, total // LAYERS // 4)
        self.preference: dict[int, float] = {}
        self.held = [0] * LAYERS
        self.ranks: dict[tuple[int, int, int], dict[int, float]] = {}  # score that each stored token was last given
        self.cascades = 0

    def statistics(self, head: Head, queries: list[int]) -> tuple[list[float], float, float]:
        """Scores, entropy and variance of one row and head."""
        rows, columns = [head.weights(q) for q in queries], range(len(head.tokens))
        own = {head.start + q for q in queries}
        mean = [sum(row[i] for row in rows) / len(rows) for i in columns]
        variance = [sum((row[i] - mean[i]) ** 2 for row in rows) / len(rows) for i in columns]
        others = [i for i in columns if i not in own]
        entropy = -sum(row[i] * math.log(row[i]) for row in rows for i in others)
        scores = [m + self.method.gamma * v for m, v in zip(mean, variance, strict=True)]
        return scores, entropy, sum(variance[i] for i in others)

    def prefer(self, found: dict[tuple[int, int], tuple[list[float], float, float]]) -> float:
        """Entropy^(1 / tau1) * variance^(1 / tau2), summed over heads first, then the mean over rows."""
        total = 0.0
        for row in range(ROWS):
            entropy = sum(found[row, head][1] for head in range(HEADS))
            variance = sum(found[row, head][2] for head in range(HEADS))
            total += entropy ** (1 / self.method.tau1) * variance ** (1 / self.method.tau2)
        return total / ROWS

    def caps(self, scale: int, layer: int) -> list[int]:
        """What all layers should hold after a visit."""
        there = [self.held[i] + (LENGTHS[scale] if i >= layer else 0) for i in range(LAYERS)]
        windows = [min(self.window, n) for n in there]
        known = list(self.preference.values())
        weights = [self.preference.get(i, sum(known) / len(known)) for i in range(LAYERS)]
        left = (self.total if scale < LAST else self.everything) - sum(windows)
        bodies = split(weights, left, [n - w for n, w in zip(there, windows, strict=True)])
        caps = [w + b for w, b in zip(windows, bodies, strict=True)]
        if scale == LAST:
            before, after = sum(self.held[:layer]), self.window * (LAYERS - 1 - layer)
            caps[layer] = min(caps[layer], self.everything - before - after)
        return caps

    def take(self, visit: LiteralVisit, caps: list[int]) -> None:
        """Other layers give their lowest tokens, one by one, until all fit."""
        for other in [*range(visit.layer), *reversed(range(visit.layer + 1, LAYERS))]:
            while sum(self.held) > self.total and self.held[other] > caps[other]:
                self.held[other] -= 1
                self.cascades += 1
                for row, head in visit.heads:
                    tokens, rank = visit.cache.tokens(other, row, head), self.ranks[other, row, head]
                    tokens.remove(min(tokens, key=lambda token: (rank[token.position], -token.position)))
        assert sum(self.held) <= self.total

    def __call__(self, visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        queries, layer = grid(visit.size, self.window), visit.layer
        statistics = {at: self.statistics(head, queries) for at, head in visit.heads.items()}
        scores = {at: each[0] for at, each in statistics.items()}
        scores = shared(scores) if self.method.share_cfg else scores
        self.preference[layer] = self.prefer(statistics)
        caps = self.caps(visit.scale, layer)
        self.held[layer] = caps[layer]
        if not visit.last:
            self.take(visit, caps)
        kept = {}
        for at, head in visit.heads.items():
            own = {head.start + q for q in queries}
            smooth = pooled(GEOMETRY, head.tokens, scores[at], own, self.method.kernel, self.method.pooling)
            kept[at] = [head.tokens[i] for i in best(smooth, caps[layer], own)]
            assert len(kept[at]) == caps[layer]
            self.ranks[layer, *at] = {
                token.position: math.inf if i in own else smooth[i] for i, token in enumerate(head.tokens)
            }
        return kept


OPTIONS = [
    {},
    {"gamma": 0.0, "kernel": 1},
    {"tau1": 0.5, "tau2": 2.0},
    {"pooling": "max", "share_cfg": True},
    {"timing": "before"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("text", ["0.2", "0.4", "0.7"])
def test_cake(text: str, options: dict[str, object]) -> None:
    method, budget = CAKE(**options), Budget.parse(text)  # type: ignore[arg-type]
    ratio = Fraction(text) * GEOMETRY.bytes_per_token / (GEOMETRY.bytes_per_token + 4)  # K, V and a score
    rule = Literal(method, int(ratio * PEAK * LAYERS), LAYERS * int(Fraction(text) * PEAK))
    policy = method.policy(Setting(GEOMETRY, budget, ROWS))
    compare(GEOMETRY, policy, rule, method.timing, ROWS, COND, seed=3, sharpness=SHARPNESS, budget=budget)
    assert rule.cascades


def test_preferences_move_tokens_between_layers() -> None:
    budget = Budget.parse("0.4")
    cache = KVCache(GEOMETRY, CAKE().policy(Setting(GEOMETRY, budget, ROWS)), ROWS, COND, budget=budget)
    for scale, layer, q, k, v in visits(GEOMETRY, ROWS, 3, SHARPNESS):
        if scale == LAST:
            break
        cache.attend(layer, q, k, v, 0.5)
        if layer == LAYERS - 1:
            cache.end_step()
    lengths = [table.lengths[0] for table in cache.tables]
    assert len(set(lengths)) > 1
    assert cache.pool.used == cache.pool.capacity == HEADS * sum(lengths)


def test_borders() -> None:
    assert type(CAKE().policy(Setting(GEOMETRY, Budget.parse(1), ROWS))) is Policy
    least = Fraction(4 * 36, 32 * PEAK)  # four tokens and their scores
    assert CAKE().policy(Setting(GEOMETRY, Budget.parse(least), ROWS)).capacity == 4 * GEOMETRY.heads
    with pytest.raises(BudgetError, match=str(least)):
        CAKE().policy(Setting(GEOMETRY, Budget.parse(least - Fraction(1, 10**9)), ROWS))
    with pytest.raises(ConfigError, match="tau1 0"):
        CAKE(tau1=0)
