"""generate: method, schedule and prompts -> PNGs and manifest.csv, pass by pass.

A pass is one way of running the scales: `free` is ordinary generation; `layout` copies the full run's bits at the
model's layout scales; `forced` copies them at every scale and records KL per bit in place of images. The full run of
the same config leaves its bits and logits (traces) for them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pixels
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import softplus

from heatkv_cli.benchmarks.base import PromptItem
from heatkv_cli.benchmarks.trees import LAYOUTS, Layout, Picture
from heatkv_cli.config import Plan, RunConfig, config_hash, raise_all
from heatkv_cli.console import Console
from heatkv_cli.core.artifacts import Schedule
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.calibration import Calibration
from heatkv_cli.core.ledger import Ledger
from heatkv_cli.core.timeline import Timeline
from heatkv_cli.errors import BudgetError, ConfigError, GPUMemoryError
from heatkv_cli.models.base import ImageModel, Trace
from heatkv_cli.pipeline import setup
from heatkv_cli.pipeline.build_schedule import schedule_of
from heatkv_cli.pipeline.calibrate import calibration_of
from heatkv_cli.results import RunFolder, finish_meta, write_meta

FREE, LAYOUT, FORCED = "free", "layout", "forced"
CHOSEN = "chosen_"  # before the name of a number that the method chose for itself (`window: auto`)

CACHE_STAGES = ("policy", "attention", "observers", "pool")
"""What a visit of the cache consists of: the stages whose share of the time every image records."""


@dataclass(frozen=True)
class Job:
    """A run that is ready to go: everything but the loaded model."""

    cfg: RunConfig
    run_id: str
    digest: str
    folder: Path
    files: dict[str, Path]
    weights_sha256: str
    schedule: Schedule | None
    calibration: Calibration | None
    images: list[setup.Image]
    prompts_sha256: str

    @property
    def shown(self) -> int:
        """How many of the images the limit asks for; the last batch is made whole."""
        asked = self.cfg.limit
        return len(self.images) if asked is None else min(len(self.images), asked * self._samples)

    @property
    def layout(self) -> Layout | None:
        """Of the folder that the benchmark's own scorer reads."""
        return LAYOUTS.get(self.cfg.benchmark.name)

    @property
    def _samples(self) -> int:
        return max(image.sample for image in self.images) + 1


