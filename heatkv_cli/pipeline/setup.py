"""From a `RunConfig` to the things a stage works with: geometry, model, method, prompts, seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heatkv_cli.benchmarks.base import Benchmark, PromptItem, PromptSet
from heatkv_cli.config import BenchmarkConfig, MethodConfig, MetricConfig, ModelConfig, RunConfig, build, build_leaf
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.policy import Method
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ConfigError, SetupError
from heatkv_cli.metrics.base import Metric
from heatkv_cli.models.base import ImageModel, Sampling
from heatkv_cli.models.text_store import encoder_sha256, find_features
from heatkv_cli.models.weights import WeightFile, find_file


@dataclass(frozen=True)
class Image:
    """One image to make: its place in the list, its prompt, and the seed that is its own."""

    image_id: str
    item: PromptItem
    sample: int
    seed: int


def geometry_of(config: ModelConfig) -> Geometry:
    """Shape of the KV cache; no weights are touched."""
    return Geometry(
        config.name,
        config.num_layers,
        config.num_heads,
        config.head_dim,
        ScaleSchedule(config.sizes),
        config.sink_scales,
        config.dtype_bytes,
    )


def budget_of(cfg: RunConfig) -> Budget:
    """The budget of a run, on whichever axis it was given."""
    if cfg.budget is None:
        return Budget.from_rho(str(cfg.rho), ScaleSchedule(cfg.model.sizes))
    return Budget.parse(cfg.budget)


def method_of(config: MethodConfig) -> Method:
    return build_leaf(config, Method, where="method")


def prompts_of(config: BenchmarkConfig) -> tuple[PromptSet, int]:
    """The prompt list, and how many images each prompt gets."""
    benchmark = build_leaf(config, Benchmark, where="benchmark")
    return benchmark.load(), benchmark.samples_per_prompt


def metrics_of(cfg: RunConfig) -> dict[str, Metric]:
    """The metrics of a run, by name."""
    return {config.name: metric_of(config, cfg) for config in cfg.metrics}


def metric_of(config: MetricConfig, cfg: RunConfig) -> Metric:
    """The metric; device and folder of weights are those of the run unless its own config names others."""
    folder = None if cfg.random_weights else cfg.weights
    offers = {"name": config.name, "needs": config.needs, "device": device_of(cfg), "weights_folder": folder}
    offers = {key: value for key, value in offers.items() if value is not None}
    return build(config.target, config.params, Metric, where=f"metric {config.name}", offers=offers)


TEXT = "text"  # role of a text encoder: features computed with it may stand in for its files


def weight_files(cfg: RunConfig) -> dict[str, Path]:
    """Paths of the model's files by role; a text encoder's may be a folder of its features, see `text_root`.

    None where weights are drawn at random.

    Raises:
        SetupError: a file is missing.
    """
    if cfg.random_weights:
        return {}
    return {file.role: weight_file(cfg, file) for file in cfg.model.weights.files}


def weight_file(cfg: RunConfig, file: WeightFile) -> Path:
    """Path of one of the model's files, or of what stands in for it; errors as in `find_file`."""
    weights = cfg.model.weights
    try:
        return find_file(cfg.model.name, file, cfg.weights, weights.place == "package", weights.verify)
    except SetupError:
        features = find_features(text_root(cfg)) if file.role == TEXT else None
        if features is None:
            raise
        return features


def text_root(cfg: RunConfig) -> Path:
    """Where text features are kept."""
    return cfg.text or cfg.out / "text"


def weights_sha256(files: dict[str, Path]) -> str:
    """One digest for all files of a model, with a text encoder or with its features; `random` without files."""
    if not files:
        return "random"
    digests = {role: encoder_sha256(path) for role, path in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = [f"{role} {digest}" for role, digest in sorted(digests.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_model(cfg: RunConfig, files: dict[str, Path]) -> ImageModel:
    """Read the weights; sets torch's threads as the runtime config says.

    Raises:
        SetupError: no such device.
    """
    if cfg.runtime.threads is not None:
        torch.set_num_threads(cfg.runtime.threads)
    device = device_of(cfg)
    return build_leaf(cfg.model, ImageModel, where="model", geometry=geometry_of(cfg.model), files=files, device=device)


def device_of(cfg: RunConfig) -> str:
    """torch's name of the device.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if cfg.runtime.device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device is cuda, but torch finds no GPU", "use runtime=cpu")
    return f"cuda:{cfg.runtime.device_index}"


def sampling_of(config: ModelConfig) -> Sampling:
    """Sampling with one value per scale."""
    return Sampling(**config.sampling.per_scale(len(config.sizes)))


def backend_of(cfg: RunConfig) -> str:
    """Attention back end: `auto` is grouped SDPA everywhere."""
    return "grouped" if cfg.runtime.attention == "auto" else cfg.runtime.attention


def seed_of(cfg: RunConfig, prompt_id: str, sample: int, index: int) -> int:
    """Seed of one image.

    `hash`: first 8 bytes of sha256 of run_seed/prompt_id/sample, so that it depends on nothing but the image itself.
    `paper`: run seed + index of the image, as the official scripts do.
    """
    if cfg.seed_mode == "paper":
        return cfg.seed + index
    digest = hashlib.sha256(f"{cfg.seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds


def images_of(cfg: RunConfig, prompts: PromptSet, samples: int, limit: int | None) -> list[Image]:
    """The images of the first `limit` prompts (None: all), in the order of the list."""
    items = prompts.items if limit is None else prompts.items[:limit]
    pairs = [(item, sample) for item in items for sample in range(samples)]
    return [
        Image(f"{item.id}-{sample}" if samples > 1 else item.id, item, sample, seed_of(cfg, item.id, sample, index))
        for index, (item, sample) in enumerate(pairs)
    ]


def batches_of(images: Sequence[Image], size: int) -> list[list[Image]]:
    """Batches are fixed positions of the list: another limit or shard meets the same ones."""
    return [list(images[i : i + size]) for i in range(0, len(images), size)]


def generators_of(batch: Sequence[Image]) -> list[torch.Generator]:
    """One CPU generator an image: draws depend on neither batch nor device."""
    return [torch.Generator().manual_seed(image.seed) for image in batch]
