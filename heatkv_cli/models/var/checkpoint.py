"""Official VAR checkpoints: which model they hold, and filling networks that were built without memory.

Source: FoundationVision/VAR (`models/var.py`, `models/vqvae.py`, `trainer.py` for what a training run saves).
Differs: upstream regenerates the buffers of a checkpoint; here what they say of the scales is checked, and no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from heatkv_cli.errors import ArtifactError
from heatkv_cli.models.infinity import checkpoint as infinity
from heatkv_cli.models.infinity.checkpoint import Identity, fill, shapes_of
from heatkv_cli.models.infinity.containers import Entry, Shape
from heatkv_cli.models.var.tokenizer import Tokenizer
from heatkv_cli.models.var.transformer import Var

TRANSFORMERS = {16: "var-d16", 20: "var-d20", 24: "var-d24", 30: "var-d30", 36: "var-d36-s"}
"""Depth -> name of the released model, whose width is 64 a layer."""

TOLD_BY = {
    "width": ("class_emb.weight", 1),
    "heads": ("blocks.0.attn.scale_mul_1H11", 1),
    "scales": ("lvl_embed.weight", 0),
    "tokens": ("pos_1LC", 1),
    "codes": ("head.weight", 0),
    "channels": ("word_embed.weight", 1),
}
"""Which tensor and which of its dimensions tell a number of a transformer."""

# Where the state dict of a pickle may be: alone, or among what a training run saves.
TRANSFORMER_PLACES = ((), ("trainer", "var_wo_ddp"))
TOKENIZER_PLACES = ((), ("trainer", "vae_local"))

LEVELS, MASK, HITS = "lvl_1L", "attn_bias_for_masking", "quantize.ema_vocab_hit_SV"
"""Buffers of official files that are no weights: scale of each token, mask of training, usage of the codebook."""


def identify(shapes: Mapping[str, Shape]) -> Identity | None:
    """What the tensors are, or None where nothing is recognised. A number that cannot be told is left out."""
    blocks = {m.group() for name in shapes if (m := re.match(r"blocks\.\d+\.", name))}
    if blocks and "class_emb.weight" in shapes:
        numbers = {"depth": len(blocks)}
        for what, (name, dim) in TOLD_BY.items():
            if len(shapes.get(name, ())) > dim:
                numbers[what] = shapes[name][dim]
        if len(shapes["class_emb.weight"]) == 2:
            numbers["classes"] = shapes["class_emb.weight"][0] - 1  # the last row is the null class
        released = numbers.get("width") == 64 * len(blocks)
        return Identity("VAR transformer", numbers, TRANSFORMERS.get(len(blocks), "") if released else "")
    if len(shapes.get("quantize.embedding.weight", ())) == 2:
        codes, channels = shapes["quantize.embedding.weight"]
        levels = len({n.split(".")[2] for n in shapes if n.startswith("decoder.up.")})
        numbers = {"codes": codes, "channels": channels, "levels": levels}
        if len(shapes.get("decoder.conv_in.weight", ())) == 4:
            numbers["widest"] = shapes["decoder.conv_in.weight"][0]
        released = (codes, channels, levels, numbers.get("widest")) == (4096, 32, 5, 640)
        return Identity("VAR tokenizer", numbers, "vae_ch160v4096z32" if released else "")
    return infinity.identify(shapes)


def require_pair(transformer: tuple[Path, Identity | None], tokenizer: tuple[Path, Identity | None]) -> None:
    """The codebook must be the one that the transformer writes; a wrong pair gives noise, and no error of its own.

    Raises:
        ArtifactError: it is not, naming both.
    """
    (net_path, net), (pixel_path, pixels) = transformer, tokenizer
    if net is None or pixels is None or pixels.kind != "VAR tokenizer":
        return
    wrong = [n for n in ("codes", "channels") if net.numbers.get(n, pixels.numbers[n]) != pixels.numbers[n]]
    if wrong:
        raise ArtifactError(
            f"{pixel_path} does not fit {net_path}: a {pixels}, but a {net}: {' and '.join(wrong)} differ",
            "each transformer works with the one tokenizer it was trained with: see weights.files in conf/model",
        )


def load_transformer(path: Path, entries: dict[str, Entry], net: Var, dtype: torch.dtype, device: str) -> None:
    """Fill a transformer made on the meta device: blocks in `dtype`, everything else in float32.

    Raises:
        ArtifactError: see `fill`; or the file was trained at other scales, or with another kind of attention or
            modulation.
    """
    wanted = shapes_of(net)
    for mark, setting, meaning in (
        ("scale_mul_1H11", "l2_norm", "temperatures of attention"),
        ("shared_ada_lin.1.weight", "shared", "modulation shared by all blocks"),
    ):
        here, needed = (any(name.endswith(mark) for name in names) for names in (entries, wanted))
        if here != needed:
            raise ArtifactError(
                f"{path} has {'a' if here else 'no'} {mark} ({meaning}), the model {'needs' if needed else 'has none'}",
                f"take the current official file, or set model.params.{setting}={str(here).lower()} for one's own",
            )
    kept = {name: entry for name, entry in entries.items() if name not in (LEVELS, MASK)}
    if LEVELS in entries:
        _require_levels(path, entries[LEVELS], net)
    zero = {name for name in wanted if name.endswith("zero_k_bias")}
    fill(path, kept, net, lambda name: dtype if name.startswith("blocks.") else torch.float32, device, zero)


def _require_levels(path: Path, entry: Entry, net: Var) -> None:
    sizes = net.config.sizes
    levels = [scale for scale, (h, w) in enumerate(sizes) for _ in range(h * w)]
    if entry.read().flatten().tolist() != levels:
        raise ArtifactError(
            f"{path} was trained at other scales than the {len(sizes)} of the model ({len(levels)} tokens)",
            "check model.resolution, or take the official file",
        )


def load_tokenizer(path: Path, entries: dict[str, Entry], net: Tokenizer, device: str) -> None:
    """Fill a tokenizer made on the meta device, in float32.

    Raises:
        ArtifactError: see `fill`.
    """
    kept = {name: entry for name, entry in entries.items() if name != HITS}
    fill(path, kept, net, lambda _: torch.float32, device)
