"""HeatKV's schedules against the official ones: every number of the golden file, and hashes at further budgets.

The order files belong to the HeatKV authors and are not part of this repository; tests that need them look in
HEATKV_SHARED (default `../shared`) and skip with a reason where it is absent.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from heatkv_cli.core.budget import Budget, decimal_up
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, BudgetError
from heatkv_cli.methods.heatkv.orders import Orders, load_orders
from heatkv_cli.methods.heatkv.schedule import Schedule
from heatkv_cli.methods.heatkv.scheduler import prune_counts, removal_schedule, smallest_budget

pytestmark = pytest.mark.golden

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parent / "data" / "heatkv_schedules.json").read_text(encoding="utf-8"))
MODELS = list(GOLDEN["models"])
BUDGETS = [(model, text) for model in MODELS for text in GOLDEN["models"][model]["budgets"]]
MORE = [(model, text) for model in MODELS for text in GOLDEN["models"][model]["more"]]


def geometry_of(model: str, sink_scales: int = 3) -> Geometry:
    entry = GOLDEN["models"][model]
    schedule = ScaleSchedule(GOLDEN["scale_schedule_hw"])
    return Geometry(model, entry["num_layers"], entry["num_heads"], entry["head_dim"], schedule, sink_scales)


def order_file(model: str) -> Path:
    path = Path(os.environ.get("HEATKV_SHARED", ROOT / ".." / "shared")) / "orders" / f"{model}.json"
    if not path.is_file():
        pytest.skip(f"needs the order file {path}: set HEATKV_SHARED")
    return path


@cache
def orders_of(model: str) -> Orders:
    return load_orders(order_file(model), geometry_of(model))


@cache
def schedule_of(model: str, text: str) -> Schedule:
    return removal_schedule(geometry_of(model), Budget.parse(text), orders_of(model))


def entry_of(model: str, text: str) -> dict[str, Any]:
    entry: dict[str, Any] = GOLDEN["models"][model]["budgets"][text]
    return entry


def test_the_scales() -> None:
    schedule = ScaleSchedule(GOLDEN["scale_schedule_hw"])
    assert list(schedule.lengths) == GOLDEN["scale_tokens"]
    assert list(schedule.offsets) == GOLDEN["cumulative_tokens"]
    assert schedule.peak_tokens == GOLDEN["full_peak_tokens_per_head"]
    assert schedule.num_tokens == GOLDEN["all_scales_tokens_per_head"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sinks", [3, 4])
def test_the_smallest_budget(model: str, sinks: int) -> None:
    golden, geometry = GOLDEN["min_feasible_budget"], geometry_of(model, sinks)
    smallest = smallest_budget(geometry)
    assert smallest == Fraction(golden[f"sink_{sinks}_fraction"])
    assert float(smallest) == golden[f"sink_{sinks}"]
    prune_counts(geometry, Budget.parse(golden[f"sink_{sinks}_fraction"]))
    prune_counts(geometry, Budget.parse(decimal_up(smallest)))
    with pytest.raises(BudgetError, match=golden[f"sink_{sinks}_fraction"]):
        prune_counts(geometry, Budget(smallest - Fraction(1, 10**12), "less"))


@pytest.mark.parametrize("model", MODELS)
def test_the_full_peak(model: str) -> None:
    assert geometry_of(model).full_tokens == GOLDEN["models"][model]["full_peak_tokens_all_heads"]


@pytest.mark.parametrize(("model", "text"), [*BUDGETS, *MORE])
def test_the_counts(model: str, text: str) -> None:
    entry = GOLDEN["models"][model]["budgets"].get(text) or GOLDEN["models"][model]["more"][text]
    assert list(prune_counts(geometry_of(model), Budget.parse(text))) == entry["prune_counts_per_scale"]


@pytest.mark.parametrize("model", MODELS)
def test_doubles_differ_from_rationals_where_the_official_ones_do(model: str) -> None:
    """Counts are bit-compatible, so they inherit the official rounding; exact rationals disagree at two budgets."""
    geometry, differ = geometry_of(model), []
    for thousandths in range(4, 1001):
        ratio = Fraction(thousandths, 1000)
        allowed = ratio * geometry.schedule.peak_tokens
        exact = [
            0 if full <= allowed else math.ceil(geometry.heads * (full - allowed) / (full - geometry.sink_tokens))
            for full in geometry.schedule.offsets[:-1]
        ]
        if list(prune_counts(geometry, Budget.parse(ratio))) != exact:
            differ.append(float(ratio))
    key = "prune_counts_float_vs_rational_differences_on_grid_0.004..1.000_step_0.001"
    assert differ == GOLDEN["models"][model][key]


@pytest.mark.parametrize("model", MODELS)
def test_the_orders(model: str) -> None:
    entry, orders = GOLDEN["models"][model], orders_of(model)
    assert orders.sha256 == entry["orders_sha256"]
    assert orders.order.shape == (entry["num_orders"], entry["num_layers"] * entry["num_heads"], 2)


@pytest.mark.parametrize(("model", "text"), BUDGETS)
def test_the_hashes(model: str, text: str) -> None:
    schedule, entry = schedule_of(model, text), entry_of(model, text)
    assert schedule.budget.as_float == entry["budget_float"]
    assert schedule.attention_removals_sha256() == entry["sha256_attention_removals"]
    assert schedule.final_removals_sha256() == entry["sha256_final_removals"]
    assert schedule.early_activations_sha256() == entry["sha256_early_activations"]
    assert schedule.first_absent_sha256() == entry["sha256_first_absent"]


@pytest.mark.parametrize(("model", "text"), MORE)
def test_the_hashes_at_further_budgets(model: str, text: str) -> None:
    schedule, entry = schedule_of(model, text), GOLDEN["models"][model]["more"][text]
    assert len(schedule.early) == entry["early_activation_total"]
    assert schedule.attention_removals_sha256() == entry["sha256_attention_removals"]
    assert schedule.final_removals_sha256() == entry["sha256_final_removals"]
    assert schedule.early_activations_sha256() == entry["sha256_early_activations"]
    assert schedule.scheduled_peak_tokens <= schedule.budget.ratio * schedule.geometry.full_tokens


@pytest.mark.parametrize(("model", "text"), BUDGETS)
def test_the_removed_sets(model: str, text: str) -> None:
    schedule, entry = schedule_of(model, text), entry_of(model, text)
    table = schedule.table()
    final = [int((schedule.removed_from <= scale).sum()) for scale in range(13)]
    assert final == entry["final_removed_counts"]
    assert sum(final) == len(schedule.final_removals()) == entry["n_final_removals"]
    attention = [row["removed_atoms"] for row in table]
    assert attention == entry["attention_removed_counts"]
    assert sum(attention) == len(schedule.attention_removals()) == entry["n_attention_removals"]
    assert int((schedule.first_absent < 13).sum()) == entry["n_ever_removed_atoms"]
    for source, histogram in entry["first_absent_target_histogram_per_source"].items():
        gone = [target for target in schedule.first_absent[int(source)].ravel().tolist() if target < 13]
        assert {str(target): number for target, number in Counter(gone).items()} == histogram


@pytest.mark.parametrize(("model", "text"), BUDGETS)
def test_the_early_activations(model: str, text: str) -> None:
    schedule, entry = schedule_of(model, text), entry_of(model, text)
    assert [row["early"] for row in schedule.table()] == entry["early_activation_count_per_scale"]
    assert len(schedule.early) == entry["early_activation_total"]
    triggers: dict[str, dict[str, int]] = {}
    for target, trigger in schedule.early[:, :2].tolist():
        per_target = triggers.setdefault(str(target), {})
        per_target[str(trigger)] = per_target.get(str(trigger), 0) + 1
    assert triggers == entry["early_activation_trigger_layers"]


@pytest.mark.parametrize(("model", "text"), BUDGETS)
def test_the_scheduler_s_model(model: str, text: str) -> None:
    schedule, entry = schedule_of(model, text), entry_of(model, text)
    official = schedule.scheduler_trace(exact=False)
    assert official.tolist() == entry["cache_tokens_after_scale_layer"]
    assert schedule.scheduler_trace().tolist() == entry["cache_tokens_after_scale_layer_exact"]
    assert schedule.scheduled_peak_tokens == entry["peak_tokens"] <= entry["threshold_total_tokens"]
    assert list(divmod(int(official.argmax()), schedule.geometry.num_layers)) == entry["peak_at_scale_layer"]
    assert schedule.scheduled_peak_tokens / schedule.geometry.full_tokens == entry["peak_over_full"]


@pytest.mark.parametrize(("model", "text"), BUDGETS)
def test_the_runtime_s_model(model: str, text: str) -> None:
    schedule, entry = schedule_of(model, text), entry_of(model, text)
    assert schedule.physical_trace().tolist() == entry["impl_cache_tokens_after_scale_layer"]
    assert schedule.physical_peak_tokens == entry["impl_peak_tokens"]
    assert schedule.physical_peak_tokens / schedule.geometry.full_tokens == entry["impl_peak_over_full"]
    table = schedule.table()
    assert [row["held_tokens"] for row in table] == entry["incoming_tokens_per_target_scale_all_layers"]
    assert table[-1]["held_tokens"] == entry["final_scale_incoming_tokens"]


@pytest.mark.parametrize(("model", "text"), BUDGETS)
def test_what_layers_of_their_own_would_need(model: str, text: str) -> None:
    """The official runtime gives each layer a slab of its own; the sum of the layers' maxima is what that costs."""
    schedule, slab = schedule_of(model, text), entry_of(model, text)["official_slab"]
    largest = schedule.held_tokens.amax(0)
    assert largest.tolist() == slab["capacity_bound_per_layer"]
    assert int(largest.sum()) == slab["sum_capacity_bound"]
    assert int(largest.sum()) / schedule.geometry.full_tokens == slab["ratio_capacity"]
    written = schedule.first_absent[:-1] > torch.arange(1, 13).view(-1, 1, 1)
    assert int(written.sum()) == slab["segments"]
    assert int(written.sum(0).max()) == slab["max_segments_per_head"]


