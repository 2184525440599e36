"""ImageReward's network: a ViT-L/16 and a BERT that looks at its tokens, and a small head; official parameter names.

Plain torch, so that no version of timm or transformers can change it. Inference only.

Source: zai-org/ImageReward, package 1.5 (``ImageReward.py``, ``models/BLIP/{vit,med,blip_pretrain}.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw rewards over the training set; a reward is shown standardised."""


@dataclass(frozen=True)
class Sizes:
    """Dimensions; the defaults are the released model's (its ``med_config.json``)."""

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vocabulary: int = 30524
    positions: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    feedforward: int = 3072

    def wrong(self) -> str:
        """Return '' where the sizes make a network, else what is wrong."""
        pairs = (("image", "patch"), ("vision_width", "vision_heads"), ("width", "heads"))
        for whole, part in pairs:
            if getattr(self, whole) % getattr(self, part):
                return f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}"
        return ""


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, H, N, C / H)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class VisionAttention(nn.Module):
    """Self-attention with one projection for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionEncoder(nn.Module):
    """ViT without a head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (sizes.image // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(VisionBlock(width, sizes.vision_heads) for _ in range(sizes.vision_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + patches, C)."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class Residual(nn.Module):
    """Projection, then the norm of its sum with the residual."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(before, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(B, N, before), (B, N, C) -> (B, N, C)."""
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


class TextAttention(nn.Module):
    """BERT's attention over its own tokens, or over the picture's."""

    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.heads = heads
        projections = {"query": nn.Linear(width, width), "key": nn.Linear(source, width)}
        self.self = nn.ModuleDict({**projections, "value": nn.Linear(source, width)})
        self.output = Residual(width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, C), (B, M, source), (B, 1, 1, M) bool or None -> (B, N, C)."""
        q = _heads(self.self["query"](x), self.heads)
        k, v = (_heads(self.self[name](source), self.heads) for name in ("key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        out: Tensor = self.output(mixed, x)
        return out


class TextLayer(nn.Module):
    """BERT layer with cross-attention between self-attention and feed-forward."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = TextAttention(sizes.width, sizes.heads, sizes.width)
        self.crossattention = TextAttention(sizes.width, sizes.heads, sizes.vision_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(sizes.width, sizes.feedforward)})
        self.output = Residual(sizes.feedforward, sizes.width)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """(B, N, C), (B, 1, 1, N) bool, (B, M, vision width) -> (B, N, C)."""
        x = self.crossattention(self.attention(x, x, mask), image, None)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class TextEncoder(nn.Module):
    """BERT over the prompt, bidirectional, looking at the picture in every layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(sizes.vocabulary, sizes.width),
                "position_embeddings": nn.Embedding(sizes.positions, sizes.width),
                "LayerNorm": nn.LayerNorm(sizes.width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(sizes) for _ in range(sizes.layers))})

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """(B, N) ids, (B, N) bool, (B, M, vision width) -> (B, N, C)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embeddings["word_embeddings"](tokens) + self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:  # type: ignore[union-attr, attr-defined]
            x = layer(x, mask[:, None, None], image)
        return x


class RewardNet(nn.Module):
    """Picture and prompt to reward.

    The head has no activations and its dropout is off, so the entries of ``layers`` that carry no parameters are
    left out; their numbers stay.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": VisionEncoder(sizes), "text_encoder": TextEncoder(sizes)})
        widths = (sizes.width, 1024, 128, 64, 16, 1)
        numbers = ("0", "2", "4", "6", "7")
        layers = {n: nn.Linear(a, b) for n, a, b in zip(numbers, widths, widths[1:], strict=False)}
        self.mlp = nn.ModuleDict({"layers": nn.ModuleDict(layers)})

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, S, S), (B, N) ids, (B, N) bool -> (B,) standardised rewards."""
        image = self.blip["visual_encoder"](pixels)
        x = self.blip["text_encoder"](tokens, mask, image)[:, 0]  # the token [CLS]; it is not replaced by [ENC]
        for layer in self.mlp["layers"].values():  # type: ignore[union-attr, operator]
            x = layer(x)
        return (x[:, 0] - MEAN) / STD
