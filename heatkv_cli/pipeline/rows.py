"""The output of eval: rows of results.csv, lines, tables and the JSON summary.

One table per model and benchmark. A table shows every axis that varies, so that no two of its rows look alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heatkv_cli.config import Plan, RunConfig, read_yaml
from heatkv_cli.console import Console
from heatkv_cli.metrics.base import Metric, SetMetric
from heatkv_cli.metrics.scores import Value
from heatkv_cli.pipeline.measure import Measured, metric_rows
from heatkv_cli.pipeline.passes import CHOSEN
from heatkv_cli.planning.job import FORCED, Infeasible, metrics_of
from heatkv_cli.results import (
    SCORE_FIELDS,
    encode_lines,
    environment,
    locked,
    parse_lines,
    read_regular,
    upsert_results,
    utc_now,
    write_file,
)

if TYPE_CHECKING:
    from heatkv_cli.pipeline.evaluate import Evaluated

COSTS = ("beta_live", "beta_alloc", "beta_work", "beta_meta", "attended_tokens", "attended_ratio", "seconds_per_image")
"""Columns about bytes, tokens and seconds, the same in all rows of a run."""

SHARES = ("attention", "policy", "pool")
"""Stages whose share of the time is a row of its own."""


class Table:
    """The rows of one command: written to results.csv as they become known.

    Args:
        plan: the command's plan.
        path: path of results.csv.
        infeasible: points that cannot exist.
    """

    def __init__(self, plan: Plan, path: Path, infeasible: Sequence[Infeasible]) -> None:
        self.plan, self.path, self.infeasible = plan, path, infeasible

    def begin(self) -> None:
        """Write what is known before any work: points that cannot exist."""
        rows = [
            row
            for point in self.infeasible
            for row in self._without_value(point.cfg, point.run_id, "infeasible", point, metrics_of(point.cfg))
        ]
        upsert_results(self.path, rows)

    def _without_value(
        self, cfg: RunConfig, run_id: str, status: str, point: Any, metrics: Mapping[str, Metric]
    ) -> Iterator[dict[str, Any]]:
        for metric in metrics.values():
            yield {
                **_about(cfg, self.plan),
                "run_id": run_id,
                "status": status,
                "reason": point.error.message,
                "metric": metric.spec.name,
                "metric_version": metric.spec.version,
                "metric_settings": metric.settings(),
                "unit": metric.spec.unit,
                "higher_is_better": metric.spec.higher_is_better,
            }

    def failed(self, item: Evaluated) -> None:
        """Write the rows of a run that failed: one without a value for each metric that it would have had."""
        rows = self._without_value(item.job.cfg, item.job.run_id, "failed", item, item.metrics)
        upsert_results(self.path, list(rows))

    def measured(self, item: Evaluated, name: str) -> None:
        """Write the rows of one metric of one run, and the scores of its images."""
        metric, cfg = item.metrics[name], item.job.cfg
        reference = cfg.reference.name if metric.spec.kind == "paired" or metric.spec.needs == FORCED else None
        if isinstance(metric, SetMetric) and metric.reference is not None:
            full = metric.reference == "full"
            reference = cfg.reference.name if full else str(Path(metric.reference).expanduser().absolute())
        common = {**self._common(item), "reference": reference}
        upsert_results(self.path, [{**common, **row} for row in metric_rows(metric, item.measured[name])])
        _write_scores(item)

    def costs(self, item: Evaluated) -> None:
        """Write the rows about a run's time, where it is known."""
        asked = len(item.job.shown)
        whole = (
            {} if item.made == asked else {"status": "partial", "reason": f"{item.made} of {asked} images are there"}
        )
        rows = [
            {
                **self._common(item),
                **whole,
                "metric": f"{stage}_share",
                "metric_version": "1",
                "variant": "",
                "value": item.costs[f"{stage}_share"],
                "n": item.made,
                "unit": "fraction of the time",
                "higher_is_better": False,
            }
            for stage in SHARES
            if f"{stage}_share" in item.costs
        ]
        upsert_results(self.path, rows)

    def _common(self, item: Evaluated) -> dict[str, Any]:
        """Return the cells that every row of a run has."""
        job, cfg = item.job, item.job.cfg
        chosen = {key.removeprefix(CHOSEN): value for key, value in item.costs.items() if key.startswith(CHOSEN)}
        bootstrap = cfg.bootstrap
        return {
            **_about(cfg, self.plan),
            "run_id": job.run_id,
            "code": job.code,
            "code_sha256": job.code_sha256,
            "weights_sha256": job.inputs.weights_sha256,
            "method_args_json": {**cfg.method.params, **({"chosen": chosen} if chosen else {})},
            "schedule_sha256": job.plan_sha256,
            "bootstrap": f"{bootstrap.resamples} {bootstrap.confidence:g} {bootstrap.seed}",
            "asked": len(job.shown),
            "total": len(job.inputs.prompts) * job.inputs.samples,
            "status": "ok",
            **{key: item.costs.get(key) for key in COSTS},
        }

    def show(self, shown: Sequence[Evaluated], ui: Console) -> None:
        """Print what is known, one table per model and benchmark."""
        groups: dict[tuple[str, str, str], list[Evaluated | Infeasible]] = {}
        everything: list[Evaluated | Infeasible] = [*shown, *self.infeasible]
        for item in everything:
            cfg = _config(item)
            groups.setdefault((cfg.model.name, cfg.model.shape_label, cfg.benchmark.name), []).append(item)
        for items in groups.values():
            runs = [item for item in items if not isinstance(item, Infeasible) and (item.costs or item.error)]
            if runs or any(isinstance(item, Infeasible) for item in items):
                _print(runs, [item for item in items if isinstance(item, Infeasible)], self.plan, ui)


