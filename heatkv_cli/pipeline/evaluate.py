"""eval: manifests -> metrics -> results.csv, a table and a contact sheet. Runs whatever stage is missing before it.

A metric that lacks weights, a package or images becomes a row with `status=skipped` and the reason; the others go on.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heatkv_cli.benchmarks.base import ORIGINAL
from heatkv_cli.config import Plan, RunConfig
from heatkv_cli.console import Console
from heatkv_cli.errors import ConfigError
from heatkv_cli.metrics.base import Metric, Sample, SetMetric, Value
from heatkv_cli.pipeline import setup
from heatkv_cli.pipeline.contact_sheet import write_contact_sheet
from heatkv_cli.pipeline.generate import CHOSEN, FORCED, FREE, Infeasible, Job, Models, prepare, prepare_all, run_pass
from heatkv_cli.pipeline.image_folder import read_image, reference_of
from heatkv_cli.pipeline.measure import Item, Measured, incomplete, measure, metric_rows, statistics_of
from heatkv_cli.results import RunFolder, encode_rows, environment, upsert_results, utc_now, write_file

SCORE_COLUMNS = ("image_id", "metric", "value", "stratum", "note")


@dataclass
class Evaluated:
    """A run with its numbers: mean costs, and what came out of each metric; `against` is the full run's id."""

    job: Job
    against: str | None
    costs: dict[str, float]
    measured: dict[str, Measured]

    @property
    def is_noise_floor(self) -> bool:
        """Whether this is the reference method once more, with other arithmetic."""
        return self.job.cfg.is_reference and self.against is not None


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Make what is missing for every run of the plan, compute its metrics, write results, print the table.

    In a sweep, a budget that a method cannot meet is a row that says so.

    Raises:
        BudgetError: nothing that was asked for can exist.
    """
    models, done = Models(), dict[str, Evaluated]()
    prepared, infeasible = prepare_all(plan.runs, ui)
    jobs = [(job, prepare(job.cfg.as_reference(), ui)) for job in prepared]
    jobs += _noise_floor(jobs, ui)
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
        **incomplete([(item.job.run_id, item.measured) for item in done.values()], ui),
        "infeasible": [point.report for point in infeasible],
    }


def _noise_floor(jobs: list[tuple[Job, Job]], ui: Console) -> list[tuple[Job, Job]]:
    """The full run once more with other arithmetic, against the full run: what a difference of nothing looks like."""
    kind, reference = jobs[0][0].cfg.noise_floor, jobs[0][1]
    if kind is None:
        return []
    if kind == "batch" and reference.cfg.runtime.batch_size == 1:
        raise ConfigError("noise_floor=batch compares with batches of 1", "set runtime.batch_size, or use attention")
    other = {"attention": "masked"} if kind == "attention" else {"batch_size": 1}
    cfg = replace(reference.cfg, runtime=replace(reference.cfg.runtime, **other))
    return [(prepare(cfg, ui), reference)]


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


def _against_full(metric: Metric) -> bool:
    """Whether the number only means something beside the full run's images."""
    return metric.spec.kind == "paired" or (isinstance(metric, SetMetric) and metric.reference == "full")


def _reference_name(metric: Metric) -> str | None:
    return metric.reference if isinstance(metric, SetMetric) else None


def _evaluate(job: Job, full: Evaluated | None, models: Models, ui: Console) -> Evaluated:
    """One run: its passes, then its metrics. `full` is None for the reference itself."""
    run_pass(job, FREE, models, ui)
    metrics = setup.metrics_of(job.cfg)
    if full is None:  # compared with itself: nothing to measure
        metrics = {name: metric for name, metric in metrics.items() if not _against_full(metric)}
    for kind in dict.fromkeys(metric.spec.needs for metric in metrics.values()):
        if kind != FREE:
            run_pass(job, kind, models, ui, full.job if full else None)
    result = Evaluated(job, full.job.run_id if full else None, _costs(RunFolder.reading(job.folder / FREE), job), {})
    items = {
        (kind, paired): _items(job, kind, full if paired else None)
        for kind, paired in set(map(_wanted, metrics.values()))
    }
    for name, metric in metrics.items():
        result.measured[name] = measure(
            metric,
            items[_wanted(metric)],
            job.folder,
            ui,
            baseline=full.measured[name].scores if full and name in full.measured else None,
            reference=_reference(metric, job, full, ui),
            shard=job.cfg.shard,
        )
    _write_scores(result)
    return result


def _reference(metric: Metric, job: Job, full: Evaluated | None, ui: Console) -> Callable[[SetMetric], Any] | None:
    """What gives a set metric the statistics of its reference."""
    if not isinstance(metric, SetMetric) or metric.reference is None:
        return None
    if metric.reference != "full":
        return reference_of(Path(metric.reference).expanduser(), job.cfg.out, ui)
    if full is None:
        return None
    pictures = _items(full.job, FREE, None)[: job.shown]
    return lambda m: statistics_of(m, pictures, full.job.folder / "features", ui, {}, job.cfg.shard)


