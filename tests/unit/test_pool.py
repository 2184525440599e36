"""The slot pool: a fixed size that is never exceeded, distinct slots, nothing lost."""

from __future__ import annotations

import random

import pytest
import torch

from heatkv_cli.core.pool import KVPool
from heatkv_cli.errors import BudgetError


def pool(capacity: int = 10, rows: int = 2, head_dim: int = 4, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(capacity, rows, head_dim, dtype)


def test_it_is_allocated_once_at_its_full_size() -> None:
    made = pool(capacity=10, rows=3, head_dim=4)
    assert made.k.shape == made.v.shape == (3, 10, 4)
    assert made.slot_bytes == 2 * 3 * 4 * 4  # K and V, rows, head dim, float32
    assert made.allocated_bytes == 10 * made.slot_bytes == made.k.nbytes + made.v.nbytes
    addresses = made.k.data_ptr(), made.v.data_ptr()
    made.write(made.take(10), torch.ones(3, 10, 4), torch.ones(3, 10, 4))
    assert (made.k.data_ptr(), made.v.data_ptr()) == addresses
    assert pool(dtype=torch.bfloat16).allocated_bytes == pool().allocated_bytes // 2


def test_asking_for_too_much_says_how_much_there_is() -> None:
    made = pool(capacity=10)
    made.take(7)
    with pytest.raises(BudgetError, match=r"asked for 4 more token slots, 3 of 10 are free") as error:
        made.take(4)
    assert error.value.hint
    assert (made.used, made.peak) == (7, 7)  # a refused request changes nothing
    assert len(made.take(3)) == 3
    with pytest.raises(BudgetError, match="asked for 1 more"):
        made.take(1)


def test_an_empty_pool_serves_nothing() -> None:
    made = pool(capacity=0)
    assert (made.used, made.allocated_bytes, len(made.take(0))) == (0, 0, 0)
    with pytest.raises(BudgetError, match="0 of 0 are free"):
        made.take(1)


def test_what_is_written_is_read_back_in_any_order() -> None:
    made = pool(capacity=6, rows=2, head_dim=3)
    first, second = made.take(4), made.take(2)
    k, v = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    made.write(first, k[:, :4], v[:, :4])
    made.write(second, k[:, 4:], v[:, 4:])
    order = torch.tensor([5, 0, 3, 3, 1])
    read_k, read_v = made.read(torch.cat((first, second))[order])
    assert torch.equal(read_k, k[:, order])
    assert torch.equal(read_v, v[:, order])
    assert read_k.untyped_storage().data_ptr() != made.k.untyped_storage().data_ptr()  # a copy


@pytest.mark.parametrize("seed", range(20))
def test_slots_are_distinct_and_none_is_lost(seed: int) -> None:
    """Random takes and gives; whatever is out is out exactly once."""
    dice = random.Random(seed)
    made = pool(capacity=dice.choice([1, 7, 40]))
    out: list[int] = []
    peak = 0
    for _ in range(200):
        if dice.random() < 0.5:
            count = dice.randint(0, made.capacity)
            if count > made.capacity - len(out):
                with pytest.raises(BudgetError):
                    made.take(count)
            else:
                slots = made.take(count)
                assert slots.dtype == torch.int32
                out += slots.tolist()
        else:
            dice.shuffle(out)
            count = dice.randint(0, len(out))
            made.give(torch.tensor(out[:count], dtype=torch.int32))
            del out[:count]
        peak = max(peak, len(out))
        assert len(set(out)) == len(out) == made.used
        assert set(out) <= set(range(made.capacity))
        assert made.peak == peak
    made.give(torch.tensor(out, dtype=torch.int32))
    assert made.used == 0
    assert sorted(made.take(made.capacity).tolist()) == list(range(made.capacity))
