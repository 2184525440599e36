"""VAR once more, written down from its formulas: slow, literal, in float64.

No cache, no batch: one image at a time, guidance's second row after the first, all scales in one pass over given codes
under a mask. Nothing is shared with the package but the weights, so that settings without a golden run can be checked
against something. The golden runs check this file first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

PHI = {5: (0, 1, 2, 2, 3), 8: (0, 0, 1, 1, 2, 2, 3, 3), 10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)}
"""Which of four phi convolutions a scale uses; 5, 8 and 10 scales are upstream's own tables."""


@dataclass
class Setting:
    """Everything one pass depends on but the weights, the class and the codes."""

    sides: Sequence[int]
    heads: int
    cfg: float = 1.5
    ramp: bool = True
    l2_norm: bool = True
    shared: bool = False


# ------------------------------------------------------------------------------------------------------ latent side


def cubic(n: int, out: int) -> Tensor:
    """Bicubic interpolation (a = -0.75) with half-pixel centres and repeated edges as a matrix (out, n)."""
    matrix = torch.zeros(out, n, dtype=torch.float64)
    for o in range(out):
        at = (o + 0.5) * n / out - 0.5
        low = math.floor(at)
        for i in range(low - 1, low + 3):
            x = abs(at - i)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[o, min(max(i, 0), n - 1)] += weight
    return matrix


def area(n: int, out: int) -> Tensor:
    """Means over the cells that an output cell touches, as a matrix (out, n)."""
    matrix = torch.zeros(out, n, dtype=torch.float64)
    for o in range(out):
        first, end = o * n // out, -(-(o + 1) * n // out)
        matrix[o, first:end] = 1 / (end - first)
    return matrix


def resized(x: Tensor, side: int, kind: str) -> Tensor:
    """(Z, H, W) -> (Z, side, side)."""
    make = cubic if kind == "up" else area
    if x.shape[-1] == side:
        return x
    matrix = make(x.shape[-1], side)
    return matrix @ x @ matrix.T


def phi(w: Weights, h: Tensor, scale: int, scales: int) -> Tensor:
    name = f"quantize.quant_resi.qresi_ls.{PHI[scales][scale]}"
    return 0.5 * h + 0.5 * F.conv2d(h[None], w[f"{name}.weight"], w[f"{name}.bias"], padding=1)[0]