def _wanted(metric: Metric) -> tuple[str, bool]:
    """The pass a metric needs, and whether it looks at the full run's images beside it; the forced pass makes none."""
    return metric.spec.needs, metric.spec.kind == "paired" and metric.spec.needs != FORCED


def _items(job: Job, kind: str, full: Evaluated | None) -> list[Item]:
    """The images of a pass, each with the full run's where that is given; none is loaded yet."""
    folder = RunFolder.reading(job.folder / kind)
    reference = None if full is None else RunFolder.reading(full.job.folder / FREE)
    items = []
    for image in job.images[: job.shown]:
        row = folder.row(image.image_id)
        if row is None:
            continue  # another shard's
        other = reference.row(image.image_id) if reference else None
        file = folder.path / row["file"] if row["file"] else None
        beside = reference.path / other["file"] if reference and other and other["file"] else None
        facts = [row["sha256"] or row["numbers_json"], other["sha256"] if other else "", image.item.prompt]
        facts.append(json.dumps(dict(image.item.meta), sort_keys=True, default=str))
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
        items.append(Item(image.image_id, key, partial(_sample, image, row["numbers_json"], file, beside)))
    return items


def _sample(image: setup.Image, numbers: str, file: Path | None, reference: Path | None) -> Sample:
    return Sample(
        prompt_id=image.item.id,
        prompt=image.item.meta.get(ORIGINAL, image.item.prompt),
        meta=image.item.meta,
        image=None if file is None else read_image(file),
        reference=None if reference is None else read_image(reference),
        recorded=json.loads(numbers),
        index=image.sample,
    )


def _costs(folder: RunFolder, job: Job) -> dict[str, float]:
    """Median over batches of what each batch recorded; bytes and tokens are the same in all of them."""
    rows = [row for image in job.images[: job.shown] if (row := folder.row(image.image_id))]
    recorded = [json.loads(row["numbers_json"]) for row in {row["batch"]: row for row in rows}.values()]
    return {key: statistics.median(numbers[key] for numbers in recorded) for key in recorded[0]}


def _write_scores(item: Evaluated) -> None:
    """The number of every image, for paired comparisons between any two runs (scripts/compare.py)."""
    rows: list[Mapping[str, Any]] = [dict(zip(SCORE_COLUMNS, SCORE_COLUMNS, strict=True))]
    image_ids = {(image.item.id, image.sample): image.image_id for image in item.job.images}
    for metric, measured in item.measured.items():
        for score in measured.scores:  # of a shard perhaps: not one for every image
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
    metrics = setup.metrics_of(cfg)
    for name, measured in item.measured.items():
        reference = cfg.reference.name if _against_full(metrics[name]) else _reference_name(metrics[name])
        for row in metric_rows(metrics[name], measured):
            yield {**common, "reference": reference, **row}
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
    for name, metric in setup.metrics_of(point.cfg).items():
        yield {
            **_about(point.cfg, plan), "run_id": point.run_id, "status": "infeasible", "reason": point.error.message,
            "metric": name, "metric_version": metric.spec.version, "unit": metric.spec.unit,
            "higher_is_better": metric.spec.higher_is_better,
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
    names = list(dict.fromkeys(name for item in items for name in item.measured))
    units = {name: metric.spec.unit for item in items for name, metric in setup.metrics_of(item.job.cfg).items()}
    columns = [
        "method",
        "budget",
        "beta_alloc",
        "attended",
        *(f"{n} ({units[n]})" if units[n] else n for n in names),
        "ms/img",
        "attention",
        "policy",
    ]
    rows = []
    for item in items:
        cfg, costs = item.job.cfg, item.costs
        cells = [_cell(item.measured.get(n)) for n in names]
        seed = cfg.method.params.get("order_seed")
        label = cfg.method.name + (f"#{seed}" if seed else "") + (" again" if item.is_noise_floor else "")
        rows.append([
            label, cfg.budget_label, f"{costs['beta_alloc']:.4f}",
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


def _cell(measured: Measured | None) -> str:
    if measured is None or not measured.values:
        return "" if measured is None else measured.status
    value: Value = measured.values[0]
    digits = 5 if abs(value.value) < 0.1 else 3 if abs(value.value) < 2 else 2
    if not math.isfinite(value.low):
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _summary(item: Evaluated) -> dict[str, Any]:
    values = {
        name: [
            {"variant": v.variant, "value": v.value, "low": v.low, "high": v.high, "n": v.n, **v.extra}
            for v in measured.values
        ]
        for name, measured in item.measured.items()
    }
    return {
        "run_id": item.job.run_id,
        "method": item.job.cfg.method.name,
        "budget": item.job.cfg.budget_label,
        "costs": item.costs,
        "metrics": values,
    }
