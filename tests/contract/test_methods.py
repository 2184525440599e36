"""What every method promises, checked for every file in conf/method: a new method is tested by being there.

A generation is driven by a loop that feeds the cache seeded random q, k, v: methods see what they would see from a
model, and a run takes milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.calibration.statistics import AttentionStatistics, concatenate
from heatkv_cli.config import choices, compose
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.planning.job import geometry_of

METHODS = choices("method")
BUDGETS = ("1", "0.5", "0.3", "0.2", "0.15", "0.1", "0.05", "0.04")
RHOS = ("0.3", "0.7", "0.9")  # 0 has a test of its own
IGNORES_BUDGET = {"sinks"}  # keeps the same at every budget, so budget 1 is not the full cache
SHARES_LAYERS = {"cake", "meda"}  # layers' shares are averaged over the batch: other images change them
IMAGES = 4

INFINITY = geometry_of(compose(["model=infinity-2b"]).first.model)
TINY = geometry_of(compose(["model=tiny"]).first.model)
GEOMETRIES = {
    "small": Geometry("small", 3, 2, 8, ScaleSchedule.squares((1, 2, 3, 4, 5, 6)), 1),
    # scales that shrink in between, sinks of two scales
    "uneven": Geometry("uneven", 2, 3, 4, ScaleSchedule(((1, 2), (2, 3), (1, 2), (4, 3), (3, 3), (5, 4))), 2),
    "no-sinks": Geometry("no-sinks", 2, 3, 4, ScaleSchedule.squares((1, 3, 4, 6)), 0),
}
LARGE = Geometry("infinity-layer", 1, 2, 8, INFINITY.schedule, INFINITY.sink_scales)


@cache
def method(name: str) -> Method:
    """`h2o`, or `h2o before` for the same with another timing."""
    base, _, timing = name.partition(" ")
    timings = [f"method.timing={timing}"] if timing else []
    made: Method = compose([f"method={base}", *timings]).first.method.object
    return made


def other_timing(name: str) -> list[str]:
    """The method with the timing that is not its own, where it has one."""
    own = getattr(method(name), "timing", None)
    return [] if own is None else [f"{name} {'before' if own == 'after' else 'after'}"]


VARIANTS = [variant for name in METHODS for variant in other_timing(name)]
SCHEDULED = [name for name in METHODS if method(name).plan_type]

cases = pytest.mark.parametrize(
    ("name", "geometry", "text"),
    [(m, g, b) for m in METHODS for g in GEOMETRIES for b in BUDGETS]
    + [(m, g, b) for m in VARIANTS for g in GEOMETRIES for b in ("0.5", "0.15")],
)
few_cases = pytest.mark.parametrize(
    ("name", "geometry", "text"),
    [(m, g, b) for m in METHODS for g in GEOMETRIES for b in ("0.3", "0.15")]
    + [(m, g, "0.3") for m in VARIANTS for g in GEOMETRIES],
)
every = pytest.mark.parametrize("name", METHODS + VARIANTS)
pairs = pytest.mark.parametrize(("name", "geometry"), [(m, g) for m in METHODS + VARIANTS for g in GEOMETRIES])


@cache
def inputs(geometry: Geometry, images: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of every visit, rows [conditional, guidance]. Heads differ in how sharply they look."""
    generator, visits = torch.Generator().manual_seed(7), []
    sharp = torch.linspace(0.2, 2, geometry.num_heads).view(1, -1, 1, 1)
    for tokens in geometry.schedule.lengths:
        for _ in range(geometry.num_layers):
            q, k, v = torch.randn(3, 2 * images, geometry.num_heads, tokens, geometry.head_dim, generator=generator)
            visits.append((q * sharp, k, v))
    return visits


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(visits: list[tuple[Tensor, Tensor, Tensor]], rows: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(q[rows], k[rows], v[rows]) for q, k, v in visits]


def drive(
    kv: KVCache,
    visits: list[tuple[Tensor, Tensor, Tensor]],
    after_visit: Callable[[int, int], None] = lambda scale, layer: None,
) -> list[Tensor]:
    """One generation; returns attention's output of every visit."""
    geometry, left, out = kv.geometry, iter(visits), []
    for scale in range(geometry.num_scales):
        for layer in range(geometry.num_layers):
            out.append(kv.attend(layer, *next(left), geometry.head_dim**-0.5))
            after_visit(scale, layer)
        kv.end_step()
    return out


@cache
def calibration(geometry: Geometry) -> Calibration:
    """A calibration on the same loop."""
    statistics = AttentionStatistics(geometry, 1)
    drive(KVCache(geometry, Policy(geometry.full_tokens), 2, 1, observers=(statistics,)), inputs(geometry))
    return Calibration(geometry, "loop", (7,), **concatenate([statistics]))


