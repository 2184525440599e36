"""ScaleKV against the paper's formulas and the published budget files (docs/methods.md)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from literal_cache import LiteralVisit, Rule, Token, compare, top

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, BudgetError, ConfigError
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.scalekv import ScaleKV, draft, published_caps, split

TOY = Geometry("toy", 4, 2, 6, ScaleSchedule.squares((1, 2, 4, 4, 8, 8)), 1)
SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
LARGE = Geometry("thirteen", 2, 1, 4, ScaleSchedule.squares(SIDES), 3)
MODELS = {
    "infinity-2b": Geometry("infinity-2b", 32, 16, 128, ScaleSchedule.squares(SIDES), 3, 2),
    "infinity-8b": Geometry("infinity-8b", 40, 28, 128, ScaleSchedule.squares(SIDES), 3, 2),
}
# (1-based entering scale, full length, drafters, Max, Min), docs/methods.md
TABLE = {
    "infinity-2b": [
        (9, 921, {0, 23}, 920, 632),
        (10, 1497, {0, 23}, 1490, 594),
        (11, 2521, {0, 23}, 2510, 526),
        (12, 4121, {0, 23}, 4100, 420),
        (13, 6425, {0}, 6385, 465),
    ],
    "infinity-8b": [
        (9, 921, {0, 1, 2}, 909, 629),
        (10, 1497, {0, 1, 2}, 1464, 584),
        (11, 2521, {0, 1, 2}, 2463, 503),
        (12, 4121, {0, 1, 2}, 4054, 374),
        (13, 6425, {0, 1, 2}, 6200, 200),
    ],
}


def calibration(geometry: Geometry, seed: int = 0) -> Calibration:
    """Random statistics; only the selectivity matters here."""
    g = torch.Generator().manual_seed(seed)
    L, H, K = geometry.num_layers, geometry.num_heads, geometry.num_scales
    shapes = {"scas": (L, H, K, K), "variance": (L, H), "asi": (L, K), "entropy": (L, H, K), "history_mass": (L, H, K)}
    values = {name: torch.rand(2, *shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return Calibration(geometry, "prompts", (0, 1), **values)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- the paper, slowly


def centres(size: tuple[int, int]) -> list[int]:
    """Centre tokens of 4 x 4 patches, or of 2 x 2: row i * (h / n) + (h / n - 1) // 2."""

    def at(length: int, pieces: int) -> list[int]:
        return [i * (length // pieces) + (length // pieces - 1) // 2 for i in range(pieces)]

    height, width = size
    return [y * width + x for y in at(height, 4) for x in at(width, 4)]


def literal_drafters(geometry: Geometry, entering: int, count: int) -> list[int]:
    asi = calibration(geometry).asi
    values = [float(asi[0, layer, entering] + asi[1, layer, entering]) / 2 for layer in range(geometry.num_layers)]
    mu = sum(values) / len(values)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in values) / len(values))
    z = [(x - mu) / (sigma + 1e-12) for x in values]
    return sorted(range(len(z)), key=lambda layer: z[layer])[:count]


def pooled(values: list[float | None], scales: list[int], kind: str) -> list[float]:
    """Average or maximum over five neighbours, masked ones (None) left out; of the same scale."""
    out = []
    for j, value in enumerate(values):
        near = [
            values[i]
            for i in range(max(0, j - 2), min(len(values), j + 3))
            if values[i] is not None and scales[i] == scales[j]
        ]
        if value is None:
            out.append(-math.inf)
        else:
            out.append(sum(near) / len(near) if kind == "avg" else max(near))
    return out


