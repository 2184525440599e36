"""Scale schedules and model geometry: how many tokens a full cache has, and when.

Everything that counts tokens or bytes starts here. Scales are 0-based; `K` is their number, `N_t` the tokens of scale
t, `C_t` the tokens of a full cache of one head *entering* scale t, `P = C_{K-1}` its peak (nobody reads the last
scale's keys, so nobody caches them) and `T = C_K` all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from heatkv_cli.errors import ConfigError

if TYPE_CHECKING:  # counting needs no torch, and commands that only count should not wait for it
    from torch import Tensor


@dataclass(frozen=True)
class ScaleSchedule:
    """The token maps of next-scale prediction, first scale first.

    Lengths need not grow: HART's scale 0 is a text context of 300 tokens, longer than the scales after it.

    Args:
        sizes: (height, width) of each scale in tokens; lists are accepted (YAML) and stored as tuples.

    Raises:
        ConfigError: no scales, a size that is not a pair of integers, or a size below 1.

    >>> import torch
    >>> schedule = ScaleSchedule.squares((1, 2, 4))
    >>> schedule.lengths, schedule.offsets, schedule.peak_tokens
    ((1, 4, 16), (0, 1, 5, 21), 5)
    >>> schedule.scale_of(torch.tensor([0, 4, 5])).tolist()
    [0, 1, 2]
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(_size(index, size) for index, size in enumerate(self.sizes)))
        if not self.sizes:
            raise ConfigError(
                "a scale schedule needs at least one scale, got none", "write sizes: [[1, 1], [2, 2], ...]"
            )

    @classmethod
    def squares(cls, sides: Iterable[int]) -> ScaleSchedule:
        """Return the schedule of square maps with these sides (VAR's `patch_nums`)."""
        return cls(tuple((side, side) for side in sides))

    @property
    def lengths(self) -> tuple[int, ...]:
        """N_t: tokens of each scale, (K,)."""
        return tuple(height * width for height, width in self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """C_t: tokens of a full cache of one head entering scale t, (K + 1,); offsets[K] = all tokens."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def num_scales(self) -> int:
        """K: number of scales."""
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """T: tokens of all scales, the last one included."""
        return self.offsets[-1]

    @property
    def peak_tokens(self) -> int:
        """P: tokens of a full cache of one head entering the last scale."""
        return self.offsets[-2]

    @property
    def resolution(self) -> str:
        """The last token map, e.g. `64x64`: how tables name the resolution."""
        height, width = self.sizes[-1]
        return f"{height}x{width}"

    def scale_table(self) -> Tensor:
        """Return the scale of every position, long (T,); a fresh tensor on the CPU."""
        import torch

        return torch.repeat_interleave(torch.arange(self.num_scales), torch.tensor(self.lengths))

    def scale_of(self, positions: Tensor) -> Tensor:
        """Return the scale of each position.

        Args:
            positions: integer token positions in 0..T-1, any shape.

        Returns:
            long, same shape and device.

        Raises:
            ValueError: a position outside the schedule (a bug of the caller, never a user's input).
        """
        import torch

        if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= self.num_tokens):
            low, high = int(positions.min()), int(positions.max())
            raise ValueError(f"positions {low}..{high} are outside the schedule's 0..{self.num_tokens - 1}")
        ends = torch.tensor(self.offsets[1:], device=positions.device)
        return torch.bucketize(positions, ends, right=True)


def _size(index: int, size: object) -> tuple[int, int]:
    """Return `size` as (height, width); ConfigError when it is not a pair of positive integers."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(type(side) is int for side in size):
        raise ConfigError(f"scale {index} has size {size!r}, expected two integers", "write a scale as [height, width]")
    if min(size) < 1:
        raise ConfigError(f"scale {index} has size {tuple(size)}, both sides must be at least 1", "remove the scale")
    return size[0], size[1]


@dataclass(frozen=True)
class Geometry:
    """What the KV cache of one model at one resolution looks like: the denominator of every budget.

    Args:
        model: the model's name, as on the command line.
        num_layers: L, layers with a self-attention cache.
        num_heads: H, key/value heads per layer.
        head_dim: D, channels of one head.
        schedule: the token maps.
        sink_scales: S, the first scales, always kept; 0..K-1.
        dtype_bytes: bytes of one stored number (2 for bf16).

    Raises:
        ConfigError: a count below 1, fewer than two scales (then nothing is ever cached), or S outside 0..K-1.
    """

    model: str
    num_layers: int
    num_heads: int
    head_dim: int
    schedule: ScaleSchedule
    sink_scales: int
    dtype_bytes: int = 4

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "dtype_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} of {self.model} is {value!r}", f"{name} must be an integer of at least 1")
        num_scales = self.schedule.num_scales
        if num_scales < 2:
            raise ConfigError(
                f"{self.model} has {num_scales} scale: nothing is ever cached", "a model needs at least two scales"
            )
        if type(self.sink_scales) is not int or not 0 <= self.sink_scales < num_scales:
            raise ConfigError(
                f"sink_scales of {self.model} is {self.sink_scales!r}",
                f"with {num_scales} scales sink_scales must be an integer in 0..{num_scales - 1}",
            )

    @property
    def num_scales(self) -> int:
        """K: number of scales."""
        return self.schedule.num_scales

    @property
    def sources(self) -> range:
        """The source scales that can be removed: S..K-2."""
        return range(self.sink_scales, self.num_scales - 1)

    @property
    def sink_tokens(self) -> int:
        """C_S: tokens of the sink scales in one head."""
        return self.schedule.offsets[self.sink_scales]

    @property
    def heads(self) -> int:
        """L * H: heads of all layers."""
        return self.num_layers * self.num_heads

    @property
    def full_tokens(self) -> int:
        """L * H * P: tokens of the full cache at its peak, all layers and heads, one batch row."""
        return self.heads * self.schedule.peak_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token of one head."""
        return 2 * self.head_dim * self.dtype_bytes

    def full_bytes(self, rows: int) -> int:
        """Return the bytes of the full cache at its peak for `rows` batch rows (guidance rows included)."""
        return self.full_tokens * self.bytes_per_token * rows

    def differences(self, other: Geometry) -> list[str]:
        """Say in which respects a file made for this geometry does not fit `other`; empty when it does.

        The number format is left out: a plan made for one fits the other.
        """
        pairs = [
            ("model", self.model, other.model),
            ("layers x heads", _grid(self), _grid(other)),
            ("head_dim", self.head_dim, other.head_dim),
            ("sink scales", self.sink_scales, other.sink_scales),
            ("scales", _scales(self.schedule), _scales(other.schedule)),
        ]
        found = [f"{name} {mine} / {theirs}" for name, mine, theirs in pairs if mine != theirs]
        if not found and self.schedule != other.schedule:
            found.append(f"scale sizes {self.schedule.sizes} / {other.schedule.sizes}")
        return found

    def __str__(self) -> str:
        return f"{self.model} ({_grid(self)} heads, {_scales(self.schedule)}, {self.sink_scales} sink scales)"


def _grid(geometry: Geometry) -> str:
    return f"{geometry.num_layers} x {geometry.num_heads}"


def _scales(schedule: ScaleSchedule) -> str:
    return f"{schedule.num_scales} scales up to {schedule.resolution}"
