"""From a config to a job: reads prompt lists, digests and artifacts, and finds the folder where the run lies.

A resolver remembers what it read, so that a sweep reads each file once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heatkv_cli.benchmarks.base import Benchmark, PromptSet
from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.config import BenchmarkConfig, RunConfig, config_hash
from heatkv_cli.core.scales import ScaleSchedule
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.methods.base import Method, Plan, Setting
from heatkv_cli.models.text_store import encoder_sha256, find_features
from heatkv_cli.models.weights import WeightFile, find_file
from heatkv_cli.planning.job import Inputs, Job, geometry_of, images_of, passes_of
from heatkv_cli.results import RunFolder, finish_meta, read_meta, write_meta

CALIBRATION, SCHEDULE = "calibration.safetensors", "schedule.safetensors"

TEXT = "text"
"""Role of a text encoder: features computed with it may stand in for its files."""


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
            self.prompts(cfg.benchmark),
            benchmark.samples_per_prompt,
            files,
            digest,
        )

    # ------------------------------------------------------------------------------------------------- artifacts

    def needs_calibration(self, cfg: RunConfig) -> bool:
        """Return whether the run reads a calibration: its method does, and nothing else was given in its place."""
        return reads_calibration(cfg)

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
        """Return a run's calibration: the one it names, else the one made before; None where there is none yet.

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
            cfg: the run's config.
            calibration: the model's, for methods that read one.

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
        if not (_holds(path, plan) and (read_meta(folder) or {}).get("sha256") == plan.sha256):  # or never finished
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
        every = images_of(cfg, inputs.prompts.items, inputs.samples)
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
    """Return whether a file is this very plan; a damaged one is not, and is written again."""
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


def _complete(job: Job, folder: Path) -> bool:
    """Return whether a run's folder holds every image of every pass that is asked for."""
    for kind in passes_of(job):
        if not (folder / kind).is_dir():
            return False
        made = RunFolder.reading(folder / kind)
        if not made.done(image.image_id for batch in job.own_batches for image in batch):
            return False
    return True


def reads_calibration(cfg: RunConfig) -> bool:
    """Return whether a run's method reads a calibration, and nothing else was given in its place."""
    method: Method = cfg.method.object
    return method.calibrated and (method.plan_type is None or (cfg.orders is None and cfg.schedule is None))


def refuse_unused(runs: Sequence[RunConfig]) -> list[ConfigError]:
    """Return an error for each artifact that was named and that no run of a plan would read."""
    takes = {
        "schedule": lambda run: run.method.object.plan_type is not None,
        "orders": lambda run: run.method.object.calibrated and run.method.object.plan_type and not run.schedule,
        "calibration": reads_calibration,
    }
    errors = []
    texts = [run.text for run in runs if run.text is not None]
    if texts and not any(file.role == TEXT for run in runs for file in run.model.weights.files):
        names = ", ".join(dict.fromkeys(run.model.name for run in runs))
        errors.append(ConfigError(f"text={texts[0]} is not read by model {names}", "leave text away"))
    for key, reads in takes.items():
        path = next((getattr(run, key) for run in runs if getattr(run, key) is not None), None)
        if path is not None and not any(reads(run) for run in runs):
            names = ", ".join(dict.fromkeys(run.method.name for run in runs))
            others = [other for other in takes if other != key and any(getattr(run, other) for run in runs)]
            beside = f" beside {' and '.join(others)}" if others else ""
            errors.append(ConfigError(f"{key}={path} is not read by method {names}{beside}", f"leave {key} away"))
    return errors


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


def _weights_sha256(files: Mapping[str, Path]) -> str:
    """Return one digest for all files of a model, with a text encoder or with its features; `random` without files."""
    if not files:
        return "random"
    digests = {role: encoder_sha256(path) for role, path in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = [f"{role} {digest}" for role, digest in sorted(digests.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
