"""The output of `bench`: passes become tidy rows with median and spread, and tables.

A stage whose name has a slash is a part of the stage before the slash; stages without one sum to `pass`. `pass` is the
generation of a batch from text features to latents, `total` is that and the decoding to pixels.

Machines are not equally fast all the time, and the FFN is the same work in every run: `per_ffn` is time over the FFN's
in the same pass, so that a slow minute does not count for or against a method.
"""

from __future__ import annotations

import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from heatkv_cli.core.timeline import Place
from heatkv_cli.pipeline.process_memory import Memory
from heatkv_cli.planning.job import Job
from heatkv_cli.results import encode_rows, environment, utc_now

ALL = "all"
COLUMNS = (
    *("run_id", "model", "resolution", "method", "method_args_json", "budget", "rho"),
    *("scale", "stage", "measure", "unit", "median", "low", "high", "repeats", "ratio_to_full"),
    *("device", "device_name", "threads", "dtype", "attention_backend", "batch_size", "rows"),
    *("weights_sha256", "schedule_sha256", "torch_version", "heatkv_version", "git_sha", "git_dirty", "created_utc"),
    "command",
)
"""Columns of `bench.csv`: a row per run, scale (or all), stage and measure; low, high: smallest and largest repeat."""

UNITS = {"seconds": "s", "bytes": "B", "flops": "FLOP"}
"""By the last word of a measure; the others are fractions."""

YARDSTICK = "ffn"
"""The largest stage that no method changes."""

Key = tuple[str, str, str]
"""Scale, stage, measure."""


@dataclass(frozen=True)
class Pass:
    """Cost of one generation.

    Args:
        seconds: time of every scale and stage.
        decode_seconds: from latents to pixels on the host.
        cpu_seconds: CPU time of all threads; well below seconds x threads something else had the machine.
        profiling_seconds: time that taking the times took, an upper estimate.
        attention_flops: per scale.
        ratios: betas (but for beta_work) and attended tokens, see `Ledger.ratios`.
        cache_bytes: allocated for keys, values and the method's state.
        generating, decoding: memory of the process, or of the GPU.
    """

    seconds: dict[Place, float]
    decode_seconds: float
    cpu_seconds: float
    profiling_seconds: float
    attention_flops: tuple[int, ...]
    ratios: dict[str, float]
    cache_bytes: int
    generating: Memory
    decoding: Memory

    def values(self) -> dict[Key, float]:
        """Return every number of the pass by scale, stage and measure."""
        found: dict[Key, float] = defaultdict(float)
        for (scale, name), seconds in self.seconds.items():
            whole = name.partition("/")[0]
            for where in (ALL,) if scale is None else (ALL, str(scale)):
                for part in dict.fromkeys((name, whole, "pass")):
                    found[where, part, "seconds"] += seconds
        found[ALL, "decode", "seconds"] = self.decode_seconds
        found[ALL, "total", "seconds"] = found[ALL, "pass", "seconds"] + self.decode_seconds
        if ffn := found.get((ALL, YARDSTICK, "seconds")):
            found |= {(ALL, name, "per_ffn"): found[ALL, name, "seconds"] / ffn for name in ("attention", "pass")}
        found[ALL, "pass", "cpu_seconds"] = self.cpu_seconds
        found[ALL, "pass", "profiling_seconds"] = self.profiling_seconds
        for scale, flops in enumerate(self.attention_flops):
            found[str(scale), "attention", "flops"] = flops
        found[ALL, "attention", "flops"] = sum(self.attention_flops)
        found |= {(ALL, "pass", name): ratio for name, ratio in self.ratios.items()}
        found[ALL, "pass", "cache_bytes"] = self.cache_bytes
        for name, memory in (("pass", self.generating), ("decode", self.decoding)):
            if memory.before is not None and memory.peak is not None:
                found[ALL, name, "process_before_bytes"] = memory.before
                found[ALL, name, "process_peak_bytes"] = memory.peak
                found[ALL, name, "process_added_bytes"] = memory.peak - memory.before
        return dict(found)


