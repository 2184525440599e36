"""One resolved run: everything a stage works with, but for the loaded model.

A `Job` is made once, by a `Resolver`, and handed from stage to stage unchanged; nobody reads config strings after that.
A resolver remembers prompt lists, digests and artifacts, so that a sweep reads each of them once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heatkv_cli.benchmarks.base import PromptItem, PromptSet
from heatkv_cli.benchmarks.trees import LAYOUTS, Layout
from heatkv_cli.config import ModelConfig, RunConfig, build, build_leaf, config_hash
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, SetupError
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.metrics.base import Metric
from heatkv_cli.models.base import ImageModel, Sampling, Sketch

FREE, LAYOUT, FORCED = "free", "layout", "forced"
"""The passes: ordinary generation; the full run's codes copied at the layout scales; copied at every scale."""


@dataclass(frozen=True)
class ImageJob:
    """One image to make: its name, its prompt, and the seed that is its own."""

    image_id: str
    item: PromptItem
    sample: int
    seed: int


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads: shapes, prompts and files.

    Args:
        geometry: shape of the model's cache.
        prompts: the benchmark's list.
        samples: images of each prompt.
        files: the model's files by role; empty where weights are drawn.
        weights_sha256: one digest of all of them.
    """

    geometry: Geometry
    prompts: PromptSet
    samples: int
    files: Mapping[str, Path]
    weights_sha256: str


@dataclass(frozen=True)
class Job:
    """A run that is ready to go.

    Args:
        cfg: the config it was resolved from.
        inputs: prompts, files and shapes that it reads.
        setting: everything its method works with, calibration and plan included; for one row.
        digest: sha256 of everything that can change an image; names the folder.
        alike: the same without the code that makes the images.
        images: whole batches, so that the files are the same whatever the limit; the first `asked` are asked for.
        asked: number of images that the limit asks for.
        run_id, folder: name of the run, and where its passes lie.
        code_sha256: digest of the code that made the images, or will make them.
        code: "same", or "differs" where an earlier code made them.
    """

    cfg: RunConfig
    inputs: Inputs
    setting: Setting
    digest: str
    alike: str
    images: tuple[ImageJob, ...]
    asked: int
    run_id: str
    folder: Path
    code_sha256: str
    code: str = "same"

    @property
    def geometry(self) -> Geometry:
        """Shape of the model's cache."""
        return self.inputs.geometry

    @property
    def sampling(self) -> Sampling:
        """Sampling, one value per scale."""
        sampling: Sampling = self.cfg.model.sampling
        return sampling

    @property
    def method(self) -> Method:
        """The method at work."""
        method: Method = self.cfg.method.object
        return method

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the run by name."""
        return metrics_of(self.cfg)

    @property
    def device(self) -> str:
        """torch's name of the device."""
        return self.cfg.runtime.torch_device

    @property
    def shown(self) -> tuple[ImageJob, ...]:
        """The images that are asked for."""
        return self.images[: self.asked]

    @property
    def batches(self) -> list[tuple[ImageJob, ...]]:
        """All batches: fixed positions of the list, so that another limit or shard meets the same ones."""
        size = self.cfg.runtime.batch_size
        return [self.images[i : i + size] for i in range(0, len(self.images), size)]

    @property
    def own_batches(self) -> list[tuple[ImageJob, ...]]:
        """The batches of this process's shard."""
        index, count = self.cfg.shard
        return self.batches[index::count]

    @property
    def plan_sha256(self) -> str | None:
        """Digest of the method's plan, None for methods that decide online."""
        return None if self.setting.plan is None else str(self.setting.plan.sha256)

    @property
    def calibration_sha256(self) -> str | None:
        """Digest of the calibration that the method reads at run time, None where it reads none."""
        return None if self.setting.calibration is None else self.setting.calibration.sha256

    @property
    def layout(self) -> Layout | None:
        """The folder that the benchmark's own scorer reads."""
        return LAYOUTS.get(self.cfg.benchmark.name)

    def make_policy(self, rows: int) -> Any:
        """Return a fresh policy for one generation of `rows` batch rows."""
        return self.method.policy(replace(self.setting, rows=rows))


