"""Infinity once more, written down from the official code's rules: slow, literal, in float64.

No cache, no batch, no padding: one image at a time, the rows of guidance side by side, all scales in one pass over
given bits. Nothing is shared with the package but the weights, so that settings without a golden run can be checked
against something. The golden runs check this file first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
Weights = dict[str, Tensor]


@dataclass
class Setting:
    """Everything one pass depends on but the weights, the text and the bits."""

    sizes: Sequence[Size]
    base: Size
    cfg: Sequence[float]
    heads: int = 4
    rope_mode: int = 2
    guide_layers: Sequence[int] = (0,)
    level_once: bool = True
    patch: int = 1

    @property
    def guided(self) -> bool:
        return any(c != 1 for c in self.cfg)

    @property
    def ends(self) -> list[int]:
        return np.cumsum([h * w for h, w in self.sizes]).tolist()


# ------------------------------------------------------------------------------------------------------ latent side


def resize_1d(n: int, out: int) -> Tensor:
    """Linear interpolation with half-pixel centres as a matrix (out, n)."""
    matrix = torch.zeros(out, n, dtype=torch.float64)
    for o in range(out):
        at = max((o + 0.5) * n / out - 0.5, 0.0)
        low = int(at)
        matrix[o, low] += 1 - (at - low)
        matrix[o, min(low + 1, n - 1)] += at - low
    return matrix


def resize(x: Tensor, size: Size) -> Tensor:
    """(d, H, W) -> (d, h, w)."""
    return resize_1d(x.shape[1], size[0]) @ x @ resize_1d(x.shape[2], size[1]).T


def pack(x: Tensor, patch: int) -> Tensor:
    """(d, H, W) -> tokens (h * w, d * patch^2); channel c at offset (i, j) goes to patch^2 c + patch i + j."""
    d, height, width = x.shape
    tokens = torch.zeros(height // patch * (width // patch), d * patch**2, dtype=x.dtype)
    for y in range(height):
        for z in range(width):
            n = y // patch * (width // patch) + z // patch
            for c in range(d):
                tokens[n, patch**2 * c + patch * (y % patch) + z % patch] = x[c, y, z]
    return tokens


def codes_and_inputs(bits: Sequence[Tensor], setting: Setting) -> tuple[Tensor, Tensor]:
    """Bits (H, W, d) of each scale -> summed codes and the inputs of word_embed, scales 1 and later."""
    full: Size = tuple(bits[-1].shape[:2])  # type: ignore[assignment]
    total, inputs = torch.zeros(bits[0].shape[-1], *full, dtype=torch.float64), []
    for s, part in enumerate(bits):
        code = (2 * part.double() - 1).permute(2, 0, 1) / math.sqrt(part.shape[-1])
        total = total + resize(code, full)
        if s + 1 < len(bits):
            h, w = setting.sizes[s + 1]
            inputs.append(pack(resize(total, (h * setting.patch, w * setting.patch)), setting.patch))
    return total, torch.cat(inputs)


# ---------------------------------------------------------------------------------------------------- rotary tables


def positions(n: int, base: int) -> np.ndarray:
    """Mode 2: the float32 product, rounded half to even."""
    return np.round(np.arange(n).astype(np.float32) * np.float32(base / n))


def angles(head_dim: int, y: float, x: float) -> Tensor:
    """(D/2,): row angles, then column angles."""
    theta = [10000.0 ** (-i / (head_dim // 4)) for i in range(head_dim // 4)]
    return torch.tensor([y * t for t in theta] + [x * t for t in theta], dtype=torch.float64)


def rope(head_dim: int, setting: Setting) -> Tensor:
    """(2, T, D/2): cosines and sines."""
    (high, wide), rows = setting.base, []
    up = (128, int(128 / high * wide)) if high >= wide else (int(128 / wide * high), 128)
    for h, w in setting.sizes:
        ys, xs = positions(h, high), positions(w, wide)
        for r in range(h):
            for c in range(w):
                if setting.rope_mode == 1:
                    y, x = (i * (m - 1) / (n - 1) if n > 1 else 0.0 for i, n, m in ((r, h, up[0]), (c, w, up[1])))
                    rows.append(_between(head_dim, y, x))
                else:
                    at = (r, c) if setting.rope_mode == 0 else (float(ys[r]), float(xs[c]))
                    angle = angles(head_dim, *at)
                    rows.append(torch.stack((angle.cos(), angle.sin())))
    return torch.stack(rows, 1)


def _between(head_dim: int, y: float, x: float) -> Tensor:
    """Mode 1: cosines and sines of the four neighbours on the integer grid, weighted."""
    total = torch.zeros(2, head_dim // 2, dtype=torch.float64)
    for gy, wy in ((math.floor(y), 1 - y % 1), (math.floor(y) + 1, y % 1)):
        for gx, wx in ((math.floor(x), 1 - x % 1), (math.floor(x) + 1, x % 1)):
            angle = angles(head_dim, gy, gx)
            total += wy * wx * torch.stack((angle.cos(), angle.sin()))
    return total


def turn(x: Tensor, table: Tensor) -> Tensor:
    """x (T, H, D) by a table (2, T, D/2)."""
    out, (cos, sin) = torch.empty_like(x), table[:, :, None]
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


# ------------------------------------------------------------------------------------------------------ transformer


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def condition(w: Weights, text: Tensor) -> tuple[Tensor, Tensor]:
    """Features (L, Ct) of one row -> cond_BD (C,), projected text (L, C)."""
    t = text.double()
    t = t / torch.sqrt((t**2).mean(-1, keepdim=True) + 1e-6) * w["text_norm.weight"]
    p = "text_proj_for_sos.ca"
    query = w[f"{p}.mat_q"][0]
    heads, dim = query.shape
    k, v = (t @ w[f"{p}.mat_kv.weight"].T).chunk(2, -1)
    k, v = k.view(-1, heads, dim), (v + w[f"{p}.v_bias"]).view(-1, heads, dim)
    weight = torch.softmax(torch.einsum("hd,nhd->hn", query, k) / math.sqrt(dim), -1)
    sos = linear(w, f"{p}.proj", torch.einsum("hn,nhd->hd", weight, v).flatten())
    return sos, linear(w, "text_proj_for_ca.2", gelu(linear(w, "text_proj_for_ca.0", t)))


def self_attention(w: Weights, p: str, x: Tensor, table: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim = setting.heads, x.shape[-1] // setting.heads
    q, k, v = (x @ w[f"{p}.mat_qkv.weight"].T).chunk(3, -1)
    q, k, v = (t.view(-1, heads, dim) for t in (q + w[f"{p}.q_bias"], k, v + w[f"{p}.v_bias"]))
    temperature = w[f"{p}.scale_mul_1H11"].view(1, heads, 1).clamp(max=math.log(100)).exp()
    q, k = turn(unit(q) * temperature, table), turn(unit(k), table)
    parts, start = [], 0
    for end in setting.ends:  # a token sees its own scale and the earlier ones
        weight = torch.softmax(torch.einsum("qhd,khd->hqk", q[start:end], k[:end]), -1)
        parts.append(torch.einsum("hqk,khd->qhd", weight, v[:end]).flatten(1))
        start = end
    return linear(w, f"{p}.proj", torch.cat(parts)), k, v


def cross_attention(w: Weights, p: str, x: Tensor, text: Tensor, heads: int) -> Tensor:
    dim = x.shape[-1] // heads
    k, v = (text @ w[f"{p}.mat_kv.weight"].T).chunk(2, -1)
    k, v = k.view(-1, heads, dim), (v + w[f"{p}.v_bias"]).view(-1, heads, dim)
    q = linear(w, f"{p}.mat_q", x).view(-1, heads, dim)
    weight = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim), -1)
    return linear(w, f"{p}.proj", torch.einsum("hqk,khd->qhd", weight, v).flatten(1))


def block_names(w: Weights) -> list[tuple[str, bool]]:
    """Prefix of every block in order, and whether it begins a chunk."""
    pairs = {tuple(int(n.split(".")[i]) for i in (1, 3)) for n in w if n.startswith("block_chunks.")}
    return [(f"block_chunks.{i}.module.{j}", j == 0) for i, j in sorted(pairs)]


@dataclass
class Literal:
    """Guided logits before tau (T, dv, 2), keys and values of each layer (rows, H, T, D), latent (d, H, W)."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    latent: Tensor