@dataclass
class Run:
    """One generation of a method, watched after every visit."""

    name: str
    geometry: Geometry
    budget: Budget
    backend: str = "grouped"
    visits: list[tuple[Tensor, Tensor, Tensor]] | None = None
    used: list[list[int]] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        made, geometry = method(self.name), self.geometry
        visits = inputs(geometry) if self.visits is None else self.visits
        self.rows = len(visits[0][0])
        found = calibration(geometry) if made.calibrated else None
        setting = Setting(geometry, self.budget, self.rows, self.name, calibration=found)
        self.schedule: Any = made.plan(setting) if made.plan_type else None
        self.policy = made.policy(replace(setting, plan=self.schedule))
        cond = self.rows // 2
        self.cache = KVCache(geometry, self.policy, self.rows, cond, backend=self.backend, budget=self.budget)
        self.used = [[0] * geometry.num_layers for _ in range(geometry.num_scales)]
        self.outputs = drive(self.cache, visits, self.watch)
        assert all(bool(y.isfinite().all()) for y in self.outputs)

    def watch(self, scale: int, layer: int) -> None:
        """The budget holds right now, and nothing of the last scale was kept."""
        cache, geometry = self.cache, self.geometry
        self.used[scale][layer] = cache.pool.used
        slots = torch.cat([table.slots for table in cache.tables])
        assert len(slots) == len(slots.unique()) == cache.pool.used
        live = cache.pool.used * self.rows * (geometry.bytes_per_token + self.policy.state_bytes)
        assert live <= cache.ledger.alloc_bytes
        assert live <= self.budget.ratio * geometry.full_bytes(self.rows)
        if scale == geometry.num_scales - 1:
            assert not len(cache.tables[layer].slots)
        stored = cache.tables[layer].positions.expand(self.rows, -1)
        assert bool((stored < geometry.schedule.peak_tokens).all())
        self.positions.append(stored)

    @cached_property
    def ratios(self) -> dict[str, float]:
        return self.cache.ledger.ratios()


@cache
def run(name: str, geometry: Geometry, text: str, backend: str = "grouped") -> Run | BudgetError:
    """A generation at a budget, `text` being a ratio or `rho=...`; kept for all tests."""
    kind, _, rho = text.partition("rho=")
    budget = Budget.parse(kind) if kind else Budget.from_rho(rho, geometry.schedule)
    try:
        return Run(name, geometry, budget, backend)
    except BudgetError as error:
        return error


def smallest(error: BudgetError) -> Fraction:
    """The budget that an error names, as a fraction and as a decimal."""
    found = re.search(r"smallest feasible budget is (\S+) \((\S+)\)$", error.message)
    assert found, error.message
    fraction, decimal = found.groups()
    assert f"budget={fraction}" in error.hint
    assert f"budget={decimal}" in error.hint
    assert 0 <= Fraction(decimal) - Fraction(fraction) <= Fraction(fraction) / 10**5
    return Fraction(fraction)


def check_bytes(made: Run) -> None:
    """beta_live <= beta_alloc <= budget, and every slot is back."""
    budget, ratios = made.budget, made.ratios
    assert ratios["beta_live"] <= ratios["beta_alloc"] <= 1.005 * budget.ratio
    assert made.cache.ledger.alloc_bytes >= made.cache.pool.k.nbytes + made.cache.pool.v.nbytes
    assert made.policy.capacity <= budget.slots(made.geometry, made.rows, made.policy.state_bytes)
    assert made.cache.pool.used == 0
    assert all(not table.slots.numel() for table in made.cache.tables)
    capacity = made.cache.pool.capacity
    assert sorted(made.cache.pool.take(capacity).tolist()) == list(range(capacity))
    made.cache.pool.give(torch.arange(capacity, dtype=torch.int32))


@cases
def test_the_budget_holds_or_the_smallest_one_is_named(name: str, geometry: str, text: str) -> None:
    made = run(name, GEOMETRIES[geometry], text)
    if isinstance(made, Run):
        check_bytes(made)
        return
    least = smallest(made)
    assert least > Fraction(text)
    for enough in (str(least), re.findall(r"\((\S+)\)$", made.message)[0]):
        at_least = run(name, GEOMETRIES[geometry], enough)
        assert isinstance(at_least, Run), at_least
        check_bytes(at_least)
    less = run(name, GEOMETRIES[geometry], str(least - Fraction(1, 10**9)))
    assert isinstance(less, BudgetError)
    assert smallest(less) == least


@pytest.mark.parametrize("rho", RHOS)
@every
def test_the_pool_of_hack_s_axis_is_the_smaller_of_beta_and_one(name: str, rho: str) -> None:
    made = run(name, GEOMETRIES["small"], f"rho={rho}")
    if isinstance(made, Run):
        check_bytes(made)
    else:
        assert smallest(made) > Budget.from_rho(rho, GEOMETRIES["small"].schedule).ratio


