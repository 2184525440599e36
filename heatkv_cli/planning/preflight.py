"""Everything that would stop a plan later, found before any work; the same list for the run and for `--dry-run`.

Errors of different kinds are gathered and raised together. A metric that lacks weights, a package or images does not
stop the others: it is told first and becomes a row that says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from heatkv_cli.benchmarks.base import PromptSet
from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.config import Plan, RunConfig, config_hash
from heatkv_cli.config.compose import DRAWING
from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import BudgetError, ConfigError, Errors, HeatKVError, SetupError, raise_all
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.metrics.base import Metric, SetMetric
from heatkv_cli.models.base import ImageModel
from heatkv_cli.planning.effort import hours_text, large
from heatkv_cli.planning.job import Infeasible, check_device, geometry_of, load_model, metrics_of, sketch_of
from heatkv_cli.planning.resolver import Resolver, refuse_unused, weight_file
from heatkv_cli.results import read_results

T = TypeVar("T")

GO_ON = ("generate", "eval")
"""Commands that leave out the points of a sweep that cannot exist; the others end there."""

LOW_DISK = 64 * 2**20
"""Free bytes below which nothing is begun."""


@dataclass(frozen=True)
class Lacking:
    """A metric that cannot be measured: which, what is missing, its bytes where they are known, and what fetches it."""

    metric: str
    what: str
    bytes: int | None
    fix: str


@dataclass
class Ready:
    """Findings of the preflight.

    Args:
        errors: whatever ends the command before it begins.
        infeasible: points of a sweep that cannot exist.
        lacking: metrics that will be rows without a value.
        calibrations: runs whose calibration must be made first, one per calibration.
    """

    errors: list[HeatKVError] = field(default_factory=list)
    infeasible: list[Infeasible] = field(default_factory=list)
    lacking: list[Lacking] = field(default_factory=list)
    calibrations: list[RunConfig] = field(default_factory=list)

    def feasible(self, runs: Sequence[RunConfig]) -> list[RunConfig]:
        """Return the runs that can exist."""
        return [run for run in runs if all(run is not point.cfg for point in self.infeasible)]

    def check(self, plan: Plan) -> None:
        """Raise what was found, where the command cannot go on with it.

        Raises:
            HeatKVError: one error, or several as `Errors`.
        """
        errors = sorted(self.errors, key=lambda error: error.exit_code)
        nothing = len(self.infeasible) == len(plan.runs) or plan.command not in GO_ON
        raise_all([*errors, *([point.error for point in self.infeasible] if nothing else [])])


def preflight(plan: Plan, resolver: Resolver) -> Ready:
    """Look at everything a plan needs; nothing is written, and no model computes anything.

    Args:
        plan: the command's plan.
        resolver: remembers what was read, for the run that follows.
    """
    ready = Ready()
    ready.errors += refuse_unused(plan.runs)
    for run in _first_of_each(plan.runs, lambda run: str(run.runtime)):
        _gather(ready, check_device, run)
    for run in _first_of_each(plan.runs, lambda run: config_hash(run.model.identity())):
        _check_model(run, plan, resolver, ready)
    _check_artifacts(plan, resolver, ready)
    _check_output(plan, ready)
    if plan.command == "eval":
        _check_metrics(plan, resolver, ready)
    return ready


def _first_of_each(runs: Sequence[RunConfig], key: Callable[[RunConfig], str]) -> list[RunConfig]:
    return list({key(run): run for run in reversed(runs)}.values())[::-1]


def _gather(ready: Ready, action: Callable[..., T], *args: Any) -> T | None:
    """Call something; keep the errors it raises, and go on."""
    try:
        return action(*args)
    except Errors as error:
        ready.errors += error.errors
    except HeatKVError as error:
        ready.errors.append(error)
    return None


# ------------------------------------------------------------------------------------------------------------- models


def _check_model(run: RunConfig, plan: Plan, resolver: Resolver, ready: Ready) -> None:
    """Files, prompts and shape of one model, and the prompts of all its runs."""
    before = len(ready.errors)
    if plan.command != "build-schedule" or _calibrates(plan, resolver):
        for file in () if run.random_weights else run.model.weights.files:
            _gather(ready, weight_file, run, file)
    lists = [run.calibration_prompts, run.calibration_check] if plan.command == "calibrate" else []
    if plan.command in ("generate", "eval", "bench"):
        mine = [other for other in plan.runs if other.model == run.model]
        lists += [
            other.benchmark for other in _first_of_each(mine, lambda other: config_hash(other.benchmark.identity()))
        ]
    if _calibrates(plan, resolver):
        lists.append(run.calibration_prompts)
    found = [prompts for config in lists if (prompts := _gather(ready, resolver.prompts, config))]
    if run.model.sketch:
        _gather(ready, sketch_of, run.model, geometry_of(run.model))
    if len(ready.errors) > before:
        return
    if run.model.weights.place == "package":  # a few megabytes: loading it checks its file and its words
        model = _gather(ready, _loaded, run, resolver)
        for prompts in () if model is None else found:
            _gather(ready, model.prepare, prompts.items, run.text_root)  # type: ignore[union-attr]
    asked_twice = run.yes or plan.dry_run or plan.command not in DRAWING
    if run.runtime.device == "cpu" and not asked_twice and large(run):
        count = sum(len(prompts) for prompts in found) * len(plan.runs)
        ready.errors.append(
            ConfigError(
                f"model={run.model.name} on a CPU takes about {hours_text(run, count)} for {count} images",
                "use a GPU (runtime=gpu), or say that you want it all the same: --yes",
            )
        )


def _loaded(run: RunConfig, resolver: Resolver) -> ImageModel:
    return load_model(run, resolver.weights(run)[0])


def _calibrates(plan: Plan, resolver: Resolver) -> bool:
    return any(resolver.needs_calibration(run) and run.calibration is None for run in plan.runs)


# ---------------------------------------------------------------------------------------------- artifacts and budgets


def stand_in(geometry: Geometry) -> Calibration:
    """Return a calibration that has seen nothing, for plans made before there is a real one.

    Its scores are noise, so that no head is special; one head's variance stands out, so that the knee of HACK's
    variances is as far right as may be: budgets that another calibration could meet are not refused.
    """
    each, scales = (1, geometry.num_layers, geometry.num_heads), geometry.num_scales
    variance = torch.zeros(each)
    variance[0, -1, -1] = 1
    scas = torch.rand(*each, scales, scales, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    asi, per_scale = torch.zeros(*each[:2], scales), torch.zeros(*each, scales)
    return Calibration(geometry, "", (0,), scas, variance, asi, per_scale, per_scale)


def setting_before(run: RunConfig, resolver: Resolver) -> tuple[Setting, bool]:
    """Return what a run's method works with before anything is made, and whether it is the very thing."""
    calibration, known = None, True
    if resolver.needs_calibration(run):
        try:
            calibration = resolver.calibration(run)
        except SetupError:  # without the weights nobody knows which calibration is theirs
            calibration = None
        known = calibration is not None
        calibration = calibration or stand_in(geometry_of(run.model))
    return resolver.setting(run, calibration), known


