"""build-schedule: calibration or order file, and budget -> schedule.safetensors and a table per scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heatkv_cli.config import ModelConfig, Plan, RunConfig, config_hash
from heatkv_cli.console import Console
from heatkv_cli.core.artifacts import Orders, Schedule, load_orders
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.scales import ScaleSchedule
from heatkv_cli.errors import ConfigError
from heatkv_cli.pipeline import setup
from heatkv_cli.pipeline.calibrate import calibration_path
from heatkv_cli.results import finish_meta, write_meta

FILE = "schedule.safetensors"


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Build the schedule of every run of the plan that has one."""
    reports = []
    for cfg in plan.runs:
        path, schedule = schedule_of(cfg, ui)
        if schedule is None or path is None:
            raise ConfigError(
                f"method {cfg.method.name} has no schedule", "heatkv ls methods shows which do: method=heatkv"
            )
        reports.append(_report(path, schedule))
        title = f"{cfg.method.name} on {cfg.model.name}, budget {cfg.budget_label}, order {schedule.order}"
        table = schedule.table()
        ui.table(list(table[0]), [list(row.values()) for row in table], title)
        ui.wrote(path)
    return {**reports[0], "schedules": reports}


def schedule_of(cfg: RunConfig, ui: Console) -> tuple[Path | None, Schedule | None]:
    """The schedule of a run, built (and calibrated for) if it is not there; (None, None) for methods without."""
    method = setup.method_of(cfg.method)
    if not method.scheduled:
        return None, None
    geometry, budget = setup.geometry_of(cfg.model), setup.budget_of(cfg)
    if cfg.schedule is not None:
        schedule = Schedule.load(cfg.schedule, geometry)
        if schedule.budget.ratio > budget.ratio:
            raise ConfigError(
                f"{cfg.schedule} was built for budget {schedule.budget}, the run has {budget}",
                f"heatkv build-schedule --model {cfg.model.name} budget={budget}",
            )
        return cfg.schedule, schedule
    if method.calibrated:
        orders = _orders(cfg, ui)
    else:
        orders = None
    schedule = method.build_schedule(geometry, budget, orders)
    digest = config_hash(
        {"model": cfg.model.name, "method": cfg.method.identity(), "budget": budget.text, "schedule": schedule.sha256}
    )
    folder = cfg.out / "schedules" / f"{cfg.model.name}-{cfg.method.name}-{cfg.budget_label}-{digest[:8]}"
    path = folder / FILE
    if not path.exists():
        write_meta(folder, config_hash=digest, config=cfg.plain())
        schedule.save(path)
        finish_meta(folder, sha256=schedule.sha256)
    return path, schedule


def _orders(cfg: RunConfig, ui: Console) -> Orders:
    geometry = setup.geometry_of(cfg.model)
    if cfg.orders is None:
        return Calibration.load(calibration_path(cfg, ui), geometry).orders()
    return orders_of_file(cfg.orders, cfg.model)


def orders_of_file(path: Path, model: ModelConfig) -> Orders:
    """Published removal orders for a model; errors as in `load_orders`."""
    # upstream's lists were found at the largest resolution; smaller ones use the lists of the sources they have
    found_at = model.order_scales or max(model.resolutions.values(), key=len)
    return load_orders(path, setup.geometry_of(model), ScaleSchedule(found_at))


def _report(path: Path, schedule: Schedule) -> dict[str, Any]:
    full = schedule.geometry.full_tokens
    return {
        "path": str(path.absolute()),
        "model": schedule.geometry.model,
        "method": schedule.method,
        "budget": schedule.budget.text,
        "order": schedule.order,
        "counts": list(schedule.counts),
        "early_activations": len(schedule.early),
        "scheduled_peak_tokens": schedule.scheduled_peak_tokens,
        "scheduled_peak_ratio": schedule.scheduled_peak_tokens / full,
        "physical_peak_tokens": schedule.physical_peak_tokens,
        "physical_peak_ratio": schedule.physical_peak_tokens / full,
        "full_tokens": full,
        "attention_removals_sha256": schedule.attention_removals_sha256(),
        "final_removals_sha256": schedule.final_removals_sha256(),
        "sha256": schedule.sha256,
        "scales": schedule.table(),
    }
