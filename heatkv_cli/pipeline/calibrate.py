"""calibrate: prompts -> model with the full cache and observers -> calibration.safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heatkv_cli.config import Plan, RunConfig, config_hash
from heatkv_cli.console import Console
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.policy import Method, Policy
from heatkv_cli.core.stability import Stability, compare_calibrations, half_split_stability
from heatkv_cli.core.statistics import AttentionStatistics, concatenate
from heatkv_cli.methods.hack import ALPHA
from heatkv_cli.models.base import ImageModel
from heatkv_cli.pipeline import setup
from heatkv_cli.pipeline.figures import write_scas_map, write_variance_curve
from heatkv_cli.results import finish_meta, write_meta

FILE = "calibration.safetensors"


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Calibrate every model of the plan; returns paths and stability of the last."""
    reports = []
    for cfg in plan.runs:
        geometry, path = setup.geometry_of(cfg.model), calibration_path(cfg, ui)
        calibration = Calibration.load(path, geometry)
        stability = half_split_stability(calibration)
        other = Calibration.load(
            calibration_path(replace(cfg, calibration_prompts=cfg.calibration_check), ui), geometry
        )
        overlap = compare_calibrations(calibration, other)
        _report(calibration, stability, overlap, cfg.calibration_check.name, ui)
        ui.wrote(path)
        figures = _figures(calibration, path)
        for figure in figures:
            ui.wrote(figure)
        reports.append(
            {"path": str(path.absolute()), "sha256": calibration.sha256, "check": cfg.calibration_check.name,
             "stability": stability.as_dict(), "overlap": overlap.as_dict(),
             "figures": [str(figure.absolute()) for figure in figures]}
        )  # fmt: skip
    return {**reports[0], "calibrations": reports}


def calibration_of(cfg: RunConfig, method: Method, ui: Console) -> Calibration | None:
    """What a calibrated method without a schedule reads at run time; made if it is not there."""
    if method.scheduled or not method.calibrated:
        return None
    return Calibration.load(calibration_path(cfg, ui), setup.geometry_of(cfg.model))


def calibration_path(cfg: RunConfig, ui: Console) -> Path:
    """The calibration of a run: the one it names, one made before, or a new one."""
    if cfg.calibration is not None:
        Calibration.load(cfg.calibration, setup.geometry_of(cfg.model))
        return cfg.calibration
    files = setup.weight_files(cfg)
    weights = setup.weights_sha256(files)
    prompts, _ = setup.prompts_of(cfg.calibration_prompts)
    identity = {**cfg.calibration_identity(), "weights": weights, "prompts_sha256": prompts.sha256}
    digest = config_hash(identity)
    folder = cfg.out / "calibration" / f"{cfg.model.name}-{digest[:8]}"
    path = folder / FILE
    if path.exists():
        Calibration.load(path, setup.geometry_of(cfg.model))
        return path
    images = setup.images_of(cfg, prompts, 1, None)
    model = setup.load_model(cfg, files)  # before there is a folder: files that cannot be read leave none behind
    model.prepare([image.item.prompt for image in images], setup.text_root(cfg))
    write_meta(folder, config_hash=digest, config=cfg.plain(), weights_sha256=weights)
    ui.log_to(folder)
    calibration = measure(cfg, model, images, prompts.sha256, weights, ui)
    calibration.save(path)
    finish_meta(folder, sha256=calibration.sha256)
    return path


def measure(
    cfg: RunConfig, model: ImageModel, images: list[setup.Image], prompts: str, weights: str, ui: Console
) -> Calibration:
    """Run the calibration images with the full cache and collect the statistics of their conditional rows.

    `prompts` and `weights` are digests.
    """
    sampling, parts = setup.sampling_of(cfg.model), []
    with ui.progress(f"calibrate {cfg.model.name}", len(images), "prompt") as progress:
        for batch in setup.batches_of(images, cfg.runtime.batch_size):
            statistics = AttentionStatistics(model.geometry, len(batch))
            cache = KVCache(
                model.geometry,
                Policy(capacity=model.geometry.full_tokens),
                rows=model.rows(len(batch), sampling),
                cond_rows=len(batch),
                dtype=getattr(torch, cfg.model.dtype),
                device=setup.device_of(cfg),
                backend=setup.backend_of(cfg),
                observers=(statistics,),
            )
            condition = model.encode([image.item.prompt for image in batch])
            model.generate(condition, sampling, cache, setup.generators_of(batch))
            parts.append(statistics)
            progress.advance(len(batch))
    return Calibration(
        geometry=model.geometry,
        prompts_sha256=prompts,
        seeds=tuple(image.seed for image in images),
        sampling=cfg.model.sampling.per_scale(len(cfg.model.sizes)),
        weights_sha256=weights,
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
    scores = calibration.scores()
    columns = ["source scale", "mean", "std", "max", "tau, half splits", f"tau, {check}"]
    rows = [
        [
            source,
            f"{scores[i].mean():.4f}",
            f"{scores[i].std():.4f}",
            f"{scores[i].max():.4f}",
            _text(tau),
            _text(theirs),
        ]
        for i, (source, tau, theirs) in enumerate(
            zip(calibration.geometry.sources, stability.tau, overlap.tau, strict=True)
        )
    ]
    title = f"S-CAS per source scale over {calibration.geometry.heads} heads, {len(calibration.seeds)} prompts"
    ui.table(columns, rows, title)
    rows = [[f"{float(b):.0%}", _text(j), _text(overlap.jaccard[b])] for b, j in stability.jaccard.items()]
    ui.table(["budget", "half splits", check], rows, "Jaccard overlap of the removed sets")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
