"""The official Infinity runs: where their tensors are, and how far a run of this package is from them.

What is committed lies in `data/`; the rest (decoders, encoder, whole caches, images) is read from HEATKV_SHARED
(default `../shared`), and a test that asks for it where it is absent skips and says so.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.base import Trace
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.schedules import rope_base
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
SHARED = Path(os.environ.get("HEATKV_SHARED", ROOT / ".." / "shared")) / "golden"
SHARED_FILES = ("infinity_tiny.safetensors", "infinity_tiny_vae_a.safetensors")
HERE = SHARED.is_dir()

META = json.loads(((SHARED if HERE else DATA) / "infinity_tiny.json").read_text(encoding="utf-8"))
RUNS: dict[str, dict[str, Any]] = META["runs"]
CODES = {"A": Codes(8), "B": Codes(4, 2)}
MULTIPLIERS = {"A": (1, 1, 2, 2, 2), "B": (1, 1, 2, 2)}
LAYERS, WIDTH, HEADS, CHUNKS, TEXT_CHANNELS, TEXT_LENGTH = 4, 64, 4, 2, 256, 32

# docs/infinity.md; `bits` are counted, everything else is the largest absolute difference
TOLERANCE = {
    "bits": 0,
    "logits": 1e-4,
    "raw_logits": 1e-4,
    "hidden": 1e-4,
    "keys": 1e-5,
    "values": 1e-5,
    "sos": 1e-5,
    "ada6": 1e-5,
    "ca_kv": 1e-5,
    "summed_codes": 1e-5,
    "scale_inputs": 1e-5,
}


@cache
def committed() -> dict[str, Tensor]:
    return load_file(DATA / "infinity_tiny.safetensors")


@cache
def shared_names() -> dict[str, str]:
    """Name -> file of every tensor under HEATKV_SHARED."""
    found = {}
    for file in SHARED_FILES:
        if (SHARED / file).is_file():
            with safe_open(SHARED / file, "pt") as f:
                found |= dict.fromkeys(f.keys(), file)
    return found


def optional(name: str) -> Tensor | None:
    """A golden tensor, or None where this machine has none of that name."""
    if name in committed():
        return committed()[name]
    if name not in shared_names():
        return None
    with safe_open(SHARED / shared_names()[name], "pt") as f:
        return f.get_tensor(name)


def tensor(name: str) -> Tensor:
    """A golden tensor; the test skips where it is neither committed nor shared."""
    found = optional(name)
    if found is None:
        pytest.skip(f"needs {name} of {SHARED / SHARED_FILES[0]}: set HEATKV_SHARED")
    return found


def weights(prefix: str) -> dict[str, Tensor]:
    """All tensors under `prefix/`, names without it."""
    names = [n for n in {*committed(), *shared_names()} if n.startswith(f"{prefix}/")]
    return {n.removeprefix(f"{prefix}/"): tensor(n) for n in names}


@cache
def transformer(model: str, level_embed_once: bool = True) -> Infinity:
    """A tiny official transformer; every key must be there and be used."""
    shape = (LAYERS, WIDTH, HEADS, CHUNKS, CODES[model], TEXT_CHANNELS, TEXT_LENGTH)
    net = Infinity(InfinityConfig(*shape, level_embed_once=level_embed_once))
    net.load_state_dict(weights(f"model{model}"))
    return net.eval().requires_grad_(False)


@cache
def tokenizer(model: str) -> Tokenizer:
    """A tiny official tokenizer; the encoder of B is not among the goldens and stays random."""
    tensor(f"vae{model}/decoder.conv_in.conv.weight")
    net = Tokenizer(TokenizerConfig(CODES[model].bits, 32, MULTIPLIERS[model]))
    missing, unexpected = net.load_state_dict(weights(f"vae{model}"), strict=False)
    assert all(name.startswith("encoder.") for name in missing) and (model == "B" or not missing)
    assert all(name.endswith("lfq.mask") for name in unexpected)
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Run:
    """One official run and what it was made from; `given` are other bits to force, one (B, h, w, d) a scale."""

    name: str
    settings: dict[str, Any]
    given: tuple[Tensor, ...] = ()

    @property
    def model(self) -> str:
        return str(self.settings["model"])

    @property
    def codes(self) -> Codes:
        return CODES[self.model]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((h, w) for _, h, w in self.settings["scale_schedule"])

    @property
    def geometry(self) -> Geometry:
        return Geometry(f"golden-{self.model}", LAYERS, HEADS, WIDTH // HEADS, ScaleSchedule(self.sizes), 3)

    @property
    def sampling(self) -> Sampling:
        s = self.settings
        guide = tuple(s["cfg_insertion_layer"])
        return Sampling(tuple(s["cfg_list"]), tuple(s["tau_list"]), s["top_k"], s["top_p"], guide)

    @property
    def batch(self) -> int:
        return len(self.settings["text"])

    @property
    def text(self) -> Text:
        return Text.pack([tensor(f"text/{name}") for name in self.settings["text"]])

    @property
    def negative(self) -> Text | None:
        names = self.settings["negative"]
        return Text.pack([tensor(f"text/{name}") for name in names]) if names else None

    def get(self, name: str) -> Tensor | None:
        return optional(f"run/{self.name}/{name}")

    @property
    def forced(self) -> tuple[Tensor, ...]:
        """Forced bits, one (B, h, w, d) a scale, or nothing."""
        if self.given or self.get("forced_bits_s0") is None:
            return self.given
        return tuple(tensor(f"run/{self.name}/forced_bits_s{s}")[:, 0] for s in range(len(self.sizes)))

    def generators(self) -> list[torch.Generator]:
        seed = self.settings["seed"]
        return [torch.Generator().manual_seed(i if seed is None else seed) for i in range(self.batch)]

    def build(self, pixels: Tokenizer | None = None) -> InfinityModel:
        """The package's model at this run's settings, without a tokenizer unless one is given."""
        net = transformer(self.model, bool(self.settings["add_lvl_embeding_only_first_block"]))
        base = rope_base(self.settings["h_div_w"])
        return InfinityModel(self.geometry, net, pixels, None, base, self.settings["rope2d_normalized_by_hw"])  # type: ignore[arg-type]

    def tokens(self, bits: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Bits per scale, latent layout -> (B, T, token_bits)."""
        return torch.cat([self.codes.to_tokens(b.permute(0, 3, 1, 2).float()) for b in bits], 1)