@dataclass(frozen=True)
class Infeasible:
    """A point of a sweep that cannot exist: the method cannot meet the budget, and `error` says why."""

    cfg: RunConfig
    error: BudgetError

    @property
    def run_id(self) -> str:
        """Name of the run that never is: the hash of its config alone."""
        return self.cfg.name(config_hash(self.cfg.identity()))

    @property
    def report(self) -> dict[str, str]:
        """Its entry in the document of --json."""
        return {"method": self.cfg.method.name, "budget": self.cfg.budget.slug, "reason": self.error.message}


# ------------------------------------------------------------------------------------------------- parts of a config


def geometry_of(config: ModelConfig) -> Geometry:
    """Return the shape of a model's KV cache; no weights are touched."""
    return Geometry(
        config.name,
        config.num_layers,
        config.num_heads,
        config.head_dim,
        ScaleSchedule(config.sizes),
        config.sink_scales,
        config.dtype_bytes,
    )


def metrics_of(cfg: RunConfig) -> dict[str, Metric]:
    """Return the metrics of a run by name."""
    return {config.name: config.object for config in cfg.metrics}


def seed_of(cfg: RunConfig, prompt_id: str, sample: int, index: int) -> int:
    """Return the seed of one image.

    `hash`: first 8 bytes of sha256 of run_seed/prompt_id/sample, so that it depends on nothing but the image itself.
    `paper`: run seed + index of the image, as the official scripts do.
    """
    if cfg.seed_mode == "paper":
        return cfg.seed + index
    digest = hashlib.sha256(f"{cfg.seed}/{prompt_id}/{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds


def images_of(cfg: RunConfig, items: Iterable[PromptItem], samples: int) -> tuple[ImageJob, ...]:
    """Return the images of some prompts, in their order."""
    pairs = [(item, sample) for item in items for sample in range(samples)]
    return tuple(
        ImageJob(f"{item.id}-{sample}" if samples > 1 else item.id, item, sample, seed_of(cfg, item.id, sample, index))
        for index, (item, sample) in enumerate(pairs)
    )


def generators_of(batch: Sequence[ImageJob]) -> list[torch.Generator]:
    """Return one CPU generator an image: draws depend on neither batch nor device."""
    return [torch.Generator().manual_seed(image.seed) for image in batch]


def sketch_of(model: ModelConfig, geometry: Geometry) -> Sketch:
    """Return a model's shape without its memory; errors are those of its parameters."""
    return build(model.sketch, model.params, Sketch, where="model", geometry=geometry, dtype=model.dtype)


def load_model(cfg: RunConfig, files: Mapping[str, Path]) -> ImageModel:
    """Read a model's weights onto the run's device; sets torch's threads and current device.

    Raises:
        HeatKVError: the device or a file is missing, or a file is damaged or does not fit the config.
    """
    check_device(cfg)
    if cfg.runtime.threads is not None:
        torch.set_num_threads(cfg.runtime.threads)
    if cfg.runtime.device == "cuda":  # events and peaks are those of the current device
        torch.cuda.set_device(cfg.runtime.device_index)
    context = {"geometry": geometry_of(cfg.model), "files": files, "device": cfg.runtime.torch_device}
    return build_leaf(cfg.model, ImageModel, where="model", **context)


def check_device(cfg: RunConfig) -> None:
    """Check that the run's device is there.

    Raises:
        SetupError: torch finds no GPU, or none with this number.
    """
    if cfg.runtime.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise SetupError(
            "runtime.device is cuda, but torch finds no GPU", "runtime=cpu, or install a CUDA build of torch"
        )
    count = torch.cuda.device_count()
    if cfg.runtime.device_index >= count:
        raise SetupError(
            f"runtime.device_index is {cfg.runtime.device_index}, torch finds {count} GPUs", "runtime.device_index=0"
        )


def passes_of(job: Job) -> list[str]:
    """Return the passes that a run's metrics read, ordinary generation first; the reference itself needs no others."""
    kinds = dict.fromkeys([FREE, *(metric.spec.needs for metric in job.metrics.values())])
    return [FREE] if job.cfg.is_reference and job.cfg == job.cfg.as_reference() else list(kinds)
