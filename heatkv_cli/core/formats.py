"""Formats: how the keys and values of an atom are written as bytes, exactly as many as promised.

An atom is all tokens of one source scale in one head. A format turns its keys and values (n, D) of each row into a
fixed number of bytes, and bytes into keys and values again:

* `Plain`: 16-bit numbers as they are.
* `Integers(b)`: b-bit integers, b in 8, 4, 3, 2, with a 16-bit scale and minimum per channel of K and per token of V.
* `Summary`: one token that stands for all: the means of keys and values in 8-bit integers.

Integers are asymmetric. Scale and minimum are rounded to float16 before codes are computed; a code is
round-half-even((x - minimum) / scale) in float32, held to 0 .. 2^b - 1. Where all numbers are equal the scale is 0 and
so are the codes. Codes are packed per atom and tensor, the first one in the lowest bits, rounded up once to a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

HALF = 2
"""Bytes of a scale, of a minimum, and of a number of the plain format."""


class Format(Protocol):
    """How an atom is written."""

    @property
    def name(self) -> str:
        """What a plan calls it."""
        ...

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of an atom of `tokens` tokens in one row."""
        ...

    def keys(self, tokens: int) -> int:
        """Keys that attention sees of an atom of `tokens` tokens."""
        ...

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Write atoms. k, v (..., n, D) -> uint8 (..., nbytes)."""
        ...

    def decode(self, data: Tensor, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read atoms. uint8 (..., nbytes) -> k, v (..., keys, D) in `dtype`."""
        ...