def run(weights: Weights, text: Tensor, other: Tensor | None, bits: Sequence[Tensor], setting: Setting) -> Literal:
    """One image: its text features (L, Ct), those of guidance (None: learned), its bits (H, W, d) of each scale."""
    w = {name: t.double() for name, t in weights.items()}
    other = weights["cfg_uncond"][: len(text)] if other is None else other
    conditions = [condition(w, t) for t in ((text, other) if setting.guided else (text,))]
    latent, inputs = codes_and_inputs(bits, setting)
    counts = torch.tensor([h * w for h, w in setting.sizes])
    level = w["lvl_embed.weight"][torch.arange(len(counts)).repeat_interleave(counts)]
    cfg = torch.tensor(list(setting.cfg), dtype=torch.float64)[: len(counts)].repeat_interleave(counts)[:, None]
    words = linear(w, "word_embed", inputs)
    hidden = [torch.cat((sos[None] + w["pos_start"][0], words)) for sos, _ in conditions]
    table = rope(hidden[0].shape[-1] // setting.heads, setting)
    keys, values, blocks = [], [], block_names(w)
    for index, (p, begins) in enumerate(blocks):
        stored = []
        for row, (sos, projected) in enumerate(conditions):
            ada = w[f"{p}.ada_gss"].view(6, -1) + linear(w, "shared_ada_lin.1", silu(sos)).view(6, -1)
            gate1, gate2, scale1, scale2, shift1, shift2 = ada
            x = hidden[row]
            if index == 0 or (begins and not setting.level_once):
                x = x + level
            y, k, v = self_attention(w, f"{p}.sa", norm(x) * (1 + scale1) + shift1, table, setting)
            x = x + gate1 * y
            normed = norm(x) * w[f"{p}.ca_norm.weight"] + w[f"{p}.ca_norm.bias"]
            x = x + cross_attention(w, f"{p}.ca", normed, projected, setting.heads)
            u = norm(x) * (1 + scale2) + shift2
            hidden[row] = x + gate2 * linear(w, f"{p}.ffn.fc2", gelu(linear(w, f"{p}.ffn.fc1", u)))
            stored.append((k.transpose(0, 1), v.transpose(0, 1)))
        keys.append(torch.stack([k for k, _ in stored]))
        values.append(torch.stack([v for _, v in stored]))
        if setting.guided and index - len(blocks) in setting.guide_layers:
            mixed = cfg * hidden[0] + (1 - cfg) * hidden[1]
            hidden = [torch.where(cfg == 1, x, mixed) for x in hidden]
    out = []
    for x, (sos, _) in zip(hidden, conditions, strict=True):
        scale, shift = linear(w, "head_nm.ada_lin.1", silu(sos)).chunk(2)
        out.append(linear(w, "head", norm(x) * (1 + scale) + shift).unflatten(-1, (-1, 2)))
    logits = out[0]
    if setting.guided and 0 in setting.guide_layers:
        logits = cfg[..., None] * out[0] + (1 - cfg[..., None]) * out[1]
    return Literal(logits, keys, values, latent)


# -------------------------------------------------------------------------------------------------------- tokenizer


def _swish_conv(w: Weights, norm_name: str, conv_name: str, x: Tensor, groups: int) -> Tensor:
    x = F.group_norm(x, groups, w[f"{norm_name}.norm.weight"], w[f"{norm_name}.norm.bias"], 1e-6)
    return F.conv2d(x * torch.sigmoid(x), w[f"{conv_name}.conv.weight"], w[f"{conv_name}.conv.bias"], padding=1)


def _res_block(w: Weights, p: str, x: Tensor, groups: int) -> Tensor:
    y = _swish_conv(w, f"{p}.norm1", f"{p}.conv1", x, groups)
    y = _swish_conv(w, f"{p}.norm2", f"{p}.conv2", y, groups)
    if f"{p}.nin_shortcut.conv.weight" in w:
        x = F.conv2d(x, w[f"{p}.nin_shortcut.conv.weight"], w[f"{p}.nin_shortcut.conv.bias"])
    return x + y


def encode(weights: Weights, image: Tensor, levels: int, groups: int = 32) -> Tensor:
    """RGB (B, 3, H, W) in [-1, 1] -> latent (B, d, h, w)."""
    w = {name.removeprefix("encoder."): t.double() for name, t in weights.items() if name.startswith("encoder.")}
    x = F.conv2d(image.double(), w["conv_in.conv.weight"], w["conv_in.conv.bias"], padding=1)
    for i in range(levels):
        for b in range(2):
            x = _res_block(w, f"down.{i}.block.{b}", x, groups)
        if i + 1 < levels:  # one row and one column of zeros, below and to the right
            name = f"down.{i}.downsample.conv.conv"
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
    for name in ("mid.block_1", "mid.block_2"):
        x = _res_block(w, name, x, groups)
    return _swish_conv(w, "norm_out", "conv_out", x, groups)


def decode(weights: Weights, latent: Tensor, levels: int, groups: int = 32) -> Tensor:
    """Summed codes (B, d, h, w) -> RGB in [-1, 1]."""
    w = {name.removeprefix("decoder."): t.double() for name, t in weights.items() if name.startswith("decoder.")}
    x = F.conv2d(latent.double(), w["conv_in.conv.weight"], w["conv_in.conv.bias"], padding=1)
    for name in ("mid.block_1", "mid.block_2"):
        x = _res_block(w, name, x, groups)
    for i in reversed(range(levels)):
        for b in range(3):
            x = _res_block(w, f"up.{i}.block.{b}", x, groups)
        if i:
            name = f"up.{i}.upsample.conv.conv"
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
    return _swish_conv(w, "norm_out", "conv_out", x, groups).clamp(-1, 1)
