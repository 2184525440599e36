"""What a run is: the frozen dataclasses that every command works on, and the hash that names its folder.

Made by `config.compose` from YAML and overrides, read by the pipeline. Pure Python: no hydra, no torch, no file is
opened here. The comment beside a field says where the user sets it.
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

PerScale = float | tuple[float, ...]
"""One number for all scales, or one per scale."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sampling:
    """How bits are drawn; names as in the upstream flags.

    Args:
        cfg: guidance strength `w` in `w * cond + (1 - w) * uncond`; 1 is no guidance.
        tau: temperature that divides the logits.
        top_k: 0 is off, 1 is greedy; more removes nothing from a bit.
        top_p: 0 is off; else the nucleus kept.
        guide_layers: where guidance acts: 0 on the logits, -n on the output of the n-th layer from the end.
    """

    cfg: PerScale = 1.0
    tau: PerScale = 1.0
    top_k: int = 0
    top_p: float = 0.0
    guide_layers: tuple[int, ...] = (0,)

    def per_scale(self, num_scales: int) -> dict[str, Any]:
        """Return the fields with `cfg` and `tau` spelled out for every scale."""
        lists = {"cfg": self.cfg, "tau": self.tau}
        spelled = {key: item if isinstance(item, tuple) else (item,) * num_scales for key, item in lists.items()}
        return {**asdict(self), **spelled}