def summed(pixels: Weights, vectors: Sequence[Tensor], sides: Sequence[int]) -> list[Tensor]:
    """Code vectors (N, Z) of each scale -> latent (Z, H, W) after each scale."""
    w = {name: t.double() for name, t in pixels.items()}
    total, after = torch.zeros(vectors[0].shape[1], sides[-1], sides[-1], dtype=torch.float64), []
    for s, part in enumerate(vectors):
        grid = torch.zeros(part.shape[1], sides[s], sides[s], dtype=torch.float64)
        for n in range(len(part)):
            grid[:, n // sides[s], n % sides[s]] = part[n].double()
        total = total + phi(w, resized(grid, sides[-1], "up"), s, len(sides))
        after.append(total)
    return after


def inputs(after: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Latents after each scale but the last -> tokens (L - 1, Z) of the scales from the second on."""
    maps = [resized(latent, side, "down") for latent, side in zip(after, sides[1:], strict=False)]
    return torch.cat([torch.stack([m[:, y, x] for y in range(len(m[0])) for x in range(len(m[0]))]) for m in maps])


def encoded(pixels: Weights, latent: Tensor, sides: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Latent (Z, H, W) -> codes of each scale and their sum."""
    w = {name: t.double() for name, t in pixels.items()}
    codebook, rest, codes = w["quantize.embedding.weight"], latent.double(), []
    for s, side in enumerate(sides):
        seen = resized(rest, side, "down")
        best = [
            min(range(len(codebook)), key=lambda v, y=y, x=x: (seen[:, y, x] - codebook[v]).square().sum().item())  # type: ignore[misc]
            for y in range(side)
            for x in range(side)
        ]
        codes.append(torch.tensor(best))
        chosen = codebook[codes[-1]].T.reshape(-1, side, side)
        rest = rest - phi(w, resized(chosen, sides[-1], "up"), s, len(sides))
    return codes, latent.double() - rest


# ------------------------------------------------------------------------------------------------------ transformer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def row(weights: Weights, class_index: int, tokens: Tensor, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """One row of the batch: tokens (L - 1, Z) -> raw logits (L, V), and k (H, L, D), v (H, L, D) of every block."""
    w = {name: t.double() for name, t in weights.items()}
    counts = [p * p for p in setting.sides]
    level = torch.tensor([s for s, n in enumerate(counts) for _ in range(n)])
    cond = w["class_emb.weight"][class_index]
    x = torch.cat((cond[None] + w["pos_start"][0], tokens.double() @ w["word_embed.weight"].T + w["word_embed.bias"]))
    x = x + w["lvl_embed.weight"][level] + w["pos_1LC"][0]
    visible, stored = level[:, None] >= level[None], []
    for i in range(sum(name.endswith("attn.proj.weight") for name in w)):
        b = f"blocks.{i}."
        ada = "shared_ada_lin.1" if setting.shared else f"{b}ada_lin.1"
        six = (w[f"{ada}.weight"] @ silu(cond) + w[f"{ada}.bias"]).view(6, -1)
        if setting.shared:
            six = six + w[f"{b}ada_gss"].view(6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        y = norm(x) * (1 + scale1) + shift1
        zero = torch.zeros_like(w[f"{b}attn.q_bias"])
        qkv = y @ w[f"{b}attn.mat_qkv.weight"].T + torch.cat((w[f"{b}attn.q_bias"], zero, w[f"{b}attn.v_bias"]))
        q, k, v = (part.view(len(x), setting.heads, -1).transpose(0, 1) for part in qkv.chunk(3, 1))
        factor = 0.25 / math.sqrt(q.shape[-1])
        if setting.l2_norm:
            temperature = torch.exp(torch.clamp(w[f"{b}attn.scale_mul_1H11"].view(-1, 1, 1), max=math.log(100)))
            q = q / q.norm(dim=-1, keepdim=True) * temperature
            k, factor = k / k.norm(dim=-1, keepdim=True), 1.0
        stored += [k, v]
        p = (q @ k.transpose(1, 2) * factor).masked_fill(~visible, -math.inf).exp()
        y = (p / p.sum(-1, keepdim=True) @ v).transpose(0, 1).reshape(len(x), -1)
        x = x + gamma1 * (y @ w[f"{b}attn.proj.weight"].T + w[f"{b}attn.proj.bias"])
        y = (norm(x) * (1 + scale2) + shift2) @ w[f"{b}ffn.fc1.weight"].T + w[f"{b}ffn.fc1.bias"]
        x = x + gamma2 * (gelu(y) @ w[f"{b}ffn.fc2.weight"].T + w[f"{b}ffn.fc2.bias"])
    scale, shift = (w["head_nm.ada_lin.1.weight"] @ silu(cond) + w["head_nm.ada_lin.1.bias"]).view(2, -1)
    return (norm(x) * (1 + scale) + shift) @ w["head.weight"].T + w["head.bias"], stored


@dataclass
class Pass:
    """Guided logits (L, V), latent (Z, H, W), and k and v of every block in turn: (H, L, D), conditional row first."""

    logits: Tensor
    latent: Tensor
    stored: list[Tensor]


def run(weights: Weights, pixels: Weights, class_index: int, vectors: Sequence[Tensor], setting: Setting) -> Pass:
    """One image whose code vectors (N, Z) of every scale are given."""
    after = summed(pixels, vectors, setting.sides)
    tokens = inputs(after[:-1], setting.sides)
    yes, stored = row(weights, class_index, tokens, setting)
    if setting.cfg == 0:
        return Pass(yes, after[-1], stored)
    no, others = row(weights, len(weights["class_emb.weight"]) - 1, tokens, setting)
    last = len(setting.sides) - 1
    t = [setting.cfg * (s / last if setting.ramp else 1) for s, p in enumerate(setting.sides) for _ in range(p * p)]
    t = torch.tensor(t, dtype=torch.float64)[:, None]
    both = [torch.stack(pair) for pair in zip(stored, others, strict=True)]
    return Pass((1 + t) * yes - t * no, after[-1], both)


# --------------------------------------------------------------------------------------------------------- sampling


def kept(logits: Tensor, top_k: int, top_p: float) -> set[int]:
    """Indices of one token's logits (V,) that may be drawn."""
    values = logits.tolist()
    left = set(range(len(values)))
    if top_k:
        kth = sorted(values)[-min(top_k, len(values))]
        left = {v for v in left if values[v] >= kth}
    if top_p:
        weights = {v: math.exp(values[v] - max(values)) for v in left}
        total, below = sum(weights.values()), 0.0
        rising = sorted(left, key=lambda v: values[v])
        for v in rising[:-1]:
            below += weights[v] / total
            if below <= 1 - top_p:
                left.discard(v)
    return left


def drawn(logits: Tensor, top_k: int, top_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of a scale -> indices by `torch.multinomial`, and the filtered logits."""
    masked = torch.full_like(logits, -math.inf)
    for n, part in enumerate(logits):
        for v in kept(part, top_k, top_p):
            masked[n, v] = part[v]
    return torch.multinomial(masked.softmax(-1), 1, replacement=True, generator=generator)[:, 0], masked


def mixed(masked: Tensor, codebook: Tensor, scale: int, scales: int, generator: torch.Generator) -> Tensor:
    """Filtered logits (N, V) -> mixtures of codes (N, Z)."""
    ratio = scale / (scales - 1)
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -torch.log(torch.empty_like(masked).exponential_(generator=generator))
    out = []
    for part, noise in zip(masked.double(), gumbel.double(), strict=True):
        z = (part * (1 + ratio) + noise) / tau
        weights = torch.exp(z - z.max())
        out.append(sum(weights[v] / weights.sum() * codebook[v].double() for v in range(len(z))))
    return torch.stack(out)  # type: ignore[arg-type]
