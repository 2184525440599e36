"""The official VAR runs: their weights, where their numbers are, and how far a run of this package is from them.

Everything is read from HEATKV_SHARED (default `../shared`); tests that ask for what is absent there skip and say so.
Weights are made by the recipe of the json, which gives those of the official runs bit for bit, unless the file has
them.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.base import Trace
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Tokenizer, TokenizerConfig
from heatkv_cli.models.var.transformer import Var, VarConfig

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HEATKV_SHARED", ROOT / ".." / "shared")) / "golden"
JSON, FILE = SHARED / "var_tiny.json", SHARED / "var_tiny.safetensors"
HERE = JSON.is_file() and FILE.is_file()
ABSENT = f"needs {JSON} and {FILE.name}: set HEATKV_SHARED"

META: dict[str, Any] = json.loads(JSON.read_text(encoding="utf-8")) if HERE else {"runs": {}}
RUNS: dict[str, dict[str, Any]] = META["runs"]

LOGITS, STATE, IMAGE = 1e-4, 1e-5, 1e-3
"""Largest absolute differences: of logits and hidden states, of keys, values and latents, of images in [0, 1]."""


@cache
def names() -> frozenset[str]:
    if not HERE:
        return frozenset()
    with safe_open(FILE, "pt") as f:
        return frozenset(f.keys())


def tensor(name: str) -> Tensor:
    """A golden tensor; the test skips where it is absent."""
    if name not in names():
        pytest.skip(f"needs {name} of {FILE}: set HEATKV_SHARED")
    with safe_open(FILE, "pt") as f:
        return f.get_tensor(name)


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """A weight by the recipe: normal numbers seeded by the full name, scaled by what the weight is."""
    r = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape).astype(np.float32)
    last = key.rpartition(".")[2]
    if last == "scale_mul_1H11":
        x = np.float32(1.3862943) + np.float32(0.5) * r
    elif last == "weight" and len(shape) == 1:
        x = 1 + np.float32(0.1) * r
    elif last == "weight" and key.split(".")[-2] in ("embedding", "class_emb", "lvl_embed"):
        x = np.float32(0.5) * r
    elif last == "weight":
        x = r / np.float32(math.sqrt(math.prod(shape[1:])))
    elif last in ("bias", "q_bias", "v_bias"):
        x = np.float32(0.1) * r
    else:
        x = np.float32(0.3) * r
    if key.endswith("decoder.conv_out.weight"):
        x = x * np.float32(0.3)
    if "quantize.embedding" in key or "head.weight" in key:
        x = x * 2
    return torch.from_numpy(x.astype(np.float16).astype(np.float32))


def fill(net: nn.Module, prefix: str, variant: str = "") -> None:
    """Weights of a network by full names `prefix.key`; a variant's own come from the file, where it has them."""
    with torch.no_grad():
        for key, value in net.named_parameters():
            stored = [n for n in (f"w.{variant}.{key}", f"w.{prefix}.{key}") if n in names()]
            value.copy_(tensor(stored[0]) if stored else drawn(f"{prefix}.{key}", tuple(value.shape)))
    net.eval().requires_grad_(False)


@cache
def tokenizer() -> Tokenizer:
    v = META["vqvae"]
    config = TokenizerConfig(
        v["vocab_size"], v["z_channels"], v["ch"], tuple(v["ch_mult"]), v["num_res_blocks"], 32, v["share_quant_resi"]
    )
    net = Tokenizer(config)
    fill(net, "vae")
    return net


@cache
def transformer(variant: str = "") -> Var:
    """The tiny transformer, or a named variant of it."""
    v = META["var"] | META["variants"].get(variant, {})
    sizes = tuple((p, p) for p in v["patch_nums"])
    config = VarConfig(
        v["depth"],
        v["embed_dim"],
        v["num_heads"],
        sizes,
        v["num_classes"],
        META["vqvae"]["vocab_size"],
        META["vqvae"]["z_channels"],
        v["mlp_ratio"],
        v["attn_l2_norm"],
        v["shared_aln"],
    )
    net = Var(config)
    fill(net, "var", variant)
    if config.l2_norm:  # one head above the clamp
        net.layers()[1].attn.scale_mul_1H11.data[0, 2] = 5.0  # type: ignore[union-attr]
    return net


