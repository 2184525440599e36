"""Official Infinity checkpoints: which model they hold, and filling a network that was built without memory.

Each tensor is cast while it is copied, so that memory never holds the model twice.

Source: FoundationVision/Infinity @ 4c27bbb (`tools/run_infinity.py`, `infinity/models/infinity.py`).
Differs: upstream loads with `strict=False`; here every tensor is used and every parameter filled, or it is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from heatkv_cli.errors import ArtifactError
from heatkv_cli.models.infinity.containers import AGAIN, Entry, Shape, first_line
from heatkv_cli.models.infinity.tokenizer import Tokenizer
from heatkv_cli.models.infinity.transformer import Infinity

LOG = logging.getLogger("heatkv.models")

STALE = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""Buffers of older versions, which upstream drops as well."""

TRANSFORMERS = {
    (32, 2048): "infinity-2b",
    (40, 3584): "infinity-8b",
    (58, 4608): "infinity_20b",
    (12, 768): "infinity_layer12",
    (16, 1152): "infinity_layer16",
    (24, 1536): "infinity_layer24",
    (32, 2080): "infinity_layer32",
    (40, 2688): "infinity_layer40",
    (48, 3360): "infinity_layer48",
}
"""(depth, width) -> name."""

TOKENIZERS = {
    (32, 5): "infinity_vae_d32reg, of infinity-2b (or the d32 before it, which has the same shapes)",
    (14, 4): "infinity_vae_d56_f8_14_patchify, of infinity-8b",
    (16, 5): "infinity_vae_d16",
    (24, 5): "infinity_vae_d24",
    (64, 5): "infinity_vae_d64",
}
"""(bits per position, levels) -> name."""

# Where the state dict of a pickle may be. A tokenizer's place is among the transformer's for the sake of the message.
TRANSFORMER_PLACES = ((), ("trainer", "gpt_fsdp"), ("vae",))
AVERAGED = (("trainer", "gpt_ema_fsdp"),)
TOKENIZER_PLACES = (("vae",), (), ("trainer", "gpt_fsdp"))


@dataclass(frozen=True)
class Identity:
    """What a list of tensors seems to be, as far as their names and shapes tell."""

    kind: str
    numbers: dict[str, int]
    name: str = ""

    def __str__(self) -> str:
        text = ", ".join(f"{what} {n}" for what, n in self.numbers.items())
        return f"{self.kind} of {text}" + (f" ({self.name})" if self.name else "")


def identify(shapes: Mapping[str, Shape]) -> Identity | None:
    """What the tensors are, or None where nothing is recognised. A number that cannot be told is left out."""
    blocks = {m.group() for name in shapes if (m := re.match(r"block_chunks\.\d+\.module\.\d+\.|blocks\.\d+\.", name))}
    if blocks:
        chunks = {block.split(".")[1] for block in blocks if block.startswith("block_chunks")}
        numbers = {"depth": len(blocks), "chunks": len(chunks) or 1}
        for what, name, dim in (("width", "pos_start", 2), ("token bits", "word_embed.weight", 1)):
            if len(shapes.get(name, ())) > dim:
                numbers[what] = shapes[name][dim]
        return Identity("transformer", numbers, TRANSFORMERS.get((len(blocks), numbers.get("width", 0)), ""))
    for name in ("decoder.conv_in.conv.weight", "decoder.conv_in.weight"):
        if len(shapes.get(name, ())) == 4:
            levels = len({n.split(".")[2] for n in shapes if n.startswith("decoder.up.")})
            numbers = {"bits": shapes[name][1], "levels": levels, "widest": shapes[name][0]}
            return Identity("tokenizer", numbers, TOKENIZERS.get((numbers["bits"], levels), ""))
    if any(name.startswith("encoder.block.0.layer.") for name in shapes):
        return Identity("T5 text encoder", {"tensors": len(shapes)})
    return None


Identify = Callable[[Mapping[str, Shape]], Identity | None]
"""A family's eye for what some tensors are."""


def identify_entries(entries: Mapping[str, Entry]) -> Identity | None:
    return identify({name: entry.shape for name, entry in entries.items()})


