"""Index arithmetic of one layer against plain lists."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from heatkv_cli.core.table import LayerTable

Lists = list[list[tuple[int, tuple[int, ...]]]]  # head -> [(slot, position in each row)]


def from_lists(heads: Lists, rows: int) -> LayerTable:
    flat = [token for head in heads for token in head]
    return LayerTable(
        tuple(map(len, heads)),
        torch.tensor([slot for slot, _ in flat], dtype=torch.int32),
        torch.tensor([[positions[r] for _, positions in flat] for r in range(rows)], dtype=torch.int32).view(rows, -1),
    )


def to_lists(table: LayerTable) -> Lists:
    assert table.slots.dtype == table.positions.dtype == torch.int32
    flat = list(zip(table.slots.tolist(), map(tuple, table.positions.T.tolist()), strict=True))
    heads, start = [], 0
    for length in table.lengths:
        heads.append(flat[start : start + length])
        start += length
    assert start == len(flat)
    return heads


def some_lists(dice: random.Random, rows: int, longest: int = 5) -> Lists:
    slots = list(range(100))
    dice.shuffle(slots)
    return [
        [(slots.pop(), tuple(dice.randrange(50) for _ in range(rows))) for _ in range(dice.randint(0, longest))]
        for _ in range(dice.randint(1, 5))
    ]


cases = pytest.mark.parametrize(("seed", "rows"), [(seed, rows) for seed in range(5) for rows in (1, 3)])


def padded(heads: Lists, rows: int) -> Tensor:
    width = max(map(len, heads))
    out = torch.full((rows, len(heads), width), -1, dtype=torch.int32)
    for h, tokens in enumerate(heads):
        for i, (_, positions) in enumerate(tokens):
            out[:, h, i] = torch.tensor(positions, dtype=torch.int32)
    return out


@cases
def test_positions_are_padded_with_minus_one(seed: int, rows: int) -> None:
    heads = some_lists(random.Random(seed), rows)
    assert torch.equal(from_lists(heads, rows).padded_positions(), padded(heads, rows))


@cases
def test_groups_hold_each_head_once(seed: int, rows: int) -> None:
    heads = some_lists(random.Random(seed), rows)
    seen: list[int] = []
    for members, slots in from_lists(heads, rows).groups():
        assert members == sorted(members)
        assert len({len(heads[h]) for h in members}) == 1
        assert slots.tolist() == [slot for h in members for slot, _ in heads[h]]
        seen += members
    assert sorted(seen) == list(range(len(heads)))


@cases
def test_filtering(seed: int, rows: int) -> None:
    dice = random.Random(seed)
    heads = some_lists(dice, rows)
    keep = torch.rand(len(heads), max(map(len, heads)), generator=torch.Generator().manual_seed(seed)) < 0.6
    table, dropped = from_lists(heads, rows).filtered(keep)
    left = [[t for i, t in enumerate(tokens) if keep[h, i]] for h, tokens in enumerate(heads)]
    gone = [t[0] for h, tokens in enumerate(heads) for i, t in enumerate(tokens) if not keep[h, i]]
    assert to_lists(table) == left
    assert dropped.tolist() == gone


@cases
def test_appending(seed: int, rows: int) -> None:
    dice = random.Random(seed)
    heads = some_lists(dice, rows)
    positions = torch.arange(60, 64, dtype=torch.int32)
    chosen = torch.rand(len(heads), 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    slots = torch.arange(200, 200 + int(chosen.sum()), dtype=torch.int32)
    table = from_lists(heads, rows).appended(slots, positions, chosen)
    fresh = iter(slots.tolist())
    expected = [
        tokens + [(next(fresh), (int(positions[i]),) * rows) for i in range(4) if chosen[h, i]]
        for h, tokens in enumerate(heads)
    ]
    assert to_lists(table) == expected


def test_an_empty_table() -> None:
    table = LayerTable.empty(3)
    assert table.padded_positions().shape == (1, 3, 0)
    assert [(heads, slots.tolist()) for heads, slots in table.groups()] == [([0, 1, 2], [])]
    assert table.index_bytes == 0


def test_nothing_is_copied_where_everything_stays() -> None:
    table = from_lists([[(1, (5,))], [(2, (5,)), (3, (6,))]], 1)
    same, dropped = table.filtered(torch.ones(2, 2, dtype=torch.bool))
    assert same is table
    assert len(dropped) == 0


def test_index_bytes_count_int32() -> None:
    heads = some_lists(random.Random(3), 3)
    tokens = sum(map(len, heads))
    assert from_lists(heads, 3).index_bytes == 4 * (tokens + 3 * tokens)
