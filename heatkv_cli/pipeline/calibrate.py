"""calibrate: prompts -> model with the full cache and observers -> calibration.safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.calibration.statistics import AttentionStatistics, concatenate
from heatkv_cli.config import Plan, RunConfig
from heatkv_cli.console import Console
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy
from heatkv_cli.methods.hack import ALPHA
from heatkv_cli.methods.heatkv.stability import Stability, compare_calibrations, half_split_stability
from heatkv_cli.models.base import ImageModel
from heatkv_cli.pipeline.figures import write_scas_map, write_variance_curve
from heatkv_cli.planning.job import generators_of, images_of, load_model
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import finish_meta, write_meta


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Calibrate every model of the plan, and compare each with its second list; returns paths and stability."""
    resolver = Resolver()
    preflight(plan, resolver).check(plan)
    reports = []
    for cfg in plan.runs:
        path, calibration = calibrate(cfg, resolver, ui)
        stability = half_split_stability(calibration)
        _, other = calibrate(replace(cfg, calibration_prompts=cfg.calibration_check, calibration=None), resolver, ui)
        overlap = compare_calibrations(calibration, other)
        _report(calibration, stability, overlap, cfg.calibration_check.name, ui)
        ui.wrote(path)
        figures = _figures(calibration, path)
        for figure in figures:
            ui.wrote(figure)
        reports.append(
            {
                "path": str(path.absolute()),
                "sha256": calibration.sha256,
                "check": cfg.calibration_check.name,
                "stability": stability.as_dict(),
                "overlap": overlap.as_dict(),
                "figures": [str(figure.absolute()) for figure in figures],
            }
        )
    return {**reports[0], "calibrations": reports}


def calibrate_all(runs: Sequence[RunConfig], resolver: Resolver, ui: Console) -> None:
    """Make the calibrations that the runs of another stage need and that are not there yet."""
    for cfg in runs:
        ui.say(f"first: {cfg.model.name} is calibrated on {cfg.calibration_prompts.name}, with the full cache")
        path, _ = calibrate(cfg, resolver, ui)
        ui.wrote(path)


def calibrate(cfg: RunConfig, resolver: Resolver, ui: Console) -> tuple[Path, Calibration]:
    """Return a run's calibration and its file: the one it names, the one made before, or a new one."""
    found = resolver.calibration(cfg)
    if found is not None:
        return cfg.calibration or resolver.calibration_home(cfg)[0], found
    path, digest = resolver.calibration_home(cfg)
    files, weights = resolver.weights(cfg)
    prompts = resolver.prompts(cfg.calibration_prompts)
    model = load_model(cfg, files)  # before there is a folder: files that cannot be read leave none behind
    model.prepare(prompts.items, cfg.text_root)
    write_meta(
        path.parent,
        config_hash=digest,
        config=cfg.plain(),
        weights_sha256=weights,
        code_sha256=cfg.calibration_code_sha256,
    )
    ui.log_to(path.parent)
    calibration = measure(cfg, model, resolver, ui)
    calibration.save(path)
    finish_meta(path.parent, sha256=calibration.sha256)
    return path, calibration


def measure(cfg: RunConfig, model: ImageModel, resolver: Resolver, ui: Console) -> Calibration:
    """Run the calibration images with the full cache and collect the statistics of their conditional rows."""
    prompts = resolver.prompts(cfg.calibration_prompts)
    images, sampling, size = images_of(cfg, prompts.items, 1), cfg.model.sampling, cfg.runtime.batch_size
    parts = []
    with ui.progress(f"calibrate {cfg.model.name}", len(images), "prompt") as progress:
        for batch in (images[i : i + size] for i in range(0, len(images), size)):
            statistics = AttentionStatistics(model.geometry, len(batch))
            cache = KVCache(
                model.geometry,
                Policy(capacity=model.geometry.full_tokens),
                rows=model.rows(len(batch), sampling),
                cond_rows=len(batch),
                dtype=getattr(torch, cfg.model.dtype),
                device=cfg.runtime.torch_device,
                backend=cfg.runtime.attention,
                observers=(statistics,),
            )
            condition = model.encode([image.item for image in batch])
            model.generate(condition, sampling, cache, generators_of(batch))
            parts.append(statistics)
            progress.advance(len(batch))
    return Calibration(
        geometry=model.geometry,
        prompts_sha256=prompts.sha256,
        seeds=tuple(image.seed for image in images),
        sampling=asdict(cfg.model.sampling),
        weights_sha256=resolver.weights(cfg)[1],
        **concatenate(parts),  # type: ignore[arg-type]
    )


def _figures(calibration: Calibration, path: Path) -> list[Path]:
    """Pictures beside the calibration: the variances HACK cuts heads by, the scores HeatKV ranks them by."""
    variance = path.with_name(f"{path.stem}-variance.png")
    scas = path.with_name(f"{path.stem}-scas.png")
    return [
        write_variance_curve(variance, calibration.variance.mean(0), ALPHA),
        write_scas_map(scas, calibration.scores(), calibration.geometry.sources),
    ]


def _report(calibration: Calibration, stability: Stability, overlap: Stability, check: str, ui: Console) -> None:
    scores, sources = calibration.scores(), calibration.geometry.sources
    columns = ["source scale", "mean", "std", "max", "tau, half splits", f"tau, {check}"]
    rows = []
    for i, (source, tau, theirs) in enumerate(zip(sources, stability.tau, overlap.tau, strict=True)):
        spread = [scores[i].mean(), scores[i].std(), scores[i].max()]
        rows.append([source, *(f"{value:.4f}" for value in spread), _text(tau), _text(theirs)])
    title = f"S-CAS per source scale over {calibration.geometry.heads} heads, {len(calibration.seeds)} prompts"
    ui.table(columns, rows, title)
    rows = [[f"{float(b):.0%}", _text(j), _text(overlap.jaccard[b])] for b, j in stability.jaccard.items()]
    ui.table(["budget", "half splits", check], rows, "Jaccard overlap of the removed sets")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