def _config(item: Evaluated | Infeasible) -> RunConfig:
    return item.cfg if isinstance(item, Infeasible) else item.job.cfg


def _about(cfg: RunConfig, plan: Plan) -> dict[str, Any]:
    """Return the cells about config, code and command that every row of a run has."""
    facts = environment()
    return {
        "created_utc": utc_now(),
        "git_sha": facts["git_sha"],
        "git_dirty": facts["git_dirty"],
        "heatkv_version": facts["heatkv_version"],
        "torch_version": torch.__version__,
        "model": cfg.model.name,
        "method": cfg.method.name,
        "method_args_json": cfg.method.params,
        "budget": cfg.budget.text if cfg.budget.rho is None else None,
        "rho": None if cfg.budget.rho is None else float(cfg.budget.rho),
        "benchmark": cfg.benchmark.name,
        "benchmark_version": cfg.benchmark.version,
        "resolution": cfg.model.shape_label,
        "seed": cfg.seed,
        "seed_mode": cfg.seed_mode,
        "dtype": cfg.model.dtype,
        "attention_backend": cfg.runtime.attention,
        "batch_size": cfg.runtime.batch_size,
        "device": cfg.runtime.device,
        "command": plan.command_line,
    }


def _write_scores(item: Evaluated) -> None:
    """Write the number of every image, for paired comparisons of any two runs; lines of earlier commands stay."""
    image_ids = {(image.item.id, image.sample): image.image_id for image in item.job.images}
    rows = {
        (image_ids[score.prompt_id, score.index], metric): {
            "image_id": image_ids[score.prompt_id, score.index],
            "metric": metric,
            "value": float(score.value),
            "stratum": score.stratum,
            "note": score.note,
        }
        for metric, measured in item.measured.items()
        for score in measured.scores  # of a shard perhaps: not one for every image
    }
    path = item.job.folder / "scores.jsonl"
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        earlier = parse_lines(path, read_regular(path), SCORE_FIELDS) if path.exists() else []
        whole = {(row["image_id"], row["metric"]): row for row in earlier} | rows
        write_file(path, encode_lines(whole.values(), SCORE_FIELDS))


