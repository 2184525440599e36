"""From files to a model: what `_target_` in conf/model names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.text import WordEncoder
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig

PARTS = ("transformer", "tokenizer", "text")


def save_bundle(path: Path, parts: Mapping[str, nn.Module], words: list[str], max_words: int) -> None:
    """Write the bundled model's three networks as one float16 safetensors file."""
    tensors = {
        f"{part}.{name}": tensor.detach().to(torch.float16).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if not name.endswith("zero_k_bias")
    }
    save_file(tensors, path, {"heatkv": json.dumps({"format": 1, "words": words, "max_words": max_words})})


def load_bundled(
    geometry: Geometry,
    files: Mapping[str, Path],
    device: str,
    width: int,
    block_chunks: int,
    text_channels: int,
    text_layers: int,
    rope_base: tuple[int, int],
    rope_mode: int,
    tokenizer: dict[str, Any],
) -> InfinityModel:
    """The bundled model, computed in float32.

    Args:
        geometry: from the model's YAML.
        files: {"model": path}.
        device: where it runs.
        width, block_chunks, text_channels, text_layers: of the networks.
        rope_base, rope_mode: see `rope_table`.
        tokenizer: fields of `TokenizerConfig`.

    Raises:
        ArtifactError: the file is damaged, or does not fit the YAML.
    """
    path = files["model"]
    try:
        with safe_open(path, "pt") as f:
            header = json.loads((f.metadata() or {})["heatkv"])
            tensors = {name: f.get_tensor(name).float() for name in f.keys()}  # noqa: SIM118
        words, max_words = list(header["words"]), int(header["max_words"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is not a bundled model: {error}", "install heatkv again") from error
    shape = TokenizerConfig(**{**tokenizer, "multipliers": tuple(tokenizer["multipliers"])})
    config = InfinityConfig(
        geometry.num_layers, width, geometry.num_heads, block_chunks, Codes(shape.bits), text_channels, max_words
    )
    parts: dict[str, nn.Module] = {
        "transformer": Infinity(config),
        "tokenizer": Tokenizer(shape),
        "text": WordEncoder(words, max_words, text_channels, text_layers),
    }
    for part, module in parts.items():
        prefix = f"{part}."
        _fill(path, module, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        module.eval().requires_grad_(False).to(device)
    transformer, pixels, text = (parts[name] for name in PARTS)
    assert isinstance(transformer, Infinity) and isinstance(pixels, Tokenizer) and isinstance(text, WordEncoder)
    return InfinityModel(geometry, transformer, pixels, text, (rope_base[0], rope_base[1]), rope_mode)


def _fill(path: Path, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not fit the model's config: {str(error).splitlines()[-1].strip()}",
            "check the sizes in conf/model",
        ) from error
    missing = [name for name in missing if not name.endswith("zero_k_bias")]  # zero by definition
    if missing or unexpected:
        raise ArtifactError(f"{path}: missing {missing[:3]}, unexpected {unexpected[:3]}", "check the model's config")


def load_official(geometry: Geometry, files: Mapping[str, Path], device: str, **params: Any) -> InfinityModel:
    """Official checkpoints: not loaded by this version; the model is known by its dimensions.

    Raises:
        SetupError: always.
    """
    raise SetupError(
        f"this version does not load the checkpoints of {geometry.model} yet",
        f"schedules need no weights: heatkv build-schedule model={geometry.model} --orders FILE; "
        "images can be made with model=tiny",
    )
