"""Passes: a job's images, or what is recorded in their place, batch by batch into a folder.

A pass is one way of running the scales. `free` is ordinary generation; `layout` copies the full run's codes at the
model's layout scales; `forced` copies them at every scale and records in place of images how far the distributions are
from the full run's. The full run of the same config leaves its codes (`traces`) for them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from heatkv_cli.config import config_hash
from heatkv_cli.console import Console
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.live_bytes import Watched
from heatkv_cli.core.timeline import Timeline
from heatkv_cli.errors import ArtifactError, HeatKVError, MemoryLimitError
from heatkv_cli.models.base import ImageModel, Trace
from heatkv_cli.pipeline.traces import encode_trace, load_codes, load_logits
from heatkv_cli.planning.job import FORCED, FREE, ImageJob, Job, generators_of, load_model
from heatkv_cli.planning.resolver import earlier
from heatkv_cli.results import RunFolder, finish_meta, write_meta

CHOSEN = "chosen_"
"""Before the name of a number that the method chose for itself (`window: auto`)."""

CACHE_STAGES = ("policy", "attention", "observers", "pool")
"""Parts of a visit of the cache: the stages whose share of the time every image records."""

Batch = Sequence[ImageJob]


class Models:
    """The loaded model: one at a time, kept while the runs that follow each other share it."""

    def __init__(self) -> None:
        self._key = ""
        self._model: ImageModel | None = None

    def get(self, job: Job) -> ImageModel:
        """Return the model of a run; another one that was loaded is let go first."""
        key = config_hash({"model": job.cfg.model.identity(), "weights": job.inputs.weights_sha256})
        if self._model is None or key != self._key:
            self.release()
            self._model, self._key = load_model(job.cfg, job.inputs.files), key
        return self._model

    def ready(self, job: Job, batches: Sequence[Batch]) -> None:
        """Load the model of a run, and put the text features of some batches on disk."""
        self.get(job).prepare([image.item for batch in batches for image in batch], job.cfg.text_root)

    def release(self) -> None:
        """Let go of the model and its memory."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_pass(job: Job, kind: str, models: Models, ui: Console, reference: Job | None = None) -> None:
    """Make what is missing of the `free` or the `layout` pass of a run.

    Args:
        job: the run.
        kind: `free` or `layout`.
        models: the one that is loaded.
        ui: console that shows progress.
        reference: the full run, whose codes `layout` copies.
    """
    if job.code == "differs":  # complete, and of another code: nothing is added to it
        return
    traces = None if reference is None else RunFolder.reading(reference.folder / FREE)
    label = f"{job.cfg.method.name} {job.cfg.budget.slug} {kind}"
    with _opened(job, kind, models, ui) as (folder, todo):
        if todo:
            models.ready(job, todo)
        with ui.progress(label, sum(map(len, todo)), "img") as progress:
            for batch in todo:
                model = models.get(job)
                codes = None if traces is None else load_codes(traces, batch)
                chosen = job.cfg.model.layout_scales
                forced = [] if codes is None else [step if s in chosen else None for s, step in enumerate(codes)]
                watch = kind == FREE and batch[0] == job.own_batches[0][0]
                made = make_batch(job, model, batch, forced, generators_of(batch), watch)
                with memory_errors(len(batch)):
                    pixels = model.decode(made.trace.latent).cpu().numpy()
                keep = made.trace if kind == FREE and job.cfg.is_reference else None
                folder.append_batch(*_pictures(batch, made, pixels, keep))
                progress.advance(len(batch))
    finish_meta(job.folder)


