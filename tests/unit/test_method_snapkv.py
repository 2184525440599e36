"""snapkv and pyramidkv against their rules, written out over the attention of single queries."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_cache import (
    COND,
    GEOMETRY,
    ROWS,
    SHARPNESS,
    LiteralVisit,
    Rule,
    Token,
    best,
    compare,
    grid,
    pooled,
    shared,
)

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.pyramidkv import PyramidKV, pyramid
from heatkv_cli.methods.snapkv import SnapKV
from heatkv_cli.methods.toolkit.caps import early_caps
from heatkv_cli.methods.toolkit.selecting import WindowMethod

PEAK, LENGTHS = GEOMETRY.schedule.peak_tokens, GEOMETRY.schedule.lengths
LAYERS, LAST = GEOMETRY.num_layers, GEOMETRY.num_scales - 1


def rule(method: WindowMethod, window: int, cap_of: Callable[[int, int], int]) -> Rule:
    """Observe w current queries, sum, pool; keep the window and the highest: `cap_of(scale, layer)` tokens."""

    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        cap, tokens = cap_of(visit.scale, visit.layer), LENGTHS[visit.scale]
        if visit.length <= cap:
            return {}
        queries = grid(visit.size, window) if method.obs == "grid" else list(range(max(0, tokens - window), tokens))
        scores = {at: head.sums(queries) for at, head in visit.heads.items()}
        scores = shared(scores) if method.share_cfg else scores
        kept = {}
        for at, head in visit.heads.items():
            own = {head.start + q for q in queries}
            smooth = pooled(GEOMETRY, head.tokens, scores[at], own, method.kernel, method.pooling)
            kept[at] = [head.tokens[i] for i in best(smooth, cap, own)]
        return kept

    return decide


def beside(method: WindowMethod, text: str, literal: Rule) -> int:
    budget = Budget.parse(text)
    policy = method.policy(Setting(GEOMETRY, budget, ROWS))
    return compare(GEOMETRY, policy, literal, method.timing, ROWS, COND, sharpness=SHARPNESS, budget=budget)


OPTIONS = [
    {},
    {"obs": "recent"},
    {"pooling": "max"},
    {"kernel": 1},
    {"kernel": 7, "window": 3},
    {"share_cfg": True},
    {"timing": "before"},
    {"timing": "before", "window": 6, "obs": "recent", "pooling": "max", "share_cfg": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("text", ["0.2", "0.45"])
def test_snapkv(text: str, options: dict[str, object]) -> None:
    method, cap = SnapKV(**options), int(Fraction(text) * PEAK)  # type: ignore[arg-type]
    window = cap // 4 if method.window == "auto" else int(method.window)
    assert beside(method, text, rule(method, window, lambda scale, layer: cap)) > LAYERS


def published_pyramid(layers: int, mean: int, window: int, length: int, beta: int = 20) -> list[int]:
    """Layer budgets as published, rounding and all."""
    smallest = (mean - window) // beta
    largest = (mean - window) * 2 - smallest
    if largest > length - window:
        largest = length - window
        smallest = (mean - window) * 2 - largest
    step = (largest - smallest) // (layers - 1)
    return [largest - layer * step + window for layer in range(layers)]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(2, 400), st.data())
def test_pyramids_are_the_published_ones_less_the_excess(layers: int, mean: int, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, mean - 1))
    length = data.draw(st.integers(mean + 1, 4 * mean))
    steepness = data.draw(st.sampled_from([1, 2, 20]))
    caps, published = (
        pyramid(layers, mean, window, length, steepness),
        published_pyramid(layers, mean, window, length, steepness),
    )
    assert sum(caps) == layers * mean
    assert caps == sorted(caps, reverse=True)
    assert caps[0] == published[0] <= length
    exact = [
        Fraction((layers - 1 - i) * published[0] + i * (2 * mean - published[0]), layers - 1) for i in range(layers)
    ]
    assert all(line - 1 < cap <= most for line, cap, most in zip(exact, caps, published, strict=True))
    changed = [cap != most for cap, most in zip(caps, published, strict=True)]
    assert changed[1:] == sorted(changed[1:])  # the last layers give


def test_pyramids_without_a_slope() -> None:
    assert pyramid(1, 10, 2, 50) == [10]
    assert pyramid(4, 10, 2, 10) == [10] * 4
    assert pyramid(4, 10, 2, 7) == [7] * 4
    assert pyramid(32, 642, 32, 2946)[::31] == [1222, 62]  # Infinity-2B at 10 %: min = 610 // 20


def planned(text: str) -> list[list[int]]:
    """Caps that are really applied, [scale][layer]: simulated token by token."""
    mean = int(Fraction(text) * PEAK)
    window, wanted, longest = mean // 4, [], 0
    for tokens in LENGTHS[:-1]:
        longest += tokens
        wanted.append([longest] * LAYERS if longest <= mean else pyramid(LAYERS, mean, window, longest))
        longest = wanted[-1][0]
    held = [list(row) for row in wanted]
    for t in range(1, LAST):
        for layer in range(LAYERS):
            while sum(wanted[t][: layer + 1]) + sum(held[t - 1][layer + 1 :]) > LAYERS * mean:
                victim = max(i for i in range(layer + 1, LAYERS) if held[t - 1][i] > wanted[t][i])
                held[t - 1][victim] -= 1
    held.append(pyramid(LAYERS, mean, window, longest + LENGTHS[-1]))
    return held


@pytest.mark.parametrize("options", [{}, {"timing": "before"}, {"pooling": "max", "obs": "recent"}], ids=str)
@pytest.mark.parametrize("text", ["0.2", "0.4", "0.6", "0.9"])
def test_pyramidkv(text: str, options: dict[str, object]) -> None:
    method = PyramidKV(**options)  # type: ignore[arg-type]
    window, caps = int(Fraction(text) * PEAK) // 4, planned(text)
    beside(method, text, rule(method, window, lambda scale, layer: caps[scale][layer]))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 30), st.data())
def test_early_caps_fit_at_every_visit(layers: int, scales: int, total: int, data: st.DataObject) -> None:
    caps = []
    for _ in range(scales):
        left, row = total, []
        for _ in range(layers):
            row.append(data.draw(st.integers(0, left)))
            left -= row[-1]
        caps.append(data.draw(st.permutations(row)))
    held = early_caps(caps, total)
    assert held[-1] == list(caps[-1])
    now = [0] * layers
    for t in range(scales):
        for layer in range(layers):
            now[layer] = held[t][layer]
            assert sum(now) <= total
            least = caps[t][layer] if t == scales - 1 else min(caps[t][layer], caps[t + 1][layer])
            assert least <= held[t][layer] <= caps[t][layer]
    if all(sum(caps[t][: i + 1]) + sum(caps[t - 1][i + 1 :]) <= total for t in range(1, scales) for i in range(layers)):
        assert held == [list(row) for row in caps]  # nothing is taken where nothing has to be


def test_early_caps_check_their_input() -> None:
    with pytest.raises(ValueError, match="scale 1 are 5 tokens, 4"):
        early_caps([[1, 1], [3, 2]], 4)


@pytest.mark.parametrize("method", [SnapKV(), PyramidKV()])
def test_the_window_shrinks_with_the_budget(method: WindowMethod) -> None:
    large = Geometry("large", 2, 2, 4, ScaleSchedule.squares((1, 2, 4, 8, 16, 20)), 1)
    for text, window in [("1", 32), ("0.5", 32), ("0.3", 25), ("0.1", 8), (str(Fraction(4, 341)), 1)]:
        assert method.policy(Setting(large, Budget.parse(text), ROWS)).chosen == {"window": window}
    with pytest.raises(BudgetError, match="smallest feasible budget is 4/341 "):
        method.policy(Setting(large, Budget.parse(Fraction(4, 342)), ROWS))
    explicit = type(method)(window=9)
    assert explicit.policy(Setting(large, Budget.parse("10/341"), ROWS)).chosen == {"window": 9}
    with pytest.raises(BudgetError, match="smallest feasible budget is 10/341 "):
        explicit.policy(Setting(large, Budget.parse("9/341"), ROWS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": "some"}, "window is 'some'"),
        ({"kernel": 4}, "kernel is 4"),
        ({"pooling": "median"}, "pooling is 'median'"),
        ({"obs": "random"}, "obs is 'random'"),
        ({"steepness": 0}, "steepness is 0"),
    ],
)
def test_bad_parameters(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=f"method pyramidkv: {words}"):
        PyramidKV(**options)  # type: ignore[arg-type]