# ------------------------------------------------------------------------------------------------------ what is printed


def announce(runs: Sequence[Evaluated], ui: Console) -> None:
    """Say what will be made, where, and what a full cache would take, before anything is made."""
    job = runs[0].job
    images = sum(len(item.job.images) for item in runs)
    rows = job.cfg.runtime.batch_size * (2 if job.sampling.guided else 1)
    full = job.geometry.full_bytes(rows) / 2**20
    ui.say(
        f"plan: {len(runs)} runs, {images} images on {job.device}; finished ones are not made again; "
        f"the full KV cache of a batch ({rows} rows) is {full:.1f} MiB"
    )


def label(item: Evaluated) -> str:
    """Return a run's name on pictures."""
    return f"{item.job.cfg.method.name} {item.job.cfg.budget.slug}"


def tell(item: Evaluated, ui: Console) -> None:
    """Say what is known of a run so far, in a line."""
    found = [f"{name} {cell(measured)}" for name, measured in item.measured.items() if measured.values]
    if found and item.full is not None:
        ui.say(f"{label(item)}: {', '.join(found)}")


def axes(runs: Sequence[RunConfig]) -> dict[str, list[str]]:
    """Return what differs between runs beside method and budget: a column of texts for each such key."""
    flat = [_flat(run) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    columns = {key: [str(values.get(key, "")) for values in flat] for key in keys}
    return {key: texts for key, texts in columns.items() if len(set(texts)) > 1}


def _flat(run: RunConfig) -> dict[str, Any]:
    """Return what a user may sweep beside method, model and benchmark; method parameters only where changed."""
    usual = read_yaml("method", run.method.name) if run.method.target.startswith("heatkv_cli.") else {}
    changed = {key: value for key, value in run.method.params.items() if usual.get(key) != value}
    values = {
        "parameters": ", ".join(f"{key}={value}" for key, value in changed.items()),
        "seed": run.seed,
        "seed_mode": run.seed_mode,
        "dtype": run.model.dtype,
        "device": run.runtime.device,
        "attention": run.runtime.attention,
        "batch": run.runtime.batch_size,
        "preset": run.model.preset,
        **{f"model.params.{key}": value for key, value in run.model.params.items()},
        **{f"sampling.{key}": _short(value) for key, value in asdict(run.model.sampling).items()},
        **{f"benchmark.{key}": value for key, value in run.benchmark.params.items()},
    }
    return {
        key: json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else value
        for key, value in values.items()
    }


def _short(value: Any) -> Any:
    """Return one value where all scales have the same."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _print(runs: Sequence[Evaluated], infeasible: Sequence[Infeasible], plan: Plan, ui: Console) -> None:
    configs = [*(item.job.cfg for item in runs), *(point.cfg for point in infeasible)]
    varied = axes(configs)
    if any(item.is_noise_floor for item in runs):  # it has its own name
        varied = {key: texts for key, texts in varied.items() if key not in ("attention", "batch")}
    names = list(dict.fromkeys(name for item in runs for name in item.measured))
    specs = {name: metric.spec for item in runs for name, metric in item.metrics.items()}
    titles = [f"{name} ({specs[name].unit})" if specs[name].unit else name for name in names]
    costs = ["ms/img", "attention", "policy"] if ui.verbose else []
    columns = ["method", *varied, "budget", "beta_alloc", "attended", *titles, *costs]
    limited = "benchmark" in plan.named
    rows = []
    for i, item in enumerate(runs):
        row = [
            item.job.cfg.method.name + (" again" if item.is_noise_floor else ""),
            *(texts[i] for texts in varied.values()),
        ]
        row.append(item.job.cfg.budget.slug)
        if item.error is not None:
            rows.append([*row, "failed", *[""] * (len(columns) - len(row) - 1)])
            continue
        row += [_number(item.costs, "beta_alloc", "{:.4f}"), _number(item.costs, "attended_ratio", "{:.3f}")]
        row += [_judged(item, name, limited) for name in names]
        if costs:
            seconds = item.costs.get("seconds_per_image")
            row.append("" if seconds is None else f"{1000 * seconds:.0f}")
            row += [_number(item.costs, "attention_share", "{:.0%}"), _number(item.costs, "policy_share", "{:.1%}")]
        rows.append(row)
    for i, point in enumerate(infeasible, start=len(runs)):
        row = [point.cfg.method.name, *(texts[i] for texts in varied.values()), point.cfg.budget.slug, "infeasible"]
        rows.append([*row, *[""] * (len(columns) - len(row))])
    ui.table(columns, rows, _title(runs, configs[0]))


def _title(runs: Sequence[Evaluated], cfg: RunConfig) -> str:
    model = cfg.model.name + ("" if not cfg.model.trained_at else f" at {cfg.model.shape_label}")
    if not runs:
        return f"{model}, {cfg.benchmark.name}"
    counts = dict.fromkeys(
        (len(item.job.shown), len(item.job.inputs.prompts) * item.job.inputs.samples) for item in runs
    )
    asked, total = next(iter(counts))
    return f"{model}, {asked} images of {cfg.benchmark.name}" + (f" (of {total})" if asked < total else "")


def _number(costs: Mapping[str, float], key: str, form: str) -> str:
    return form.format(costs[key]) if key in costs else ""


def _judged(item: Evaluated, name: str, limited: bool) -> str:
    """Return a cell; it says when a score of a named benchmark is over a part of its images."""
    text = cell(item.measured.get(name))
    asked, total = len(item.job.shown), len(item.job.inputs.prompts) * item.job.inputs.samples
    if limited and asked < total and text and item.job.metrics[name].spec.kind == "prompt":
        text += f" ({asked} of {total})"
    return text


def cell(measured: Measured | None) -> str:
    """Return the headline of a metric with its interval, and what was left out of it."""
    if measured is None or not measured.values:
        return "" if measured is None else measured.status
    value: Value = measured.values[0]
    if not math.isfinite(value.value):
        return "identical" if value.value > 0 else f"{value.value}"
    digits = 5 if abs(value.value) < 0.1 else 3 if abs(value.value) < 2 else 2
    text = f"{value.value:.{digits}f}"
    if math.isfinite(value.low):
        text += f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    identical = int(value.extra.get("identical", 0))
    return text + (f" +{identical} identical" if identical else "") + ("*" if measured.status == "partial" else "")


def summary(item: Evaluated) -> dict[str, Any]:
    """Return what --json says of a run: every axis, its costs and its metrics."""
    cfg = item.job.cfg
    return {
        "run_id": item.job.run_id,
        "model": cfg.model.name,
        "resolution": cfg.model.shape_label,
        "benchmark": cfg.benchmark.name,
        "method": cfg.method.name,
        "parameters": dict(cfg.method.params),
        "budget": cfg.budget.slug,
        "seed": cfg.seed,
        "seed_mode": cfg.seed_mode,
        "dtype": cfg.model.dtype,
        "preset": cfg.model.preset,
        "model_parameters": dict(cfg.model.params),
        "benchmark_parameters": dict(cfg.benchmark.params),
        "sampling": asdict(cfg.model.sampling),
        "runtime": cfg.runtime.identity(),
        "asked": len(item.job.shown),
        "status": "failed" if item.error else "done",
        "costs": item.costs,
        "metrics": {name: list(_values(measured)) for name, measured in item.measured.items()},
    }


def _values(measured: Measured) -> Iterable[dict[str, Any]]:
    for value in measured.values:
        yield {
            "variant": value.variant,
            "value": value.value,
            "low": value.low,
            "high": value.high,
            "n": value.n,
            **value.extra,
        }