@dataclass(frozen=True)
class Infeasible:
    """A point of a sweep that cannot exist: the method cannot meet the budget, and `error` says why."""

    cfg: RunConfig
    error: BudgetError

    @property
    def run_id(self) -> str:
        """Of a run that never is: the hash of its config alone."""
        return self.cfg.name(config_hash(self.cfg.identity()))

    @property
    def report(self) -> dict[str, str]:
        """What --json says of it."""
        return {"method": self.cfg.method.name, "budget": self.cfg.budget_label, "reason": self.error.message}

    def tell(self, ui: Console) -> None:
        """Say that it is left out, and why."""
        ui.warn(f"left out: {self.error.message}")


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Make the images of every run of the plan; in a sweep, budgets that a method cannot meet are left out.

    Where the benchmark has a scorer of its own, the images are also laid out as that reads them (`benchmarks.trees`).

    Raises:
        BudgetError: nothing that was asked for can exist.
    """
    reports = []
    models = Models()
    jobs, infeasible = prepare_all(plan.runs, ui)
    lists = [_checked_list(job) for job in jobs]
    for job, prompts in zip(jobs, lists, strict=True):
        run_pass(job, FREE, models, ui)
        report = {"run_id": job.run_id, "path": str((job.folder / FREE).absolute()), "images": job.shown}
        ui.wrote(job.folder / FREE)
        if job.layout:
            tree = job.folder / job.cfg.benchmark.name
            job.layout.write(_pictures(job), prompts, tree)
            report["tree"] = str(tree.absolute())
            ui.wrote(tree)
        reports.append(report)
    return {
        "status": "partial" if infeasible else "done", **reports[0], "runs": reports,
        "infeasible": [point.report for point in infeasible],
    }  # fmt: skip


def _checked_list(job: Job) -> Sequence[PromptItem]:
    """The whole list of a benchmark with a tree of its own, which must fit into it; else nothing."""
    if job.layout is None:
        return ()
    prompts, samples = setup.prompts_of(job.cfg.benchmark)
    job.layout.check(prompts.items, samples)
    return prompts.items


def _pictures(job: Job) -> list[Picture]:
    """The images of a run that are there, as its benchmark's tree takes them; others are another shard's."""
    folder = RunFolder.reading(job.folder / FREE)
    rows = ((image, folder.row(image.image_id)) for image in job.images[: job.shown])
    return [Picture(image.item, image.sample, folder.path / row["file"]) for image, row in rows if row is not None]


class Models:
    """Loaded models, kept while one command needs them."""

    def __init__(self) -> None:
        self._loaded: dict[str, ImageModel] = {}

    def get(self, job: Job) -> ImageModel:
        key = config_hash({"model": job.cfg.model.identity(), "weights": job.weights_sha256})
        if key not in self._loaded:
            self._loaded[key] = setup.load_model(job.cfg, job.files)
        return self._loaded[key]

    def ready(self, job: Job, batches: Iterable[Sequence[setup.Image]]) -> ImageModel:
        """The model of a run, with the text features of some batches on disk."""
        model = self.get(job)
        model.prepare([image.item.prompt for batch in batches for image in batch], setup.text_root(job.cfg))
        return model


def prepare_all(configs: Sequence[RunConfig], ui: Console) -> tuple[list[Job], list[Infeasible]]:
    """Every run that can exist, and the points of the sweep that cannot.

    Raises:
        BudgetError: none can; several errors become one `ConfigErrors`.
        HeatKVError: as `prepare`.
    """
    jobs, infeasible = list[Job](), list[Infeasible]()
    for cfg in configs:
        try:
            jobs.append(prepare(cfg, ui))
        except BudgetError as error:
            infeasible.append(Infeasible(cfg, error))
    if not jobs:
        raise_all([point.error for point in infeasible])
    for point in infeasible:
        point.tell(ui)
    return jobs, infeasible


def prepare(cfg: RunConfig, ui: Console) -> Job:
    """Everything that has to be known before the first image, missing artifacts included.

    Raises:
        HeatKVError: whatever is wrong with the config, the files or the budget.
    """
    geometry, budget, method = setup.geometry_of(cfg.model), setup.budget_of(cfg), setup.method_of(cfg.method)
    prompts, samples = setup.prompts_of(cfg.benchmark)
    files = setup.weight_files(cfg)
    weights = setup.weights_sha256(files)
    _, schedule = schedule_of(cfg, ui)
    calibration = calibration_of(cfg, method, ui)
    method.policy(geometry, budget, schedule, 1, calibration)  # an infeasible budget is told before anything is made
    identity = {
        **cfg.identity(),
        "weights": weights,
        "schedule": schedule.sha256 if schedule else None,
        "prompts": prompts.sha256,
    }
    if calibration is not None:
        identity["calibration"] = calibration.sha256
    digest = config_hash(identity)
    run_id = cfg.name(digest)
    size = cfg.runtime.batch_size
    every = setup.images_of(cfg, prompts, samples, None)
    asked = len(every) if cfg.limit is None else min(cfg.limit * samples, len(every))
    images = every[: -(-asked // size) * size]  # whole batches: the same files whatever the limit
    folder = cfg.out / "images" / run_id
    return Job(cfg, run_id, digest, folder, files, weights, schedule, calibration, images, prompts.sha256)


def run_pass(job: Job, kind: str, models: Models, ui: Console, reference: Job | None = None) -> None:
    """Make what is missing of one pass. A model that cannot be read leaves no new folder behind.

    Args:
        job: the run.
        kind: `free`, `layout` or `forced`.
        models: loaded so far.
        ui: for progress.
        reference: the full run, whose traces `layout` and `forced` copy from.
    """
    cfg, shard = job.cfg, job.cfg.shard
    batches = setup.batches_of(job.images, cfg.runtime.batch_size)[shard[0] :: shard[1]]
    new = bool(batches) and not (job.folder / kind).exists()
    if new:
        models.ready(job, batches)
    write_meta(
        job.folder,
        config_hash=job.digest,
        config=cfg.plain(),
        run_id=job.run_id,
        weights_sha256=job.weights_sha256,
        schedule_sha256=job.schedule.sha256 if job.schedule else None,
        calibration_sha256=job.calibration.sha256 if job.calibration else None,
        prompts_sha256=job.prompts_sha256,
    )
    ui.log_to(job.folder)
    traces = None if reference is None else RunFolder.reading(reference.folder / FREE)
    with RunFolder(job.folder / kind, shard) as folder:
        todo = [batch for batch in batches if not folder.done(image.image_id for image in batch)]
        label = f"{cfg.method.name} {cfg.budget_label} {kind}"
        if todo:
            model = models.get(job) if new else models.ready(job, todo)
        with ui.progress(label, sum(map(len, todo)), "img") as progress:
            for batch in todo:
                copied = None if traces is None else _load_traces(traces, batch)
                rows, files = _make(job, kind, model, batch, copied)
                folder.append_batch(rows, files)
                progress.advance(len(batch))
    finish_meta(job.folder)


def _make(
    job: Job, kind: str, model: ImageModel, batch: list[setup.Image], copied: list[Trace] | None
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Run one batch; returns its manifest rows and its files."""
    cfg, sampling = job.cfg, setup.sampling_of(job.cfg.model)
    cache = new_cache(job, model, len(batch))
    forced: list[Tensor | None] = []
    if copied is not None:
        bits = [torch.cat([trace.bits[s] for trace in copied]) for s in range(model.geometry.num_scales)]
        scales = range(model.geometry.num_scales) if kind == FORCED else cfg.model.layout_scales
        forced = [bits[s] if s in scales else None for s in range(len(bits))]
    generators = None if kind == FORCED else setup.generators_of(batch)
    cuda = cfg.runtime.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with memory_errors(len(batch)):
        with Timeline(setup.device_of(cfg)) as reading:
            condition = model.encode([image.item.prompt for image in batch])
        with Timeline(setup.device_of(cfg)) as timeline:
            trace = model.generate(condition, sampling, cache, generators, forced)
        text_seconds, stages = sum(reading.by_stage().values()), timeline.by_stage()
        ledger, facts = cache.ledger, cache.policy.facts
        del cache  # the decoder needs more memory than any scale, and no cache
        pixels = None if kind == FORCED else model.decode(trace.latent).cpu().numpy()
    numbers = _costs(ledger, stages, len(batch)) | {"text_seconds": text_seconds / len(batch)}
    numbers |= {CHOSEN + name: value for name, value in facts.items()}
    common = {
        "batch": batch[0].image_id,
        "seconds": numbers["seconds_per_image"],
        "kv_peak_bytes": ledger.live_peak,
        "kv_resident_bytes": ledger.alloc_bytes,
        "status": "ok",
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    rows: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for i, image in enumerate(batch):
        row: dict[str, Any] = {
            **common,
            "image_id": image.image_id,
            "prompt_id": image.item.id,
            "sample": image.sample,
            "prompt": image.item.prompt,
            "seed": image.seed,
        }
        own = dict(numbers)
        if pixels is not None:
            row |= {"file": f"{image.image_id}.png", "height": pixels.shape[1], "width": pixels.shape[2]}
            files[row["file"]] = _png(pixels[i])
        if kind == FORCED and copied is not None:
            own |= bit_kl(copied[i].logits, [part[i : i + 1] for part in trace.logits])
        if kind == FREE and cfg.is_reference:
            row["trace"] = f"{image.image_id}.safetensors"
            files[row["trace"]] = _encode_trace(trace, i)
        rows.append({**row, "numbers_json": json.dumps(own, sort_keys=True)})
    return rows, files


@contextmanager
def memory_errors(batch: int) -> Iterator[None]:
    """Say what to type when the GPU's memory does not hold a batch of `batch` images."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GPUMemoryError(
            f"out of GPU memory with batch size {batch}", f"runtime.batch_size={max(1, batch // 2)}"
        ) from error


def new_cache(job: Job, model: ImageModel, batch: int) -> KVCache:
    """A cache with a fresh policy for `batch` images."""
    cfg = job.cfg
    rows, budget = model.rows(batch, setup.sampling_of(cfg.model)), setup.budget_of(cfg)
    return KVCache(
        model.geometry,
        setup.method_of(cfg.method).policy(model.geometry, budget, job.schedule, rows, job.calibration),
        rows,
        cond_rows=batch,
        dtype=getattr(torch, cfg.model.dtype),
        device=setup.device_of(cfg),
        backend=setup.backend_of(cfg),
        budget=budget,
    )


def bit_kl(full: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """KL(full || other) per bit in nats, from logit differences of one image; scale 0 sees no history and is left out.

    Args:
        full, other: per scale (1, N, bits).

    Returns:
        `kl`, the mean over all bits of scales 1..K-1, and `kl_s{t}` for each of them.
    """
    each, total, count = {}, 0.0, 0
    for t, (a, b) in enumerate(zip(full, other, strict=True)):
        if t == 0:
            continue
        a, b = a.double().cpu(), b.double().cpu()
        kl = torch.sigmoid(a) * (a - b) + softplus(b) - softplus(a)
        each[f"kl_s{t}"] = kl.mean().item()
        total, count = total + kl.sum().item(), count + kl.numel()
    return {"kl": total / count, **each}


def _costs(ledger: Ledger, stages: dict[str, float], images: int) -> dict[str, float]:
    seconds = sum(stages.values())
    shares = {f"{stage}_share": stages.get(stage, 0) / seconds for stage in CACHE_STAGES}
    return {**ledger.ratios(), "seconds_per_image": seconds / images, **shares}


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Pixels.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _encode_trace(trace: Trace, i: int) -> bytes:
    bits = {f"bits.{s:02}": part[i : i + 1].cpu().contiguous() for s, part in enumerate(trace.bits)}
    logits = {f"logits.{s:02}": part[i : i + 1].cpu().contiguous() for s, part in enumerate(trace.logits)}
    return save({**bits, **logits})


def _load_traces(folder: RunFolder, batch: list[setup.Image]) -> list[Trace]:
    """The full run's bits and logits of a batch, one trace an image."""
    traces = []
    for image in batch:
        row = folder.row(image.image_id)
        if row is None:
            raise ConfigError(f"the full run has no image {image.image_id}", "run the same command without --shard")
        tensors = load_file(folder.path / row["trace"])
        names = sorted(tensors)
        bits, logits = (tuple(tensors[n] for n in names if n.startswith(kind)) for kind in ("bits", "logits"))
        traces.append(Trace(bits, logits, torch.empty(0)))
    return traces
