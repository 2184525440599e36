"""VAR's multi-scale residual tokenizer: image <-> one index into a codebook per position and scale.

Source: FoundationVision/VAR (`models/vqvae.py`, `basic_vae.py`, `quant.py`), behaviour checked against golden vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.core.timeline import staged
from heatkv_cli.models.parts import NORM_EPS, Pyramid

Size = tuple[int, int]

RESIDUAL = 0.5
"""Share of the convolution in phi."""


@dataclass(frozen=True)
class TokenizerConfig(Pyramid):
    """Shape of the tokenizer; the defaults are those of `vae_ch160v4096z32`.

    Args:
        vocabulary: entries of the codebook (V).
        channels: latent channels (Z).
        base_channels: width of the first level.
        multipliers: width of each level as a multiple of `base_channels`; every level but one halves the side.
        blocks: residual blocks of a level in the encoder; the decoder has one more.
        norm_groups: groups of every GroupNorm; they divide every width. Official: 32.
        phi: number of phi convolutions that the scales share.
        stem: side of the pixel patches the first convolution reads and the last one writes. Official: 1. The bundled
            model works on 2 x 2 patches, which makes it several times cheaper on a CPU.
    """

    vocabulary: int = 4096
    channels: int = 32
    base_channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    norm_groups: int = 32
    phi: int = 4
    stem: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number that no tokenizer can have.
        """
        self.check(
            "VAR",
            {
                "vocabulary": not 1 <= self.vocabulary <= 2**20,
                "channels": not 1 <= self.channels <= 4096,
                "blocks": not 1 <= self.blocks <= 64,
                "norm_groups": self.norm_groups < 1 or any(width % self.norm_groups for width in self.widths),
                "phi": not 1 <= self.phi <= 64,
            },
        )


def phi_table(scales: int, count: int = 4) -> tuple[int, ...]:
    """Which phi convolution each scale uses: the one whose tick is nearest to k / (K - 1).

    Computed in float64, as upstream does: at ten scales the third lies exactly between two ticks, and rounding decides.

    >>> phi_table(10)
    (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    """
    ticks = np.linspace(1 / 3 / count, 1 - 1 / 3 / count, count)
    return tuple(int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales))


def shrink(x: Tensor, size: Size) -> Tensor:
    """Mean over areas (B, Z, H, W) -> (B, Z, *size); nothing happens at the same size."""
    return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size, mode="area")


def grow(x: Tensor, size: Size) -> Tensor:
    """Bicubic, half-pixel centres (B, Z, h, w) -> (B, Z, *size); nothing happens at the same size."""
    return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size, mode="bicubic")


class _Phi(nn.Conv2d):
    """The convolution that smooths an upsampled code, mixed half and half with the code itself."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - RESIDUAL) + super().forward(x) * RESIDUAL


class _PhiList(nn.Module):
    def __init__(self, channels: int, count: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList(_Phi(channels) for _ in range(count))


class Quantiser(nn.Module):
    """Codebook and phi convolutions. A latent is the sum over scales of phi(upsampled codes)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.channels)
        self.quant_resi = _PhiList(config.channels, config.phi)

    def lookup(self, indices: Tensor, size: Size) -> Tensor:
        """Indices (B, N) of a scale, row-major -> codes (B, Z, h, w)."""
        return self.embedding(indices).transpose(1, 2).unflatten(2, size)

    def nearest(self, latent: Tensor) -> Tensor:
        """Latent (B, Z, h, w) -> indices (B, N) of the nearest codes, by |z|^2 + |e|^2 - 2 z.e in float32."""
        z, codes = latent.float().flatten(2).transpose(1, 2), self.embedding.weight.float()
        distance = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * (z @ codes.T)
        return distance.argmin(-1)

    def contribution(self, codes: Tensor, scale: int, scales: int, size: Size) -> Tensor:
        """What the codes (B, Z, h, w) of a scale add to a latent of `size`: phi of them, upsampled."""
        which = phi_table(scales, len(self.quant_resi.qresi_ls))[scale]
        added: Tensor = self.quant_resi.qresi_ls[which](grow(codes, size))
        return added

    def quantise(self, latent: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Tensor]]:
        """Multi-scale residual quantisation.

        Args:
            latent: (B, Z, H, W), what the encoder and `quant_conv` made.
            sizes: latent grids, coarse to fine; the last is (H, W).

        Returns:
            The summed codes (B, Z, H, W) and the indices of each scale, (B, N).
        """
        residual, total, indices = latent, torch.zeros_like(latent), []
        for k, size in enumerate(sizes):
            indices.append(self.nearest(shrink(residual, size)))
            added = self.contribution(self.lookup(indices[-1], size), k, len(sizes), sizes[-1])
            residual, total = residual - added, total + added
        return total, indices

    def totals(self, indices: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Indices (B, N) of the first scales -> the latent (B, Z, H, W) after each of them."""
        total, after = torch.zeros(()), []
        for k, (index, size) in enumerate(zip(indices, sizes, strict=False)):
            added = self.contribution(self.lookup(index, size), k, len(sizes), sizes[-1])
            total = added if k == 0 else total + added
            after.append(total)
        return after

    def inputs(self, indices: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        """Indices of all scales -> what a transformer reads from the second scale on, (B, L - 1, Z)."""
        after = self.totals(indices[: len(sizes) - 1], sizes)
        return torch.cat([tokens(shrink(x, size)) for x, size in zip(after, sizes[1:], strict=True)], 1)


def tokens(latent: Tensor) -> Tensor:
    """Latent (B, Z, h, w) -> tokens (B, N, Z), row-major."""
    return latent.flatten(2).transpose(1, 2)


class _ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin, NORM_EPS), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout, NORM_EPS), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Attention(nn.Module):
    """Attention of one head over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.qkv, self.proj_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[-2:]))


