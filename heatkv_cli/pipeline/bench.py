"""bench: methods and budgets -> seconds per scale and stage, bytes of the cache and of the process; CSV and table.

Every run is an ordinary generation of the same images with the same seeds. Nothing is forced, so that sampling is
measured as it is: what a pass costs does not depend on which codes it draws. One model is in memory, and runs take
turns (full, heatkv 0.2, ..., full, ...), another one first in every round, so that a slow moment hits all of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from heatkv_cli.config import Plan, RunConfig, config_hash
from heatkv_cli.console import Console
from heatkv_cli.core.timeline import Timeline, mark_seconds, stage
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.base import ImageModel
from heatkv_cli.pipeline import bench_table as tables
from heatkv_cli.pipeline.bench_table import Pass
from heatkv_cli.pipeline.calibrate import calibrate_all
from heatkv_cli.pipeline.passes import Models, memory_errors, new_cache
from heatkv_cli.pipeline.process_memory import peak_memory
from heatkv_cli.planning.job import ImageJob, Job, generators_of
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import finish_meta, write_file, write_meta

FILE, TABLE = "bench.csv", "bench.md"


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Measure every run of the plan, and the full cache beside them."""
    cfg, jobs = plan.first, _jobs(plan, ui)
    count = cfg.warmup + cfg.repeats * len(jobs)
    ui.say(f"plan: {len(jobs)} runs in turns, {cfg.repeats} times; {count} passes of {len(_batch(jobs[0]))} images")
    clock = perf_counter()
    model = Models().get(jobs[0])
    loaded = perf_counter() - clock
    items = [image.item for image in _batch(jobs[0])]
    model.prepare(items, cfg.text_root)
    condition = model.encode(items)
    text = perf_counter() - clock - loaded
    folder = _begin(plan, jobs)  # once there is a model: files that cannot be read leave no folder behind
    ui.say(f"weights after {loaded:.1f} s, text after another {text:.1f} s; neither is part of a pass")
    passes: dict[str, list[Pass]] = defaultdict(list)
    with ui.progress("bench", count, "pass") as progress:
        for _ in range(cfg.warmup):
            _measure(jobs[0], model, condition)
            progress.advance()
        for turn in range(cfg.repeats):
            first = turn % len(jobs)
            for job in jobs[first:] + jobs[:first]:
                passes[job.run_id].append(_measure(job, model, condition))
                write_file(folder / FILE, tables.encode(jobs, passes, plan.command_line))
                progress.advance(note=f"{job.cfg.method.name} {job.cfg.budget.slug}")
    summary = tables.summary(jobs, passes)
    write_file(folder / TABLE, tables.markdown(jobs, passes, plan.command_line).encode())
    finish_meta(folder, load_seconds=loaded, text_seconds=text)
    for title, columns, rows in tables.shown(jobs, passes):
        ui.table(columns, rows, title)
    ui.wrote(folder / TABLE)
    ui.wrote(folder / FILE)
    return {
        "path": str((folder / FILE).absolute()),
        "table": str((folder / TABLE).absolute()),
        "load_seconds": loaded,
        "text_seconds": text,
        "runs": summary,
    }


def _jobs(plan: Plan, ui: Console) -> list[Job]:
    """Return the full cache first, then the runs of the plan, each once.

    Raises:
        ConfigError: runs that one loaded model cannot make, or a calibration of random weights.
    """
    first = plan.first
    shared = replace(first.runtime, attention="grouped")
    for cfg in plan.runs:
        if (cfg.model, cfg.weights) != (first.model, first.weights) or replace(
            cfg.runtime, attention="grouped"
        ) != shared:
            raise ConfigError(
                "bench compares methods and budgets on one loaded model, this sweep changes more than that",
                "run the command once for each model, resolution, device and number of threads",
            )
        _require_orders(cfg)
    resolver = Resolver()
    ready = preflight(plan, resolver)
    ready.check(plan)
    calibrate_all([cfg for cfg in plan.runs if resolver.needs_calibration(cfg)], resolver, ui)
    jobs = {job.run_id: job for job in (resolver.job(cfg) for cfg in (first.as_reference(), *plan.runs))}
    return list(jobs.values())


def _require_orders(cfg: RunConfig) -> None:
    given = (cfg.orders, cfg.calibration, cfg.schedule)
    if cfg.random_weights and cfg.method.object.calibrated and not any(given):
        raise ConfigError(
            f"method {cfg.method.name} is calibrated, and in random weights there is nothing to find",
            "--orders FILE (the published ones), or method=random: the same schedule in random order",
        )


def _batch(job: Job) -> tuple[ImageJob, ...]:
    return job.images[: job.cfg.runtime.batch_size]


def _begin(plan: Plan, jobs: list[Job]) -> Path:
    """Return the folder of this measurement; the same command measures again."""
    cfg = plan.first
    identity = {
        "runs": [job.digest for job in jobs],
        "threads": cfg.runtime.threads,
        "repeats": cfg.repeats,
        "warmup": cfg.warmup,
    }
    digest = config_hash(identity)
    folder = cfg.out / "bench" / f"{cfg.model.name}-{cfg.model.resolution}-{digest[:8]}"
    write_meta(
        folder,
        config_hash=digest,
        config=cfg.plain(),
        runs=[job.run_id for job in jobs],
        weights_sha256=jobs[0].inputs.weights_sha256,
        schedules_sha256=[job.plan_sha256 for job in jobs],
    )
    return folder


def _measure(job: Job, model: ImageModel, condition: Any) -> Pass:
    """Run one pass, its cache included; then decode its pixels."""
    batch, device = _batch(job), job.device
    sampling, generators = job.sampling, generators_of(batch)
    with memory_errors(len(batch)):
        with peak_memory(device) as generating:
            cpu = process_time()
            with Timeline(device) as timeline:
                with stage("pool"):
                    cache = new_cache(job, model, len(batch))
                latent = model.generate(condition, sampling, cache, generators).latent
            seconds, cpu = timeline.seconds(), process_time() - cpu
        ledger = cache.ledger
        del cache
        with peak_memory(device) as decoding:
            with Timeline(device) as pixels:
                model.decode(latent).cpu()
            decode = sum(pixels.seconds().values())
    return Pass(
        seconds=seconds,
        decode_seconds=decode,
        cpu_seconds=cpu,
        profiling_seconds=timeline.marks * mark_seconds(device),
        attention_flops=tuple(ledger.attention_flops),
        ratios=ledger.ratios(),
        cache_bytes=ledger.alloc_bytes,
        generating=generating,
        decoding=decoding,
    )
