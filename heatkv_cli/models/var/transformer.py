"""VAR's transformer, for any size, under official state-dict names.

Source: FoundationVision/VAR (`models/var.py`, `models/basic_var.py`), checked against golden vectors.
Every self-attention is one call of `Attend.attend`: a KV cache while generating, whole-sequence attention in training.

Precision is that of upstream's autocast, written out: `blocks.*` are in the model's dtype and compute in it, everything
else is float32; norms, modulation and the normalisation of q and k are computed in float32, and so is the residual
stream, since it begins with an embedding. In float32 nothing of this is seen.
Differs: under autocast upstream's token embedding, shared modulation and head are half-precision products; here they
are float32. Upstream's CUDA autocast leaves normalised keys in float32; here they have the dtype of the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.base import Attend
from heatkv_cli.models.parts import FeedForward, linear, modulate
from heatkv_cli.models.var.tokenizer import Size

MAX_LOG_SCALE = math.log(100)
START_LOG_SCALE = math.log(4)


@dataclass(frozen=True)
class VarConfig:
    """Shape of the transformer; the defaults are shared by all released models.

    Args:
        depth, width, heads: L, C, H.
        sizes: token maps, coarse to fine.
        classes: number of classes; the embedding has one row more, the null class of guidance.
        vocabulary, channels: of the tokenizer (V, Z).
        mlp_ratio: width of the FFN over C.
        l2_norm: unit queries and keys with one learned temperature a head; else the softmax scale is 0.25 / sqrt(D).
        shared: one modulation for all blocks plus a table per block (d36-s), else a projection per block.

    Raises:
        ConfigError: no depth, fewer than two scales, no classes, or a width that the heads do not divide.
    """

    depth: int
    width: int
    heads: int
    sizes: tuple[Size, ...]
    classes: int = 1000
    vocabulary: int = 4096
    channels: int = 32
    mlp_ratio: float = 4.0
    l2_norm: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ConfigError(
                f"VAR: depth {self.depth}, width {self.width}, heads {self.heads}: the heads must divide the width",
                "change model.num_layers, model.num_heads or model.params.width",
            )
        if len(self.sizes) < 2 or not 1 <= self.classes <= 2**20:
            raise ConfigError(
                f"VAR: {len(self.sizes)} scales and {self.classes} classes: at least two scales, 1 to 2^20 classes",
                "check model.resolutions and model.params.classes",
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """FFN width."""
        return round(self.width * self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """L: tokens of all scales."""
        return sum(h * w for h, w in self.sizes)

    @property
    def softmax_scale(self) -> float:
        return 1.0 if self.l2_norm else 0.25 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class Conditioning:
    """All that the class decides, computed once per image.

    Shapes: sos (R, 1, C), the class embedding; ada per block (R, 1, 6, C); head (R, 1, 2, C); all but `sos` modulate,
    in the order gates, scales, shifts (first of attention, then of the FFN), and scale, shift for the head.
    """

    sos: Tensor
    ada: tuple[Tensor, ...]
    head: Tensor


class SelfAttention(nn.Module):
    """Projections around attention."""

    zero_k_bias: Tensor

    def __init__(self, config: VarConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.scale_mul_1H11 = (
            nn.Parameter(torch.full((1, self.heads, 1, 1), START_LOG_SCALE)) if config.l2_norm else None
        )
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    @staged("projections")
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (R, N, C) -> q, k, v (R, H, N, D), exactly what attention multiplies, in the dtype of the weights."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.scale_mul_1H11 is not None:
            temperature = self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).float().exp()
            q = (F.normalize(q.float(), dim=-1) * temperature).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    @staged("projections")
    def output(self, y: Tensor) -> Tensor:
        """Attention output (R, H, N, D) -> (R, N, C)."""
        return linear(y.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)


class Block(nn.Module):
    """Self-attention and FFN, both modulated by the class."""

    def __init__(self, config: VarConfig):
        super().__init__()
        c = config.width
        self.attn, self.ffn = SelfAttention(config), FeedForward(c, config.hidden)
        if config.shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, c) / c**0.5)
        else:
            self.ada_lin = _modulation(c, 6)

    def modulation(self, sos: Tensor, shared: Tensor | None) -> Tensor:
        """Class embedding (R, 1, C) and the shared modulation (R, 1, 6, C), if there is one -> (R, 1, 6, C)."""
        return _modulate_by(self.ada_lin, sos, 6) if shared is None else self.ada_gss.float() + shared

    @staged("norms")
    def before(self, x: Tensor, ada: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Everything up to attention: residual (R, N, C) -> q, k, v (R, H, N, D)."""
        _, _, scale, _, shift, _ = ada.unbind(2)
        return self.attn.project(modulate(x, scale, shift))

    @staged("norms")
    def after(self, x: Tensor, y: Tensor, ada: Tensor) -> Tensor:
        """Everything after attention: residual and attention output y (R, H, N, D) -> residual."""
        gate1, gate2, _, scale, _, shift = ada.unbind(2)
        y = self.attn.output(y)
        x = x + (gate1 * y).to(y.dtype)  # in place upstream, so rounded
        y = self.ffn(modulate(x, scale, shift))
        return x + (gate2 * y).to(y.dtype)