def run_forced(jobs: Sequence[Job], reference: Job, models: Models, ui: Console) -> dict[str, HeatKVError]:
    """Make what is missing of the `forced` pass of several runs, batch by batch beside the full run.

    The full run's distributions of a batch are read, or made once and used by all.

    Args:
        jobs: runs with the same reference.
        reference: the full run.
        models: the one that is loaded.
        ui: console that shows progress.

    Returns:
        The error of each run that failed, by its id; the others are complete.
    """
    traces = RunFolder.reading(reference.folder / FREE)
    failed: dict[str, HeatKVError] = {}
    with ExitStack() as stack:
        opened = {
            job.run_id: (job, *stack.enter_context(_opened(job, FORCED, models, ui)))
            for job in jobs
            if job.code != "differs"
        }
        names = ", ".join(f"{job.cfg.method.name} {job.cfg.budget.slug}" for job, _, _ in opened.values())
        label = f"{names if len(opened) < 3 else f'{len(opened)} runs'} {FORCED}"
        count = sum(len(batch) for _, _, todo in opened.values() for batch in todo)
        if count:
            models.ready(reference, reference.own_batches)
        progress = stack.enter_context(ui.progress(label, count, "img"))
        for batch in reference.own_batches:
            lacking = [(job, folder) for job, folder, todo in opened.values() if batch in todo]
            lacking = [(job, folder) for job, folder in lacking if job.run_id not in failed]
            if not lacking:
                continue
            model = models.get(reference)
            codes, full = load_codes(traces, batch), load_logits(traces, batch)
            if full is None:
                made = make_batch(reference, model, batch, codes, None)
                full = [_of_image(made.trace.logits, i) for i in range(len(batch))]
            for job, folder in lacking:
                try:
                    made = make_batch(job, model, batch, codes, None)
                except HeatKVError as error:
                    failed[job.run_id] = error
                    continue
                found = [model.divergence(full[i], _of_image(made.trace.logits, i)) for i in range(len(batch))]
                rows = [made.row(image, numbers) for image, numbers in zip(batch, found, strict=True)]
                folder.append_batch(rows, {})
                progress.advance(len(batch))
    for job in jobs:
        if job.run_id not in failed:
            finish_meta(job.folder)
    return failed


@contextmanager
def _opened(job: Job, kind: str, models: Models, ui: Console) -> Iterator[tuple[RunFolder, list[Batch]]]:
    """Open the folder of a pass, with the batches that it lacks.

    A model that cannot be read leaves no new folder behind.
    """
    batches = job.own_batches
    if batches and not (job.folder / kind).exists():
        _tell_earlier(job, kind, ui)
        models.ready(job, batches)
    write_meta(
        job.folder,
        config_hash=job.digest,
        config=job.cfg.plain(),
        run_id=job.run_id,
        alike=job.alike,
        code_sha256=job.code_sha256,
        weights_sha256=job.inputs.weights_sha256,
        schedule_sha256=job.plan_sha256,
        calibration_sha256=job.calibration_sha256,
        prompts_sha256=job.inputs.prompts.sha256,
    )
    ui.log_to(job.folder)
    with RunFolder(job.folder / kind, job.cfg.shard) as folder:
        yield folder, [batch for batch in batches if not folder.done(image.image_id for image in batch)]


def _tell_earlier(job: Job, kind: str, ui: Console) -> None:
    """Say that images of earlier code exist and are not used."""
    for folder, _ in earlier(job)[:1] if kind == FREE else ():
        count = len(list((folder / kind).glob("*.png")))
        if count:
            ui.say(f"{count} images of {folder.name} are from earlier code: made again (code=any uses them)")


@dataclass(frozen=True)
class Made:
    """A batch that was made.

    Args:
        trace: the codes it drew, with their logits.
        numbers: bytes, tokens and seconds, the same for each of its images.
        common: fields of the manifest's lines that its images share.
    """

    trace: Trace
    numbers: Mapping[str, float]
    common: Mapping[str, Any]

    def row(self, image: ImageJob, numbers: Mapping[str, float]) -> dict[str, Any]:
        """Return an image's line; `numbers` are its own."""
        return {
            **self.common,
            "image_id": image.image_id,
            "prompt_id": image.item.id,
            "sample": image.sample,
            "prompt": image.item.prompt,
            "seed": image.seed,
            "numbers": {**self.numbers, **numbers},
        }


