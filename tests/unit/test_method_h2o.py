"""window, streaming and h2o against their rules, written out over the attention of single queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import pytest
from literal_cache import (
    COND,
    GEOMETRY,
    ROWS,
    SHARPNESS,
    Head,
    LiteralVisit,
    Rule,
    Token,
    best,
    compare,
    grid,
    shared,
    visits,
)

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.methods.h2o import H2O
from heatkv_cli.methods.streaming import Streaming
from heatkv_cli.methods.window import Window

PEAK, TOTAL = GEOMETRY.schedule.peak_tokens, GEOMETRY.schedule.num_tokens


def recent(head: Head, size: tuple[int, int], count: int, kind: str) -> list[int]:
    """The most recent tokens; `grid` spreads them over the newest map where that has more."""
    if kind == "grid" and count < head.current:
        return [head.start + i for i in grid(size, count)]
    return list(range(len(head.tokens) - count, len(head.tokens)))


def newest(sink: int, cap: int, kind: str) -> Rule:
    """The first tokens of the sequence and the most recent ones."""

    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        if visit.length <= cap:
            return {}
        return {
            at: [head.tokens[i] for i in [*range(sink), *recent(head, visit.size, cap - sink, kind)]]
            for at, head in visit.heads.items()
        }

    return decide


def beside(method: Method, timing: str, budget: Budget, literal: Rule) -> int:
    policy = method.policy(Setting(GEOMETRY, budget, ROWS))
    return compare(GEOMETRY, policy, literal, timing, ROWS, COND, sharpness=SHARPNESS, budget=budget)


@pytest.mark.parametrize("kind", ["raster", "grid"])
@pytest.mark.parametrize("timing", ["after", "before"])
@pytest.mark.parametrize("text", ["0.2", "0.45"])
def test_window(text: str, timing: str, kind: str) -> None:
    cap = int(Fraction(text) * PEAK)
    chosen = beside(Window(timing=timing, recent=kind), timing, Budget.parse(text), newest(0, cap, kind))
    assert chosen > GEOMETRY.num_layers


@pytest.mark.parametrize("kind", ["raster", "grid"])
@pytest.mark.parametrize("timing", ["after", "before"])
@pytest.mark.parametrize(("sink", "tokens"), [("scales", 5), (3, 3)])
def test_streaming(sink: str | int, tokens: int, timing: str, kind: str) -> None:
    cap = int(Fraction("0.4") * PEAK)
    method = Streaming(sink=sink, timing=timing, recent=kind)
    beside(method, timing, Budget.parse("0.4"), newest(tokens, cap, kind))


def heavy(method: H2O, cap_of: Callable[[int, int], int]) -> Rule:
    """Half the cap for recent tokens, half for those that got the most attention since they exist."""
    sums: dict[tuple[int, int, int, int], float] = defaultdict(float)  # by layer, row, head, position

    def received(visit: LiteralVisit, row: int, h: int, head: Head) -> list[float]:
        queries = head.current
        seen = grid(visit.size, method.n_obs) if 0 < method.n_obs < queries else range(queries)
        factor = (1 if method.per_scale_mean else queries) / len(seen)
        keys = [(visit.layer, row, h, token.position) for token in head.tokens]
        for key, got in zip(keys, head.sums(seen), strict=True):
            sums[key] += got * factor
        return [sums[key] for key in keys]

    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        scores = {at: received(visit, *at, head) for at, head in visit.heads.items()}
        scores = shared(scores) if method.share_cfg else scores
        cap = cap_of(visit.scale, visit.layer)
        if visit.length <= cap:
            return {}
        kept = {}
        for at, head in visit.heads.items():
            always = set(recent(head, visit.size, cap // 2, method.recent))
            kept[at] = [head.tokens[i] for i in best(scores[at], cap, always)]
        return kept

    return decide


def h2o_cap(ratio: Fraction) -> int:
    """A token costs K, V and its sum: what remains of the cap."""
    return int(ratio * PEAK * GEOMETRY.bytes_per_token / (GEOMETRY.bytes_per_token + 4))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("0.2", {}),
        ("0.6", {}),
        ("0.95", {}),
        ("0.4", {"recent": "grid"}),
        ("0.4", {"n_obs": 7}),
        ("0.4", {"per_scale_mean": True}),
        ("0.4", {"per_scale_mean": True, "n_obs": 7}),
        ("0.4", {"share_cfg": True}),
        ("0.4", {"timing": "before"}),
    ],
)
def test_h2o(text: str, options: dict[str, object]) -> None:
    method = H2O(**options)  # type: ignore[arg-type]
    cap, last = h2o_cap(Fraction(text)), GEOMETRY.num_scales - 1

    def caps(scale: int, layer: int) -> int:
        return int(Fraction(text) * PEAK) if scale == last else cap  # what is only attended needs no sums

    assert beside(method, method.timing, Budget.parse(text), heavy(method, caps))


@pytest.mark.parametrize(("rho", "stored"), [("0", PEAK), ("0.2", h2o_cap(Fraction(1))), ("0.7", 21)])
def test_h2o_on_hack_s_axis(rho: str, stored: int) -> None:
    """Caps follow rho; sums are paid for, and there are none where nothing is ever evicted."""
    attended = int((1 - Fraction(rho)) * TOTAL)
    if rho == "0.7":
        stored = h2o_cap((1 - Fraction(rho)) * TOTAL / PEAK)
    method, budget = H2O(timing="before"), Budget.from_rho(rho, GEOMETRY.schedule)
    literal = heavy(method, lambda scale, layer: attended if scale == GEOMETRY.num_scales - 1 else stored)
    assert bool(beside(method, "before", budget, literal)) == (rho != "0")
    policy = method.policy(Setting(GEOMETRY, budget, ROWS))
    assert policy.state_bytes == (0 if rho == "0" else 4)
    assert policy.capacity == GEOMETRY.heads * min(stored, PEAK)


def test_no_state_where_nothing_can_be_evicted() -> None:
    policy = H2O().policy(Setting(GEOMETRY, Budget.parse(1), ROWS))
    assert type(policy) is Policy
    assert policy.state_bytes == 0
    assert H2O(timing="before").policy(Setting(GEOMETRY, Budget.parse(1), ROWS)).state_bytes == 4


def test_sums_weigh_what_they_are_charged() -> None:
    budget = Budget.parse("0.4")
    policy = H2O().policy(Setting(GEOMETRY, budget, ROWS))
    cache = KVCache(GEOMETRY, policy, ROWS, COND, budget=budget)
    for scale, layer, q, k, v in visits(GEOMETRY, ROWS, 1, SHARPNESS):
        cache.attend(layer, q, k, v, 0.5)
        if scale < GEOMETRY.num_scales - 1:
            held = sum(sums.nbytes for sums in policy._sums if sums is not None)  # type: ignore[attr-defined]
            assert held == cache.pool.used * ROWS * policy.state_bytes
        if layer == GEOMETRY.num_layers - 1:
            cache.end_step()
    assert cache.ledger.alloc_bytes <= budget.ratio * GEOMETRY.full_bytes(ROWS)


def test_smallest_budgets() -> None:
    for method, least in [(Window(), Fraction(1, PEAK)), (H2O(), Fraction(36, 32 * PEAK))]:
        assert method.policy(Setting(GEOMETRY, Budget.parse(least), ROWS)).capacity == GEOMETRY.heads
        with pytest.raises(BudgetError, match=str(least)):
            method.policy(Setting(GEOMETRY, Budget.parse(least - Fraction(1, 10**9)), ROWS))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Window(timing="never"), "timing is 'never'"),  # type: ignore[arg-type]
        (lambda: Streaming(recent="diagonal"), "recent is 'diagonal'"),  # type: ignore[arg-type]
        (lambda: H2O(n_obs=-1), "n_obs is -1"),
    ],
)
def test_bad_parameters(build: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()  # type: ignore[operator]
