"""Bytes and ratios of a generation, computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heatkv_cli.core.ledger import Ledger
from heatkv_cli.core.scales import Geometry, ScaleSchedule

ROWS, CAPACITY = 4, 50
GEOMETRY = Geometry("toy", 2, 3, 8, ScaleSchedule.squares((1, 2, 3)), 1, dtype_bytes=2)  # P = 5, T = 14
SLOT = ROWS * 2 * 8 * 2  # rows, K and V, head dim, bfloat16


def ledger(state_bytes: int = 0) -> Ledger:
    return Ledger(GEOMETRY, ROWS, CAPACITY * SLOT, state_bytes)


def test_allocated_bytes_hold_the_method_s_state() -> None:
    assert ledger().alloc_bytes == CAPACITY * SLOT
    assert ledger(state_bytes=4).alloc_bytes == CAPACITY * (SLOT + ROWS * 4)
    assert ledger(state_bytes=4).token_bytes == SLOT + ROWS * 4
    assert Ledger(GEOMETRY, ROWS, 0, 4).alloc_bytes == 0


def test_peaks_do_not_fall() -> None:
    made = ledger(state_bytes=4)
    for used, index in [(10, 100), (30, 50), (20, 70)]:
        made.visited(used, index)
    assert made.used_slots == 20
    assert made.live_peak == 30 * (SLOT + ROWS * 4)
    assert made.meta_peak == 100
    made.worked(7)
    made.worked(3)
    assert made.work_peak == made.alloc_bytes + 7


def test_ratios() -> None:
    made = ledger()
    made.visited(15, 60)
    assert "beta_work" not in made.ratios()
    made.worked(9)
    made.attending(1, [3, 4, 5])
    made.attending(2, [1, 1, 1])
    full = 2 * 3 * 5 * SLOT  # layers, heads, P
    everything = 2 * 3 * (1 + 5 + 14)  # what a full cache attends to at scale 0, 1, 2
    assert made.ratios() == pytest.approx(
        {
            "beta_live": 15 * SLOT / full,
            "beta_alloc": CAPACITY * SLOT / full,
            "beta_work": (CAPACITY * SLOT + 9) / full,
            "beta_meta": 60 / full,
            "attended_tokens": 15,
            "attended_ratio": 15 / everything,
        }
    )


def test_flops_are_those_torch_counts() -> None:
    made, each = ledger(), []
    for scale, keys in enumerate([(1, 1, 1), (5, 4, 5), (14, 9, 10)]):
        made.attending(scale, keys)
        with FlopCounterMode(display=False) as counter:
            for count in keys:
                q, k = torch.ones(ROWS, 1, GEOMETRY.schedule.lengths[scale], 8), torch.ones(ROWS, 1, count, 8)
                with sdpa_kernel(SDPBackend.MATH):
                    torch.nn.functional.scaled_dot_product_attention(q, k, k)
        each.append(counter.get_total_flops())
    assert made.attention_flops == each
