"""eval: manifests -> metrics -> results.csv, a table and a contact sheet. Runs whatever stage is missing before it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pixels

from heatkv_cli.config import MetricConfig, Plan, RunConfig, build_leaf, config_hash, raise_all
from heatkv_cli.console import Console
from heatkv_cli.errors import BudgetError
from heatkv_cli.metrics.base import ImageMetric, Metric, Sample, Score, Value
from heatkv_cli.pipeline import setup
from heatkv_cli.pipeline.contact_sheet import write_contact_sheet
from heatkv_cli.pipeline.generate import CHOSEN, FREE, Job, Models, prepare, run_pass
from heatkv_cli.results import RunFolder, encode_rows, environment, upsert_results, utc_now, write_file

SCORE_COLUMNS = ("image_id", "metric", "value", "stratum", "note")


@dataclass
class Evaluated:
    """A run with its numbers: mean costs, and per metric the values and the scores of each image."""

    job: Job
    costs: dict[str, float]
    values: dict[str, list[Value]]
    scores: dict[str, list[Score]]


@dataclass(frozen=True)
class Infeasible:
    """A point of a sweep that cannot exist: the method cannot meet the budget, and `error` says why."""

    cfg: RunConfig
    error: BudgetError

    @property
    def run_id(self) -> str:
        """Of a run that never is: the hash of its config alone."""
        return self.cfg.name(config_hash(self.cfg.identity()))


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Make what is missing for every run of the plan, compute its metrics, write results, print the table.

    In a sweep, a budget that a method cannot meet is a row that says so.

    Raises:
        BudgetError: nothing that was asked for can exist.
    """
    models, done = Models(), dict[str, Evaluated]()
    jobs, infeasible = _prepare(plan, ui)
    _announce(jobs, ui)
    for job, reference in jobs:
        if reference.run_id not in done:
            done[reference.run_id] = _evaluate(reference, None, models, ui)
        if job.run_id not in done:
            done[job.run_id] = _evaluate(job, done[reference.run_id], models, ui)
    shown = [done[run_id] for run_id in dict.fromkeys(job.run_id for job, _ in jobs)]
    path = plan.first.out / "results.csv"
    rows = [row for item in done.values() for row in _rows(item, plan)]
    upsert_results(path, rows + [row for point in infeasible for row in _infeasible_rows(point, plan)])
    _print_table(shown, infeasible, ui)
    sheet = None
    if plan.first.contact_sheet:
        sheet = write_contact_sheet(
            plan.first.out / "contact-sheet.png",
            [(f"{i.job.cfg.method.name} {i.job.cfg.budget_label}", i.job.folder / FREE) for i in shown],
            shown[0].job.images[: min(plan.first.contact_sheet, min(i.job.shown for i in shown))],
        )
        ui.wrote(sheet)
    ui.wrote(path)
    return {
        "status": "partial" if infeasible else "done",
        "path": str(path.absolute()),
        "contact_sheet": str(sheet.absolute()) if sheet else None,
        "runs": [_summary(item) for item in shown],
        "infeasible": [
            {"method": point.cfg.method.name, "budget": point.cfg.budget_label, "reason": point.error.message}
            for point in infeasible
        ],
    }


def _prepare(plan: Plan, ui: Console) -> tuple[list[tuple[Job, Job]], list[Infeasible]]:
    """Every run with its reference, and the points of the sweep that cannot exist."""
    jobs, infeasible = [], []
    for cfg in plan.runs:
        try:
            jobs.append((prepare(cfg, ui), prepare(cfg.as_reference(), ui)))
        except BudgetError as error:
            infeasible.append(Infeasible(cfg, error))
    if not jobs:
        raise_all([point.error for point in infeasible])
    for point in infeasible:
        ui.warn(f"left out: {point.error.message}")
    return jobs, infeasible


def _announce(jobs: list[tuple[Job, Job]], ui: Console) -> None:
    """Say what will be made, and what a full cache would take, before anything is made."""
    everything = {job.run_id: job for pair in jobs for job in pair}
    images = sum(len(job.images) for job in everything.values())
    cfg = jobs[0][0].cfg
    rows = cfg.runtime.batch_size * (2 if setup.sampling_of(cfg.model).guided else 1)
    full = setup.geometry_of(cfg.model).full_bytes(rows) / 2**20
    ui.say(
        f"plan: {len(everything)} runs, {images} images; finished ones are not made again; "
        f"the full KV cache of a batch ({rows} rows) is {full:.1f} MiB"
    )


