"""One resolved run: everything a stage works with, but for the loaded model.

A `Job` is made once, by a `Resolver`, and handed from stage to stage unchanged; nobody reads config strings after that.
A resolver remembers prompt lists, digests and artifacts, so that a sweep reads each of them once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heatkv_cli.benchmarks.base import Benchmark, PromptItem, PromptSet
from heatkv_cli.benchmarks.trees import LAYOUTS, Layout
from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.config import BenchmarkConfig, ModelConfig, RunConfig, build, build_leaf, config_hash
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, BudgetError, ConfigError, SetupError
from heatkv_cli.methods.base import Method, Plan, Setting
from heatkv_cli.metrics.base import Metric
from heatkv_cli.models.base import ImageModel, Sampling, Sketch
from heatkv_cli.models.text_store import encoder_sha256, find_features
from heatkv_cli.models.weights import WeightFile, find_file
from heatkv_cli.results import RunFolder, finish_meta, read_meta, write_meta

CALIBRATION, SCHEDULE = "calibration.safetensors", "schedule.safetensors"
FREE, LAYOUT, FORCED = "free", "layout", "forced"
"""The passes: ordinary generation; the full run's codes copied at the layout scales; copied at every scale."""

TEXT = "text"
"""Role of a text encoder: features computed with it may stand in for its files."""


@dataclass(frozen=True)
class ImageJob:
    """One image to make: its name, its prompt, and the seed that is its own."""

    image_id: str
    item: PromptItem
    sample: int
    seed: int


@dataclass(frozen=True)
class Inputs:
    """What a run reads: shapes, prompts and files.

    Args:
        geometry: shape of the model's cache.
        sampling: one value per scale.
        prompts: the benchmark's list.
        samples: images of each prompt.
        files: the model's files by role; empty where weights are drawn.
        weights_sha256: one digest of all of them.
    """

    geometry: Geometry
    sampling: Sampling
    prompts: PromptSet
    samples: int
    files: Mapping[str, Path]
    weights_sha256: str


@dataclass(frozen=True)
class Job:
    """A run that is ready to go.

    Args:
        cfg: the config it was resolved from.
        inputs: what it reads.
        setting: what its method works with, calibration and plan included; for one row.
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
        return self.inputs.sampling

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
        """What --json says of it."""
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


def sampling_of(config: ModelConfig) -> Sampling:
    """Return a model's sampling with one value per scale."""
    return Sampling(**config.sampling.per_scale(len(config.sizes)))


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


def images_of(cfg: RunConfig, prompts: PromptSet, samples: int) -> tuple[ImageJob, ...]:
    """Return the images of a prompt list, in its order."""
    pairs = [(item, sample) for item in prompts.items for sample in range(samples)]
    return tuple(
        ImageJob(f"{item.id}-{sample}" if samples > 1 else item.id, item, sample, seed_of(cfg, item.id, sample, index))
        for index, (item, sample) in enumerate(pairs)
    )


def generators_of(batch: Sequence[ImageJob]) -> list[torch.Generator]:
    """Return one CPU generator an image: draws depend on neither batch nor device."""
    return [torch.Generator().manual_seed(image.seed) for image in batch]


def weight_file(cfg: RunConfig, file: WeightFile) -> Path:
    """Return the path of one of the model's files, or of what stands in for it; errors as in `find_file`."""
    weights = cfg.model.weights
    try:
        return find_file(cfg.model.name, file, cfg.weights_folder, weights.place == "package", weights.verify)
    except SetupError:
        features = find_features(cfg.text_root) if file.role == TEXT else None
        if features is None:
            raise
        return features


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


