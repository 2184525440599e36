"""What methods hold while they choose is in beta_work: all tensors are found on the heap after every operation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.methods.cake import CAKE
from heatkv_cli.methods.h2o import H2O
from heatkv_cli.methods.hack import Hack
from heatkv_cli.methods.lookm import LookM
from heatkv_cli.methods.meda import MEDA
from heatkv_cli.methods.pyramidkv import PyramidKV
from heatkv_cli.methods.scalekv import ScaleKV
from heatkv_cli.methods.snapkv import SnapKV
from heatkv_cli.methods.streaming import Streaming

ROWS = 2
GEOMETRY = Geometry("toy", 2, 3, 8, ScaleSchedule.squares((1, 3, 6, 8, 10)), 1)


@pytest.fixture(autouse=True)
def heap() -> Iterator[None]:
    """Hide what was there before from `gc.get_objects`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Heap(TorchDispatchMode):
    """Notes the most bytes that tensors beside the known ones take, after every single operation."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.weigh()
        return out

    def weigh(self) -> None:
        found = {}
        for thing in gc.get_objects():
            if type(thing) is Tensor:
                storage = thing.untyped_storage()
                if storage.data_ptr() not in self.known:
                    found[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(found.values()))


METHODS = [
    SnapKV(),
    SnapKV(window=1),
    SnapKV(pooling="max", share_cfg=True),
    PyramidKV(),
    CAKE(),
    CAKE(window=1),
    H2O(),
    H2O(n_obs=4, share_cfg=True),
    Streaming(),
    LookM(),
    LookM(merge="weighted", share_cfg=True),
    LookM(merge="none", timing="before"),
    MEDA(),
    MEDA(timing="before"),
    ScaleKV(),
    ScaleKV(share_cfg=True),
    Hack(),
    Hack(share_cfg=True, queries="full"),
    Hack(timing="after"),
]


def calibration() -> Calibration:
    g, K = torch.Generator().manual_seed(1), GEOMETRY.num_scales
    heads = GEOMETRY.num_layers, GEOMETRY.num_heads
    shapes = {"scas": (*heads, K, K), "variance": heads, "asi": (heads[0], K), "entropy": (*heads, K)}
    shapes["history_mass"] = shapes["entropy"]
    values = {name: torch.rand(1, *shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return Calibration(GEOMETRY, "prompts", (0,), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0.3"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scores_are_charged(method: Method, text: str) -> None:
    """At every visit the bytes booked while the policy decides are no less than there are, stored state aside."""
    budget = Budget.parse(text)
    policy = method.policy(Setting(GEOMETRY, budget, ROWS, calibration=calibration() if method.calibrated else None))
    cache = KVCache(GEOMETRY, policy, ROWS, 1, budget=budget)
    generator, chosen = torch.Generator().manual_seed(0), 0
    place = "before_attend" if getattr(method, "timing", "after") == "before" else "after_attend"
    decide = getattr(policy, place)

    def weighed(visit: Visit) -> Any:
        nonlocal chosen
        cache.ledger.work_peak = 0
        tables = [x for table in cache.tables for x in (table.slots, table.positions)]
        heap = Heap([cache.pool.k, cache.pool.v, cache.pool._free, visit.q, visit.k, visit.v, *tables])
        with heap:
            heap.weigh()
            before, heap.peak = heap.peak, 0  # state of earlier visits
            keeps = decide(visit)
        if keeps:
            chosen += 1
            current = visit.k.nbytes + visit.v.nbytes
            booked = cache.ledger.work_peak - cache.ledger.alloc_bytes - current
            assert heap.peak - before <= booked
        return keeps

    setattr(policy, place, weighed)
    for tokens in GEOMETRY.schedule.lengths:
        for layer in range(GEOMETRY.num_layers):
            q, k, v = torch.randn(3, ROWS, GEOMETRY.num_heads, tokens, GEOMETRY.head_dim, generator=generator)
            cache.attend(layer, q, k, v, 0.35)
        cache.end_scale()
    assert chosen
    assert type(cache.policy) is not Policy