def _check_artifacts(plan: Plan, resolver: Resolver, ready: Ready) -> None:
    """Files that runs name, and whether each budget can be met."""
    missing: dict[Path, RunConfig] = {}
    for run in plan.runs:
        if plan.command == "calibrate":
            if run.calibration is not None:
                _gather(ready, resolver.calibration, run)
            continue
        found = _gather(ready, setting_before, run, resolver)
        if found is None:
            continue
        setting, known = found
        if not known and plan.command != "bench":
            with suppress(SetupError):  # weights are missing: told already
                missing.setdefault(resolver.calibration_home(run)[0], run)
        method: Method = run.method.object
        try:
            method.policy(setting)
        except BudgetError as error:
            ready.infeasible.append(Infeasible(run, error))
        except HeatKVError as error:
            ready.errors.append(error)
    ready.calibrations = list(missing.values())


# ------------------------------------------------------------------------------------------------- output and metrics


def _check_output(plan: Plan, ready: Ready) -> None:
    """A folder that can be written, with room, and files that are ours."""
    out = plan.first.out.absolute()
    existing = out
    while not os.path.lexists(existing) and existing != existing.parent:  # a link to nothing is there, and no folder
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        ready.errors.append(SetupError(f"cannot write to {out}", "choose another folder with --out DIR"))
        return
    if shutil.disk_usage(existing).free < LOW_DISK:
        ready.errors.append(
            SetupError(f"the disk of {existing} is full", "free some disk, or choose --out DIR elsewhere")
        )
    if plan.command != "eval":
        return
    _gather(ready, read_results, out / "results.csv")
    sheet = out / "contact-sheet.png"
    if plan.first.contact_sheet and sheet.exists() and not (sheet.is_file() and os.access(sheet, os.W_OK)):
        ready.errors.append(SetupError(f"cannot write {sheet}", "remove it, or contact_sheet=0"))


def _check_metrics(plan: Plan, resolver: Resolver, ready: Ready) -> None:
    """Prompts that lack what a metric reads end the command; weights and images that are missing are told."""
    seen: set[tuple[str, str, int | None]] = set()
    for run in plan.runs:
        key = config_hash(run.benchmark.identity())
        for name, metric in metrics_of(run).items():
            if (name, key, run.limit) in seen:
                continue
            seen.add((name, key, run.limit))
            prompts = _prompts_of(run, resolver)
            if prompts is None:
                continue
            _gather(ready, _check_prompts, metric, prompts)
            ready.lacking += [Lacking(name, lack.name, lack.bytes, lack.fix) for lack in metric.lacks()]
            samples = run.benchmark.object.samples_per_prompt
            count = (len(prompts) if run.limit is None else min(run.limit, len(prompts))) * samples
            if isinstance(metric, SetMetric) and count < metric.min_images:
                fix = f"--limit all, or metric.{name}.min_images={max(count, 2)}"
                ready.lacking.append(
                    Lacking(name, f"{count} images, at least {metric.min_images} are needed", None, fix)
                )
    ready.lacking = list(dict.fromkeys(ready.lacking))


def _check_prompts(metric: Metric, prompts: PromptSet) -> None:
    for item in prompts.items:
        metric.check_prompt(item.id, item.meta)


def _prompts_of(run: RunConfig, resolver: Resolver) -> PromptSet | None:
    try:
        return resolver.prompts(run.benchmark)
    except HeatKVError:
        return None  # told already
