"""The dry run: what a plan would do, its bytes, and everything that is missing; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from heatkv_cli.config import Plan, RunConfig, config_hash
from heatkv_cli.console import Console, size_text
from heatkv_cli.errors import BudgetError, HeatKVError
from heatkv_cli.planning.byte_plan import BATCHES, BytePlan, byte_plan
from heatkv_cli.planning.job import Infeasible, geometry_of
from heatkv_cli.planning.preflight import Ready, preflight
from heatkv_cli.planning.resolver import Resolver


def preview(plan: Plan, ui: Console) -> dict[str, Any]:
    """Show what a plan would do and whether everything for it is there.

    Returns:
        The resolved config of every run that can exist, sizes in bytes; under `missing` what would end the command
        before it begins, under `lacking` the metrics that would be skipped, under `infeasible` the points of a sweep
        that would be left out; `exit_code`, the code the command would end with.

    Raises:
        HeatKVError: the plan makes no sense; or no budget can be met, where the command itself would end with that.
    """
    resolver = Resolver()
    ready = preflight(plan, resolver)
    if not any(error.exit_code > 2 for error in ready.errors):
        ready.check(plan)
    plans = _byte_plans(plan, ready, resolver)
    _show_runs(plan, plans, ui)
    _show_calibrations(ready, ui)
    for key, value in sorted(_flat(plan.first.plain())):
        ui.detail(f"  {key}: {value}")
    ui.say(
        "nothing was written" if ui.as_json or ui.verbose else "with -v also the resolved config; nothing was written"
    )
    for point in ready.infeasible:
        ui.warn(f"left out: {point.error.message}")
    for lack in ready.lacking:
        size = "" if lack.bytes is None else f" ({size_text(lack.bytes)})"
        ui.warn(f"{lack.metric} will be skipped: {lack.what}{size}; {lack.fix}")
    for error in ready.errors:
        ui.error(error)
    return {
        "status": "planned",
        "command": plan.command_line,
        "runs": [
            _planned(run, found)
            for run, found in zip(plan.runs, plans, strict=True)
            if not isinstance(found, Infeasible)
        ],
        "calibrations": [run.calibration_prompts.name for run in ready.calibrations],
        "missing": [{"error": error.message, "fix": error.hint} for error in ready.errors],
        "lacking": [vars(lack) for lack in ready.lacking],
        "infeasible": [point.report for point in ready.infeasible],
        "exit_code": _exit_code(ready),
    }


def _exit_code(ready: Ready) -> int:
    if ready.errors:
        return min(error.exit_code for error in ready.errors)
    return 6 if ready.infeasible or ready.lacking else 0


def _byte_plans(plan: Plan, ready: Ready, resolver: Resolver) -> list[BytePlan | Infeasible | None]:
    """Return a plan for each run, or why it cannot exist; runs that differ in nothing but prompts share one."""
    if plan.command == "calibrate":
        return [None] * len(plan.runs)
    found: dict[str, BytePlan | Infeasible | None] = {}
    infeasible = {id(point.cfg): point for point in ready.infeasible}
    plans: list[BytePlan | Infeasible | None] = []
    for run in plan.runs:
        parts = {"model": run.model.identity(), "method": run.method.identity(), "runtime": run.runtime.identity()}
        key = config_hash({**parts, "budget": run.budget.text})
        if id(run) in infeasible:
            plans.append(infeasible[id(run)])
            continue
        if key not in found:
            try:
                found[key] = byte_plan(run, resolver)
            except BudgetError as error:
                found[key] = Infeasible(run, error)
            except HeatKVError:
                found[key] = None  # told already: a file that it needs is missing
        plans.append(found[key])
    return plans


def _planned(run: RunConfig, plan: BytePlan | None) -> dict[str, Any]:
    full, kept = kv_bytes(run)
    document = {**run.plain(), "kv_full_bytes": full, "kv_budget_bytes": kept, "byte_plan": None}
    if plan is not None:
        document["byte_plan"] = {"exact": plan.exact, "batches": list(plan.lines(_batches(run)))}
        if run.memory is not None:
            document["largest_batch"] = plan.largest_batch(run.memory)
    return document


def _batches(run: RunConfig) -> tuple[int, ...]:
    return tuple(sorted({*BATCHES, run.runtime.batch_size}))


def _first_of(plan: Plan, group: str) -> list[RunConfig]:
    """Return the first run of each model, or benchmark, of a sweep."""
    return list({getattr(run, group).name: run for run in reversed(plan.runs)}.values())[::-1]


def _show_calibrations(ready: Ready, ui: Console) -> None:
    for run in ready.calibrations:
        ui.say(f"first: {run.model.name} is calibrated on {run.calibration_prompts.name}, with the full cache")


def _show_runs(plan: Plan, plans: Sequence[BytePlan | Infeasible | None], ui: Console) -> None:
    if plan.command == "calibrate":  # with the full cache, whatever method the runs will have
        rows = [[run.model.name, run.calibration_prompts.name, size_text(kv_bytes(run)[0])] for run in plan.runs]
        ui.table(("model", "prompts", "KV full"), rows, title=_headline(plan))
        return
    memory = plan.first.memory
    swept = [group for group in ("model", "benchmark") if len(_first_of(plan, group)) > 1]
    columns = [*swept, "method", "parameters", "budget", "prompts", "KV kept", "KV full", "peak"]
    rows = []
    for run, found in zip(plan.runs, plans, strict=True):
        full, kept = kv_bytes(run)
        params = ", ".join(f"{key}={value}" for key, value in run.method.params.items())
        images = "all" if run.limit is None else str(run.limit)
        row = [getattr(run, group).name for group in swept]
        row += [run.method.name, params, run.budget.text, images]
        row += ["infeasible" if isinstance(found, Infeasible) else size_text(kept), size_text(full)]
        if isinstance(found, BytePlan):
            batch = [] if memory is None else [str(found.largest_batch(memory))]
            rows.append([*row, size_text(found.total(run.runtime.batch_size)), *batch])
        else:
            rows.append([*row, "-", *([] if memory is None else ["-"])])
    ui.table(columns + ([] if memory is None else ["largest batch"]), rows, title=_headline(plan))
    shown = [(run, found) for run, found in zip(plan.runs, plans, strict=True) if isinstance(found, BytePlan)]
    if shown:
        _show_bytes(*next((pair for pair in shown if not pair[0].method.budgetless), shown[0]), ui)


def _show_bytes(run: RunConfig, plan: BytePlan, ui: Console) -> None:
    """One run at several batch sizes; all runs are in the JSON document."""
    columns = ("batch", "weights", "text encoder", "KV full", "KV kept", "index", "transient", "decode", "peak")
    keys = ("weights", "text_encoder", "kv_full", "kv", "index", "transient", "decode", "total")
    rows = [[line["batch"], *(size_text(line[key]) for key in keys)] for line in plan.lines(_batches(run))]
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in plan.model.weights.items())
    about = "" if plan.exact else "; an estimate: its orders are not known yet, or it looks at keys"
    ui.table(columns, rows, f"bytes of {run.method.name} at {run.budget.slug} ({parts}{about})")


def kv_bytes(run: RunConfig) -> tuple[int, int]:
    """Return the bytes of the full KV cache of one batch, guidance rows included, and those the budget allows."""
    rows = run.runtime.batch_size * (2 if run.model.sampling.guided else 1)
    geometry = geometry_of(run.model)
    slots = run.budget.slots(geometry, rows)
    return geometry.full_bytes(rows), slots * rows * geometry.bytes_per_token


def _headline(plan: Plan) -> str:
    models = ", ".join(f"{run.model.name} at {run.model.shape_label}" for run in _first_of(plan, "model"))
    group = "calibration_prompts" if plan.command == "calibrate" else "benchmark"
    benchmarks = ", ".join(getattr(run, group).name for run in _first_of(plan, group))
    where = f"{models}, {benchmarks}, batches of {plan.first.runtime.batch_size} on {plan.first.runtime.torch_device}"
    name = plan.experiment.title or plan.experiment.name if plan.experiment else plan.command
    return f"{name}: {where} ({len(plan.runs)} {'run' if len(plan.runs) == 1 else 'runs'})"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