@dataclass(frozen=True)
class Number:
    """One number of a run over its repeats; `ratio`: median of its quotients with the full cache's, turn by turn."""

    median: float
    low: float
    high: float
    repeats: int
    ratio: float | None


Passes = Mapping[str, Sequence[Pass]]


def numbers(job: Job, full: Job, passes: Passes) -> dict[Key, Number]:
    """Return all numbers of one run over the repeats it has so far."""
    mine, theirs = ([each.values() for each in passes.get(one.run_id, ())] for one in (job, full))
    found = {}
    for key in dict.fromkeys(key for each in mine for key in each):
        values = [each[key] for each in mine if key in each]
        pairs = [(a[key], b[key]) for a, b in zip(mine, theirs, strict=False) if key in a and b.get(key)]
        ratio = median(a / b for a, b in pairs) if pairs else None
        found[key] = Number(median(values), min(values), max(values), len(values), ratio)
    return found


def encode(jobs: Sequence[Job], passes: Passes, command: str) -> bytes:
    """`bench.csv` of whatever was measured so far."""
    rows = [row for job in jobs for row in _rows(job, jobs[0], passes, command)]
    return encode_rows([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows], COLUMNS)


def _rows(job: Job, full: Job, passes: Passes, command: str) -> Iterable[dict[str, Any]]:
    cfg, facts = job.cfg, environment()
    batch = cfg.runtime.batch_size
    common = {
        "run_id": job.run_id,
        "model": cfg.model.name,
        "resolution": cfg.model.resolution,
        "method": cfg.method.name,
        "method_args_json": cfg.method.params,
        "budget": cfg.budget.text if cfg.budget.rho is None else None,
        "rho": None if cfg.budget.rho is None else float(cfg.budget.rho),
        **_machine(job),
        "batch_size": batch,
        "rows": batch * (2 if job.sampling.guided else 1),
        "weights_sha256": job.inputs.weights_sha256,
        "schedule_sha256": job.plan_sha256,
        "torch_version": torch.__version__,
        "heatkv_version": facts["heatkv_version"],
        "git_sha": facts["git_sha"],
        "git_dirty": facts["git_dirty"],
        "created_utc": utc_now(),
        "command": command,
    }
    for (scale, name, measure), number in numbers(job, full, passes).items():
        yield {
            **common,
            "scale": scale,
            "stage": name,
            "measure": measure,
            "unit": _unit(measure),
            "median": number.median,
            "low": number.low,
            "high": number.high,
            "repeats": number.repeats,
            "ratio_to_full": number.ratio,
        }


def _unit(measure: str) -> str:
    if measure == "attended_tokens":
        return "tokens"
    return UNITS.get(measure.rpartition("_")[2], "fraction")


def _machine(job: Job) -> dict[str, Any]:
    """Return the machine and its settings, as every row says them."""
    cfg = job.cfg
    return {
        "device": cfg.runtime.device,
        "device_name": device_name(job.device),
        "threads": torch.get_num_threads(),
        "dtype": cfg.model.dtype,
        "attention_backend": cfg.runtime.attention,
    }


