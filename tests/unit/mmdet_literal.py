"""mmdet's Mask2Former with Swin once more, by its own names and its own order of channels; slow and plain.

Written from the shapes and formulas of mmdetection 2.x, so that the converter is compared with something that does not
know transformers. Modules are named so that ``state_dict`` has mmdet's keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tree(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


def ffn(width: int, hidden: int) -> nn.ModuleDict:
    return tree(layers=nn.ModuleList([nn.Sequential(nn.Linear(width, hidden)), nn.Linear(hidden, width)]))


def run_ffn(net: nn.ModuleDict, x: Tensor, act) -> Tensor:
    return net["layers"][1](act(net["layers"][0](x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.ffn = nn.LayerNorm(width), nn.LayerNorm(width), ffn(width, 4 * width)
        msa = tree(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        msa.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        ys, xs = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ys, xs = ys.flatten(), xs.flatten()
        index = (ys[:, None] - ys + window - 1) * (2 * window - 1) + xs[:, None] - xs + window - 1
        msa.register_buffer("relative_position_index", index)
        self.attn = tree(w_msa=msa)
        self.heads, self.window, self.shift = heads, window, shift

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.attend(self.norm1(x))
        return x + run_ffn(self.ffn, self.norm2(x), F.gelu)

    def attend(self, x: Tensor) -> Tensor:
        """Position by position: who may look at whom is decided pairwise, with no windows cut out."""
        B, H, W, C = x.shape
        w, msa = self.window, self.attn["w_msa"]
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        h, v = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        y, z = (p.flatten() for p in torch.meshgrid(torch.arange(h), torch.arange(v), indexing="ij"))
        same_window = (y[:, None] // w == y // w) & (z[:, None] // w == z // w)

        def region(p: Tensor, size: int) -> Tensor:
            return (p >= size - w).long() + (p >= size - self.shift).long() if self.shift else p * 0

        same_region = (region(y, h)[:, None] == region(y, h)) & (region(z, v)[:, None] == region(z, v))
        place = (y % w) * w + z % w
        bias = msa.relative_position_bias_table[msa.relative_position_index[place[:, None], place]].permute(2, 0, 1)
        bias = bias.masked_fill(~same_window, -torch.inf) + torch.where(same_region, 0.0, -100.0)
        q, k, value = msa["qkv"](x.flatten(1, 2)).view(B, h * v, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        out = msa["proj"]((weights @ value).transpose(1, 2).reshape(B, h, v, C))
        return torch.roll(out, (self.shift, self.shift), (1, 2))[:, :H, :W]


class Swin(nn.Module):
    def __init__(self, width: int, depths: list[int], heads: list[int], window: int) -> None:
        super().__init__()
        self.patch_embed = tree(projection=nn.Conv2d(3, width, 4, 4), norm=nn.LayerNorm(width))
        self.stages = nn.ModuleList()
        for i, (depth, head) in enumerate(zip(depths, heads, strict=True)):
            c = width * 2**i
            stage = tree(blocks=nn.ModuleList(Block(c, head, window, j % 2 * (window // 2)) for j in range(depth)))
            if i < 3:
                stage["downsample"] = tree(norm=nn.LayerNorm(4 * c), reduction=nn.Linear(4 * c, 2 * c, bias=False))
            self.stages.append(stage)
            self.add_module(f"norm{i}", nn.LayerNorm(c))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.patch_embed["norm"](self.patch_embed["projection"](pixels).permute(0, 2, 3, 1))
        outs = []
        for i, stage in enumerate(self.stages):
            for block in stage["blocks"]:
                x = block(x)
            outs.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            if "downsample" in stage:
                B, H, W, C = x.shape
                merged = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2).view(B, H // 2, W // 2, 4 * C)
                x = stage["downsample"]["reduction"](stage["downsample"]["norm"](merged))
        return outs


def conv_gn(a: int, b: int, kernel: int, bias: bool) -> nn.ModuleDict:
    return tree(conv=nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=bias), gn=nn.GroupNorm(32, b))


def sine(h: int, w: int, feats: int) -> Tensor:
    """(2 feats, h, w): rows first."""
    y = torch.arange(1.0, h + 1) / (h + 1e-6) * 2 * math.pi
    x = torch.arange(1.0, w + 1) / (w + 1e-6) * 2 * math.pi
    scale = 10000 ** (2 * (torch.arange(feats) // 2) / feats)
    waves = [
        torch.stack(((p / scale)[:, 0::2].sin(), (p / scale)[:, 1::2].cos()), 2).flatten(1)
        for p in (y[:, None], x[:, None])
    ]
    return torch.cat((waves[0].T[:, :, None].expand(-1, h, w), waves[1].T[:, None].expand(-1, h, w)))


class Deformable(nn.Module):
    """Each query reads ``points`` places around itself in every level, one head after the other."""

    def __init__(self, width: int, heads: int, levels: int = 3, points: int = 4) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.levels, self.points = heads, levels, points

    def forward(self, x: Tensor, positions: Tensor, places: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        B, N, C = x.shape
        query = x + positions
        offsets = self.sampling_offsets(query).view(B, N, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(B, N, self.heads, -1).softmax(-1)
        weights = weights.view(B, N, self.heads, self.levels, self.points)
        values = self.value_proj(x).view(B, N, self.heads, -1)
        out = torch.zeros(B, self.heads, C // self.heads, N)
        begin = 0
        for level, (h, w) in enumerate(sizes):
            plane = values[:, begin : begin + h * w].view(B, h, w, self.heads, -1)
            begin += h * w
            for head in range(self.heads):
                where = places[None, :, None] + offsets[:, :, head, level] / torch.tensor([w, h])
                read = F.grid_sample(plane[:, :, :, head].permute(0, 3, 1, 2), 2 * where - 1, align_corners=False)
                out[:, head] += (read * weights[:, None, :, head, level]).sum(-1)
        return self.output_proj(out.flatten(1, 2).transpose(1, 2))


class PixelDecoder(nn.Module):
    def __init__(self, channels: list[int], width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.input_convs = nn.ModuleList(conv_gn(c, width, 1, True) for c in channels[:0:-1])
        self.encoder = tree(
            layers=nn.ModuleList(
                tree(
                    attentions=nn.ModuleList([Deformable(width, heads)]),
                    ffns=nn.ModuleList([ffn(width, hidden)]),
                    norms=nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]),
                )
                for _ in range(layers)
            )
        )
        self.level_encoding = nn.Embedding(3, width)
        self.lateral_convs = nn.ModuleList([conv_gn(channels[0], width, 1, False)])
        self.output_convs = nn.ModuleList([conv_gn(width, width, 3, False)])
        self.mask_feature = nn.Conv2d(width, width, 1)

    def forward(self, feats: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        tokens, positions, places, sizes = [], [], [], []
        for i, feat in enumerate(feats[:0:-1]):
            x = self.input_convs[i]["gn"](self.input_convs[i]["conv"](feat))
            h, w = x.shape[2:]
            tokens.append(x.flatten(2).transpose(1, 2))
            positions.append((sine(h, w, x.shape[1] // 2).flatten(1).T + self.level_encoding.weight[i])[None])
            y, z = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
            places.append(torch.stack((z.flatten(), y.flatten()), 1))
            sizes.append((h, w))
        x, pos, place = torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(places)
        for layer in self.encoder["layers"]:
            x = layer["norms"][0](x + layer["attentions"][0](x, pos, place, sizes))
            x = layer["norms"][1](x + run_ffn(layer["ffns"][0], x, F.relu))
        outs = [
            part.transpose(1, 2).unflatten(2, size)
            for part, size in zip(x.split([h * w for h, w in sizes], 1), sizes, strict=True)
        ]
        lateral, output = self.lateral_convs[0], self.output_convs[0]
        y = lateral["gn"](lateral["conv"](feats[0]))
        y = y + F.interpolate(outs[-1], size=y.shape[2:], mode="bilinear", align_corners=False)
        y = output["gn"](output["conv"](y)).relu()
        return self.mask_feature(y), outs


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)


class Head(nn.Module):
    def __init__(self, channels: list[int], width: int, heads: int, queries: int, hidden: int, decoder: dict) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(channels, width, heads, hidden, decoder["encoder_layers"])
        layers = [
            tree(
                attentions=nn.ModuleList([Attention(width, heads), Attention(width, heads)]),
                ffns=nn.ModuleList([ffn(width, decoder["hidden"])]),
                norms=nn.ModuleList(nn.LayerNorm(width) for _ in range(3)),
            )
            for _ in range(decoder["layers"])
        ]
        self.transformer_decoder = tree(layers=nn.ModuleList(layers), post_norm=nn.LayerNorm(width))
        self.query_embed, self.query_feat = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(3, width)
        self.cls_embed = nn.Linear(width, 81)
        linear = [nn.Linear(width, width) for _ in range(3)]
        self.mask_embed = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
        self.heads = heads

    def predict(self, x: Tensor, features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        x = self.transformer_decoder["post_norm"](x)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), features)
        hidden = F.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(2).sigmoid() < 0.5
        hidden[hidden.all(2)] = False
        return self.cls_embed(x), masks, hidden.repeat_interleave(self.heads, 0)

    def forward(self, feats: list[Tensor]) -> tuple[Tensor, Tensor]:
        features, levels = self.pixel_decoder(feats)
        x, embed = self.query_feat.weight[None], self.query_embed.weight[None]
        for i, layer in enumerate(self.transformer_decoder["layers"]):
            level = levels[i % 3]
            _, _, hidden = self.predict(x, features, level.shape[2:])
            memory = level.flatten(2).transpose(1, 2) + self.level_embed.weight[i % 3]
            place = sine(*level.shape[2:], level.shape[1] // 2).flatten(1).T
            cross, own = layer["attentions"][0].attn, layer["attentions"][1].attn
            x = layer["norms"][0](x + cross(x + embed, memory + place, memory, attn_mask=hidden)[0])
            x = layer["norms"][1](x + own(x + embed, x + embed, x)[0])
            x = layer["norms"][2](x + run_ffn(layer["ffns"][0], x, F.relu))
        classes, masks, _ = self.predict(x, features, levels[0].shape[2:])
        return classes, masks


class Mask2Former(nn.Module):
    """Batch of one."""

    def __init__(self, width: int = 8, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window: int = 3) -> None:
        super().__init__()
        self.backbone = Swin(width, list(depths), list(heads), window)
        channels = [width * 2**i for i in range(4)]
        self.panoptic_head = Head(channels, 32, 4, 7, 48, {"encoder_layers": 2, "layers": 4, "hidden": 64})

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.panoptic_head(self.backbone(pixels))


CONFIG = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 5,
    "num_attention_heads": 4,
    "dim_feedforward": 64,
    "num_queries": 7,
    "backbone_config": {
        "image_size": 64,
        "embed_dim": 8,
        "depths": [2, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 3,
    },
}
"""The same sizes in transformers' words; it counts the decoder's input as a layer."""


def random_mmdet(seed: int = 0) -> Mask2Former:
    torch.manual_seed(seed)
    net = Mask2Former()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()
