"""From files to a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn

from heatkv_cli.core.scales import Geometry
from heatkv_cli.errors import ArtifactError
from heatkv_cli.models.base import Sketch
from heatkv_cli.models.infinity.checkpoint import require
from heatkv_cli.models.infinity.containers import Entry, open_checkpoint
from heatkv_cli.models.infinity.load import check_width
from heatkv_cli.models.infinity.random_weights import random_entries
from heatkv_cli.models.var.checkpoint import (
    TOKENIZER_PLACES,
    TRANSFORMER_PLACES,
    identify,
    load_tokenizer,
    load_transformer,
    require_pair,
)
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.tokenizer import Tokenizer, TokenizerConfig
from heatkv_cli.models.var.transformer import Var, VarConfig

Dtype = Literal["float32", "bfloat16", "float16"]

_NOWHERE = Path("random weights")


def networks(
    geometry: Geometry, width: int, classes: int, shared: bool, l2_norm: bool, tokenizer: TokenizerConfig
) -> tuple[Var, Tokenizer]:
    """Both networks of a model's YAML on the meta device.

    Args:
        geometry: layers, heads, head dim and scales.
        width, classes, shared, l2_norm: see `VarConfig`.
        tokenizer: its shape.

    Raises:
        ConfigError: the numbers do not fit together.
    """
    check_width(geometry, width)
    config = VarConfig(
        geometry.num_layers,
        width,
        geometry.num_heads,
        geometry.schedule.sizes,
        classes,
        tokenizer.vocabulary,
        tokenizer.channels,
        l2_norm=l2_norm,
        shared=shared,
    )
    with torch.device("meta"):
        return Var(config), Tokenizer(tokenizer)


def load(
    geometry: Geometry,
    files: Mapping[str, Path],
    device: str,
    width: int,
    tokenizer: TokenizerConfig,
    classes: int = 1000,
    shared: bool = False,
    l2_norm: bool = True,
    dtype: Dtype = "float32",
) -> VarModel:
    """An official checkpoint, one trained with the official code, or the bundled model.

    Args:
        geometry: from the model's YAML.
        files: paths by role: "transformer" and "tokenizer", or "model" for one file with both under these prefixes.
            Empty: random weights.
        device: where it runs.
        width, tokenizer, classes, shared, l2_norm: see `networks`.
        dtype: of the transformer's blocks; everything else is float32.

    Raises:
        SetupError: a file or a shard is missing.
        ArtifactError: a file is damaged, or belongs to another model; or tokenizer and transformer do not fit.
    """
    net, pixels = networks(geometry, width, classes, shared, l2_norm, tokenizer)
    net_path, pixel_path, net_file, pixel_file = _open(files, net, pixels)
    found = require(net_path, net_file, net, geometry.model, identify)
    pixels_found = require(pixel_path, pixel_file, pixels, geometry.model, identify)
    require_pair((net_path, found), (pixel_path, pixels_found))
    load_transformer(net_path, net_file, net, getattr(torch, dtype), device)
    load_tokenizer(pixel_path, pixel_file, pixels, device)
    return VarModel(geometry, net, pixels)


def sketch(
    geometry: Geometry,
    dtype: Dtype,
    width: int,
    tokenizer: TokenizerConfig,
    classes: int = 1000,
    shared: bool = False,
    l2_norm: bool = True,
) -> Sketch:
    """The model without weights, for byte plans; arguments as in `load`."""
    net, pixels = networks(geometry, width, classes, shared, l2_norm, tokenizer)
    net.blocks.to(getattr(torch, dtype))  # as `load_transformer` fills them
    for part in (net, pixels):
        part.eval().requires_grad_(False)
    parts: dict[str, nn.Module] = {"transformer": net, "tokenizer": pixels}
    return Sketch(
        VarModel(geometry, net, pixels), parts, lambda batch: torch.zeros(batch, dtype=torch.int64, device="meta"), 0
    )


def _open(
    files: Mapping[str, Path], net: Var, pixels: Tokenizer
) -> tuple[Path, Path, dict[str, Entry], dict[str, Entry]]:
    """Paths and tensors of transformer and tokenizer."""
    if not files:
        return _NOWHERE, _NOWHERE, random_entries(net), random_entries(pixels)
    if "model" in files:
        path = files["model"]
        whole = open_checkpoint(path)
        other = [name for name in whole if not name.startswith(("transformer.", "tokenizer."))]
        if other:
            raise ArtifactError(f"{path} is not a bundled model: it holds {other[0]}", "install heatkv again")
        return path, path, _under(whole, "transformer."), _under(whole, "tokenizer.")
    net_path, pixel_path = files["transformer"], files["tokenizer"]
    return (
        net_path,
        pixel_path,
        open_checkpoint(net_path, TRANSFORMER_PLACES),
        open_checkpoint(pixel_path, TOKENIZER_PLACES),
    )


def _under(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def save_bundle(path: Path, transformer: Var, tokenizer: Tokenizer) -> None:
    """Write both networks as one float16 safetensors file, for `load` with the role "model"."""
    parts: dict[str, nn.Module] = {"transformer": transformer, "tokenizer": tokenizer}
    tensors = {
        f"{part}.{name}": tensor.detach().to(torch.float16).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if not name.endswith("zero_k_bias")
    }
    save_file(tensors, path)
