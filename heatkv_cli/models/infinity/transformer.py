"""Infinity's transformer, for any size, under official state-dict names.

Source: FoundationVision/Infinity @ 4c27bbb (`infinity/models/infinity.py`, `basic.py`), checked against golden vectors.
Every self-attention is one call of `Attend.attend`: a KV cache while generating, whole-sequence attention in training.

Precision is that of upstream's CUDA autocast, written out: blocks are in the model's dtype, everything else is stored
in float32; every linear layer computes in the model's dtype but for the modulations and the head, which are float32,
as norms, temperatures, rotations and the modulation itself are. The residual stream of a scale begins in the dtype of
its embedded tokens and is float32 from the first cross-attention on. In float32 nothing of this is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.base import Attend
from heatkv_cli.models.infinity.rope import rotate
from heatkv_cli.models.infinity.tokenizer import Codes
from heatkv_cli.models.parts import NORM_EPS, FeedForward, linear, modulate

MAX_LOG_SCALE = math.log(100)
LEVELS = 15  # rows of the official level embedding


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of the transformer.

    Args:
        depth, width, heads: L, C, H.
        block_chunks: number of groups the blocks are named in (`block_chunks.{i}.module.{j}`).
        codes: bits of a latent position and packing of positions into tokens.
        text_channels, text_length: width of the text features and rows of the learned unconditional text.
        level_embed_once: add the level embedding before the first block only, else before every chunk.

    Raises:
        ConfigError: numbers that do not divide as they must.
    """

    depth: int
    width: int
    heads: int
    block_chunks: int
    codes: Codes
    text_channels: int = 2048
    text_length: int = 512
    level_embed_once: bool = True

    def __post_init__(self) -> None:
        for whole, part in (("depth", "block_chunks"), ("width", "heads"), ("width", "pool_heads")):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"Infinity: {whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}",
                    "change model.num_layers, model.num_heads or model.params",
                )
        if self.hidden == 0:
            raise ConfigError(f"Infinity: width {self.width} gives no FFN", "use a width above 32")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """FFN width: 4 C rounded half to even to a multiple of 256."""
        return round(self.width * 4 / 256) * 256

    @property
    def pool_heads(self) -> int:
        return self.text_channels // (128 if self.width <= 4096 else 64)


@dataclass(frozen=True)
class Text:
    """Text features of a batch of rows, padded: features (R, M, Ct), lengths (R,)."""

    features: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def pack(cls, rows: Sequence[Tensor]) -> Text:
        """From one (L_i, Ct) tensor a row."""
        return cls(nn.utils.rnn.pad_sequence(list(rows), batch_first=True), tuple(len(r) for r in rows))

    def mask(self) -> Tensor | None:
        """Additive-free boolean mask (R, 1, 1, M), or None when every row fills the width."""
        if min(self.lengths) == self.features.shape[1]:
            return None
        mask = torch.arange(self.features.shape[1]) < torch.tensor(self.lengths)[:, None]
        return mask[:, None, None].to(self.features.device, non_blocking=True)


@dataclass(frozen=True)
class Conditioning:
    """All that the text decides, computed once per image.

    Shapes: sos (R, C); ada (R, 1, 6, C); head (R, 1, 2, C); text (R, M, C) projected features; mask (R, 1, 1, M) or
    None; cross: per layer the cross-attention keys and values, each (R, H, M, D).
    """

    sos: Tensor
    ada: Tensor
    head: Tensor
    text: Tensor
    mask: Tensor | None
    cross: tuple[tuple[Tensor, Tensor], ...]


class SelfAttention(nn.Module):
    """Cosine attention with one learned temperature a head; softmax scale 1."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    @staged("projections")
    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (R, N, C), rope (2, N, D/2) -> q, k, v (R, H, N, D), exactly what attention multiplies, in x's dtype."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        # clamped in its own dtype: in bfloat16 the largest temperature is 98.9
        temperature = self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).float().exp()
        q = rotate(F.normalize(q.float(), dim=-1) * temperature, rope)
        k = rotate(F.normalize(k.float(), dim=-1), rope)
        return q.to(v.dtype), k.to(v.dtype), v

    @staged("projections")
    def output(self, y: Tensor) -> Tensor:
        """Attention output (R, H, N, D) -> (R, N, C)."""
        return linear(y.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)


class CrossAttention(nn.Module):
    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text (R, M, C) -> keys and values (R, H, M, D)."""
        kv = linear(text, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias)))
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    @staged("cross_attention")
    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q = linear(x, self.mat_q.weight, self.mat_q.bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, kv[0].to(q.dtype), kv[1].to(q.dtype), attn_mask=mask)
        return linear(y.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, FFN; the first and the last modulated by the condition."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        self.sa, self.ca = SelfAttention(width, heads), CrossAttention(width, heads)
        self.ca_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.ffn = FeedForward(width, hidden)

    @staged("norms")
    def before(self, x: Tensor, ada: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Everything up to attention: residual (R, N, C) -> q, k, v (R, H, N, D)."""
        return self.sa.project(self._modulated(x, ada), rope)

    def _modulated(self, x: Tensor, ada: Tensor) -> Tensor:
        _, _, scale, _, shift, _ = (self.ada_gss.float() + ada).unbind(2)
        return modulate(x, scale, shift)

    @staged("norms")
    def after(self, x: Tensor, y: Tensor, ada: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Everything after attention: residual and attention output y (R, H, N, D) -> residual."""
        gate1, gate2, _, scale, _, shift = (self.ada_gss.float() + ada).unbind(2)
        y = self.sa.output(y)
        x = x + (gate1 * y).to(y.dtype)  # in place upstream, so rounded; the FFN's gate is not
        normed = F.layer_norm(x.float(), x.shape[-1:], self.ca_norm.weight.float(), self.ca_norm.bias.float(), NORM_EPS)
        x = x + self.ca(normed, kv, mask).float()
        return x + gate2 * self.ffn(modulate(x, scale, shift))


class _TextNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), NORM_EPS).to(x.dtype)