def _metrics(cfg: RunConfig) -> dict[str, Metric]:
    return {config.name: _metric(config) for config in cfg.metrics}


def _metric(config: MetricConfig) -> Metric:
    return build_leaf(config, object, where=f"metric {config.name}")  # type: ignore[return-value]


def _evaluate(job: Job, full: Evaluated | None, models: Models, ui: Console) -> Evaluated:
    """One run: its passes, then its metrics. `full` is None for the reference itself."""
    run_pass(job, FREE, models, ui)
    metrics = _metrics(job.cfg)
    if full is None:  # compared with itself: nothing to measure
        metrics = {name: metric for name, metric in metrics.items() if metric.kind != "paired"}
    for kind in dict.fromkeys(metric.needs for metric in metrics.values()):
        if kind != FREE:
            run_pass(job, kind, models, ui, full.job if full else None)
    reference = None if full is None else RunFolder.reading(full.job.folder / FREE)
    result = Evaluated(job, _costs(RunFolder.reading(job.folder / FREE), job), {}, {})
    folders = {metric.needs: RunFolder.reading(job.folder / metric.needs) for metric in metrics.values()}
    for name, metric in metrics.items():
        samples = _samples(job, folders[metric.needs], reference)
        if isinstance(metric, ImageMetric):
            scores = [metric.score(sample) for sample in samples]
            baseline = full.scores.get(name) if full else None
            result.scores[name] = scores
            result.values[name] = metric.summarise(scores, baseline)
        else:
            for sample in samples:
                metric.update(sample)
            result.values[name] = metric.compute()
    _write_scores(result)
    return result


def _samples(job: Job, folder: RunFolder, reference: RunFolder | None) -> Iterable[Sample]:
    for image in job.images[: job.shown]:
        row = folder.row(image.image_id)
        if row is None:
            continue  # another shard's
        other = reference.row(image.image_id) if reference else None
        yield Sample(
            prompt_id=image.item.id,
            prompt=image.item.prompt,
            meta=image.item.meta,
            image=_pixels(folder.path, row),
            reference=None if other is None or reference is None else _pixels(reference.path, other),
            recorded=json.loads(row["numbers_json"]),
            index=image.sample,
        )


def _pixels(folder: Path, row: Mapping[str, str]) -> np.ndarray[Any, Any] | None:
    return np.asarray(Pixels.open(folder / row["file"]).convert("RGB")) if row["file"] else None


def _costs(folder: RunFolder, job: Job) -> dict[str, float]:
    """Median over batches of what each batch recorded; bytes and tokens are the same in all of them."""
    rows = [row for image in job.images[: job.shown] if (row := folder.row(image.image_id))]
    recorded = [json.loads(row["numbers_json"]) for row in {row["batch"]: row for row in rows}.values()]
    return {key: statistics.median(numbers[key] for numbers in recorded) for key in recorded[0]}


def _write_scores(item: Evaluated) -> None:
    """The number of every image, for paired comparisons between any two runs (scripts/compare.py)."""
    rows: list[Mapping[str, Any]] = [dict(zip(SCORE_COLUMNS, SCORE_COLUMNS, strict=True))]
    image_ids = {(image.item.id, image.sample): image.image_id for image in item.job.images}
    for metric, scores in item.scores.items():
        for score in scores:  # of a shard perhaps: not one for every image
            rows.append(
                {
                    "image_id": image_ids[score.prompt_id, score.index],
                    "metric": metric,
                    "value": score.value,
                    "stratum": score.stratum,
                    "note": score.note,
                }
            )
    write_file(item.job.folder / "scores.csv", encode_rows(rows, SCORE_COLUMNS))


