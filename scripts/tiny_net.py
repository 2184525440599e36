"""The models of the shapes world in training: sizes, whole-sequence attention, self-correcting inputs, networks.

Used by `train_tiny.py`. The transformer, tokenizer and text encoder are the package's own; what is here exists only in
training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.rope import rope_table
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.text import WordEncoder
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig, resize
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text
from shapes_world import COLOUR_NAMES, MAX_WORDS, SHAPES, WORDS, Scene

TOKENIZER = TokenizerConfig(bits=16, base_channels=48, multipliers=(1, 1), norm_groups=8, stem=4)
CODES = Codes(TOKENIZER.bits)
TRANSFORMER = InfinityConfig(
    depth=8, width=160, heads=8, block_chunks=4, codes=CODES, text_channels=128, text_length=MAX_WORDS
)
TEXT_LAYERS = 2
PLACES = ("", "left", "right", "top", "bottom")
PROBES = (len(COLOUR_NAMES) + 1, len(SHAPES), len(PLACES))  # classes of the probe: colour, shape, place
MERGED_SCALES = 5  # these small scales share one masked product in training


@dataclass(frozen=True)
class Shape:
    """A model of the shapes world: networks as above, a map of `sides[-1]` x `sides[-1]` tokens.

    Args:
        name: the model's, as in conf/model.
        sides: tokens a side, scale by scale.
        tau: temperature of each scale when pictures are drawn to be scored.
        short: scales of a short training step.
    """

    name: str
    sides: tuple[int, ...]
    tau: tuple[float, ...]
    short: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(p, p) for p in self.sides]

    @property
    def pixels(self) -> int:
        """Side of a picture."""
        return self.sides[-1] * TOKENIZER.stride

    @property
    def sampling(self) -> Sampling:
        return Sampling(cfg=(2.0,) * len(self.sides), tau=self.tau)

    def levels(self, scales: int) -> Tensor:
        """Scale of each token of the first `scales` scales, (N,)."""
        return torch.cat([torch.full((p * p,), i) for i, p in enumerate(self.sides[:scales])])

    def model(self, transformer: Infinity, tokenizer: Tokenizer, text: WordEncoder) -> InfinityModel:
        """The trained networks as the package runs them."""
        t = TRANSFORMER
        geometry = Geometry(self.name, t.depth, t.heads, t.head_dim, ScaleSchedule(tuple(self.sizes)), 1)
        return InfinityModel(geometry, transformer, tokenizer, text, self.sizes[-1])


TINY = Shape("tiny", (1, 2, 3, 4, 5, 6, 8, 10), (1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.3), 7)
TINY_160 = Shape("tiny-160", (1, 2, 3, 4, 6, 8, 10, 13, 16, 20), (1.0, 1.0, 1.0, 1.0, 0.6, 0.5, 0.4, 0.3, 0.3, 0.3), 7)
MODELS = {shape.name: shape for shape in (TINY, TINY_160)}


class BlockCausal(torch.autograd.Function):
    """Whole-sequence attention in which a token sees its own and all earlier scales.

    A hand-written backward accumulates into dK and dV: slicing them per scale under autograd would zero-fill and add
    a full tensor for every slice. `spans`: (first query, end, additive mask or None); queries of a span see
    keys [0, end).
    """

    @staticmethod
    def forward(ctx, q, k, v, spans):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.spans = q.shape, spans
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        out, weights = torch.empty_like(q), []
        for start, end, mask in spans:
            logits = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
            weights.append((logits if mask is None else logits + mask).softmax(-1))
            out[:, start:end] = torch.bmm(weights[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, out, *weights)
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, out, *weights = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        row = (grad * out).sum(-1, keepdim=True)
        for (start, end, _), p in zip(ctx.spans, weights, strict=True):
            dp = torch.bmm(grad[:, start:end], v[:, :end].transpose(1, 2)).sub_(row[:, start:end]).mul_(p)
            dq[:, start:end] = torch.bmm(dp, k[:, :end])
            dk[:, :end] += torch.bmm(dp.transpose(1, 2), q[:, start:end])
            dv[:, :end] += torch.bmm(p.transpose(1, 2), grad[:, start:end])
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), None


class TrainingAttention:
    """The seam of the model in training: no cache, all scales at once."""

    def __init__(self, shape: Shape, scales: int, dtype: torch.dtype):
        ends = torch.tensor([p * p for p in shape.sides[:scales]]).cumsum(0).tolist()
        merged = min(MERGED_SCALES, scales)
        level = shape.levels(merged)
        mask = torch.where(level[:, None] >= level[None], 0.0, -torch.inf).to(dtype)
        self.spans = [(0, len(level), mask), *((a, b, None) for a, b in pairwise(ends[merged - 1 :]))]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        return BlockCausal.apply(q, k, v, self.spans)


@torch.no_grad()
def noisy_codes(latents: Tensor, sides: Sequence[int], flip: float) -> tuple[list[Tensor], list[Tensor]]:
    """Clean target bits (B, N_s, d) and, after each scale, the sum of the codes with mistakes in them (B, d, H, W).

    `sides`: of the first scales, as many as are wanted.

    Bitwise self-correction (Infinity, section 3.4): a random share of the bits of each scale, up to `flip`, is turned
    before the later scales are quantised, so that they learn to repair earlier mistakes.
    """
    total, bits, totals = torch.zeros_like(latents), [], []
    for side in sides:
        seen = F.normalize(F.interpolate(latents - total, side, mode="area"), dim=1)
        bits.append(CODES.to_tokens((seen > 0).float()))
        share = torch.rand(len(latents), 1, 1, 1) * flip
        turned = (seen > 0) ^ (torch.rand_like(seen) < share)
        total = total + resize(CODES.embed(turned.permute(0, 2, 3, 1)), (latents.shape[-2], latents.shape[-1]))
        totals.append(total)
    return bits, totals


def noisy_inputs(latents: Tensor, sides: Sequence[int], flip: float) -> tuple[Tensor, Tensor]:
    """Target bits (B, N, d) and transformer inputs (B, N - 1, d) of the scales in `sides`; see `noisy_codes`."""
    bits, totals = noisy_codes(latents, sides, flip)
    inputs = [CODES.to_tokens(resize(x, (side, side))) for x, side in zip(totals, sides[1:], strict=False)]
    return torch.cat(bits, 1), torch.cat(inputs, 1)


class Tiny(torch.nn.Module):
    """What is trained together: text encoder, transformer, and a probe of the noun features.

    The probe reads colour, shape and place of every noun from its text feature; it gives the binding of words (which
    object is left of which) a direct gradient and is not shipped.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.text = WordEncoder(WORDS, MAX_WORDS, TRANSFORMER.text_channels, TEXT_LAYERS)
        self.transformer = Infinity(TRANSFORMER)
        self.probe = torch.nn.Linear(TRANSFORMER.text_channels, sum(PROBES))
        net, c = self.transformer, TRANSFORMER.width
        for block in net.layers():
            torch.nn.init.zeros_(block.ada_gss)
            for out in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                torch.nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * TRANSFORMER.depth))
                torch.nn.init.zeros_(out.bias)
        torch.nn.init.normal_(net.shared_ada_lin[1].weight, std=0.01)
        net.shared_ada_lin[1].bias.data.zero_().view(6, c)[:2] = 1.0  # both gates open
        torch.nn.init.normal_(net.lvl_embed.weight, std=0.3)
        torch.nn.init.normal_(net.head.weight, std=0.02)
        torch.nn.init.normal_(net.head_nm.ada_lin[1].weight, std=0.01)
        table = rope_table(TRANSFORMER.head_dim, tuple(shape.sizes), shape.sizes[-1])
        self.register_buffer("rope", table, persistent=False)
        self.register_buffer("levels", shape.levels(len(shape.sides)), persistent=False)

    def forward(
        self, ids: Tensor, dropped: Tensor, inputs: Tensor, attention: TrainingAttention
    ) -> tuple[Tensor, Tensor]:
        """Word ids (B, M), rows that lose their text (B,), inputs (B, N - 1, d) -> logits (B, N, d), text features."""
        features = self.text(ids)
        lengths = tuple(((ids > 0).sum(1)).tolist())
        nothing = self.transformer.cfg_uncond[: ids.shape[1]].expand_as(features)
        cond = self.transformer.condition(Text(torch.where(dropped[:, None, None], nothing, features), lengths))
        count = inputs.shape[1] + 1
        x = torch.cat((self.transformer.start(cond), self.transformer.embed(inputs)), 1)
        hidden = self.transformer.blocks(x, self.levels[:count], cond, self.rope[:, :count], attention)
        logits = self.transformer.logits(hidden, cond)
        return logits[..., 1] - logits[..., 0], features

    def probe_loss(self, features: Tensor, nouns: Tensor) -> Tensor:
        """nouns (B, G, 4): word index (-1 = none), colour, shape, place."""
        chosen = nouns[..., 0] >= 0
        at = nouns[..., 0].clamp(min=0).unsqueeze(-1).expand(-1, -1, features.shape[-1])
        parts = self.probe(features.gather(1, at)[chosen]).split(PROBES, -1)
        labels = nouns[chosen][:, 1:].unbind(-1)
        return sum(F.cross_entropy(p, y) for p, y in zip(parts, labels, strict=True))  # type: ignore[return-value]


def noun_labels(scene: Scene) -> list[list[int]]:
    """Two rows of word index, colour (last class: not named), shape, place for `Tiny.probe_loss`."""
    rows = []
    for word, group in scene.nouns[:2]:
        _, colour, shape = scene.want[group]
        named = COLOUR_NAMES.index(colour) if colour else len(COLOUR_NAMES)
        rows.append([word, named, SHAPES.index(shape), PLACES.index(scene.places[group])])
    return rows + [[-1, 0, 0, 0]] * (2 - len(rows))


class FullAttention:
    """The plainest cache: keep everything, attend to everything."""

    def __init__(self) -> None:
        self.past: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        if layer in self.past:
            k, v = (torch.cat(pair, 2) for pair in zip(self.past[layer], (k, v), strict=True))
        self.past[layer] = k, v
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale)

    def end_step(self) -> None:
        pass
