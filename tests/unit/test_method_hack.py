"""HACK against a literal re-statement of the paper's rules (docs/methods.md), one token at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from literal_cache import Head, LiteralVisit, Rule, Token, compare, merge, top
from torch import Tensor

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.hack import Hack, contextual_heads, head_caps

TOY = Geometry("toy", 2, 4, 6, ScaleSchedule(((1, 1), (2, 2), (2, 3), (3, 3), (4, 5))), 1)
LARGE = Geometry("thirteen", 1, 2, 4, ScaleSchedule.squares((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)), 3)


def calibration(geometry: Geometry, seed: int = 0) -> Calibration:
    """Random statistics; only the variance matters here. Two prompts, of which the mean counts."""
    g = torch.Generator().manual_seed(seed)
    L, H, K = geometry.num_layers, geometry.num_heads, geometry.num_scales
    shapes = {"scas": (L, H, K, K), "variance": (L, H), "asi": (L, K), "entropy": (L, H, K), "history_mass": (L, H, K)}
    values = {name: torch.rand(2, *shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return Calibration(geometry, "prompts", (0, 1), **values)  # type: ignore[arg-type]


def made(method: Hack, geometry: Geometry, budget: Budget) -> Policy:
    return method.policy(Setting(geometry, budget, 2, calibration=calibration(geometry)))


# --------------------------------------------------------------------------------------------------- the paper, slowly


def types(geometry: Geometry, alpha: float) -> dict[tuple[int, int], str]:
    variance = calibration(geometry).variance
    heads = [(layer, head) for layer in range(geometry.num_layers) for head in range(geometry.num_heads)]
    mean = {pair: float(variance[0][pair] + variance[1][pair]) / 2 for pair in heads}
    ranked = sorted(heads, key=lambda pair: mean[pair])
    count = round(alpha * len(heads))
    return {pair: "contextual" if index < count else "structural" for index, pair in enumerate(ranked)}


def patches_first(scores: list[float], size: tuple[int, int], start: int, count: int) -> list[int]:
    """`count` current tokens: the best of each cell of a sqrt(count) grid, then the best of the others."""
    height, width = size
    side, leaders = math.isqrt(count), []
    for row in range(side):
        for column in range(side):
            cell = [
                start + y * width + x
                for y in range(height)
                for x in range(width)
                if y * side // height == row and x * side // width == column
            ]
            leaders += top(scores, 1, cell)
    others = [j for j in range(start, start + height * width) if j not in set(leaders)]
    return leaders + top(scores, count - len(leaders), others)


def rule(method: Hack, geometry: Geometry, caps: Tensor) -> Rule:
    kind = types(geometry, method.alpha) if isinstance(method.alpha, float) else {}
    mean = int(caps.sum()) // caps.numel()
    count = min(32, max(1, mean // 4)) if method.num_queries == "auto" else int(method.num_queries)
    initial_tokens = geometry.schedule.offsets[method.init_scales]

    def queries(tokens: int, visit: LiteralVisit) -> list[int]:
        if method.queries == "full" or tokens <= count:
            return list(range(tokens))
        if method.queries == "uniform":
            return [math.floor((j + 0.5) * tokens / count) for j in range(count)]
        if method.queries == "init":
            return list(range(count))
        return list(range(tokens - count, tokens))

    def structural(head: Head, scores: list[float], cap: int, visit: LiteralVisit) -> list[int]:
        columns, start = range(len(head.tokens)), len(head.tokens) - head.current
        initial = min(initial_tokens, cap // 4) if method.keep_initial else 0
        if not method.keep_recent:
            always = [j for j in columns if head.tokens[j].position < initial]
            return always + top(scores, cap - len(always), [j for j in columns if j not in always])
        if cap >= head.current:
            initial = min(initial, cap - head.current)
            always = [j for j in columns if head.tokens[j].position < initial or j >= start]
            return always + top(scores, cap - len(always), [j for j in columns if j not in always])
        always = [j for j in columns if head.tokens[j].position < initial]
        size = geometry.schedule.sizes[visit.scale]
        return always + patches_first(scores, size, start, cap - len(always))

    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        kept = {}
        for (row, h), head in visit.heads.items():
            cap = int(caps[visit.layer, h])
            if len(head.tokens) <= cap:
                continue
            scores = head.sums(queries(head.current, visit))
            if method.share_cfg:
                other = visit.heads[1 - row, h]
                theirs = other.sums(queries(head.current, visit))
                scores = [a + b for a, b in zip(scores, theirs, strict=True)]
            mine = kind[visit.layer, h] if kind else "contextual"
            if method.swapped:
                mine = {"contextual": "structural", "structural": "contextual"}[mine]
            if method.patterns and mine == "structural":
                chosen = sorted(structural(head, scores, cap, visit))
            else:
                chosen = sorted(top(scores, cap, range(len(head.tokens))))
            assert len(chosen) == len(set(chosen)) == cap
            kept[row, h] = [head.tokens[j] for j in chosen]
            if method.merge and method.patterns and mine == "contextual" and visit.last:
                kept[row, h] = merge(head.tokens, chosen, "similarity")
        return kept

    return decide


VARIANTS = {
    "paper": Hack(num_queries=3),
    "some queries": Hack(),
    "all queries": Hack(queries="full"),
    "first queries": Hack(queries="init", num_queries=2),
    "last queries": Hack(queries="recent", num_queries=2),
    "without merge": Hack(num_queries=3, merge=False),
    "without initial": Hack(num_queries=3, keep_initial=False),
    "without recent": Hack(num_queries=3, keep_recent=False),
    "without both": Hack(num_queries=3, keep_initial=False, keep_recent=False),
    "swapped": Hack(num_queries=3, swapped=True),
    "one budget": Hack(num_queries=3, asymmetric=False),
    "one rule": Hack(num_queries=3, patterns=False),
    "neither": Hack(num_queries=3, asymmetric=False, patterns=False),
    "few contextual": Hack(num_queries=3, alpha=0.25, ratio=0.5),
    "all contextual": Hack(num_queries=3, alpha=1.0),
    "none contextual": Hack(num_queries=3, alpha=0.0),
    "shared": Hack(num_queries=3, share_cfg=True),
    "after": Hack(num_queries=3, timing="after"),
}
BUDGETS = ["rho=0.3", "rho=0.5", "rho=0.7", "rho=0.9", "1", "0.5", "0.3"]


def budget_of(text: str, geometry: Geometry) -> Budget:
    if text.startswith("rho="):
        return Budget.from_rho(text.removeprefix("rho="), geometry.schedule)
    return Budget.parse(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [("paper", text) for text in BUDGETS]
    + [(name, text) for name in VARIANTS for text in ("rho=0.5", "rho=0.9", "0.3")],
)
def test_it_is_the_papers_rule(name: str, text: str) -> None:
    method, budget = VARIANTS[name], budget_of(text, TOY)
    contextual = torch.tensor([[types(TOY, method.alpha)[m, h] == "contextual" for h in range(4)] for m in range(2)])
    if method.asymmetric is method.patterns is False:
        contextual = torch.zeros_like(contextual)
    ratio = Fraction(str(method.ratio)) if method.asymmetric else Fraction(1)
    most = TOY.schedule.num_tokens if method.timing == "before" else TOY.schedule.peak_tokens
    caps = head_caps(budget.cap(TOY.schedule), contextual, ratio, most)
    policy = made(method, TOY, budget)
    dropped = compare(TOY, policy, rule(method, TOY, caps), method.timing, seed=3)
    assert dropped or (budget.ratio == 1 and method.timing == "after")


@pytest.mark.parametrize("text", ["rho=0.7", "rho=0.9"])
def test_thirteen_scales(text: str) -> None:
    method, budget = Hack(), budget_of(text, LARGE)
    contextual = torch.tensor([[types(LARGE, 0.5)[0, h] == "contextual" for h in range(2)]])
    caps = head_caps(budget.cap(LARGE.schedule), contextual, Fraction(1, 5), LARGE.schedule.num_tokens)
    literal = rule(Hack(merge=False), LARGE, caps)
    assert compare(LARGE, made(Hack(merge=False), LARGE, budget), literal, "before", rows=1, outputs=3)
    assert method.merge


# ------------------------------------------------------------------------------------------------------- budgets


def test_the_specs_own_numbers() -> None:
    """At rho = 70 % and alpha = 0.5 contextual heads get 10 % of all tokens and structural ones 50 %."""
    for geometry in (LARGE, Geometry("var", 30, 30, 4, ScaleSchedule.squares((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), 1)):
        tokens = geometry.schedule.num_tokens
        cap = Budget.from_rho("0.7", geometry.schedule).cap(geometry.schedule)
        contextual = contextual_heads(torch.arange(geometry.heads).view(geometry.num_layers, -1).double(), 0.5)
        caps = head_caps(cap, contextual, Fraction(1, 5), tokens)
        assert abs(caps[contextual] - tokens / 10).max() <= 1
        assert abs(caps[~contextual] - tokens / 2).max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("ratio", [Fraction(1, 5), Fraction(1, 2), Fraction(1)])
@pytest.mark.parametrize("cap", [0, 1, 7, 100, 339, 679, 680, 900])
def test_the_sum_is_exact(share: float, ratio: Fraction, cap: int) -> None:
    tokens, contextual = 680, contextual_heads(torch.arange(35.0).view(5, 7), share)
    caps = head_caps(cap, contextual, ratio, tokens)
    assert int(caps.sum()) == min(cap, tokens) * 35
    assert int(caps.min()) >= 0 and int(caps.max()) <= tokens
    for group in (caps[contextual], caps[~contextual]):
        assert not len(group) or int(group.max() - group.min()) <= 1
    if 0 < share < 1 and cap:
        assert caps[contextual].max() <= caps[~contextual].max()


def test_structural_heads_stop_at_all_tokens() -> None:
    """B_S > T: B_S = T, and B_C = (B - (1 - alpha) T) / alpha."""
    contextual = contextual_heads(torch.arange(8.0).view(2, 4), 0.5)
    caps = head_caps(70, contextual, Fraction(1, 5), 100)
    assert caps[~contextual].tolist() == [100] * 4
    assert caps[contextual].tolist() == [40] * 4


@pytest.mark.parametrize("text", ["rho=0", "rho=0.3", "rho=0.7", "1", "0.49", "0.15"])
def test_the_pool_is_the_sum_of_the_caps(text: str) -> None:
    budget, peak = budget_of(text, TOY), TOY.schedule.peak_tokens
    policy = made(Hack(), TOY, budget)
    assert policy.capacity <= budget.slots(TOY, 2)
    contextual = contextual_heads(calibration(TOY).variance.mean(0), 0.5)
    caps = head_caps(budget.cap(TOY.schedule), contextual, Fraction(1, 5), TOY.schedule.num_tokens)
    assert policy.capacity == sum(min(cap, peak) for cap in caps.flatten().tolist())


def test_types_are_ranked_over_all_layers() -> None:
    variance = torch.tensor([[5.0, 1.0, 9.0], [2.0, 8.0, 0.5]])
    assert contextual_heads(variance, 0.5).tolist() == [[False, True, False], [True, False, True]]
    curve = torch.cat((torch.linspace(0, 0.1, 70), torch.linspace(0.2, 9, 30))).view(10, 10)
    assert int(contextual_heads(curve, "elbow").sum()) == pytest.approx(70, abs=2)


# --------------------------------------------------------------------------------------------------------- errors


def test_too_small_a_budget_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match=r"smallest feasible budget is 3/20"):
        made(Hack(), TOY, Budget.parse("1/20"))
    assert made(Hack(), TOY, Budget.parse("3/20")).capacity == 3 * 8
    made(Hack(asymmetric=False), TOY, Budget.parse("1/20"))


def test_a_calibration_is_needed_and_must_fit() -> None:
    with pytest.raises(ConfigError, match="needs a calibration"):
        Hack().policy(Setting(TOY, Budget.parse("0.5"), 2))
    with pytest.raises(ArtifactError, match="thirteen"):
        Hack().policy(Setting(TOY, Budget.parse("0.5"), 2, calibration=calibration(LARGE)))
    neither = Hack(asymmetric=False, patterns=False)
    assert Hack().calibrated and not neither.calibrated
    neither.policy(Setting(TOY, Budget.parse("0.5"), 2))


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": 1.5},
        {"ratio": 0.0},
        {"queries": "some"},
        {"num_queries": 0},
        {"num_queries": "x"},
        {"init_scales": -1},
        {"timing": "x"},
    ],
)
def test_parameters_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="method hack"):
        Hack(**bad)  # type: ignore[arg-type]


def test_random_queries_are_seeded() -> None:
    """Same seed, same choice; another seed, another."""

    def outputs(seed: int) -> Tensor:
        from heatkv_cli.core.cache import KVCache

        g = torch.Generator().manual_seed(1)
        cache, out = (
            KVCache(TOY, made(Hack(queries="random", num_queries=2, query_seed=seed), TOY, Budget.parse("0.4")), 2, 1),
            [],
        )
        for tokens in TOY.schedule.lengths:
            for layer in range(TOY.num_layers):
                q, k, v = torch.randn(3, 2, 4, tokens, 6, generator=g)
                out.append(cache.attend(layer, 2 * q, k, v, 1.0).flatten())
            cache.end_step()
        return torch.cat(out)

    first, again, other = outputs(0), outputs(0), outputs(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
