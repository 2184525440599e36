"""window, streaming and h2o against their rules, written out over full attention matrices."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import pytest
from selection_oracle import COND, GEOMETRY, ROWS, Place, best, check, grid

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.policy import Policy
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.h2o import H2O
from heatkv_cli.methods.streaming import Streaming
from heatkv_cli.methods.window import Window

PEAK, TOTAL = GEOMETRY.schedule.peak_tokens, GEOMETRY.schedule.num_tokens


def recent(place: Place, count: int, kind: str) -> list[int]:
    """The most recent tokens; `grid` spreads them over the newest map where that has more."""
    if kind == "grid" and count < place.size[0] * place.size[1]:
        return [place.current + i for i in grid(place.size, count)]
    return list(range(len(place.positions) - count, len(place.positions)))


@pytest.mark.parametrize("kind", ["raster", "grid"])
@pytest.mark.parametrize("timing", ["after", "before"])
@pytest.mark.parametrize("text", ["0.2", "0.45"])
def test_window(text: str, timing: str, kind: str) -> None:
    cap = int(Fraction(text) * PEAK)
    chosen = check(
        Window(timing=timing, recent=kind),
        text,
        caps=lambda scale, layer: cap,
        score=lambda place: [],
        pick=lambda place, scores: recent(place, cap, kind),
        before=timing == "before",
    )
    assert chosen > GEOMETRY.num_layers


@pytest.mark.parametrize("kind", ["raster", "grid"])
@pytest.mark.parametrize("timing", ["after", "before"])
@pytest.mark.parametrize(("sink", "tokens"), [("scales", 5), (3, 3)])
def test_streaming(sink: str | int, tokens: int, timing: str, kind: str) -> None:
    cap = int(Fraction("0.4") * PEAK)
    check(
        Streaming(sink=sink, timing=timing, recent=kind),
        "0.4",
        caps=lambda scale, layer: cap,
        score=lambda place: [],
        pick=lambda place, scores: list(range(tokens)) + recent(place, cap - tokens, kind),
        before=timing == "before",
    )


class Sums:
    """Attention that a token has got since it exists, by layer, row, head and position."""

    def __init__(self, n_obs: int = 0, mean: bool = False):
        self.sums: dict[tuple[int, int, int, int], float] = defaultdict(float)
        self.n_obs, self.mean = n_obs, mean

    def __call__(self, place: Place) -> list[float]:
        queries = len(place.attention)
        seen = grid(place.size, self.n_obs) if 0 < self.n_obs < queries else range(queries)
        for i, position in enumerate(place.positions):
            got = sum(place.attention[q][i] for q in seen)
            self.sums[place.layer, place.row, place.head, position] += got * (1 if self.mean else queries) / len(seen)
        return [self.sums[place.layer, place.row, place.head, position] for position in place.positions]


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

    chosen = check(
        method,
        text,
        caps,
        Sums(method.n_obs, method.per_scale_mean),
        lambda place, scores: best(scores, place.cap, set(recent(place, place.cap // 2, method.recent))),
        before=method.timing == "before",
        share_cfg=method.share_cfg,
    )
    assert chosen


@pytest.mark.parametrize(("rho", "stored"), [("0", PEAK), ("0.2", h2o_cap(Fraction(1))), ("0.7", 21)])
def test_h2o_on_hack_s_axis(rho: str, stored: int) -> None:
    """Caps follow rho; sums are paid for, and there are none where nothing is ever evicted."""
    attended = int((1 - Fraction(rho)) * TOTAL)
    if rho == "0.7":
        stored = h2o_cap((1 - Fraction(rho)) * TOTAL / PEAK)
    chosen = check(
        H2O(timing="before"),
        rho,
        lambda scale, layer: attended if scale == GEOMETRY.num_scales - 1 else stored,
        Sums(),
        lambda place, scores: best(scores, place.cap, set(recent(place, place.cap // 2, "raster"))),
        before=True,
        rho=True,
    )
    assert bool(chosen) == (rho != "0")
    policy = H2O(timing="before").policy(Setting(GEOMETRY, Budget.from_rho(rho, GEOMETRY.schedule), ROWS))
    assert policy.state_bytes == (0 if rho == "0" else 4)
    assert policy.capacity == GEOMETRY.heads * min(stored, PEAK)


def test_no_state_where_nothing_can_be_evicted() -> None:
    policy = H2O().policy(Setting(GEOMETRY, Budget.parse(1), ROWS))
    assert type(policy) is Policy
    assert policy.state_bytes == 0
    assert H2O(timing="before").policy(Setting(GEOMETRY, Budget.parse(1), ROWS)).state_bytes == 4


def test_sums_weigh_what_they_are_charged() -> None:
    from selection_oracle import SOFTMAX_SCALE, visits

    from heatkv_cli.core.cache import KVCache

    budget = Budget.parse("0.4")
    policy = H2O().policy(Setting(GEOMETRY, budget, ROWS))
    cache = KVCache(GEOMETRY, policy, ROWS, COND, budget=budget)
    for scale, layer, q, k, v in visits(GEOMETRY, 1):
        cache.attend(layer, q, k, v, SOFTMAX_SCALE)
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