def _rows(item: Evaluated, plan: Plan) -> Iterable[dict[str, Any]]:
    """Tidy rows: one per value of each metric, and one per cost."""
    job, cfg = item.job, item.job.cfg
    costs = {
        key: item.costs[key]
        for key in (
            "beta_live",
            "beta_alloc",
            "beta_work",
            "beta_meta",
            "attended_tokens",
            "attended_ratio",
            "seconds_per_image",
        )
    }
    chosen = {key.removeprefix(CHOSEN): value for key, value in item.costs.items() if key.startswith(CHOSEN)}
    args = {**cfg.method.params, **({"chosen": chosen} if chosen else {})}
    common = {
        **_about(cfg, plan), "run_id": job.run_id, "weights_sha256": job.weights_sha256, "method_args_json": args,
        "schedule_sha256": job.schedule.sha256 if job.schedule else None, "status": "ok", **costs,
    }  # fmt: skip
    metrics = _metrics(cfg)
    for name, values in item.values.items():
        metric = metrics[name]
        for value in values:
            yield {
                **common, "metric": name, "metric_version": metric.version, "variant": value.variant,
                "value": value.value, "stderr": value.stderr, "low": value.low, "high": value.high, "n": value.n,
                "unit": metric.unit, "higher_is_better": metric.higher_is_better,
                "reference": cfg.reference.name if metric.kind == "paired" else None, **value.extra,
            }  # fmt: skip
    for stage in ("attention", "policy", "pool"):
        yield {
            **common,
            "metric": f"{stage}_share",
            "metric_version": "1",
            "variant": "",
            "value": item.costs.get(f"{stage}_share", math.nan),
            "n": job.shown,
            "unit": "fraction of the time",
            "higher_is_better": False,
        }


def _infeasible_rows(point: Infeasible, plan: Plan) -> Iterable[dict[str, Any]]:
    """One row per metric, without a value."""
    for name, metric in _metrics(point.cfg).items():
        yield {
            **_about(point.cfg, plan), "run_id": point.run_id, "status": "infeasible", "reason": point.error.message,
            "metric": name, "metric_version": metric.version, "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
        }  # fmt: skip


def _about(cfg: RunConfig, plan: Plan) -> dict[str, Any]:
    """What every row of a run says about its config, the code and the command."""
    facts = environment()
    return {
        "created_utc": utc_now(), "git_sha": facts["git_sha"], "git_dirty": facts["git_dirty"],
        "heatkv_version": facts["heatkv_version"], "torch_version": torch.__version__, "model": cfg.model.name,
        "method": cfg.method.name, "method_args_json": cfg.method.params, "budget": cfg.budget, "rho": cfg.rho,
        "benchmark": cfg.benchmark.name, "benchmark_version": cfg.benchmark.version,
        "resolution": cfg.model.shape_label, "seed": cfg.seed, "seed_mode": cfg.seed_mode, "dtype": cfg.model.dtype,
        "attention_backend": setup.backend_of(cfg), "batch_size": cfg.runtime.batch_size,
        "device": cfg.runtime.device, "command": plan.command_line,
    }  # fmt: skip


def _print_table(items: list[Evaluated], infeasible: list[Infeasible], ui: Console) -> None:
    names = list(dict.fromkeys(name for item in items for name in item.values))
    units = {name: metric.unit for item in items for name, metric in _metrics(item.job.cfg).items()}
    columns = [
        "method",
        "budget",
        "beta_alloc",
        "attended",
        *(f"{n} ({units[n]})" for n in names),
        "ms/img",
        "attention",
        "policy",
    ]
    rows = []
    for item in items:
        cfg, costs = item.job.cfg, item.costs
        cells = [_cell(item.values[n][0]) if n in item.values else "" for n in names]
        seed = cfg.method.params.get("order_seed")
        rows.append([
            cfg.method.name + (f"#{seed}" if seed else ""), cfg.budget_label, f"{costs['beta_alloc']:.4f}",
            f"{costs['attended_ratio']:.3f}", *cells, f"{1000 * costs['seconds_per_image']:.0f}",
            f"{costs.get('attention_share', math.nan):.0%}", f"{costs.get('policy_share', math.nan):.1%}",
        ])  # fmt: skip
    for point in infeasible:
        blank = [""] * (len(columns) - 3)
        rows.append([point.cfg.method.name, point.cfg.budget_label, "infeasible", *blank])
    ui.table(
        columns,
        rows,
        f"{items[0].job.cfg.model.name}, {items[0].job.shown} images of {items[0].job.cfg.benchmark.name}",
    )


def _cell(value: Value) -> str:
    digits = 5 if abs(value.value) < 0.1 else 3 if abs(value.value) < 2 else 2
    if not math.isfinite(value.low):
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _summary(item: Evaluated) -> dict[str, Any]:
    values = {
        name: [{"variant": v.variant, "value": v.value, "low": v.low, "high": v.high, "n": v.n, **v.extra} for v in vs]
        for name, vs in item.values.items()
    }
    return {
        "run_id": item.job.run_id,
        "method": item.job.cfg.method.name,
        "budget": item.job.cfg.budget_label,
        "costs": item.costs,
        "metrics": values,
    }