@dataclass(frozen=True)
class WeightFile:
    """One file a model needs: its name below the weights folder, and how to know that it is the right one."""

    role: str
    name: str
    sha256: str | None = None
    bytes: int | None = None
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Weights:
    """The files of a model, and where they lie: in the package's assets, or in the folder `weights=DIR`."""

    place: Literal["package", "folder"] = "folder"
    files: tuple[WeightFile, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """`conf/model/<name>.yaml`.

    Args:
        name: CLI value, file name and CSV cell.
        target: dotted path of the class or function that makes the model.
        num_layers, num_heads, head_dim: L, H, D of self-attention.
        sink_scales: how many first scales are always kept.
        layout_scales: scales whose bits are copied from the full run for PSNR "copied layout".
        resolutions: the scale schedules, (height, width) of each scale, by name.
        resolution: which of them is used.
        sampling: defaults of the draws.
        dtype: of weights and of the KV state, hence of the bytes of a budget.
        default_benchmark: what `generate` and `eval` use when no benchmark is named.
        calibration_prompts: the benchmark whose prompts `calibrate` uses.
        calibration_check: a second list, whose orders `calibrate` compares with the first one's.
        weights: files, digests, licences.
        params: the remaining arguments of `target`.
    """

    name: str
    target: str
    num_layers: int
    num_heads: int
    head_dim: int
    sink_scales: int
    layout_scales: tuple[int, ...]
    resolutions: dict[str, tuple[tuple[int, int], ...]]
    resolution: str
    sampling: Sampling
    dtype: Literal["float32", "bfloat16", "float16"]
    default_benchmark: str
    calibration_prompts: str
    calibration_check: str
    weights: Weights = field(default_factory=Weights)
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each scale at the chosen resolution."""
        return self.resolutions[self.resolution]

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of the KV state."""
        return DTYPE_BYTES[self.dtype]

    def identity(self) -> dict[str, Any]:
        """What of the model can change an image; the digest of its weights is added by whoever opens them."""
        return {
            "name": self.name,
            "target": self.target,
            "dims": [self.num_layers, self.num_heads, self.head_dim],
            "sink_scales": self.sink_scales,
            "layout_scales": self.layout_scales,
            "resolution": self.resolution,
            "sizes": self.sizes,
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "params": self.params,
        }


@dataclass(frozen=True)
class MethodConfig:
    """`conf/method/<name>.yaml`.

    Args:
        name: CLI value and CSV cell.
        target: dotted path of the method's dataclass.
        needs: "calibration" where the method reads a calibration artifact, else None.
        budgetless: the method has no budget, it always keeps everything (`full`).
        params: the paper's parameters; every other key of the YAML.
    """

    name: str
    target: str
    needs: Literal["calibration"] | None = None
    budgetless: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""

    def identity(self) -> dict[str, Any]:
        """What of the method can change an image."""
        return {"name": self.name, "target": self.target, "params": self.params}


@dataclass(frozen=True)
class BenchmarkConfig:
    """`conf/benchmark/<name>.yaml`: a versioned list of prompts.

    Args:
        name: CLI value and CSV cell.
        target: dotted path of the class or function that reads the prompts.
        version: changes whenever a prompt changes.
        default_metrics: what `eval` computes when no metric is named.
        params: every other key of the YAML.
    """

    name: str
    target: str
    version: str
    default_metrics: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""

    def identity(self) -> dict[str, Any]:
        """What of the benchmark can change an image."""
        return {"name": self.name, "version": self.version, "target": self.target, "params": self.params}


@dataclass(frozen=True)
class MetricConfig:
    """`conf/metric/<name>.yaml`.

    Args:
        name: CLI value and CSV cell.
        target: dotted path of the metric's class.
        needs: the pass it reads: "free", "layout" or "forced"; None where the class itself says it.
        params: every knob that changes the number; every other key of the YAML.
    """

    name: str
    target: str
    needs: Literal["free", "layout", "forced"] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    note: str = ""


@dataclass(frozen=True)
class RuntimeConfig:
    """`conf/runtime/<name>.yaml`.

    Args:
        device: "cpu" or "cuda".
        device_index: which GPU; never part of a hash.
        threads: CPU threads of torch; None leaves torch's own choice; never part of a hash.
        attention: back end of ragged attention; "masked" is the slow dense oracle.
        batch_size: prompts per batch (guidance doubles the rows).
    """

    device: Literal["cpu", "cuda"] = "cpu"
    device_index: int = 0
    threads: int | None = None
    attention: Literal["auto", "grouped", "masked"] = "auto"
    batch_size: int = 8

    def identity(self) -> dict[str, Any]:
        """What of the machinery can change a float, and so a pixel."""
        return {"device": self.device, "attention": self.attention, "batch_size": self.batch_size}


@dataclass(frozen=True)
class RunConfig:
    """One method at one budget on one model and benchmark: one row group of the results.

    Args:
        model, method, benchmark, metrics, runtime: the chosen files of the config groups.
        reference: the method all others are compared with (`full`).
        calibration_prompts: the prompts of `calibrate`; calibration_check: those it compares its orders with.
        budget: fraction kept, canonical text ("0.1", "21/6425"); None exactly where rho is given.
        rho: HACK's compression ratio over all scales; None where budget is given.
        seed: of the run; each image derives its own.
        seed_mode: "hash" (default) or "paper" (seed + i, batch 1).
        limit: first prompts of the benchmark; None for all.
        shard: (i, n): every n-th batch beginning with the i-th.
        out: everything is written below it.
        weights: folder of model files, None where none was named.
        calibration, schedule: artifacts to use instead of those `out` holds.
        orders: removal orders in the upstream file format, for `build-schedule`.
        contact_sheet: columns of the picture `eval` ends with; 0 for none.
        noise_floor: `eval` also compares the reference with itself, with the dense attention back end or one prompt
            at a time; None leaves that out.
    """

    model: ModelConfig
    method: MethodConfig
    reference: MethodConfig
    benchmark: BenchmarkConfig
    calibration_prompts: BenchmarkConfig
    calibration_check: BenchmarkConfig
    metrics: tuple[MetricConfig, ...]
    runtime: RuntimeConfig
    budget: str | None
    rho: float | None
    seed: int
    seed_mode: Literal["hash", "paper"]
    limit: int | None
    shard: tuple[int, int]
    out: Path
    weights: Path | None
    calibration: Path | None
    schedule: Path | None
    orders: Path | None
    contact_sheet: int
    noise_floor: Literal["attention", "batch"] | None = None

    @property
    def budget_label(self) -> str:
        """The budget as a piece of a file name: "0.1", "21of6425", "rho0.7"."""
        return f"rho{self.rho:g}" if self.budget is None else self.budget.replace("/", "of")

    @property
    def is_reference(self) -> bool:
        """Whether this run is what the others are compared with."""
        return self.method == self.reference

    def as_reference(self) -> RunConfig:
        """Return the run everything of this one is compared with: same config, reference method, budget 1.

        It always uses the default attention, so that `method=full runtime.attention=masked` measures the noise floor.
        """
        runtime = replace(self.runtime, attention="auto")
        return replace(
            self, method=self.reference, budget="1", rho=None, runtime=runtime,
            calibration=None, schedule=None, orders=None,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What can change an image (design, "Run hash"), as plain values for `config_hash`.

        Digests of files are not known here; the pipeline adds those of weights, calibration and schedule.
        """
        return {
            "model": self.model.identity(),
            "method": self.method.identity(),
            "budget": self.budget,
            "rho": self.rho,
            "benchmark": self.benchmark.identity(),
            "runtime": self.runtime.identity(),
            "seed": self.seed,
            "seed_mode": self.seed_mode,
        }

    def calibration_identity(self) -> dict[str, Any]:
        """What can change a calibration: no method, no budget, its own prompts."""
        return {
            "model": self.model.identity(),
            "prompts": self.calibration_prompts.identity(),
            "runtime": self.runtime.identity(),
            "seed": self.seed,
            "seed_mode": self.seed_mode,
        }

    def name(self, digest: str) -> str:
        """Return the folder name and run id of this run for the hash `digest` of its full identity."""
        return "-".join(
            (self.model.name, self.method.name, self.budget_label, self.benchmark.name, digest[:8]),
        )

    def plain(self) -> dict[str, Any]:
        """Return all fields as JSON-able values, for `meta.json` and `--dry-run`."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values


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
        overrides: what the user typed, options included, as overrides.
        experiment: the experiment the runs come from, if any.
        dry_run: show, but touch nothing.
    """

    command: str
    runs: tuple[RunConfig, ...]
    overrides: tuple[str, ...] = ()
    experiment: Experiment | None = None
    dry_run: bool = False

    @property
    def first(self) -> RunConfig:
        """The first run; what all runs share (out, limit, shard, seed) may be read from it."""
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