def device_name(device: str) -> str:
    """Return the GPU's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------- tables


def summary(jobs: Sequence[Job], passes: Passes) -> list[dict[str, Any]]:
    """Return the headline of every run.

    `attention_ratio` and `flop_ratio` are self-attention's time (reading the cache included) and its FLOPs over those
    of the full cache; `quotient` is the first over the second, 1 where saved work is saved time. `*_by_ffn` are in
    units of the time of the FFN, None for models without that stage. `pool_share` and `policy_share` are parts of
    the pass.
    """
    found = []
    for job in jobs:
        each = numbers(job, jobs[0], passes)
        batch = job.cfg.runtime.batch_size

        def at(name: str, measure: str = "seconds", each: dict[Key, Number] = each) -> Number | None:
            return each.get((ALL, name, measure))

        total, attention, flops, whole = at("total"), at("attention"), at("attention", "flops"), at("pass")
        assert total and attention and flops and whole  # every pass has them
        shares = {n: (each[key].median / whole.median if (key := (ALL, n, "seconds")) in each else 0.0) for n in SHARES}
        steady, pace = at("attention", "per_ffn"), at("pass", "per_ffn")
        added, peak = at("pass", "process_added_bytes"), at("pass", "process_peak_bytes")
        found.append(
            {
                "run_id": job.run_id,
                "method": job.cfg.method.name,
                "budget": job.cfg.budget.slug,
                "seconds_per_image": total.median / batch,
                "ratio_to_full": total.ratio,
                "attention_ratio": attention.ratio,
                "flop_ratio": flops.ratio,
                "quotient": _over(attention, flops),
                "pass_ratio_by_ffn": None if pace is None else pace.ratio,
                "quotient_by_ffn": None if steady is None else _over(steady, flops),
                **{f"{name.replace('/', '_')}_share": share for name, share in shares.items()},
                **{name: each[ALL, "pass", name].median for name in ("beta_alloc", "beta_live")},
                "added_bytes": None if added is None else added.median,
                "peak_bytes": None if peak is None else peak.median,
            }
        )
    return found


def _over(time: Number, work: Number) -> float | None:
    """Quotient of two ratios to the full cache."""
    return time.ratio / work.ratio if time.ratio and work.ratio else None


SHARES = ("attention", "attention/read", "pool", "policy")


def shown(jobs: Sequence[Job], passes: Passes) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Title, columns and rows of the printed tables: the headline, and seconds of each stage."""
    cfg, machine = jobs[0].cfg, _machine(jobs[0])
    title = (
        f"{cfg.model.name} at {cfg.model.resolution}, {cfg.model.dtype}, batch {cfg.runtime.batch_size}, "
        f"{machine['device_name']}, {machine['threads']} threads, median of {cfg.repeats}"
    )
    columns = ["method", "budget", "s/image", "of full", "by ffn", "self-attention", "FLOPs", "quotient", "by ffn"]
    columns += ["read", "pool", "policy", "beta_alloc", "beta_live", "added MiB", "peak MiB"]
    rows = [
        [
            item["method"],
            item["budget"],
            f"{item['seconds_per_image']:.3g}",
            *(_cell(item[name]) for name in ("ratio_to_full", "pass_ratio_by_ffn", "attention_ratio", "flop_ratio")),
            *(_cell(item[name]) for name in ("quotient", "quotient_by_ffn")),
            *(f"{item[name]:.1%}" for name in ("attention_read_share", "pool_share", "policy_share")),
            *(f"{item[name]:.4f}" for name in ("beta_alloc", "beta_live")),
            _mebibytes(item["added_bytes"]),
            _mebibytes(item["peak_bytes"]),
        ]
        for item in summary(jobs, passes)
    ]
    return [(title, columns, rows), _stages(jobs, passes)]


def _stages(jobs: Sequence[Job], passes: Passes) -> tuple[str, list[str], list[list[Any]]]:
    """Return the seconds of each stage over all scales, largest of the full cache first."""
    each = [numbers(job, jobs[0], passes) for job in jobs]
    names = {name for found in each for scale, name, measure in found if (scale, measure) == (ALL, "seconds")}
    keys = [(ALL, name, "seconds") for name in names]
    seconds = {key[1]: [found[key].median if key in found else 0.0 for found in each] for key in keys}
    order = sorted(names, key=lambda name: (name in ("pass", "total"), -seconds[name.partition("/")[0]][0], name))
    columns = ["seconds", *(f"{job.cfg.method.name} {job.cfg.budget.slug}" for job in jobs)]
    return "stages", columns, [[name, *(f"{value:.4g}" for value in seconds[name])] for name in order]


def markdown(jobs: Sequence[Job], passes: Passes, command: str) -> str:
    """Return the printed tables and the command that made them."""
    parts = [f"```\n{command}\n```"]
    for title, columns, rows in shown(jobs, passes):
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
        parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"