def _modulation(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def _modulate_by(projection: nn.Sequential, sos: Tensor, count: int) -> Tensor:
    """Class embedding (R, 1, C) -> (R, 1, count, C), float32."""
    last = projection[1]
    assert isinstance(last, nn.Linear)
    return linear(F.silu(sos), last.weight, last.bias).float().unflatten(-1, (count, -1))


class _HeadModulation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = _modulation(width, 2)


class Var(nn.Module):
    """The transformer. `condition` once per image, `start`, `embed`, `blocks` and `logits` once per scale."""

    def __init__(self, config: VarConfig):
        super().__init__()
        self.config, c = config, config.width
        first = config.sizes[0]
        self.pos_start = nn.Parameter(torch.randn(1, first[0] * first[1], c) * 0.02)
        self.pos_1LC = nn.Parameter(torch.randn(1, config.tokens, c) * 0.02)
        self.word_embed = nn.Linear(config.channels, c)
        self.class_emb = nn.Embedding(config.classes + 1, c)
        self.lvl_embed = nn.Embedding(len(config.sizes), c)
        self.shared_ada_lin = _modulation(c, 6) if config.shared else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = _HeadModulation(c)
        self.head = nn.Linear(c, config.vocabulary)

    def layers(self) -> list[Block]:
        """Blocks in order."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""
        return self.layers()[0].ffn.fc1.weight.dtype

    @staged("condition")
    def condition(self, classes: Tensor) -> Conditioning:
        """Class indices of all rows (R,), `config.classes` for guidance rows -> what the blocks need of them."""
        sos = self.class_emb(classes)[:, None].float()
        shared = None if self.shared_ada_lin is None else _modulate_by(self.shared_ada_lin, sos, 6)
        ada = tuple(block.modulation(sos, shared) for block in self.layers())
        return Conditioning(sos, ada, _modulate_by(self.head_nm.ada_lin, sos, 2))

    def positions(self) -> Tensor:
        """What every token's place adds: position and scale, (1, L, C)."""
        levels = zip(self.lvl_embed.weight, self.config.sizes, strict=True)
        return self.pos_1LC + torch.cat([level.expand(h * w, -1) for level, (h, w) in levels])

    def start(self, cond: Conditioning, positions: Tensor) -> Tensor:
        """Input of scale 0, (R, N_0, C); `positions` are the scale's own."""
        return cond.sos + self.pos_start + positions

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Latent tokens (B, N, Z) of later scales and their positions (1, N, C) -> (B, N, C)."""
        return linear(tokens, self.word_embed.weight, self.word_embed.bias) + positions

    def run(self, x: Tensor, cond: Conditioning, cache: Attend) -> Tensor:
        """All blocks over tokens x (R, N, C) of one or more scales -> hidden state (R, N, C), float32."""
        for index, block in enumerate(self.layers()):
            q, k, v = block.before(x, cond.ada[index])
            y = cache.attend(index, q, k, v, self.config.softmax_scale)
            x = block.after(x, y, cond.ada[index])
        return x

    @staged("head")
    def logits(self, hidden: Tensor, cond: Conditioning) -> Tensor:
        """Hidden state of the first rows (R', N, C) -> float32 logits (R', N, V)."""
        scale, shift = cond.head[: len(hidden)].unbind(2)
        return linear(modulate(hidden, scale, shift), self.head.weight, self.head.bias).float()