def shapes_of(net: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def require(
    path: Path, entries: Mapping[str, Entry], net: nn.Module, model: str, told: Identify = identify
) -> Identity | None:
    """What the file holds.

    Args:
        path, entries: the file.
        net: what it shall fill.
        model: name of the model that is loaded.
        told: the family's own eye for what tensors are.

    Raises:
        ArtifactError: it belongs to another model.
    """
    found, needed = told({name: entry.shape for name, entry in entries.items()}), told(shapes_of(net))
    if found is None or needed is None:
        return found
    same_kind = found.kind == needed.kind
    if not same_kind or any(found.numbers.get(what, n) != n for what, n in needed.numbers.items()):
        raise ArtifactError(
            f"{path} holds a {found}, but {model} needs a {needed}",
            "take the file that conf/model names for this model, or the model this file belongs to",
        )
    return found


def require_pair(
    transformer: tuple[Path, Identity | None], tokenizer: tuple[Path, Identity | None], patch: int
) -> None:
    """The tokenizer's bits must be those the transformer writes; a wrong pair gives noise, and no error of its own.

    Raises:
        ArtifactError: they are not, naming both.
    """
    (net_path, net), (pixel_path, pixels) = transformer, tokenizer
    if net is None or pixels is None or pixels.kind != "tokenizer" or "token bits" not in net.numbers:
        return
    bits, needed = pixels.numbers["bits"], net.numbers["token bits"]
    if bits * patch**2 != needed:
        raise ArtifactError(
            f"{pixel_path} does not fit {net_path}: a {pixels} with {patch} x {patch} positions a token gives "
            f"{bits * patch**2} bits a token, the {net} reads {needed}",
            "each transformer works with the one tokenizer it was trained with: see weights.files in conf/model",
        )


# ---------------------------------------------------------------------------------------------------------- filling


def load_transformer(path: Path, entries: dict[str, Entry], net: Infinity, dtype: torch.dtype, device: str) -> None:
    """Fill a transformer made on the meta device: blocks in `dtype`, everything else in float32.

    The split is upstream's with `bf16=1`. Stale buffers are dropped, absent zero biases are zero, temperatures of any
    4-D layout become (1, H, 1, 1), and the unconditional text gets the length of the model's.

    Raises:
        ArtifactError: see `fill`.
    """
    kept = {name: entry for name, entry in entries.items() if name.rpartition(".")[2] not in STALE}
    wanted = shapes_of(net)
    for name, entry in list(kept.items()):
        if name.endswith("scale_mul_1H11") and name in wanted and len(entry.shape) == 4:
            if sorted(entry.shape) == sorted(wanted[name]):
                kept[name] = _reshaped(entry, wanted[name])
        elif name == "cfg_uncond" and entry.shape[1:] == wanted[name][1:]:
            rows = wanted[name][0]
            if entry.shape[0] < rows:
                LOG.warning(
                    "%s: unconditional text has %d rows, the model %d: rows %d to %d are upstream's untrained start "
                    "values, which matter to prompts longer than %d tokens",
                    *(path, entry.shape[0], rows, entry.shape[0], rows - 1, entry.shape[0]),
                )
            kept[name] = _of_length(entry, rows)
    zero = {name for name in wanted if name.endswith("zero_k_bias")}
    fill(path, kept, net, lambda name: dtype if name.startswith("block_chunks.") else torch.float32, device, zero)


def load_tokenizer(path: Path, entries: dict[str, Entry], net: Tokenizer, device: str) -> None:
    """Fill a tokenizer made on the meta device, in float32.

    Both key styles are read: `conv1.conv.weight` and `conv1.weight`. What is neither encoder nor decoder
    (discriminators, perceptual networks, the quantiser's masks) is left out, as upstream does.

    Raises:
        ArtifactError: see `fill`.
    """
    kept = {name: entry for name, entry in entries.items() if name.startswith(("encoder.", "decoder."))}
    for name in net.state_dict():
        *front, _, last = name.split(".")
        short = ".".join((*front, last))
        if name not in kept and short in kept:
            kept[name] = kept.pop(short)
    fill(path, kept, net, lambda _: torch.float32, device)


def _reshaped(entry: Entry, shape: Shape) -> Entry:
    return Entry(shape, lambda: entry.read().reshape(shape))


def _of_length(entry: Entry, rows: int) -> Entry:
    """First `rows` rows of the unconditional text; what is missing are the values upstream's constructor starts with.

    They are drawn from a fixed seed, so every loader sees the same.
    """
    had, channels = entry.shape

    def read() -> Tensor:
        if had >= rows:
            return entry.read()[:rows]
        start = torch.empty(rows, channels)
        nn.init.trunc_normal_(start, std=1.2, generator=torch.Generator().manual_seed(0))
        return torch.cat((entry.read().float(), start[had:] / channels**0.5))

    return Entry((rows, channels), read)


def fill(
    path: Path,
    entries: dict[str, Entry],
    net: nn.Module,
    dtype_of: Callable[[str], torch.dtype],
    device: str,
    zero: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Give every parameter and buffer of a network on the meta device its tensor, one after the other.

    Args:
        path: for messages.
        entries: the tensors; all of them are used.
        net: the network; afterwards on `device`, in evaluation mode, without gradients.
        dtype_of: name -> dtype.
        device: where it shall be.
        zero: names that may be absent and are zero then.

    Raises:
        ArtifactError: missing or unexpected names, another shape, integers, or values that are not finite.
    """
    wanted = shapes_of(net)
    missing = [name for name in wanted if name not in entries and name not in zero]
    unexpected = [name for name in entries if name not in wanted]
    if missing or unexpected:
        what = identify_entries(entries)
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ArtifactError(
            f"{path}: tensors do not match the model: {', '.join(parts)}",
            f"the file looks like a {what}; take the complete official file" if what else "check which file this is",
        )
    wrong = [name for name in wanted if name in entries and entries[name].shape != wanted[name]]
    if wrong:
        first, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ArtifactError(
            f"{path}: {first} has shape {list(entries[first].shape)}, the model needs {list(wanted[first])}{more}",
            "check the sizes in conf/model, or take the official file",
        )
    for name, shape in wanted.items():
        value = torch.zeros(shape, dtype=dtype_of(name), device=device)
        if name in entries:
            _copy(path, name, entries[name], value)
        _place(net, name, value)
    net.eval().requires_grad_(False)


def _copy(path: Path, name: str, entry: Entry, value: Tensor) -> None:
    try:
        tensor = entry.read()
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{path}: {name} cannot be read: {first_line(error)}", AGAIN) from error
    if not tensor.is_floating_point():
        raise ArtifactError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers", AGAIN)
    value.copy_(tensor)
    # the smallest and largest number carry NaN with them, and need no memory of the tensor's size
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        finite = bool(torch.stack(tensor.aminmax()).isfinite().all())
        raise ArtifactError(
            f"{path}: {name} " + (f"does not fit in {value.dtype}" if finite else "holds NaN or infinite values"),
            "load it with model.dtype=bfloat16 or float32" if finite else AGAIN,
        )


def _place(net: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = net.get_submodule(parent)
    if leaf in dict(module.named_parameters(recurse=False)):
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)