@dataclass(frozen=True)
class Plain:
    """16-bit numbers as they are: 4 D bytes a token, keys first. The number format is that of what is written."""

    @property
    def name(self) -> str:
        """What a plan calls it."""
        return "plain"

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of an atom of `tokens` tokens in one row."""
        return 2 * HALF * tokens * head_dim

    def keys(self, tokens: int) -> int:
        """Every token is a key."""
        return tokens

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Write atoms; see `Format.encode`. k, v hold 16-bit numbers."""
        return torch.stack((k, v), -3).flatten(-3).view(torch.uint8)

    def decode(self, data: Tensor, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read atoms; see `Format.decode`. `dtype` is that of what was written."""
        k, v = data.contiguous().view(dtype).unflatten(-1, (2, tokens, head_dim)).unbind(-3)
        return k, v


@dataclass(frozen=True)
class Integers:
    """Integers of `bits` bits: K with a scale and a minimum per channel of the atom, V with one per token.

    2 ceil(n D bits / 8) + 4 D + 4 n bytes: codes of K, codes of V, scales and minima of K, then of V.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 3, 2):
            raise ValueError(f"integers of {self.bits} bits: 8, 4, 3 or 2")

    @property
    def name(self) -> str:
        """What a plan calls it."""
        return f"int{self.bits}"

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of an atom of `tokens` tokens in one row."""
        return 2 * packed_bytes(tokens * head_dim, self.bits) + 2 * HALF * (head_dim + tokens)

    def keys(self, tokens: int) -> int:
        """Every token is a key."""
        return tokens

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Write atoms; see `Format.encode`."""
        parts, grids = [], []
        for x, over in ((k, -2), (v, -1)):
            codes, scale, minimum = quantise(x.float(), self.bits, over)
            parts.append(pack(codes.flatten(-2), self.bits))
            grids.append(torch.cat((scale.flatten(-2), minimum.flatten(-2)), -1).view(torch.uint8))
        return torch.cat((*parts, *grids), -1)

    def decode(self, data: Tensor, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read atoms; see `Format.decode`."""
        size, count = packed_bytes(tokens * head_dim, self.bits), tokens * head_dim
        codes_k, codes_v, grid_k, grid_v = data.split((size, size, 2 * HALF * head_dim, 2 * HALF * tokens), -1)
        out = []
        for codes, grid, shape in ((codes_k, grid_k, (1, head_dim)), (codes_v, grid_v, (tokens, 1))):
            scale, minimum = grid.contiguous().view(torch.float16).float().unflatten(-1, (2, *shape)).unbind(-3)
            x = unpack(codes, self.bits, count).unflatten(-1, (tokens, head_dim)).float()
            out.append(x.mul_(scale).add_(minimum).to(dtype))
        return out[0], out[1]


@dataclass(frozen=True)
class Summary:
    """One token for all of an atom: the means of its keys and values, each in 8-bit integers with one scale.

    2 D + 8 bytes: codes of K, codes of V, scale and minimum of K, then of V. What the softmax sees of it beside its key
    is a bias that the plan holds.
    """

    @property
    def name(self) -> str:
        """What a plan calls it."""
        return "summary"

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of an atom in one row, however many tokens it has."""
        return 2 * head_dim + 4 * HALF

    def keys(self, tokens: int) -> int:
        """One key."""
        return 1

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """Write atoms; see `Format.encode`."""
        parts, grids = [], []
        for x in (k, v):
            codes, scale, minimum = quantise(x.float().mean(-2, keepdim=True), 8, -1)
            parts.append(codes.flatten(-2))
            grids.append(torch.cat((scale.flatten(-2), minimum.flatten(-2)), -1).view(torch.uint8))
        return torch.cat((*parts, *grids), -1)

    def decode(self, data: Tensor, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read atoms; see `Format.decode`."""
        codes_k, codes_v, grids = data.split((head_dim, head_dim, 4 * HALF), -1)
        grids = grids.contiguous().view(torch.float16).float()
        k, v = (
            (codes.float() * grid[..., :1] + grid[..., 1:]).unsqueeze(-2).to(dtype)
            for codes, grid in ((codes_k, grids[..., :2]), (codes_v, grids[..., 2:]))
        )
        return k, v


def quantise(x: Tensor, bits: int, over: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (uint8, as x), scale and minimum (float16, 1 along `over`) of float32 numbers."""
    most = 2**bits - 1
    low, high = x.aminmax(dim=over, keepdim=True)
    minimum, scale = low.half(), ((high - low) / most).half()
    step = scale.float()
    codes = ((x - minimum.float()) / step).round().clamp_(0, most)
    return torch.where(step > 0, codes, 0.0).to(torch.uint8), scale, minimum


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 (..., count) into uint8 (..., packed_bytes), the first code in the lowest bits."""
    if bits == 8:
        return codes
    together, width = _groups(bits)
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % together)).unflatten(-1, (-1, together)).int()
    shifts = torch.arange(together, dtype=torch.int32, device=codes.device) * bits
    words = (padded << shifts).sum(-1, dtype=torch.int32)
    bytes_ = torch.arange(width, dtype=torch.int32, device=codes.device) * 8
    packed: Tensor = ((words.unsqueeze(-1) >> bytes_) & 255).to(torch.uint8).flatten(-2)
    return packed[..., : packed_bytes(count, bits)]


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes, uint8 (..., count), of packed bytes uint8 (..., packed_bytes)."""
    if bits == 8:
        return data
    together, width = _groups(bits)
    if width == 1:
        shifts = torch.arange(together, dtype=torch.uint8, device=data.device) * bits
        codes: Tensor = (data.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(-2)[..., :count]
    padded = torch.nn.functional.pad(data, (0, -data.shape[-1] % width)).unflatten(-1, (-1, width)).int()
    bytes_ = torch.arange(width, dtype=torch.int32, device=data.device) * 8
    words = (padded << bytes_).sum(-1, dtype=torch.int32)
    shifts = torch.arange(together, dtype=torch.int32, device=data.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _groups(bits: int) -> tuple[int, int]:
    """Codes that fill whole bytes together, and how many bytes."""
    return (8, 3) if bits == 3 else (8 // bits, 1)


FORMATS: dict[str, Format] = {
    item.name: item for item in (Plain(), Integers(8), Integers(4), Integers(3), Integers(2), Summary())
}
"""The formats by name, dearest first."""