@pytest.mark.parametrize("model", MODELS)
def test_nothing_goes_at_budget_one(model: str) -> None:
    schedule = schedule_of(model, "1")
    assert not schedule.attention_removals()
    assert not len(schedule.early)
    assert schedule.physical_peak_tokens == schedule.geometry.full_tokens


@pytest.mark.parametrize("model", MODELS)
def test_attended_totals_do_not_fall_with_the_budget(model: str) -> None:
    """Summed over the target scales; at a single target early activation may take a little more from more."""
    totals = [int(schedule_of(model, f"{percent / 100}").held_tokens.sum()) for percent in range(1, 101, 3)]
    assert totals == sorted(totals)


@pytest.mark.parametrize("model", MODELS)
def test_orders_serve_a_lower_resolution(model: str) -> None:
    full = geometry_of(model)
    small = Geometry(model, full.num_layers, full.num_heads, 128, ScaleSchedule(full.schedule.sizes[:10]), 3)
    with pytest.raises(ArtifactError, match="has 9 lists, expected 6"):
        load_orders(order_file(model), small)
    orders = load_orders(order_file(model), small, calibrated_on=full.schedule)
    assert torch.equal(orders.order, orders_of(model).order[:6])
    schedule = removal_schedule(small, Budget.parse("0.1"), orders)
    assert schedule.calibrated_on.resolution == "64x64"
    assert schedule.geometry.schedule.resolution == "32x32"
    assert schedule.calibration_sha256 == orders.source_sha256


def test_orders_of_the_other_model_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"list 0 .* has 1120 entries, expected 512"):
        load_orders(order_file("infinity-8b"), geometry_of("infinity-2b"))