@dataclass
class Result:
    """One run of this package. `inputs` and `raw` are what went into word_embed and came out of the head."""

    trace: Trace
    inputs: list[Tensor]
    raw: list[Tensor]


def generate(run: Run, cache: Any, model: InfinityModel | None = None, sampling: Sampling | None = None) -> Result:
    """Run it, with the transformer's ends recorded."""
    model = model or run.build()
    inputs: list[Tensor] = []
    raw: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        embed, logits = model.transformer.embed, model.transformer.logits

        def embed_recorded(tokens: Tensor) -> Tensor:
            inputs.append(tokens)
            return embed(tokens)

        def logits_recorded(hidden: Tensor, cond: Any) -> Tensor:
            raw.append(logits(hidden, cond))
            return raw[-1]

        patch.setattr(model.transformer, "embed", embed_recorded)
        patch.setattr(model.transformer, "logits", logits_recorded)
        settings = sampling or run.sampling
        trace = model.generate(run.text, settings, cache, run.generators(), run.forced, run.negative)
    return Result(trace, inputs, raw)


def gap(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return (ours.float() - golden.float()).abs().max().item()


def difference(run: Run, trace: Trace) -> Tensor:
    """Our logits as the goldens have them: after tau, bit 1 minus bit 0, (B, T, token_bits)."""
    return torch.cat([part / tau for part, tau in zip(trace.logits, run.sampling.tau, strict=True)], 1)


def every(ours: Tensor, golden: Tensor, dim: int) -> Tensor:
    """The positions that a thinned-out golden tensor holds: 0, n, 2n, ..."""
    step = -(-ours.shape[dim] // golden.shape[dim])
    return ours.index_select(dim, torch.arange(0, ours.shape[dim], step))


def errors(
    run: Run, model: InfinityModel, result: Result, keys: dict[int, Tensor], values: dict[int, Tensor]
) -> dict[str, float]:
    """How far a run is from the official one, by the names of `TOLERANCE`; what the goldens lack is left out."""
    trace, found = result.trace, {}
    condition = model._condition(run.text, run.sampling, run.negative)
    lengths = [*run.text.lengths, *((run.negative or run.text).lengths if run.sampling.guided else ())]
    text = torch.cat([row[:n] for row, n in zip(condition.text, lengths, strict=True)])
    logits, golden = difference(run, trace), tensor(f"run/{run.name}/logits")
    wanted = golden[..., 1] - golden[..., 0]
    found["logits"] = gap(every(logits, wanted, 1), wanted)
    if run.forced:  # what it would have drawn: the likelier value
        found["bits"] = float(((every(logits, wanted, 1) > 0) != (wanted > 0)).sum())
    else:
        found["bits"] = float((run.tokens(trace.codes) != tensor(f"run/{run.name}/bits")).sum())
    pairs: dict[str, Any] = {
        "sos": (condition.sos, run.get("sos")),
        "ada6": (condition.ada, run.get("ada6")),
        "ca_kv": (text, run.get("ca_kv")),
        "summed_codes": (trace.latent, run.get("summed_codes")),
    }
    if run.get("raw_logits") is not None:
        pairs["raw_logits"] = (torch.cat(result.raw, 1).flatten(2), run.get("raw_logits"))
    if run.get("scale_inputs") is not None:
        pairs["scale_inputs"] = (torch.cat(result.inputs, 1), run.get("scale_inputs"))
    for name, (ours, theirs) in pairs.items():
        if theirs is not None:
            found[name] = gap(ours, theirs)
    for name, kept, short in (("keys", keys, "kcache"), ("values", values, "vcache")):
        for layer, stored in kept.items():
            for suffix in ("", "_every4"):
                theirs = run.get(f"{short}_l{layer}{suffix}")
                if theirs is not None:
                    found[name] = max(found.get(name, 0.0), gap(every(stored, theirs, 2), theirs))
    return found


def beyond(found: dict[str, float]) -> dict[str, float]:
    """The errors that exceed their tolerance."""
    return {name: error for name, error in found.items() if not error <= TOLERANCE[name]}