def rule(method: ScaleKV, geometry: Geometry, caps: list[list[int]], window: int) -> Rule:
    def decide(visit: LiteralVisit) -> dict[tuple[int, int], list[Token]]:
        cap = caps[visit.scale][visit.layer]
        if visit.length <= cap:
            return {}
        kept = {}
        for (row, h), head in visit.heads.items():
            size, start = geometry.schedule.sizes[visit.scale], len(head.tokens) - head.current
            own = centres(size) if window == 16 else [(size[0] - 1) // 2 * size[1] + (size[1] - 1) // 2]
            received = head.sums(own)
            if method.share_cfg:
                received = [a + b for a, b in zip(received, visit.heads[1 - row, h].sums(own), strict=True)]
            columns = {start + j for j in own}
            masked = [None if j in columns else x for j, x in enumerate(received)]
            scale_of = [int(geometry.schedule.scale_of(torch.tensor(x.position))) for x in head.tokens]
            final = pooled(masked, scale_of, method.pooling)
            rest = top(final, cap - len(columns), [j for j in range(len(head.tokens)) if j not in columns])
            kept[row, h] = [head.tokens[j] for j in sorted([*columns, *rest])]
        return kept

    return decide


VARIANTS = {
    "paper": ScaleKV(window=16),
    "max": ScaleKV(window=16, pooling="max"),
    "one query": ScaleKV(window=1),
    "shared": ScaleKV(window=16, share_cfg=True),
    "before": ScaleKV(window=1, timing="before"),
    "two drafters": ScaleKV(window=1, drafters=2),
    "decay": ScaleKV(window=1, allocation="decay"),
}


@pytest.mark.parametrize("text", ["0.5", "0.7"])
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_are_chosen_by_the_papers_rule(name: str, text: str) -> None:
    method, budget = VARIANTS[name], Budget.parse(text)
    policy = method.policy(Setting(TOY, budget, 2, calibration=calibration(TOY)))
    caps = method._caps(Setting(TOY, budget), calibration(TOY).asi.mean(0))
    assert compare(TOY, policy, rule(method, TOY, caps, int(method.window)), method.timing, seed=4)


def test_thirteen_scales() -> None:
    method, budget = ScaleKV(), Budget.parse("0.1")
    policy = method.policy(Setting(LARGE, budget, 1, calibration=calibration(LARGE)))
    caps = method._caps(Setting(LARGE, budget), calibration(LARGE).asi.mean(0))
    assert compare(LARGE, policy, rule(method, LARGE, caps, 16), "after", rows=1, outputs=2)


# -------------------------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize("model", MODELS)
def test_the_published_rows(model: str) -> None:
    """Given a file's drafters and their tokens, refiners get the file's: the mean is exactly 650."""
    geometry = MODELS[model]
    for scale, full, drafters, most, least in TABLE[model]:
        assert geometry.schedule.offsets[scale - 1] == full
        available = [most if layer in drafters else full for layer in range(geometry.num_layers)]
        caps = split(650, available, drafters, 64)
        assert caps == [most if layer in drafters else least for layer in range(geometry.num_layers)]
        assert sum(caps) == 650 * geometry.num_layers


@pytest.mark.parametrize("model", MODELS)
def test_published_files(model: str) -> None:
    geometry, budget = MODELS[model], Budget.parse("650/6425")
    caps, L = published_caps(Setting(geometry, budget)), geometry.num_layers
    assert [len(row) for row in caps] == [L] * 13
    scale, _, drafters, most, least = TABLE[model][-1]
    assert scale == 13
    assert caps[11] == caps[12] == [most if layer in drafters else least for layer in range(L)]
    assert [max(row) for row in caps[7:11]] == [row[3] for row in TABLE[model][:4]]
    assert caps[6] == [521] * L or max(caps[6]) == 521
    never_above(caps[:-1], 650 * L)
    ScaleKV(allocation="published").policy(Setting(geometry, budget, 2))
    with pytest.raises(BudgetError, match="smallest feasible budget is 26/257"):
        ScaleKV(allocation="published").policy(Setting(geometry, Budget.parse("0.1"), 2))
    with pytest.raises(ConfigError, match="no published budgets"):
        ScaleKV(allocation="published").policy(Setting(replace(geometry, model="other"), budget, 2))


def never_above(caps: list[list[int]], total: int) -> None:
    """After every visit: what this scale's layers got, and what the others still hold of the scale before."""
    for t, row in enumerate(caps):
        before = caps[t - 1] if t else [0] * len(row)
        for layer in range(len(row)):
            assert sum(row[: layer + 1]) + sum(before[layer + 1 :]) <= total


@pytest.mark.parametrize("rank", ["scale", "all"])
@pytest.mark.parametrize("allocation", ["mean", "decay"])
@pytest.mark.parametrize("text", ["0.2", "0.1", "0.04", "0.01"])
@pytest.mark.parametrize("model", MODELS)
def test_the_budget_is_met_and_used(model: str, text: str, allocation: str, rank: str) -> None:
    geometry, budget = MODELS[model], Budget.parse(text)
    method = ScaleKV(allocation=allocation, rank=rank)  # type: ignore[arg-type]
    asi, mean = calibration(geometry).asi.mean(0), budget.cap(geometry.schedule)
    caps = method._caps(Setting(geometry, budget), asi)
    never_above(caps[:-1], mean * geometry.num_layers)
    assert sum(caps[11]) == mean * geometry.num_layers  # entering the last scale: the peak, exactly
    assert min(caps[11]) >= min(64, mean // 2)


def test_drafters_have_nearly_all() -> None:
    """The rule of the files at another budget: drafters as many as there are while refiners keep 64."""
    geometry, asi = MODELS["infinity-2b"], calibration(MODELS["infinity-2b"]).asi.mean(0)
    for text, mean in (("0.2", 1285), ("0.1", 642), ("0.04", 257)):
        caps = ScaleKV()._caps(Setting(geometry, Budget.parse(text)), asi)[11]
        wide = literal_drafters(geometry, 12, 2)
        narrow = sorted({caps[layer] for layer in range(32) if layer not in wide})
        # a layer can be a drafter only with what it still holds
        assert all(caps[layer] >= max(narrow) for layer in wide)
        assert narrow[-1] - narrow[0] <= 1 and narrow[0] >= 64
        assert sum(caps) == mean * 32
    same = torch.arange(32.0)[:, None].expand(32, 13)  # the same drafters at every scale
    caps = ScaleKV()._caps(Setting(geometry, Budget.parse("0.1")), same)
    assert caps[11][:2] == [6425, 6425]
    assert sum(caps[11]) == 642 * 32 and set(caps[11][2:]) == {
        (642 * 32 - 2 * 6425) // 30,
        (642 * 32 - 2 * 6425) // 30 + 1,
    }


@pytest.mark.parametrize("count", [1, 2])
def test_drafters_have_the_lowest_scores(count: int) -> None:
    asi = calibration(TOY).asi.mean(0)
    found = draft(asi, [3, 4, 5], count)
    assert found == [set(literal_drafters(TOY, scale, count)) for scale in (3, 4, 5)]
    together = draft(asi, [3, 4, 5], count, "all")
    assert sum(map(len, together)) == 3 * count
    z = (asi - asi.mean(0)) / asi.std(0, correction=0)
    inside = [float(z[layer, scale]) for scale, layers in zip((3, 4, 5), together, strict=True) for layer in layers]
    outside = [float(z[m, s]) for s, layers in zip((3, 4, 5), together, strict=True) for m in set(range(4)) - layers]
    assert max(inside) <= min(outside)


def test_refiners_decay() -> None:
    """600, 530, 460, ... tokens of 650 where drafters can use what is left."""
    method = ScaleKV(allocation="decay")
    assert [method._refiner(650, step) for step in range(5)] == [600, 530, 460, 390, 320]
    caps = split(650, [921] * 32, {0, 1}, 600)
    assert caps[:2] == [921, 921] and sum(caps) == 650 * 32
    caps = split(650, [6425] * 32, {0, 1}, 600)
    assert caps[:2] == [1400, 1400] and set(caps[2:]) == {600}


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_calibration_is_needed_and_must_fit() -> None:
    with pytest.raises(ConfigError, match="needs a calibration"):
        ScaleKV().policy(Setting(TOY, Budget.parse("0.5"), 2))
    with pytest.raises(ArtifactError, match="thirteen"):
        ScaleKV().policy(Setting(TOY, Budget.parse("0.5"), 2, calibration=calibration(LARGE)))
    assert ScaleKV().calibrated and not ScaleKV(allocation="published").calibrated


@pytest.mark.parametrize(
    "bad", [{"drafters": 0}, {"drafters": "x"}, {"rank": "x"}, {"allocation": "x"}, {"floor": -1}, {"window": 0}]
)
def test_parameters_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="method scalekv"):
        ScaleKV(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="5 drafters of 4 layers"):
        ScaleKV(drafters=5).policy(Setting(TOY, Budget.parse("0.5"), 2, calibration=calibration(TOY)))
