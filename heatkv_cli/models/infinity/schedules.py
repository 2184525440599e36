"""Infinity's official token maps: every aspect ratio at every resolution.

Source: FoundationVision/Infinity @ 4c27bbb, `infinity/utils/dynamic_resolution.py`. Its time axis is left out: image
generation has one frame. A resolution is the beginning of the next one. The 8B has the same maps, with 2 x 2 latent
positions to a token.
"""

from __future__ import annotations

import math
from typing import Any

from heatkv_cli.errors import ConfigError, did_you_mean

Size = tuple[int, int]

RESOLUTIONS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Resolution (megapixels of the image) -> number of scales."""

STRIDE = 16
"""Pixels per token side."""

_PORTRAIT = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _all_ratios() -> dict[float, tuple[Size, ...]]:
    """Height / width -> the 13 maps, in the official order; a landscape ratio turns the maps of its portrait."""
    table: dict[float, tuple[Size, ...]] = {}
    for ratio, text in _PORTRAIT.items():
        pairs = [size.split("x") for size in text.split()]
        table[ratio] = tuple((int(h), int(w)) for h, w in pairs)
        if ratio != 1:
            inverse = math.floor(1000 / ratio) / 1000  # the official keys are cut, not rounded, to three decimals
            table[inverse] = tuple((int(w), int(h)) for h, w in pairs)
    return table


_SIZES = _all_ratios()

RATIOS = tuple(_SIZES)
"""The 15 official ratios height / width, in the official order."""


def _maps(ratio: float) -> tuple[Size, ...]:
    if ratio not in _SIZES:
        known = ", ".join(f"{r:g}" for r in RATIOS)
        raise ConfigError(
            f"Infinity has no token maps for the ratio {ratio!r} (height / width)",
            f"the nearest is {nearest_ratio(ratio):g}; one of: {known}",
        )
    return _SIZES[ratio]


def scale_sizes(resolution: str, ratio: float = 1.0) -> tuple[Size, ...]:
    """(height, width) in tokens of each scale.

    Args:
        resolution: a key of `RESOLUTIONS`.
        ratio: height / width, one of `RATIOS`.

    Raises:
        ConfigError: there is no such resolution or ratio.

    >>> scale_sizes("0.06M", 2.0)
    ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11))
    """
    if resolution not in RESOLUTIONS:
        raise ConfigError(f"Infinity has no resolution {resolution!r}", did_you_mean(str(resolution), [*RESOLUTIONS]))
    return _maps(ratio)[: RESOLUTIONS[resolution]]


def pixel_size(resolution: str, ratio: float = 1.0) -> Size:
    """(height, width) of the image in pixels; arguments and errors as in `scale_sizes`.

    >>> pixel_size("1M"), pixel_size("0.60M", 0.333)
    ((1024, 1024), (480, 1440))
    """
    height, width = scale_sizes(resolution, ratio)[-1]
    return height * STRIDE, width * STRIDE


def rope_base(ratio: float = 1.0) -> Size:
    """Grid that rotary positions are stretched to: the last map of the ratio's 1M schedule, at every resolution.

    Raises:
        ConfigError: there is no such ratio.

    >>> rope_base(0.5)
    (45, 90)
    """
    return _maps(ratio)[-1]


def at_ratio(ratio: float) -> dict[str, Any]:
    """What of a model's config follows from the aspect ratio; named by `resolutions` in conf/model.

    Returns:
        `resolutions`: the scales of every resolution; `order_scales`: those at which the published orders were found;
        `params`: `rope_base`, see there.

    Raises:
        ConfigError: there is no such ratio.
    """
    sizes = {name: scale_sizes(name, ratio) for name in RESOLUTIONS}
    return {"resolutions": sizes, "order_scales": scale_sizes("1M"), "params": {"rope_base": rope_base(ratio)}}


def nearest_ratio(ratio: float) -> float:
    """The official ratio with the smallest absolute difference, the first of `RATIOS` on ties.

    Args:
        ratio: height / width of any picture.

    Raises:
        ConfigError: it is not a positive number.

    >>> nearest_ratio(1080 / 1920), nearest_ratio(7), nearest_ratio(1.125)
    (0.571, 3.0, 1.0)
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"a ratio of {ratio!r} is no picture", "height / width is a positive number")
    return min(RATIOS, key=lambda official: abs(official - ratio))
