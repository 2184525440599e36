"""score: images that somebody made -> the same metrics, rows and intervals as `eval`; no model, no method.

Images are known by their names. A prompt with id P has the images P, P-0, P-1, ... or P/0, P/samples/0, ... (GenEval's
tree), any image ending. A metric that compares image with image finds the reference by the image's name; one that
compares set with set takes all references, whatever their names and number.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heatkv_cli.benchmarks.base import PromptSet, load_prompts
from heatkv_cli.config import Plan, config_hash
from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, ConfigError, ConfigErrors, SetupError
from heatkv_cli.metrics.base import Metric, Sample, SetMetric
from heatkv_cli.metrics.pictures import printable, read_image
from heatkv_cli.pipeline.image_folder import reference_of, scan, stamp
from heatkv_cli.pipeline.measure import Item, Measured, incomplete, measure, metric_rows
from heatkv_cli.planning.job import metrics_of
from heatkv_cli.results import check_path, environment, read_results, upsert_results, utc_now, write_meta

_NUMBERED = re.compile(r"(.+?)(?:-|/samples/|/)(\d+)")


@dataclass(frozen=True)
class Sources:
    """Images to score, and what they are compared with.

    Attributes:
        images: folder of images.
        reference: folder of the images they are compared with, or, where all metrics compare sets, an npz file with
            ``mu`` and ``sigma``; None where there are none.
        prompts: txt, jsonl or csv list; None where there is none.
    """

    images: Path
    reference: Path | None = None
    prompts: Path | None = None


def run(plan: Plan, ui: Console, sources: Sources) -> dict[str, Any]:
    """Compute the metrics of a plan on images of a folder; write rows to `score/results.csv`, print a table.

    Raises:
        ConfigError: a metric needs something that was not given.
        SetupError: a folder is missing or empty, or the reference is.
        ArtifactError: a name is double, an image has no prompt, or no image has a reference of its name.
    """
    cfg = plan.first
    metrics = metrics_of(cfg)
    path = cfg.out / "score" / "results.csv"  # apart from those of runs, which all have a model and a method
    prompts = _check(plan, metrics, sources, path)
    identity = {
        "images": str(sources.images.absolute()),
        "reference": str(sources.reference.absolute()) if sources.reference else None,
        "prompts": prompts.sha256 if prompts else None,
    }
    digest = config_hash(identity)
    run_id = f"score-{printable(sources.images.absolute().name)[:100]}-{digest[:8]}"
    folder = cfg.out / "score" / run_id
    files = scan(sources.images)
    paired = [metric for metric in metrics.values() if metric.spec.kind == "paired"]
    others = _others(files, sources) if paired else {}
    items = items_of(files, {}, prompts)
    pairs = items_of(files, others, prompts) if others else items
    unseen = _unseen(files, prompts)
    unpaired = [image_id for image_id in others if image_id not in files]
    write_meta(folder, config_hash=digest, config=identity, run_id=run_id)
    ui.log_to(folder)
    measured = {}
    for name, metric in metrics.items():
        reference = _reference(metric, sources, cfg.out, ui)
        own = pairs if metric in paired else items
        found = measure(metric, own, folder, ui, reference=reference, bootstrap=cfg.bootstrap)
        found = _lacking(found, unseen, "prompts")
        measured[name] = _lacking(found, unpaired, "reference images") if metric in paired else found
        common = _common(plan, run_id, prompts, sources, metric) | {"asked": len(items)}
        upsert_results(path, [{**common, **row} for row in metric_rows(metric, measured[name])])
    rows = [row for name in measured for row in metric_rows(metrics[name], measured[name])]
    columns = ("metric", "variant", "value", "low", "high", "n", "unit", "status")
    cells = [[row.get(key) for key in columns] for row in rows]
    ui.table(columns, cells, f"{len(items)} images of {sources.images}")
    ui.wrote(path)
    shown = ("variant", "value", "stderr", "low", "high", "n")
    return {
        "path": str(path.absolute()),
        "run_id": run_id,
        "images": len(items),
        "metrics": {
            name: [{key: getattr(v, key) for key in shown} | dict(v.extra) for v in m.values]
            for name, m in measured.items()
        },
        **incomplete([(run_id, measured)], ui),
    }


def _check(plan: Plan, metrics: Mapping[str, Metric], sources: Sources, results: Path) -> PromptSet | None:
    """Check everything that would end the command later; returns the prompts."""
    for path in (sources.images, sources.reference, sources.prompts):
        if path is not None:
            check_path(path)
    _check_needs(plan, metrics, sources)
    if sources.reference is not None and not sources.reference.exists():
        raise SetupError(f"there is no reference {sources.reference}", "check the path of --reference")
    read_results(results)
    prompts = None if sources.prompts is None else load_prompts(sources.prompts)
    for metric in metrics.values():
        for item in prompts.items if prompts and metric.spec.kind == "prompt" else ():
            metric.check_prompt(item.id, item.meta)
    return prompts


def _check_needs(plan: Plan, metrics: Mapping[str, Metric], sources: Sources) -> None:
    if not any(override.startswith("metric=") for override in plan.overrides):
        raise ConfigError("no metric is named", "add metric=NAME,...; heatkv ls metrics shows which there are")
    errors = []
    for name, metric in metrics.items():
        if metric.spec.needs != "free":
            errors.append(
                ConfigError(f"metric {name} needs the model's own {metric.spec.needs} pass", "use heatkv eval for it")
            )
        elif sources.reference is None and _compares(metric):
            errors.append(ConfigError(f"metric {name} compares with other images", "add --reference DIR"))
        elif sources.prompts is None and metric.spec.kind == "prompt":
            errors.append(ConfigError(f"metric {name} compares with prompts", "add --prompts FILE"))
    if errors:
        raise ConfigErrors(errors)


def _compares(metric: Metric) -> bool:
    return metric.spec.kind == "paired" or (isinstance(metric, SetMetric) and metric.reference == "full")


def _reference(metric: Metric, sources: Sources, out: Path, ui: Console) -> Any:
    if not isinstance(metric, SetMetric) or metric.reference is None:
        return None
    path = sources.reference if metric.reference == "full" else Path(metric.reference).expanduser()
    return None if path is None else reference_of(path, out, ui)


def _others(files: Mapping[str, Path], sources: Sources) -> dict[str, Path]:
    """Return the images to compare with, by name.

    Raises:
        ArtifactError: none has the name of an image.
    """
    if sources.reference is None:
        return {}
    others = scan(sources.reference)
    if others.keys().isdisjoint(files):
        raise ArtifactError(
            f"no image of {sources.reference} has the name of one of {sources.images}",
            f"names must agree, apart from the ending: {next(iter(files))} and {next(iter(others))} do not; "
            "metrics of sets (fid, ...) by themselves need no names",
        )
    return others


def items_of(files: Mapping[str, Path], others: Mapping[str, Path], prompts: PromptSet | None) -> list[Item]:
    """Return the images with their prompts, and the references of the same names.

    Raises:
        ArtifactError: an image has no prompt.
    """
    known = {item.id: item for item in prompts.items} if prompts else {}
    items = []
    for image_id, path in files.items():
        prompt_id, index = _prompt_of(image_id, known) if prompts else (image_id, 0)
        beside = others.get(image_id)
        item = known.get(prompt_id)
        text, meta = (item.prompt, item.meta) if item else ("", {})
        key = stamp(path) + (f"/{stamp(beside)}" if beside else "")
        sample = Sample(prompt_id, text, meta, index=index)
        items.append(Item(image_id, key, partial(_load, sample, path, beside)))
    return items


def _unseen(files: Mapping[str, Path], prompts: PromptSet | None) -> list[str]:
    """Ids of prompts without an image."""
    if prompts is None:
        return []
    known = {item.id: item for item in prompts.items}
    seen = {_prompt_of(image_id, known)[0] for image_id in files}
    return [prompt_id for prompt_id in known if prompt_id not in seen]


def _load(sample: Sample, path: Path, beside: Path | None) -> Sample:
    image, reference = read_image(path), None if beside is None else read_image(beside)
    return Sample(sample.prompt_id, sample.prompt, sample.meta, image, reference, index=sample.index)


def _prompt_of(image_id: str, known: Mapping[str, Any]) -> tuple[str, int]:
    """Prompt id and number of an image.

    >>> _prompt_of("00003/samples/0001", {"00003": 0}), _prompt_of("a-2", {"a": 0}), _prompt_of("a-2", {"a-2": 0})
    (('00003', 1), ('a', 2), ('a-2', 0))
    """
    if image_id in known:
        return image_id, 0
    match = _NUMBERED.fullmatch(image_id)
    if match and match[1] in known:
        return match[1], int(match[2])
    raise ArtifactError(
        f"image {image_id} has no prompt: the list has no id {image_id!r}",
        f"an image is called like its prompt's id (the first is {next(iter(known))!r}), with -0, -1, ... for several",
    )


def _lacking(measured: Measured, missing: list[str], what: str) -> Measured:
    """Return the outcome, partial where there are fewer images than prompts or references."""
    if not missing or measured.status not in ("ok", "partial"):
        return measured
    reason = f"{len(missing)} {what} have no image, the first: {missing[0]}"
    reason = f"{measured.reason}; {reason}" if measured.reason else reason
    return Measured(measured.values, measured.scores, "partial", reason, measured.weights_sha256)


def _common(plan: Plan, run_id: str, prompts: PromptSet | None, sources: Sources, metric: Metric) -> dict[str, Any]:
    """Return the columns that all rows of a metric share; those about a model stay empty."""
    facts, bootstrap = environment(), plan.first.bootstrap
    reference = metric.reference if isinstance(metric, SetMetric) else None
    if _compares(metric):
        reference = str(sources.reference.absolute()) if sources.reference else None
    return {
        "run_id": run_id,
        "created_utc": utc_now(),
        "git_sha": facts["git_sha"],
        "git_dirty": facts["git_dirty"],
        "heatkv_version": facts["heatkv_version"],
        "benchmark": prompts.name if prompts else None,
        "benchmark_version": prompts.sha256[:16] if prompts else None,
        "device": plan.first.runtime.device,
        "torch_version": torch.__version__,
        "bootstrap": f"{bootstrap.resamples} {bootstrap.confidence:g} {bootstrap.seed}",
        "reference": reference,
        "command": command_line(plan, sources),
    }


def command_line(plan: Plan, sources: Sources) -> str:
    """Return the command that makes these rows again."""
    options = {"--images": sources.images, "--reference": sources.reference, "--prompts": sources.prompts}
    words = [word for option, path in options.items() if path is not None for word in (option, str(path))]
    return f"{plan.command_line} {shlex.join(words)}"
