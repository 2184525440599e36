"""generate: jobs -> PNGs and manifest.jsonl, pass by pass.

A pass is one way of running the scales: `free` is ordinary generation; `layout` copies the full run's bits at the
model's layout scales; `forced` copies them at every scale and records KL per bit in place of images. The full run of
the same config leaves its bits and logits (traces) for them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pixels
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import softplus

from heatkv_cli.benchmarks.base import PromptItem
from heatkv_cli.benchmarks.trees import Picture
from heatkv_cli.config import Plan, config_hash
from heatkv_cli.console import Console
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.live_bytes import Watched
from heatkv_cli.core.timeline import Timeline
from heatkv_cli.errors import ArtifactError, ConfigError, HeatKVError, MemoryLimitError
from heatkv_cli.models.base import ImageModel, Trace
from heatkv_cli.pipeline.calibrate import calibrate_all
from heatkv_cli.planning.job import FORCED, FREE, ImageJob, Infeasible, Job, generators_of, load_model
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver, earlier
from heatkv_cli.results import RunFolder, finish_meta, write_meta

CHOSEN = "chosen_"  # before the name of a number that the method chose for itself (`window: auto`)

CACHE_STAGES = ("policy", "attention", "observers", "pool")
"""What a visit of the cache consists of: the stages whose share of the time every image records."""


def run(plan: Plan, ui: Console) -> dict[str, Any]:
    """Make the images of every run of the plan; in a sweep, what cannot exist or fails is left out, and told.

    Where the benchmark has a scorer of its own, the images are also laid out as that reads them (`benchmarks.trees`).

    Raises:
        HeatKVError: nothing that was asked for can exist, or the only run failed.
    """
    resolver = Resolver()
    ready = preflight(plan, resolver)
    ready.check(plan)
    for point in ready.infeasible:
        tell_infeasible(point, ui)
    calibrate_all(ready.calibrations, resolver, ui)
    jobs = [resolver.job(cfg) for cfg in ready.feasible(plan.runs)]
    lists = [_checked_list(job) for job in jobs]
    reports, failed, models = [], [], Models()
    for job, prompts in zip(jobs, lists, strict=True):
        try:
            run_pass(job, FREE, models, ui)
        except HeatKVError as error:
            if len(plan.runs) == 1:
                raise
            ui.error(error)
            failed.append({"run_id": job.run_id, "reason": error.message})
            continue
        report = {"run_id": job.run_id, "path": str((job.folder / FREE).absolute()), "images": len(job.shown)}
        ui.wrote(job.folder / FREE)
        if job.layout:
            tree = job.folder / job.cfg.benchmark.name
            job.layout.write(_pictures(job), prompts, tree)
            report["tree"] = str(tree.absolute())
            ui.wrote(tree)
        reports.append(report)
    return {
        "status": "partial" if ready.infeasible or failed else "done",
        **(reports[0] if reports else {}),
        "runs": reports,
        "infeasible": [point.report for point in ready.infeasible],
        "failed": failed,
    }


def tell_infeasible(point: Infeasible, ui: Console) -> None:
    """Say that a point of a sweep is left out, and why."""
    ui.warn(f"left out: {point.error.message}")


def _checked_list(job: Job) -> Sequence[PromptItem]:
    """The whole list of a benchmark with a tree of its own, which must fit into it; else nothing."""
    if job.layout is None:
        return ()
    items = job.inputs.prompts.items
    job.layout.check(items, job.inputs.samples)
    return items


def _pictures(job: Job) -> list[Picture]:
    """The images of a run that are there, as its benchmark's tree takes them; others are another shard's."""
    folder = RunFolder.reading(job.folder / FREE)
    rows = ((image, folder.row(image.image_id)) for image in job.shown)
    return [Picture(image.item, image.sample, folder.path / row["file"]) for image, row in rows if row is not None]


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

    def ready(self, job: Job, batches: Sequence[Sequence[ImageJob]]) -> ImageModel:
        """Return the model of a run, with the text features of some batches on disk."""
        model = self.get(job)
        model.prepare([image.item.prompt for batch in batches for image in batch], job.cfg.text_root)
        return model

    def release(self) -> None:
        """Let go of the model and its memory."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_pass(job: Job, kind: str, models: Models, ui: Console, reference: Job | None = None) -> None:
    """Make what is missing of one pass. A model that cannot be read leaves no new folder behind.

    Args:
        job: the run.
        kind: `free`, `layout` or `forced`.
        models: the one that is loaded.
        ui: for progress.
        reference: the full run, whose traces `layout` and `forced` copy from.
    """
    if job.code == "differs":  # complete, and of another code: nothing is added to it
        return
    cfg, batches = job.cfg, job.own_batches
    new = bool(batches) and not (job.folder / kind).exists()
    if new:
        _tell_earlier(job, kind, ui)
        models.ready(job, batches)
    write_meta(
        job.folder,
        config_hash=job.digest,
        config=cfg.plain(),
        run_id=job.run_id,
        alike=job.alike,
        code_sha256=job.code_sha256,
        weights_sha256=job.inputs.weights_sha256,
        schedule_sha256=job.plan_sha256,
        calibration_sha256=job.calibration_sha256,
        prompts_sha256=job.inputs.prompts.sha256,
    )
    ui.log_to(job.folder)
    traces = None if reference is None else RunFolder.reading(reference.folder / FREE)
    with RunFolder(job.folder / kind, cfg.shard) as folder:
        todo = [batch for batch in batches if not folder.done(image.image_id for image in batch)]
        label = f"{cfg.method.name} {cfg.budget.slug} {kind}"
        if todo:
            model = models.get(job) if new else models.ready(job, todo)
        with ui.progress(label, sum(map(len, todo)), "img") as progress:
            for batch in todo:
                copied = None if traces is None else _load_traces(traces, batch)
                watch = kind == FREE and batch[0] == batches[0][0]
                rows, files = _make(job, kind, model, batch, copied, watch)
                folder.append_batch(rows, files)
                progress.advance(len(batch))
    finish_meta(job.folder)


