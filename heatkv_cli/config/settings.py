"""Runs: the frozen dataclasses that every command works on, and the hash that names a run's folder.

Made by `config.compose` from YAML and overrides, read by the pipeline. Pure Python: no hydra, no torch. The comment
beside a field says where the user sets it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from heatkv_cli.config.leaves import BenchmarkConfig, MethodConfig, MetricConfig, ModelConfig, RuntimeConfig
from heatkv_cli.core.budget import Budget
from heatkv_cli.metrics.bootstrap import Bootstrap
from heatkv_cli.results.code import code_sha256, folder_files, module_files, run_code_sha256


@dataclass(frozen=True)
class RunConfig:
    """One method at one budget on one model and benchmark: one row group of the results.

    Args:
        model, method, benchmark, metrics, runtime: the chosen files of the config groups.
        reference: the method all others are compared with (`full`).
        calibration_prompts: the prompts of `calibrate`; calibration_check: those it compares its orders with.
        budget: fraction that may be kept, on the axis on which it was given (`budget`, `rho`).
        bootstrap: number, confidence and seed of the draws behind intervals.
        seed: the run's seed; each image derives its own.
        seed_mode: "hash" (default) or "paper" (seed + i, batch 1).
        limit: first prompts of the benchmark; None for all.
        shard: (i, n): every n-th batch beginning with the i-th.
        out: everything is written below it.
        weights: folder with files of models and metrics, None where none was named; `random`: see `random_weights`.
        text: folder of text features; None for `out`/text.
        calibration, schedule: artifacts to use instead of those `out` holds.
        orders: published head orders in the calibration's place.
        plugin: a Python file that holds a method from outside.
        code: `same` uses images that this code has made, `any` those of earlier code too.
        memory: bytes that the byte plan shall fit; None where none were named.
        contact_sheet: columns of the picture `eval` ends with; 0 for none.
        repeats, warmup: measured and unmeasured passes of `bench`.
        noise_floor: `eval` also compares the reference with itself, with the dense attention back end or one prompt
            at a time; None leaves that out.
        yes: run a large model on a CPU all the same.
    """

    model: ModelConfig
    method: MethodConfig
    reference: MethodConfig
    benchmark: BenchmarkConfig
    calibration_prompts: BenchmarkConfig
    calibration_check: BenchmarkConfig
    metrics: tuple[MetricConfig, ...]
    runtime: RuntimeConfig
    budget: Budget
    bootstrap: Bootstrap
    seed: int
    seed_mode: Literal["hash", "paper"]
    limit: int | None
    shard: tuple[int, int]
    out: Path
    weights: Path | None
    text: Path | None
    calibration: Path | None
    schedule: Path | None
    orders: Path | None
    plugin: Path | None
    code: Literal["same", "any"]
    memory: int | None
    contact_sheet: int
    repeats: int
    warmup: int
    noise_floor: Literal["attention", "batch"] | None = None
    yes: bool = False

    @property
    def random_weights(self) -> bool:
        """Whether weights are drawn, not read: real dimensions without files (`weights=random`)."""
        return self.weights is not None and str(self.weights) == "random"

    @property
    def weights_folder(self) -> Path | None:
        """The folder with files of models and metrics, None where none was named."""
        return None if self.random_weights else self.weights

    @property
    def text_root(self) -> Path:
        """The folder of text features."""
        return self.text or self.out / "text"

    @property
    def is_reference(self) -> bool:
        """Whether this run is what the others are compared with."""
        return self.method == self.reference

    def as_reference(self) -> RunConfig:
        """Return the run everything of this one is compared with: same config, reference method, budget 1.

        It always uses the default attention, so that `method=full runtime.attention=masked` measures the noise floor.
        """
        return replace(
            self,
            method=self.reference,
            budget=Budget.parse("1"),
            runtime=replace(self.runtime, attention="grouped"),
            calibration=None,
            schedule=None,
            orders=None,
        )

    @property
    def code_sha256(self) -> str:
        """Digest of the code that can change an image: engine, toolkit, method with what it imports, model family."""
        return run_code_sha256(self.method.target, self.model.target)

    @property
    def calibration_code_sha256(self) -> str:
        """Digest of the code that can change a calibration."""
        return code_sha256(folder_files("core") | folder_files("calibration") | module_files(self.model.target))

    def identity(self) -> dict[str, Any]:
        """Return everything that can change an image, as plain values for `config_hash`; the code is apart.

        Digests of files are not known here; the pipeline adds those of weights, calibration, plan and code.
        """
        return {
            "model": self.model.identity(),
            "method": self.method.identity(),
            "budget": self.budget.text,
            "benchmark": self.benchmark.identity(),
            "runtime": self.runtime.identity(),
            "seed": self.seed,
            "seed_mode": self.seed_mode,
        }

    def calibration_identity(self) -> dict[str, Any]:
        """Return everything that can change a calibration: no method, no budget, its own prompts."""
        return {
            "model": self.model.identity(),
            "prompts": self.calibration_prompts.identity(),
            "runtime": self.runtime.identity(),
            "seed": self.seed,
            "seed_mode": self.seed_mode,
        }

    def name(self, digest: str) -> str:
        """Return the folder name and run id of this run for the hash `digest` of its full identity."""
        return f"{self.stem}-{digest[:8]}"

    @property
    def stem(self) -> str:
        """The run id without its hash."""
        method = self.method.name.replace(":", ".")
        return "-".join((self.model.name, method, self.budget.slug, self.benchmark.name))

    def plain(self) -> dict[str, Any]:
        """Return all fields as JSON-able values, for `meta.json` and `--dry-run`."""
        bare = {name: replace(getattr(self, name), object=None) for name in ("method", "reference")}
        bare |= {name: replace(getattr(self, name), object=None) for name in _PROMPT_LISTS}
        metrics = tuple(replace(metric, object=None) for metric in self.metrics)
        values = asdict(replace(self, metrics=metrics, **bare))
        for leaf in (*(values[name] for name in bare), *values["metrics"]):
            del leaf["object"]
        rho = self.budget.rho
        values |= {"budget": self.budget.text if rho is None else None, "rho": None if rho is None else float(rho)}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


_PROMPT_LISTS = ("benchmark", "calibration_prompts", "calibration_check")


@dataclass(frozen=True)
class Experiment:
    """`conf/experiment/<name>.yaml`: a named set of runs, such as one table of a paper."""

    name: str
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything one command line asks for.

    Args:
        command: "calibrate", "build-schedule", "generate" or "eval".
        runs: one entry per point of the sweep, in the order typed, without repeats; at least one.
        overrides: everything that the user typed, options included, as overrides.
        experiment: the experiment the runs come from, if any.
        dry_run: show, but touch nothing.
        named: keys that were set, by the user or by the experiment.
    """

    command: str
    runs: tuple[RunConfig, ...]
    overrides: tuple[str, ...] = ()
    experiment: Experiment | None = None
    dry_run: bool = False
    named: frozenset[str] = field(default_factory=frozenset)

    @property
    def first(self) -> RunConfig:
        """The first run; what all runs share (out, limit, shard) may be read from it."""
        return self.runs[0]

    @property
    def command_line(self) -> str:
        """The command that makes this plan again, quoted for a shell."""
        return shlex.join(("heatkv", self.command, *self.overrides))


def config_hash(fields: Mapping[str, Any]) -> str:
    """Return the sha256 (64 hex digits) of plain values; equal values give equal hashes on every machine.

    Keys are sorted, tuples are lists, and 2.0 is 2, since a user may type either.

    Raises:
        TypeError: on a value that is not plain (a path is never part of an identity).
        ValueError: on a NaN or an infinity.

    >>> config_hash({"a": 1, "b": (2.0,)}) == config_hash({"b": [2], "a": 1.0})
    True
    """
    text = json.dumps(_canonical(fields), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of an identity are texts, not {list(value)}")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} cannot be part of an identity")