def make_batch(
    job: Job,
    model: ImageModel,
    batch: Batch,
    forced: Sequence[Tensor | None],
    generators: Sequence[torch.Generator] | None,
    watch: bool = False,
) -> Made:
    """Run all scales for one batch, with a fresh cache.

    Args:
        job: the run.
        model: its model.
        batch: the images.
        forced: codes that replace what would be drawn, one entry per scale; None where it is drawn.
        generators: one an image; None where everything is forced.
        watch: measure how much memory a visit takes, and no time, which watching costs.

    Raises:
        ArtifactError: logits that are not finite.
        MemoryLimitError: the batch does not fit.
    """
    cuda = job.cfg.runtime.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(job.device)
    with memory_errors(len(batch)):
        cache = new_cache(job, model, len(batch))
        seam = Watched(cache) if watch else cache
        with Timeline(job.device) as reading:
            condition = model.encode([image.item for image in batch])
        with Timeline(job.device) as timeline:
            trace = model.generate(condition, job.sampling, seam, generators, forced)
        text_seconds, stages = sum(reading.by_stage().values()), timeline.by_stage()
    _check_finite(trace, job)
    ledger = cache.ledger
    numbers = ledger.ratios() | {"text_seconds": text_seconds / len(batch)}
    if not watch:
        numbers |= _times(stages, len(batch))
    numbers |= {CHOSEN + name: value for name, value in cache.policy.chosen.items()}
    peak = torch.cuda.max_memory_allocated(job.device) if cuda else None
    common = {
        "batch": batch[0].image_id,
        "seconds": numbers.get("seconds_per_image"),
        "kv_peak_bytes": ledger.live_peak,
        "kv_resident_bytes": ledger.alloc_bytes,
        "cuda_peak_bytes": max(peak, seam.cuda_peak) if peak is not None and isinstance(seam, Watched) else peak,
        "status": "ok",
    }
    return Made(trace, numbers, common)  # without the cache: the decoder needs more memory than any scale


def _pictures(
    batch: Batch, made: Made, pixels: Any, keep: Trace | None
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return the lines and files of a batch with pictures (B, height, width, 3), and its trace where that is kept."""
    rows: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for i, image in enumerate(batch):
        row = made.row(image, {}) | {"height": pixels.shape[1], "width": pixels.shape[2]}
        row["file"] = f"{image.image_id}.png"
        files[row["file"]] = _png(pixels[i])
        if keep is not None:
            row["trace"] = f"{image.image_id}.safetensors"
            files[row["trace"]] = encode_trace(keep, i)
        rows.append(row)
    return rows, files


def _of_image(steps: Sequence[Tensor], i: int) -> list[Tensor]:
    return [step[i : i + 1] for step in steps]


def _check_finite(trace: Trace, job: Job) -> None:
    """Refuse logits that are NaN or infinite: sampling would draw from nothing, in silence."""
    bad = sum(int((~logits.isfinite()).sum()) for logits in trace.logits)
    if bad:
        total = sum(logits.numel() for logits in trace.logits)
        raise ArtifactError(
            f"{job.cfg.model.name}: {bad} of {total} logits are not finite",
            "check the weights and model.sampling, or compute in a wider format: model.dtype=float32",
        )


@contextmanager
def memory_errors(batch: int) -> Iterator[None]:
    """Say what to type when memory does not hold a batch of `batch` images."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
        smaller = f"runtime.batch_size={batch // 2}" if batch > 1 else "a smaller resolution or model"
        raise MemoryLimitError(f"out of {where} memory with batch size {batch}", smaller) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch says that an allocation failed; on the CPU it has no class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def new_cache(job: Job, model: ImageModel, batch: int) -> KVCache:
    """Return a cache with a fresh policy for `batch` images."""
    rows = model.rows(batch, job.sampling)
    return KVCache(
        model.geometry,
        job.make_policy(rows),
        rows,
        cond_rows=batch,
        dtype=getattr(torch, job.cfg.model.dtype),
        device=job.device,
        backend=job.cfg.runtime.attention,
        budget=job.cfg.budget,
    )


def _times(stages: dict[str, float], images: int) -> dict[str, float]:
    """Return the seconds an image, and the share of each stage of the cache."""
    seconds = sum(stages.values())
    return {"seconds_per_image": seconds / images} | {f"{s}_share": stages.get(s, 0) / seconds for s in CACHE_STAGES}


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
