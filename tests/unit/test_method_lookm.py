"""LOOK-M against a literal re-statement of its rules (docs/methods.md), one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from literal_cache import Head, LiteralVisit, Rule, Token, compare, merge, top

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.lookm import LookM
from heatkv_cli.methods.toolkit.heavy_hitters import STATE_BYTES
from heatkv_cli.methods.toolkit.selecting import grid_queries

TOY = Geometry("toy", 2, 3, 6, ScaleSchedule(((1, 1), (2, 2), (2, 3), (3, 3), (4, 5))), 2)
LARGE = Geometry("thirteen", 1, 1, 4, ScaleSchedule.squares((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)), 3)


def chosen(head: Head, scores: list[float], cap: int, text: int, recent: list[int]) -> list[int]:
    """Recent tokens; then text; then the rest by score, in as many places as are left."""
    others = [j for j in range(len(head.tokens)) if j not in recent]
    first = [j for j in others if head.tokens[j].position < text]
    heavy = (first + top(scores, len(others), [j for j in others if j not in first]))[: cap - len(recent)]
    return sorted(recent + heavy)


def rule(method: LookM, geometry: Geometry, cap: int) -> Rule:
    text = geometry.sink_tokens if method.text == "scales" else int(method.text)

    def recent(head: Head, visit: LiteralVisit) -> list[int]:
        count, columns = cap // 2, len(head.tokens)
        if method.recent == "grid" and count < head.current:
            size = geometry.schedule.sizes[visit.scale]
            return [columns - head.current + j for j in grid_queries(size, count).tolist()]
        return list(range(columns - count, columns))

    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        sums = {}
        for key, head in visit.heads.items():
            queries = list(range(head.current))
            if 0 < method.n_obs < head.current:
                queries = grid_queries(geometry.schedule.sizes[visit.scale], method.n_obs).tolist()
            factor = (1 if method.per_scale_mean else head.current) / len(queries)
            received = head.sums(queries)
            head.tokens = [replace(x, score=x.score + factor * r) for x, r in zip(head.tokens, received, strict=True)]
            sums[key] = [x.score for x in head.tokens]
        if visit.length <= cap:
            return {}
        kept = {}
        for (row, h), head in visit.heads.items():
            scores = sums[row, h]
            if method.share_cfg:
                scores = [a + b for a, b in zip(scores, sums[1 - row, h], strict=True)]
            columns = chosen(head, scores, cap, text, recent(head, visit))
            assert len(columns) == len(set(columns)) == cap
            if method.merge == "none":
                kept[row, h] = [head.tokens[j] for j in columns]
            else:
                kept[row, h] = merge(head.tokens, columns, method.merge)
        return kept

    return decide


def cap_of(geometry: Geometry, budget: Budget, rows: int = 2) -> int:
    return budget.slots(geometry, rows, STATE_BYTES) // geometry.heads


VARIANTS = {
    "paper": LookM(),
    "average": LookM(merge="average"),
    "weighted": LookM(merge="weighted"),
    "without merging": LookM(merge="none"),
    "no text": LookM(text=0),
    "four text tokens": LookM(text=4),
    "recent on a grid": LookM(recent="grid"),
    "observed": LookM(n_obs=3),
    "means": LookM(per_scale_mean=True),
    "shared": LookM(share_cfg=True),
    "before": LookM(timing="before"),
}


@pytest.mark.parametrize("text", ["0.6", "0.3", "0.2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_papers_rule(name: str, text: str) -> None:
    method, budget = VARIANTS[name], Budget.parse(text)
    cap = cap_of(TOY, budget)
    stored, attended = rule(method, TOY, cap), rule(method, TOY, budget.cap(TOY.schedule))
    literal: Rule = lambda visit: attended(visit) if visit.last else stored(visit)  # noqa: E731
    policy = method.policy(Setting(TOY, budget, 2))
    assert policy.capacity == cap * TOY.heads and policy.state_bytes == STATE_BYTES
    assert compare(TOY, policy, literal, method.timing, seed=5)


def test_thirteen_scales() -> None:
    budget, method = Budget.parse("0.02"), LookM(n_obs=8)
    literal = rule(method, LARGE, cap_of(LARGE, budget, 1))
    assert compare(LARGE, method.policy(Setting(LARGE, budget, 1)), literal, "after", rows=1, outputs=2)


def test_full_budget_keeps_no_sums() -> None:
    policy = LookM().policy(Setting(TOY, Budget.parse("1"), 2))
    assert policy.capacity == TOY.full_tokens and policy.state_bytes == 0


def test_the_smallest_budget_is_named() -> None:
    least = f"{(48 + 4)}/{48 * 20}"
    with pytest.raises(BudgetError, match="smallest feasible budget is 13/240"):
        LookM().policy(Setting(TOY, Budget.parse("0.05"), 2))
    assert LookM().policy(Setting(TOY, Budget.parse(least), 2)).capacity == TOY.heads


@pytest.mark.parametrize("bad", [{"merge": "mean"}, {"text": -1}, {"text": "all"}, {"timing": "x"}, {"n_obs": -1}])
def test_parameters_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="method lookm"):
        LookM(**bad)  # type: ignore[arg-type]
