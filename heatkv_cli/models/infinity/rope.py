"""Infinity's 2-D rotary positions.

Source: FoundationVision/Infinity @ 4c27bbb, `infinity/models/basic.py` (tables), checked against golden tables.
Half of the head dimension turns with the row, half with the column; adjacent elements form a pair. Positions of every
scale live on one common grid (`base`), whatever the resolution of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
MAX_SIDE = 128  # of the official base table; mode 1 interpolates in it


def _angles(head_dim: int, y: Tensor, x: Tensor) -> Tensor:
    """Angles (h, w, D/2) of rows y (h,) and columns x (w,): D/4 row frequencies, then D/4 column frequencies."""
    half = head_dim // 2
    theta = 1.0 / (10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half))
    rows = torch.outer(y.float(), theta)[:, None].expand(-1, len(x), -1)
    columns = torch.outer(x.float(), theta)[None].expand(len(y), -1, -1)
    return torch.cat((rows, columns), -1)


def _scale_table(head_dim: int, size: Size, base: Size, mode: int) -> tuple[Tensor, Tensor]:
    h, w = size
    if mode == 0:
        angle = _angles(head_dim, torch.arange(h), torch.arange(w))
        return angle.cos(), angle.sin()
    if mode == 2:
        # float32 product and round half to even: ties exist for every ratio but 1
        y, x = (torch.round(torch.arange(n) * (b / n)).int() for n, b in zip(size, base, strict=True))
        angle = _angles(head_dim, y, x)
        return angle.cos(), angle.sin()
    high, wide = base
    if high >= wide:
        up = (MAX_SIDE, int(MAX_SIDE / high * wide))
    else:
        up = (int(MAX_SIDE / wide * high), MAX_SIDE)
    angle = _angles(head_dim, torch.arange(up[0]), torch.arange(up[1]))
    maps = torch.stack((angle.cos(), angle.sin())).permute(0, 3, 1, 2)
    small = F.interpolate(maps, size=size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    return small[0], small[1]


def rope_table(head_dim: int, sizes: tuple[Size, ...], base: Size, mode: int = 2) -> Tensor:
    """Cosines and sines of all tokens, scale after scale, row-major inside a scale.

    Args:
        head_dim: D, a multiple of 4.
        sizes: (h, w) of each scale.
        base: grid all scales are stretched to; official: last scale of the same ratio's 1M schedule.
        mode: 2 (released models) stretched and rounded positions; 1 interpolated tables; 0 raw positions.

    Returns:
        float32 (2, T, D/2).

    Raises:
        ValueError: head_dim is not a multiple of 4, or the mode is unknown.
    """
    if head_dim % 4:
        raise ValueError(f"rope: head_dim is {head_dim}, rotary positions need a multiple of 4")
    if mode not in (0, 1, 2):
        raise ValueError(f"rope: rope_mode is {mode}, it must be one of 0, 1, 2")
    parts = [_scale_table(head_dim, size, base, mode) for size in sizes]
    return torch.stack([torch.cat([p[i].flatten(0, 1) for p in parts]) for i in (0, 1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (B, H, N, D) in float32 by a table (2, N, D/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[0], table[1]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
