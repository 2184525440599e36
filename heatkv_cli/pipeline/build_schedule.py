"""build-schedule: calibration or order file, and budget -> what a method would do: a file, and a table per scale."""

from __future__ import annotations

from typing import Any

from heatkv_cli.config import Plan
from heatkv_cli.console import Console
from heatkv_cli.errors import ConfigError, raise_all
from heatkv_cli.pipeline.calibrate import calibrate_all
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Build the plan of every run: each must have a method that plans ahead."""
    online = dict.fromkeys(cfg.method.name for cfg in plan.runs if cfg.method.object.plan_type is None)
    raise_all(
        [ConfigError(f"method {name} decides online: it has no schedule", "method=heatkv has one") for name in online]
    )
    resolver = Resolver()
    ready = preflight(plan, resolver)
    ready.check(plan)
    calibrate_all(ready.calibrations, resolver, ui)
    reports = []
    for cfg in plan.runs:
        calibration = resolver.calibration(cfg) if resolver.needs_calibration(cfg) else None
        path, made = resolver.plan(cfg, resolver.setting(cfg, calibration))
        assert path is not None and made is not None  # a method that plans ahead has a plan
        reports.append({"path": str(path.absolute()), "model": cfg.model.name, **made.report(), "scales": made.table()})
        table = made.table()
        title = f"{cfg.method.name} on {cfg.model.name}, budget {cfg.budget.slug}, {made.about}"
        ui.table(list(table[0]), [list(row.values()) for row in table], title)
        ui.wrote(path)
    return {**reports[0], "schedules": reports}
