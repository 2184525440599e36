"""From files to a model: what `_target_` in conf/model names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.models.infinity.checkpoint import (
    AVERAGED,
    TOKENIZER_PLACES,
    TRANSFORMER_PLACES,
    identify_entries,
    load_tokenizer,
    load_transformer,
    require,
    require_pair,
)
from heatkv_cli.models.infinity.containers import open_checkpoint
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.random_weights import TEXT_TOKENS, random_model
from heatkv_cli.models.infinity.text import WordEncoder
from heatkv_cli.models.infinity.text_t5 import Precision, T5Encoder, positive_text
from heatkv_cli.models.infinity.tokenizer import Tokenizer, TokenizerParams
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig
from heatkv_cli.models.text_store import StoredText, is_features

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
    tokenizer: TokenizerParams,
    dtype: str = "float32",
) -> InfinityModel:
    """The bundled model, computed in float32.

    Args:
        geometry: from the model's YAML.
        files: {"model": path}; empty: random weights.
        device: where it runs.
        width, block_chunks, text_channels, text_layers: of the networks.
        rope_base, rope_mode: see `rope_table`.
        tokenizer: its shape and packing.
        dtype: of the model's YAML.

    Raises:
        ConfigError: the dtype is another than float32.
        ArtifactError: the file is damaged, or does not fit the YAML.
    """
    if dtype != "float32":
        raise ConfigError(f"model.dtype is {dtype}: a bundled model computes in float32", "model.dtype=float32")
    check_width(geometry, width)
    shape, codes = tokenizer.shape, tokenizer.codes
    base = (rope_base[0], rope_base[1])
    sizes = (geometry.num_layers, width, geometry.num_heads, block_chunks, codes, text_channels)
    if not files:
        config = InfinityConfig(*sizes, TEXT_TOKENS)
        return random_model(geometry, config, shape, torch.float32, device, base, rope_mode)
    path = files["model"]
    try:
        with safe_open(path, "pt") as f:
            header = json.loads((f.metadata() or {})["heatkv"])
            tensors = {name: f.get_tensor(name).float() for name in f.keys()}  # noqa: SIM118
        words, max_words = list(header["words"]), int(header["max_words"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is not a bundled model: {error}", "install heatkv again") from error
    config = InfinityConfig(*sizes, max_words)
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
    return InfinityModel(geometry, transformer, pixels, text, base, rope_mode)


def check_width(geometry: Geometry, width: int) -> None:
    """Check that the transformer's width is that of its heads.

    Raises:
        ConfigError: it is not.
    """
    if width != geometry.num_heads * geometry.head_dim:
        raise ConfigError(
            f"{geometry.model}: width {width} over {geometry.num_heads} heads is not head_dim {geometry.head_dim}",
            "change model.params.width, model.num_heads or model.head_dim",
        )


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


def load_official(
    geometry: Geometry,
    files: Mapping[str, Path],
    device: str,
    dtype: Literal["float32", "bfloat16", "float16"],
    width: int,
    block_chunks: int,
    text_channels: int,
    text_length: int,
    rope_base: tuple[int, int],
    rope_mode: int,
    tokenizer: TokenizerParams,
    t5_dtype: Precision = "float16",
    positive_prompt: bool = False,
    ema: bool | None = None,
    level_embed_per_chunk: bool | None = None,
) -> InfinityModel:
    """An official checkpoint, or one trained with the official code.

    Args:
        geometry: from the model's YAML.
        files: paths by role: "transformer" and "tokenizer"; "text" is the folder of the encoder, or one of features
            computed with it; without "text" the model takes features in place of prompts. Empty: random weights.
        device: where it runs.
        dtype: of the transformer's blocks; everything else is float32.
        width, block_chunks, text_channels, text_length: see `InfinityConfig`.
        rope_base, rope_mode: see `rope_table`.
        tokenizer: its shape and packing.
        t5_dtype: precision of the text encoder, see `T5Encoder`.
        positive_prompt: prompts that speak of persons ask for good faces, see `positive_text`.
        ema: take the averaged weights of a training checkpoint.
        level_embed_per_chunk: see `level_embed_once` of `InfinityConfig`.

    Raises:
        SetupError: a file, a shard or a package is missing.
        ArtifactError: a file is damaged, or belongs to another model; or tokenizer and transformer do not fit.
    """
    check_width(geometry, width)
    shape, codes = tokenizer.shape, tokenizer.codes
    config = InfinityConfig(
        geometry.num_layers,
        width,
        geometry.num_heads,
        block_chunks,
        codes,
        text_channels,
        text_length,
        level_embed_once=not level_embed_per_chunk,
    )
    base = (rope_base[0], rope_base[1])
    if not files:
        return random_model(geometry, config, shape, getattr(torch, dtype), device, base, rope_mode)
    with torch.device("meta"):
        net, pixels = Infinity(config), Tokenizer(shape)
    net_path, pixel_path = files["transformer"], files["tokenizer"]
    net_file = open_checkpoint(net_path, AVERAGED if ema else TRANSFORMER_PLACES)
    pixel_file = open_checkpoint(pixel_path, TOKENIZER_PLACES)
    found = require(net_path, net_file, net, geometry.model)
    require_pair((net_path, found), (pixel_path, identify_entries(pixel_file)), codes.patch)
    require(pixel_path, pixel_file, pixels, geometry.model)
    text = None
    if "text" in files:
        text = _stored_text(files["text"], text_channels, text_length, t5_dtype, device, positive_prompt)
    load_transformer(net_path, net_file, net, getattr(torch, dtype), device)
    load_tokenizer(pixel_path, pixel_file, pixels, device)
    return InfinityModel(geometry, net, pixels, text, base, rope_mode)


def _stored_text(source: Path, channels: int, length: int, dtype: Precision, device: str, positive: bool) -> StoredText:
    encoder = None if is_features(source) else T5Encoder(source, channels, length, dtype, device)
    settings = {"precision": dtype, "longest": length}
    return StoredText(source, encoder, settings, positive_text if positive else str)