@every
def test_budget_one_always_works(name: str) -> None:
    assert all(isinstance(run(name, geometry, "1"), Run) for geometry in GEOMETRIES.values())


@few_cases
def test_twice_is_the_same(name: str, geometry: str, text: str) -> None:
    made = run(name, GEOMETRIES[geometry], text)
    if isinstance(made, Run):
        again = Run(name, GEOMETRIES[geometry], made.budget)
        assert all(map(torch.equal, made.outputs, again.outputs))
        assert again.used == made.used
        assert again.cache.ledger == made.cache.ledger


@few_cases
def test_back_ends_agree(name: str, geometry: str, text: str) -> None:
    made, masked = (run(name, GEOMETRIES[geometry], text, backend) for backend in ("grouped", "masked"))
    if not isinstance(made, Run) or not isinstance(masked, Run):
        assert type(made) is type(masked) is BudgetError
        return
    for mine, oracle in zip(made.outputs, masked.outputs, strict=True):
        torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=1e-5)
    assert made.used == masked.used
    assert made.cache.ledger.attended_tokens == masked.cache.ledger.attended_tokens


@pairs
def test_the_whole_budget_is_the_full_cache_bit_for_bit(name: str, geometry: str) -> None:
    """Budget 1 for what acts after attention; rho = 0 for what acts before it."""
    if name in IGNORES_BUDGET:
        pytest.skip("keeps the same at every budget")
    before = getattr(method(name), "timing", "after") == "before"
    full = run("full", GEOMETRIES[geometry], "1")
    made = run(name, GEOMETRIES[geometry], "rho=0" if before else "1")
    assert isinstance(full, Run) and isinstance(made, Run)
    assert all(map(torch.equal, full.outputs, made.outputs))
    assert made.used == full.used
    assert made.ratios["attended_ratio"] == 1


@pytest.mark.parametrize(
    ("name", "geometry"),
    [(m, g) for m in METHODS for g in (["tiny"] if m in SCHEDULED else GEOMETRIES)] + [(m, "small") for m in VARIANTS],
)
def test_more_budget_attends_to_no_less(name: str, geometry: str) -> None:
    """Of schedules on a model with many heads: with few, early activation may give up more at a larger budget."""
    runs = [run(name, GEOMETRIES.get(geometry, TINY), text) for text in BUDGETS]
    totals = [made.cache.ledger.attended_tokens for made in runs if isinstance(made, Run)]
    assert totals == sorted(totals, reverse=True)


@every
def test_a_batch_is_its_images(name: str) -> None:
    """Four images at once and one at a time, on the same inputs."""
    geometry, budget = GEOMETRIES["small"], Budget.parse("1" if name == "full" else "0.3")
    visits = inputs(geometry, IMAGES)
    if name.partition(" ")[0] in SHARES_LAYERS:  # then four times the same image
        visits = rows_of(visits, [0] * IMAGES + [IMAGES] * IMAGES)
    together = Run(name, geometry, budget, visits=visits)
    for image in range(IMAGES):
        rows = [image, IMAGES + image]
        single = Run(name, geometry, budget, visits=rows_of(visits, rows))
        assert single.used == together.used
        for mine, batch in zip(single.positions, together.positions, strict=True):
            assert torch.equal(mine, batch[rows])
        for mine, batch in zip(single.outputs, together.outputs, strict=True):
            torch.testing.assert_close(mine, batch[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("geometry", [*GEOMETRIES, "tiny"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_are_followed_to_the_token(name: str, geometry: str, text: str) -> None:
    shape = GEOMETRIES.get(geometry, TINY)
    made = run(name, shape, text)
    if isinstance(made, BudgetError):
        return
    assert made.schedule is not None
    assert made.used[:-1] == made.schedule.physical_trace().tolist()
    peak = max(map(max, made.used))
    assert peak == made.schedule.physical_peak_tokens == made.cache.pool.peak == made.cache.pool.capacity
    attended = int(made.schedule.held_tokens.sum())
    attended += shape.heads * shape.schedule.num_tokens
    assert made.cache.ledger.attended_tokens == attended


@pytest.mark.parametrize("name", METHODS)
def test_thirteen_scales(name: str) -> None:
    """One layer of Infinity at 1024 x 1024."""
    made = run(name, LARGE, "0.1")
    if isinstance(made, BudgetError):
        made = run(name, LARGE, str(smallest(made)))
    assert isinstance(made, Run)
    check_bytes(made)
    if made.schedule is not None:
        assert made.used[:-1] == made.schedule.physical_trace().tolist()
        assert made.cache.pool.peak == made.cache.pool.capacity == made.schedule.physical_peak_tokens