def _tell_earlier(job: Job, kind: str, ui: Console) -> None:
    """Say that images of earlier code exist and are not used."""
    for folder, _ in earlier(job)[:1] if kind == FREE else ():
        count = len(list((folder / kind).glob("*.png")))
        if count:
            ui.say(f"{count} images of {folder.name} are from earlier code: made again (code=any uses them)")


def _make(
    job: Job, kind: str, model: ImageModel, batch: Sequence[ImageJob], copied: list[Trace] | None, watch: bool
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Run one batch; returns its manifest rows and its files.

    A watched batch says how much memory a visit takes, and nothing of time, which watching costs.
    """
    cfg, scales = job.cfg, range(model.geometry.num_scales)
    forced: list[Tensor | None] = []
    if copied is not None:
        bits = [torch.cat([trace.bits[s] for trace in copied]) for s in scales]
        chosen = scales if kind == FORCED else cfg.model.layout_scales
        forced = [bits[s] if s in chosen else None for s in scales]
    generators = None if kind == FORCED else generators_of(batch)
    cuda = cfg.runtime.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(job.device)
    with memory_errors(len(batch)):
        cache = new_cache(job, model, len(batch))
        with Timeline(job.device) as reading:
            condition = model.encode([image.item.prompt for image in batch])
        with Timeline(job.device) as timeline:
            seen = Watched(cache) if watch else cache
            trace = model.generate(condition, job.sampling, seen, generators, forced)
        text_seconds, stages = sum(reading.by_stage().values()), timeline.by_stage()
        ledger, facts = cache.ledger, cache.policy.facts
        visits_peak = seen.cuda_peak if isinstance(seen, Watched) else 0
        del cache, seen  # the decoder needs more memory than any scale, and no cache
        _check_finite(trace, job)
        pixels = None if kind == FORCED else model.decode(trace.latent).cpu().numpy()
    numbers = ledger.ratios() | {"text_seconds": text_seconds / len(batch)}
    if not watch:
        numbers |= _times(stages, len(batch))
    numbers |= {CHOSEN + name: value for name, value in facts.items()}
    common = {
        "batch": batch[0].image_id,
        "seconds": numbers.get("seconds_per_image"),
        "kv_peak_bytes": ledger.live_peak,
        "kv_resident_bytes": ledger.alloc_bytes,
        "status": "ok",
        "cuda_peak_bytes": max(visits_peak, torch.cuda.max_memory_allocated(job.device)) if cuda else None,
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
        rows.append({**row, "numbers": own})
    return rows, files


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
    """Whether torch says that an allocation failed; on the CPU it has no class of its own for that."""
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


def _times(stages: dict[str, float], images: int) -> dict[str, float]:
    """Seconds an image, and the share of each stage of the cache."""
    seconds = sum(stages.values())
    return {"seconds_per_image": seconds / images} | {f"{s}_share": stages.get(s, 0) / seconds for s in CACHE_STAGES}


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Pixels.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _encode_trace(trace: Trace, i: int) -> bytes:
    bits = {f"bits.{s:02}": part[i : i + 1].cpu().contiguous() for s, part in enumerate(trace.bits)}
    logits = {f"logits.{s:02}": part[i : i + 1].cpu().contiguous() for s, part in enumerate(trace.logits)}
    return save({**bits, **logits})


def _load_traces(folder: RunFolder, batch: Sequence[ImageJob]) -> list[Trace]:
    """The full run's bits and logits of a batch, one trace an image."""
    return [_load_trace(folder, image) for image in batch]


def _load_trace(folder: RunFolder, image: ImageJob) -> Trace:
    row = folder.row(image.image_id)
    if row is None or not row["trace"]:
        raise ConfigError(f"the full run has no image {image.image_id}", "run the same command without --shard")
    path: Path = folder.path / row["trace"]
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "remove it: the image is made again") from error
    names = sorted(tensors)
    bits, logits = (tuple(tensors[n] for n in names if n.startswith(kind)) for kind in ("bits", "logits"))
    return Trace(bits, logits, torch.empty(0))