def geometry(config: VarConfig) -> Geometry:
    return Geometry("golden-var", config.depth, config.heads, config.head_dim, ScaleSchedule(config.sizes), 1)


@dataclass(frozen=True)
class Run:
    """One official run."""

    name: str
    settings: dict[str, Any]

    @property
    def variant(self) -> str:
        return self.name if self.name in META["variants"] else ""

    @property
    def classes(self) -> Tensor:
        return torch.tensor(self.settings["label_B"])

    @property
    def sampling(self) -> Sampling:
        s = self.settings
        return Sampling(s["cfg"], True, s["top_k"], s["top_p"], s["more_smooth"])

    @property
    def generators(self) -> list[torch.Generator]:
        """One stream for all images of a scale in turn, as upstream draws them."""
        return [torch.Generator().manual_seed(self.settings["g_seed"])] * len(self.classes)

    @property
    def codes(self) -> list[Tensor]:
        return [tensor(f"o.{self.name}.s{s}.idx").long() for s in range(len(self.build().geometry.schedule.sizes))]

    def build(self) -> VarModel:
        net = transformer(self.variant)
        return VarModel(geometry(net.config), net, tokenizer())


@dataclass
class Result:
    """A run of this package: its trace, and per scale the head's output and input and the next scale's latent."""

    trace: Trace
    raw: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


def generate(
    run: Run, cache: Any, forced: bool, model: VarModel | None = None, classes: Tensor | None = None
) -> Result:
    """Run it with its own seed, or with its recorded codes; the transformer's ends are recorded."""
    model, result = model or run.build(), Result(Trace((), (), torch.empty(0)))
    net = model.transformer
    with pytest.MonkeyPatch.context() as patch:
        embed, logits = net.embed, net.logits

        def embed_recorded(tokens: Tensor, positions: Tensor) -> Tensor:
            result.inputs.append(tokens)
            return embed(tokens, positions)

        def logits_recorded(hidden: Tensor, cond: Any) -> Tensor:
            result.hidden.append(hidden)
            result.raw.append(logits(hidden, cond))
            return result.raw[-1]

        patch.setattr(net, "embed", embed_recorded)
        patch.setattr(net, "logits", logits_recorded)
        result.trace = model.generate(
            run.classes if classes is None else classes,
            run.sampling,
            cache,
            None if forced else run.generators,
            run.codes if forced else (),
        )
    return result


def gap(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return (ours.float() - golden.float()).abs().max().item()


def errors(run: Run, model: VarModel, result: Result) -> dict[str, float]:
    """How far a run is from the official one; what the goldens lack is left out."""
    found: dict[str, float] = {}
    trace, latents = result.trace, model.tokenizer.quantize.totals(result.trace.codes, model.geometry.schedule.sizes)
    for s in range(len(trace.codes)):
        ours = {"cfg_logits": trace.logits[s], "raw_logits": result.raw[s], "hidden": result.hidden[s]}
        if not run.settings["more_smooth"]:
            ours["f_hat"] = latents[s]
        if s < len(result.inputs):
            sides = model.geometry.schedule.sizes[s + 1]
            ours["next_map"] = result.inputs[s].transpose(1, 2).unflatten(2, sides)
        for name, mine in ours.items():
            key = f"o.{run.name}.s{s}.{name}"
            if key in names():
                found[name] = max(found.get(name, 0.0), gap(mine, tensor(key)))
    last = f"o.{run.name}.s{len(trace.codes) - 1}.f_hat"
    if last in names():
        found["f_hat"] = max(found.get("f_hat", 0.0), gap(trace.latent, tensor(last)))
    found["image"] = gap((model.tokenizer.decode(trace.latent) + 1) / 2, tensor(f"o.{run.name}.img"))
    return found


def beyond(found: dict[str, float]) -> dict[str, float]:
    """The errors that exceed their tolerance."""
    limits = {"cfg_logits": LOGITS, "raw_logits": LOGITS, "hidden": LOGITS, "image": IMAGE}
    return {name: error for name, error in found.items() if not error <= limits.get(name, STATE)}