class _Down(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution, each with attention after it at the coarsest one, and the resampling."""

    def __init__(self, cin: int, cout: int, blocks: int, groups: int, attend: bool, **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(cin if b == 0 else cout, cout, groups) for b in range(blocks))
        self.attn = nn.ModuleList(_Attention(cout, groups) for _ in range(blocks if attend else 0))
        for name, module in resample.items():
            self.add_module(name, module)
        self._resample = next(iter(resample), None)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self._resample is None else getattr(self, self._resample)(x)


class _Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = _ResBlock(channels, channels, groups)
        self.attn_1 = _Attention(channels, groups)
        self.block_2 = _ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """RGB (B, 3, stride*H, stride*W) in [-1, 1] -> features (B, Z, H, W)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths, groups, last = config.widths, config.norm_groups, len(config.widths) - 1
        self.stem, self.conv_in = config.stem, nn.Conv2d(3 * config.stem**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = {"downsample": _Down(width)} if i < last else {}
            self.down.append(_Level(widths[max(i - 1, 0)], width, config.blocks, groups, i == last, **resample))
        self.mid = _Mid(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.stem))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent (B, Z, H, W), after `post_quant_conv` -> RGB (B, 3, stride*H, stride*W), not clamped."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths, groups, last = config.widths, config.norm_groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.mid = _Mid(widths[-1], groups)
        levels = []
        for i, width in enumerate(widths):
            resample = {"upsample": _Up(width)} if i else {}
            levels.append(_Level(widths[min(i + 1, last)], width, config.blocks + 1, groups, i == last, **resample))
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3 * config.stem**2, 3, padding=1)
        self.stem = config.stem

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.stem)


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder under official names."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.quantize = Quantiser(config)

    def features(self, image: Tensor) -> Tensor:
        """RGB in [-1, 1] -> what is quantised, (B, Z, H, W)."""
        return self.quant_conv(self.encoder(image))

    @torch.no_grad()
    def encode(self, image: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, list[Tensor]]:
        """RGB in [-1, 1] -> summed codes (B, Z, H, W) and indices per scale (B, N); `sizes` are latent grids."""
        return self.quantize.quantise(self.features(image), sizes)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Summed codes (B, Z, H, W) -> RGB in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype))).clamp(-1, 1)

    @staged("decode")
    def decode_uint8(self, latent: Tensor) -> Tensor:
        """Summed codes -> RGB uint8 (B, H, W, 3); truncated, not rounded, as upstream's demonstration does."""
        return ((self.decode(latent).float() + 1) / 2).permute(0, 2, 3, 1).mul(255).to(torch.uint8).contiguous()
