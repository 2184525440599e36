"""Infinity's bitwise multi-scale residual tokenizer: image <-> one bit per channel, position and scale.

Source: FoundationVision/Infinity @ 4c27bbb (`infinity/models/bsq_vae`), behaviour checked against golden vectors.
The network has no attention, no quant convolution and no latent scale; a code is a vertex (+-1/sqrt d)^d of the unit
sphere, and the sum of the upsampled codes of all scales goes straight into the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.core.timeline import staged
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.parts import Pyramid

Size = tuple[int, int]


@dataclass(frozen=True)
class TokenizerConfig(Pyramid):
    """Shape of the tokenizer.

    Args:
        bits: bits per latent position (d).
        base_channels: width of the first level.
        multipliers: width of each level as a multiple of `base_channels`; every level but one halves the side.
        norm_groups: groups of every GroupNorm. Official: 32 (24 where 32 does not divide the width).
        stem: side of the pixel patches the first convolution reads and the last one writes. Official: 1. The bundled
            model works on 4 x 4 patches, which makes it an order of magnitude cheaper on a CPU.
    """

    bits: int
    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    norm_groups: int = 32
    stem: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number that no tokenizer can have.
        """
        self.check("Infinity", {"bits": not 1 <= self.bits <= 256, "norm_groups": self.norm_groups < 1})


@dataclass(frozen=True)
class TokenizerParams(TokenizerConfig):
    """The tokenizer's section of a model's YAML: its shape, and how positions are packed into tokens."""

    patch: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: as `TokenizerConfig`, or another packing than 1 x 1 or 2 x 2.
        """
        super().__post_init__()
        if self.patch not in (1, 2):
            raise ConfigError(f"Infinity's tokenizer: patch is {self.patch}", "model.params.tokenizer.patch=1, or 2")

    @property
    def shape(self) -> TokenizerConfig:
        """The tokenizer's own shape."""
        own = {field.name: getattr(self, field.name) for field in fields(TokenizerConfig)}
        return TokenizerConfig(**own)

    @property
    def codes(self) -> Codes:
        """Bits and packing."""
        return Codes(self.bits, self.patch)


@dataclass(frozen=True)
class Codes:
    """Bits <-> codes <-> transformer tokens. `patch` 2 packs 2 x 2 latent positions into one token (Infinity-8B)."""

    bits: int
    patch: int = 1

    @property
    def token_bits(self) -> int:
        return self.bits * self.patch**2

    def grid(self, size: Size) -> Size:
        """Latent grid of a scale of `size` tokens."""
        return size[0] * self.patch, size[1] * self.patch

    def to_grid(self, bits: Tensor, size: Size) -> Tensor:
        """Token bits (B, N, token_bits) -> latent bits (B, H, W, bits)."""
        x = bits.view(len(bits), *size, self.token_bits).permute(0, 3, 1, 2)
        return F.pixel_shuffle(x, self.patch).permute(0, 2, 3, 1)

    def to_tokens(self, latent: Tensor) -> Tensor:
        """Latent (B, bits, H, W) -> tokens (B, N, token_bits), row-major."""
        return F.pixel_unshuffle(latent, self.patch).flatten(2).transpose(1, 2)

    def embed(self, bits: Tensor) -> Tensor:
        """Latent bits (B, H, W, bits) -> unit codes (B, bits, H, W) in float32."""
        # sqrt of the tokenizer's own width, also where a token packs several positions
        code = (bits.float() * 2 - 1) / math.sqrt(self.bits)
        return F.normalize(code, dim=-1).permute(0, 3, 1, 2).contiguous()


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, half-pixel centres, no antialiasing also when shrinking: how codes and next inputs are resized."""
    return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size, mode="bilinear", align_corners=False)


def quantise(latent: Tensor, sizes: list[Size], codes: Codes) -> tuple[Tensor, list[Tensor]]:
    """Multi-scale residual quantisation.

    Args:
        latent: encoder output (B, d, H, W), not normalised.
        sizes: latent grids, coarse to fine; the last is (H, W).
        codes: bit width.

    Returns:
        The summed codes (B, d, H, W) and the bits of each scale, uint8 (B, h, w, d).
    """
    residual, total, bits = latent, torch.zeros_like(latent), []
    for size in sizes:
        # `area` here, bilinear for the transformer's inputs: the two differ in the official code as well
        seen = residual if residual.shape[-2:] == torch.Size(size) else F.interpolate(residual, size, mode="area")
        bits.append((F.normalize(seen, dim=1) > 0).permute(0, 2, 3, 1).to(torch.uint8))
        code = resize(codes.embed(bits[-1]), (latent.shape[-2], latent.shape[-1]))
        residual, total = residual - code, total + code
    return total, bits


class _Conv(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Norm(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups if channels % groups == 0 else 24, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


class _ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = _Norm(cin, groups), _Conv(cin, cout)
        self.norm2, self.conv2 = _Norm(cout, groups), _Conv(cout, cout)
        self.nin_shortcut = _Conv(cin, cout, 1, padding=0) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Down(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _Conv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """`block.{b}` of one resolution and its resampling, if any."""

    def __init__(self, cin: int, cout: int, blocks: int, groups: int, **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(cin if b == 0 else cout, cout, groups) for b in range(blocks))
        for name, module in resample.items():
            self.add_module(name, module)
        self._resample = next(iter(resample), None)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self._resample is None else getattr(self, self._resample)(x)


class _Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1, self.block_2 = _ResBlock(channels, channels, groups), _ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """RGB (B, 3, stride*H, stride*W) in [-1, 1] -> latent (B, d, H, W)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.stem, self.conv_in = config.stem, _Conv(3 * config.stem**2, widths[0])
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = {"downsample": _Down(width)} if i < len(widths) - 1 else {}
            self.down.append(_Level(widths[max(i - 1, 0)], width, 2, groups, **resample))
        self.mid = _Mid(widths[-1], groups)
        self.norm_out, self.conv_out = _Norm(widths[-1], groups), _Conv(widths[-1], config.bits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.stem))
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """Summed codes (B, d, H, W) -> RGB (B, 3, stride*H, stride*W), not clamped."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = _Conv(config.bits, widths[-1])
        self.mid = _Mid(widths[-1], groups)
        levels = []
        for i, width in enumerate(widths):
            resample = {"upsample": _Up(width)} if i else {}
            levels.append(_Level(widths[min(i + 1, len(widths) - 1)], width, 3, groups, **resample))
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = _Norm(widths[0], groups), _Conv(widths[0], 3 * config.stem**2)
        self.stem = config.stem

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.stem)


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder under official names (`encoder.*`, `decoder.*`)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @torch.no_grad()
    def encode(self, image: Tensor, sizes: list[Size]) -> tuple[Tensor, list[Tensor]]:
        """RGB in [-1, 1] -> summed codes (B, d, H, W) and bits per scale (B, h, w, d); `sizes` are latent grids."""
        return quantise(self.encoder(image), sizes, Codes(self.config.bits))

    @torch.no_grad()
    def decode(self, summed: Tensor) -> Tensor:
        """Summed codes (B, d, H, W) -> RGB in [-1, 1]."""
        return self.decoder(summed.to(self.decoder.conv_in.conv.weight.dtype)).clamp(-1, 1)

    @staged("decode")
    def decode_uint8(self, summed: Tensor) -> Tensor:
        """Summed codes -> RGB uint8 (B, H, W, 3); truncated, not rounded, as upstream does."""
        return ((self.decode(summed).float() + 1) / 2).permute(0, 2, 3, 1).mul(255).to(torch.uint8).contiguous()
