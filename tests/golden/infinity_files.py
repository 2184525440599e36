"""Synthetic official checkpoints: the golden weights under official names, in every container the loader reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import infinity_golden as golden
import torch
from safetensors.torch import save_file
from torch import Tensor

from heatkv_cli.models.infinity.load import load_official
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.tokenizer import Tokenizer, TokenizerConfig, TokenizerParams

Tensors = dict[str, Tensor]
PATCH = {"A": 1, "B": 2}


def official(model: str) -> Tensors:
    return {name: t.clone() for name, t in golden.weights(f"model{model}").items()}


def pixels(model: str, bits: int | None = None) -> Tensors:
    """A random tokenizer: bits do not depend on it."""
    torch.manual_seed(0)
    bits = bits or golden.CODES[model].bits
    return dict(Tokenizer(TokenizerConfig(bits, 32, golden.MULTIPLIERS[model])).state_dict())


def load(net: Path, vae: Path, model: str = "A", **changes: Any) -> InfinityModel:
    run = golden.Run(f"{model}_forced", golden.RUNS[f"{model}_forced"])
    settings: dict[str, Any] = {
        "geometry": run.geometry,
        "files": {"transformer": net, "tokenizer": vae},
        "device": "cpu",
        "dtype": "float32",
        "width": golden.WIDTH,
        "block_chunks": golden.CHUNKS,
        "text_channels": golden.TEXT_CHANNELS,
        "text_length": golden.TEXT_LENGTH,
        "rope_base": golden.rope_base(1.0),
        "rope_mode": 2,
        "tokenizer": TokenizerParams(golden.CODES[model].bits, 32, golden.MULTIPLIERS[model], 32, patch=PATCH[model]),
    }
    return load_official(**(settings | changes))


# ------------------------------------------------------------------------------------------------------- containers


def flat(folder: Path, tensors: Tensors) -> Path:
    path = folder / "infinity.pth"
    torch.save(tensors, path)
    return path


def old_format(folder: Path, tensors: Tensors) -> Path:
    path = folder / "infinity.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def training(folder: Path, tensors: Tensors) -> Path:
    path = folder / "ar-ckpt-giter000.pth"
    average = {name: torch.zeros_like(t) for name, t in tensors.items()}
    trainer = {"config": {"lr": 1e-4}, "gpt_fsdp": tensors, "gpt_ema_fsdp": average, "gpt_opt": {"state": {}}}
    torch.save({"args": {"pn": "1M"}, "epoch": 3, "trainer": trainer}, path)
    return path


def one_safetensors(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "infinity.safetensors")
    return folder / "infinity.safetensors"


def shards(folder: Path, tensors: Tensors, kind: str, save: Callable[[Tensors, Path], None]) -> Path:
    path = folder / "infinity_weights"
    path.mkdir()
    suffix = kind.rpartition(".")[2]
    names, where = list(tensors), {}
    for i in range(3):
        shard = f"{kind.rpartition('.')[0]}-{i + 1:05d}-of-00003.{suffix}"
        part = names[i::3]
        save({name: tensors[name] for name in part}, path / shard)
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (path / f"{kind}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def sharded_safetensors(folder: Path, tensors: Tensors) -> Path:
    return shards(folder, tensors, "model.safetensors", save_file)


def sharded_bin(folder: Path, tensors: Tensors) -> Path:
    return shards(folder, tensors, "pytorch_model.bin", torch.save)


def other_index_name(folder: Path, tensors: Tensors) -> Path:
    return shards(folder, tensors, "weights.safetensors", save_file)


CONTAINERS = [flat, old_format, training, one_safetensors, sharded_safetensors, sharded_bin, other_index_name]


def wrapped(folder: Path, tensors: Tensors) -> Path:
    """Under `vae`, with what a training run leaves beside it."""
    path = folder / "vae.pth"
    extras = {"quantizer.lfq.mask": torch.arange(8), "image_disc.head.conv.weight": torch.ones(2, 2)}
    torch.save({"vae": tensors | extras, "ema": {"anything": torch.full((2,), torch.nan)}, "step": 7}, path)
    return path


def unwrapped(folder: Path, tensors: Tensors) -> Path:
    """FLUX's names, flat."""
    path = folder / "vae.pth"
    torch.save({".".join((*(p := n.split("."))[:-2], p[-1])): t for n, t in tensors.items()}, path)
    return path
