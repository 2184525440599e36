"""Formats against a scalar restatement, number by number and bit by bit."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from heatkv_cli.core.formats import FORMATS, Integers, Plain, Summary

SHAPES = [(1, 4), (4, 20), (9, 5), (25, 20), (100, 16), (3, 1), (64, 128)]


def half(x: float) -> float:
    """Nearest float16."""
    return float(struct.unpack("<e", struct.pack("<e", x))[0])


def single(x: float) -> float:
    """Nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def half_even(x: float) -> int:
    floor = math.floor(x)
    rest = x - floor
    return floor + (rest > 0.5 or (rest == 0.5 and floor % 2 == 1))


def scalar_quantise(values: list[float], bits: int) -> tuple[list[int], float, float]:
    most = 2**bits - 1
    minimum, scale = half(min(values)), half(single(single(max(values) - min(values)) / most))
    if scale == 0:
        return [0] * len(values), scale, minimum
    codes = [half_even(single(single(x - minimum) / scale)) for x in values]
    return [min(max(code, 0), most) for code in codes], scale, minimum


def packed(codes: list[int], bits: int) -> list[int]:
    number = sum(code << (place * bits) for place, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


def halves(*values: float) -> list[int]:
    return [byte for value in values for byte in struct.pack("<e", value)]


def literal(k: Tensor, v: Tensor, bits: int) -> tuple[list[int], list[list[float]], list[list[float]]]:
    """Bytes of one atom, and what they decode to."""
    n, d = k.shape
    keys, values = k.float().tolist(), v.float().tolist()
    channels = [scalar_quantise([keys[i][c] for i in range(n)], bits) for c in range(d)]
    tokens = [scalar_quantise(values[i], bits) for i in range(n)]
    codes_k = [channels[c][0][i] for i in range(n) for c in range(d)]
    codes_v = [tokens[i][0][c] for i in range(n) for c in range(d)]
    grid_k = halves(*(channel[1] for channel in channels), *(channel[2] for channel in channels))
    grid_v = halves(*(token[1] for token in tokens), *(token[2] for token in tokens))
    data = packed(codes_k, bits) + packed(codes_v, bits) + grid_k + grid_v
    back_k = [[single(single(channels[c][0][i] * channels[c][1]) + channels[c][2]) for c in range(d)] for i in range(n)]
    back_v = [[single(single(tokens[i][0][c] * tokens[i][1]) + tokens[i][2]) for c in range(d)] for i in range(n)]
    return data, back_k, back_v


def atom(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, *shape, generator=generator) * 3).to(dtype)
    k[:, 0] = 0.75  # a constant channel
    v[0] = -2.0  # a constant token
    return k, v


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_are_the_scalar_ones_bit_for_bit(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    form, (k, v) = Integers(bits), atom(shape, dtype=dtype)
    data, back_k, back_v = literal(k, v, bits)
    encoded = form.encode(k, v)
    assert encoded.tolist() == data and len(data) == form.nbytes(*shape)
    for decoded, back in zip(form.decode(encoded, *shape, dtype), (back_k, back_v), strict=True):
        assert torch.equal(decoded, torch.tensor(back).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_summary_is_the_mean_in_eight_bits(shape: tuple[int, int]) -> None:
    form, (k, v) = Summary(), atom(shape)
    encoded = form.encode(k, v)
    assert len(encoded) == form.nbytes(*shape) == 2 * shape[1] + 8
    grids: list[float] = []
    for x, place in ((k, 0), (v, 1)):
        mean = x.float().mean(0).tolist()  # the sum's order is torch's
        codes, scale, minimum = scalar_quantise(mean, 8)
        assert encoded[place * shape[1] : (place + 1) * shape[1]].tolist() == codes
        grids += [scale, minimum]
        back = form.decode(encoded, *shape, torch.float32)[place]
        expected = [single(single(code * scale) + minimum) for code in codes]
        assert back.shape == (1, shape[1]) and back[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert encoded[2 * shape[1] :].tolist() == halves(*grids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_is_what_it_was(dtype: torch.dtype) -> None:
    k, v = atom((9, 5), dtype=dtype)
    data = Plain().encode(k, v)
    assert len(data) == Plain().nbytes(9, 5) == 4 * 9 * 5
    assert all(map(torch.equal, Plain().decode(data, 9, 5, dtype), (k, v)))


@pytest.mark.parametrize("name", FORMATS)
def test_atoms_of_many_rows_and_heads_are_written_apart(name: str) -> None:
    form = FORMATS[name]
    k, v = torch.randn(2, 2, 3, 6, 10, generator=torch.Generator().manual_seed(1)).half()
    together = form.encode(k, v)
    assert together.shape == (2, 3, form.nbytes(6, 10)) and together.dtype == torch.uint8
    decoded = form.decode(together, 6, 10, torch.float16)
    assert decoded[0].shape == (2, 3, form.keys(6), 10)
    for row in range(2):
        for head in range(3):
            alone = form.encode(k[row, head], v[row, head])
            assert torch.equal(together[row, head], alone)
            again = form.decode(alone, 6, 10, torch.float16)
            assert all(torch.equal(x[row, head], y) for x, y in zip(decoded, again, strict=True))


def test_the_error_is_at_most_half_a_step() -> None:
    """And the rounding of the grid to 16 bits, and of the result."""
    k, v = (torch.rand(2, 40, 30, generator=torch.Generator().manual_seed(2)) * 4 - 2).half()
    for bits in (8, 4, 3, 2):
        back = Integers(bits).decode(Integers(bits).encode(k, v), 40, 30, torch.float32)
        for x, y, over in ((k, back[0], 0), (v, back[1], 1)):
            step = (x.float().amax(over, True) - x.float().amin(over, True)) / (2**bits - 1)
            slack = 2**-10 * (4 + 2**bits * step)  # of minimum, and of scale times the largest code
            assert bool(((x.float() - y).abs() <= step / 2 + slack).all())


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        Integers(5)