class _PoolAttention(nn.Module):
    """One learned query a head over the text; gives the start token and the modulation vector."""

    zero_k_bias: Tensor

    def __init__(self, channels: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.mat_q = nn.Parameter(torch.randn(1, heads, width // heads) * 0.02)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_kv = nn.Linear(channels, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, text: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        kv = linear(text, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias)), dtype)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.mat_q.to(k.dtype).unsqueeze(2).expand(len(k), -1, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return linear(y.transpose(1, 2).flatten(1), self.proj.weight, self.proj.bias, dtype)


class _StartProjection(nn.Module):
    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.ca = _PoolAttention(config.text_channels, config.width, config.pool_heads)


class _HeadModulation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class _Chunk(nn.Module):
    def __init__(self, config: InfinityConfig, blocks: int):
        super().__init__()
        self.module = nn.ModuleList(Block(config.width, config.heads, config.hidden) for _ in range(blocks))


class Infinity(nn.Module):
    """The transformer. `condition` once per image, `embed`, `blocks` and `logits` once per scale."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.config, c = config, config.width
        bits = config.codes.token_bits
        self.cfg_uncond = nn.Parameter(
            torch.randn(config.text_length, config.text_channels) / config.text_channels**0.5
        )
        self.pos_start = nn.Parameter(torch.randn(1, 1, c) * 0.02)
        self.text_norm = _TextNorm(config.text_channels)
        self.text_proj_for_sos = _StartProjection(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_channels, c), nn.GELU(approximate="tanh"), nn.Linear(c, c)
        )
        self.lvl_embed = nn.Embedding(LEVELS, c)
        self.word_embed = nn.Linear(bits, c)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.head_nm = _HeadModulation(c)
        self.head = nn.Linear(c, 2 * bits)
        per_chunk = config.depth // config.block_chunks
        self.block_chunks = nn.ModuleList(_Chunk(config, per_chunk) for _ in range(config.block_chunks))

    def layers(self) -> list[Block]:
        """Blocks in order, over all chunks."""
        return [block for chunk in self.block_chunks for block in chunk.module]  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks, and of every linear layer's arithmetic but the modulations' and the head's."""
        return self.layers()[0].ffn.fc1.weight.dtype

    def unconditional(self, text: Text) -> list[Tensor]:
        """The learned text of guidance, one (L_i, Ct) a row: as long as the row's own prompt."""
        return [self.cfg_uncond[:n] for n in text.lengths]

    @staged("condition")
    def condition(self, text: Text) -> Conditioning:
        """Text features -> everything the blocks need of them (all rows, guidance rows included)."""
        mask, normed, dtype = text.mask(), self.text_norm(text.features), self.dtype
        sos = self.text_proj_for_sos.ca(normed, mask, dtype).float()
        first, gelu, second = self.text_proj_for_ca
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        projected = gelu(linear(normed, first.weight, first.bias, dtype))
        projected = linear(projected, second.weight, second.bias, dtype)
        return Conditioning(
            sos=sos,
            ada=self.shared_ada_lin(sos).float().unflatten(-1, (1, 6, -1)),
            head=self.head_nm.ada_lin(sos).float().unflatten(-1, (1, 2, -1)),
            text=projected,
            mask=mask,
            cross=tuple(block.ca.keys_values(projected) for block in self.layers()),
        )

    def start(self, cond: Conditioning) -> Tensor:
        """Input of scale 0: (R, 1, C)."""
        return cond.sos[:, None] + self.pos_start

    def embed(self, tokens: Tensor) -> Tensor:
        """Latent tokens (B, N, token_bits) -> (B, N, C) in the model's dtype."""
        return linear(tokens, self.word_embed.weight, self.word_embed.bias, self.dtype)

    def blocks(
        self,
        x: Tensor,
        level: Tensor | int,
        cond: Conditioning,
        rope: Tensor,
        cache: Attend,
        guide: dict[int, float] | None = None,
    ) -> Tensor:
        """All blocks over tokens of one or more scales.

        Args:
            x: inputs (R, N, C).
            level: scale index of all tokens, or of each, long (N,).
            cond: conditioning of the R rows.
            rope: rows of the table that belong to the tokens, (2, N, D/2).
            cache: where attention happens.
            guide: {layer: cfg}: after that layer the hidden state of both halves becomes the guided one
                (upstream's negative `cfg_insertion_layer`).

        Returns:
            Hidden state (R, N, C), float32.
        """
        offset, index = self.lvl_embed.weight[level], 0
        for number, chunk in enumerate(self.block_chunks):
            if number == 0 or not self.config.level_embed_once:
                x = (x + offset).to(x.dtype)
            for block in chunk.module:  # type: ignore[union-attr]
                q, k, v = block.before(x, cond.ada, rope)
                y = cache.attend(index, q, k, v, 1.0)
                x = block.after(x, y, cond.ada, cond.cross[index], cond.mask)
                if guide and index in guide:
                    yes, no = x.chunk(2)
                    x = (guide[index] * yes + (1 - guide[index]) * no).repeat(2, 1, 1)
                index += 1
        return x

    @staged("head")
    def logits(self, hidden: Tensor, cond: Conditioning) -> Tensor:
        """Hidden state of the first rows (R', N, C) -> float32 logits (R', N, token_bits, 2); [..., 1] is bit 1."""
        scale, shift = cond.head[: len(hidden)].unbind(2)
        return self.head(modulate(hidden, scale, shift)).float().unflatten(-1, (-1, 2))