def _weights_sha256(files: Mapping[str, Path]) -> str:
    """One digest for all files of a model, with a text encoder or with its features; `random` without files."""
    if not files:
        return "random"
    digests = {role: encoder_sha256(path) for role, path in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = [f"{role} {digest}" for role, digest in sorted(digests.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- resolving


class Resolver:
    """Makes jobs of configs and remembers what several of them share."""

    def __init__(self) -> None:
        self._prompts: dict[str, PromptSet] = {}
        self._weights: dict[str, tuple[dict[str, Path], str]] = {}
        self._calibrations: dict[Path, Calibration] = {}

    def prompts(self, config: BenchmarkConfig) -> PromptSet:
        """Return a prompt list; errors as in `Benchmark.load`."""
        key = config_hash(config.identity())
        if key not in self._prompts:
            benchmark: Benchmark = config.object
            self._prompts[key] = benchmark.load()
        return self._prompts[key]

    def weights(self, cfg: RunConfig) -> tuple[dict[str, Path], str]:
        """Return the model's files by role and their digest.

        Raises:
            SetupError: a file is missing.
            ArtifactError: it is another file than the config names.
        """
        if cfg.random_weights:
            return {}, "random"
        key = config_hash({"model": cfg.model.name, "at": [str(cfg.weights), str(cfg.text_root)]})
        if key not in self._weights:
            files = {file.role: weight_file(cfg, file) for file in cfg.model.weights.files}
            self._weights[key] = files, _weights_sha256(files)
        return self._weights[key]

    def inputs(self, cfg: RunConfig) -> Inputs:
        """Return what a run reads; errors as in `prompts` and `weights`."""
        files, digest = self.weights(cfg)
        benchmark: Benchmark = cfg.benchmark.object
        return Inputs(
            geometry_of(cfg.model),
            sampling_of(cfg.model),
            self.prompts(cfg.benchmark),
            benchmark.samples_per_prompt,
            files,
            digest,
        )

    # ------------------------------------------------------------------------------------------------- artifacts

    def needs_calibration(self, cfg: RunConfig) -> bool:
        """Return whether the run reads a calibration: its method does, and nothing else was given in its place."""
        method: Method = cfg.method.object
        return method.calibrated and (method.plan_type is None or (cfg.orders is None and cfg.schedule is None))

    def calibration_home(self, cfg: RunConfig) -> tuple[Path, str]:
        """Return the file of a run's calibration, there or not, and the digest of what it is made from."""
        _, weights = self.weights(cfg)
        identity = {
            **cfg.calibration_identity(),
            "code": cfg.calibration_code_sha256,
            "weights": weights,
            "prompts_sha256": self.prompts(cfg.calibration_prompts).sha256,
        }
        digest = config_hash(identity)
        return cfg.out / "calibration" / f"{cfg.model.name}-{digest[:8]}" / CALIBRATION, digest

    def calibration(self, cfg: RunConfig) -> Calibration | None:
        """Return a run's calibration: the one it names, else the one made before; None where it is still to be made.

        Raises:
            ArtifactError: damaged, changed since it was made, or of another model or other weights.
        """
        if cfg.calibration is not None:
            found = self._load(cfg.calibration, cfg)
            self._same_weights(found, cfg, cfg.calibration)
            return found
        path, _ = self.calibration_home(cfg)
        if not path.exists():
            return None
        found = self._load(path, cfg)
        recorded = (read_meta(path.parent) or {}).get("sha256")
        if recorded not in (None, found.sha256):
            raise ArtifactError(f"calibration {path} was changed since it was made", f"remove {path.parent}")
        return found

    def _load(self, path: Path, cfg: RunConfig) -> Calibration:
        if path not in self._calibrations:
            self._calibrations[path] = Calibration.load(path)
        self._calibrations[path].check(geometry_of(cfg.model), str(path))
        return self._calibrations[path]

    def _same_weights(self, calibration: Calibration, cfg: RunConfig, path: Path) -> None:
        """Refuse a calibration of other weights, where the run's own are at hand to compare with."""
        try:
            _, weights = self.weights(cfg)
        except SetupError:
            return
        if calibration.weights_sha256 and calibration.weights_sha256 != weights:
            raise ArtifactError(
                f"calibration {path} was made with other weights ({calibration.weights_sha256[:12]}) than the run's "
                f"({weights[:12]})",
                f"calibrate these weights: heatkv calibrate --model {cfg.model.name}",
            )

    def setting(self, cfg: RunConfig, calibration: Calibration | None = None) -> Setting:
        """Return what a run's method works with, for one row; the plan is read where the run names one.

        Args:
            cfg: of the run.
            calibration: for methods that read one.

        Raises:
            ArtifactError: the plan is damaged, or made for another model, method or budget.
        """
        at = ScaleSchedule(cfg.model.order_scales or max(cfg.model.resolutions.values(), key=len))
        setting = Setting(geometry_of(cfg.model), cfg.budget, 1, cfg.method.name, calibration, cfg.orders, at)
        method: Method = cfg.method.object
        if cfg.schedule is None or method.plan_type is None:
            return setting
        return replace(setting, calibration=None, plan=_given_plan(cfg, setting, method.plan_type))

    def plan(self, cfg: RunConfig, setting: Setting) -> tuple[Path | None, Plan | None]:
        """Return a run's plan and its file, made and written where it is not there; nothing for online methods.

        Raises:
            BudgetError: the method cannot meet the budget.
            ArtifactError: as `setting`.
        """
        method: Method = cfg.method.object
        if method.plan_type is None:
            return None, None
        if setting.plan is not None:
            return cfg.schedule, setting.plan
        plan = method.plan(setting)
        parts = {"method": cfg.method.identity(), "budget": cfg.budget.text, "plan": plan.sha256}
        digest = config_hash({"model": cfg.model.name, **parts})
        folder = cfg.out / "schedules" / f"{cfg.model.name}-{cfg.method.name}-{cfg.budget.slug}-{digest[:8]}"
        path = folder / SCHEDULE
        if not _holds(path, plan):
            write_meta(folder, config_hash=digest, config=cfg.plain())
            plan.save(path)
            finish_meta(folder, sha256=plan.sha256)
        return path, plan

    # ------------------------------------------------------------------------------------------------------ jobs

    def job(self, cfg: RunConfig) -> Job:
        """Resolve one run; its calibration must be there.

        Raises:
            HeatKVError: whatever is wrong with the files or the budget.
        """
        inputs = self.inputs(cfg)
        calibration = self.calibration(cfg) if self.needs_calibration(cfg) else None
        setting = self.setting(cfg, calibration)
        _, plan = self.plan(cfg, setting)
        if plan is not None:  # all that the method knows is in it
            setting = replace(setting, calibration=None, plan=plan)
        cfg.method.object.policy(setting)  # an infeasible budget is told before anything is made
        alike: dict[str, Any] = {
            **cfg.identity(),
            "weights": inputs.weights_sha256,
            "schedule": None if plan is None else plan.sha256,
            "prompts": inputs.prompts.sha256,
        }
        if setting.calibration is not None:
            alike["calibration"] = setting.calibration.sha256
        code = cfg.code_sha256
        digest = config_hash({**alike, "code": code})
        every = images_of(cfg, inputs.prompts, inputs.samples)
        asked = len(every) if cfg.limit is None else min(cfg.limit * inputs.samples, len(every))
        size = cfg.runtime.batch_size
        images = every[: -(-asked // size) * size]
        run_id = cfg.name(digest)
        job = Job(
            cfg,
            inputs,
            setting,
            digest,
            config_hash(alike),
            images,
            asked,
            run_id,
            cfg.out / "images" / run_id,
            code,
        )
        return _of_any_code(job) if cfg.code == "any" else job


def _given_plan(cfg: RunConfig, setting: Setting, plan_type: type[Plan]) -> Plan:
    """Read the plan a run names, and check that it is a plan of this method at this budget."""
    assert cfg.schedule is not None
    plan = plan_type.load(cfg.schedule, setting.geometry)
    again = f"heatkv build-schedule --model {cfg.model.name} --method {cfg.method.name} {cfg.budget.override}"
    if plan.method != cfg.method.name:
        raise ArtifactError(f"{cfg.schedule} was built for method {plan.method}, the run's is {cfg.method.name}", again)
    if plan.budget.ratio != cfg.budget.ratio:
        raise ArtifactError(f"{cfg.schedule} was built for budget {plan.budget}, the run has {cfg.budget}", again)
    return plan


def _holds(path: Path, plan: Plan) -> bool:
    """Whether a file is this very plan; a damaged one is not, and is written again."""
    try:
        return path.exists() and type(plan).load(path).sha256 == plan.sha256
    except ArtifactError:
        return False


def _of_any_code(job: Job) -> Job:
    """Return the job with the folder of an earlier code, where that holds everything that is asked for."""
    if _complete(job, job.folder):
        return job
    for folder, meta in earlier(job):
        if _complete(job, folder):
            return replace(
                job, folder=folder, run_id=folder.name, code="differs", code_sha256=str(meta.get("code_sha256"))
            )
    return job


def earlier(job: Job) -> list[tuple[Path, dict[str, Any]]]:
    """Return the folders, newest first, of runs that differ from this one in nothing but their code."""
    found = []
    for folder in job.folder.parent.glob(f"{job.cfg.stem}-*"):
        if folder == job.folder or not (folder / "meta.json").is_file():
            continue
        try:
            meta = read_meta(folder) or {}
        except ArtifactError:
            continue
        if meta.get("alike") == job.alike:
            found.append((folder, meta))
    return sorted(found, key=lambda pair: str(pair[1].get("created_utc")), reverse=True)


def passes_of(job: Job) -> list[str]:
    """Return the passes that a run's metrics read, ordinary generation first; the reference itself needs no others."""
    kinds = dict.fromkeys([FREE, *(metric.spec.needs for metric in job.metrics.values())])
    return [FREE] if job.cfg.is_reference and job.cfg == job.cfg.as_reference() else list(kinds)


def _complete(job: Job, folder: Path) -> bool:
    """Whether a run's folder holds every image of every pass that is asked for."""
    for kind in passes_of(job):
        if not (folder / kind).is_dir():
            return False
        made = RunFolder.reading(folder / kind)
        if not made.done(image.image_id for batch in job.own_batches for image in batch):
            return False
    return True


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


def refuse_unused(runs: Sequence[RunConfig]) -> list[ConfigError]:
    """Return an error for each artifact that was named and that no run of a plan would read."""
    takes = {
        "schedule": lambda method: method.plan_type is not None,
        "orders": lambda method: method.calibrated and method.plan_type is not None,
        "calibration": lambda method: method.calibrated,
    }
    errors = []
    for key, reads in takes.items():
        path = next((getattr(run, key) for run in runs if getattr(run, key) is not None), None)
        if path is not None and not any(reads(run.method.object) for run in runs):
            names = ", ".join(dict.fromkeys(run.method.name for run in runs))
            errors.append(ConfigError(f"{key}={path} is not read by method {names}", f"leave {key} away"))
    return errors
