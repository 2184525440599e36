"""beta_work is what a visit holds: all tensors are found on the heap after every operation."""

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
from heatkv_cli.core.live_bytes import LiveBytes, Watched
from heatkv_cli.core.policy import Policy
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.methods.cake import CAKE
from heatkv_cli.methods.full import Full
from heatkv_cli.methods.h2o import H2O
from heatkv_cli.methods.hack import Hack
from heatkv_cli.methods.heatkv import HeatKV
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
    """The most bytes that tensors take which were not there before, weighed after every single operation."""

    def __init__(self) -> None:
        super().__init__()
        self.before = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor]
        self.known = {storage.data_ptr() for storage in self.before}  # they live as long as this, and keep their places
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor]
        found = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in self.known}
        self.peak = max(self.peak, sum(found.values()))
        return out


METHODS: list[Method] = [
    Full(),
    HeatKV(order="random"),
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


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_watched_visit_holds_what_is_on_the_heap(method: Method) -> None:
    """Two ways to count, at every visit of a generation: by births and ends of storages, and by walking the heap."""
    budget = Budget.parse("1" if method == Full() else "0.3")
    setting = Setting(GEOMETRY, budget, ROWS, calibration=calibration() if method.calibrated else None)
    cache = KVCache(GEOMETRY, method.policy(setting), ROWS, 1, budget=budget)
    watched, generator, most = Watched(cache), torch.Generator().manual_seed(0), 0
    for tokens in GEOMETRY.schedule.lengths:
        for layer in range(GEOMETRY.num_layers):
            q, k, v = torch.randn(3, ROWS, GEOMETRY.num_heads, tokens, GEOMETRY.head_dim, generator=generator).unbind()
            cache.ledger.work_peak = None
            with Heap() as heap:
                watched.attend(layer, q, k, v, 0.35)
            assert cache.ledger.work_peak == cache.ledger.alloc_bytes + k.nbytes + v.nbytes + heap.peak
            most = max(most, heap.peak)
        watched.end_step()
    assert most > cache.ledger.alloc_bytes / 4


def test_a_watched_cache_answers_as_the_cache_itself() -> None:
    answers = []
    for watch in (False, True):
        cache, generator = KVCache(GEOMETRY, Policy(GEOMETRY.full_tokens), ROWS, 1), torch.Generator().manual_seed(0)
        seam = Watched(cache) if watch else cache
        for tokens in GEOMETRY.schedule.lengths:
            for layer in range(GEOMETRY.num_layers):
                q, k, v = torch.randn(3, ROWS, 3, tokens, 8, generator=generator)
                answers.append(seam.attend(layer, q, k, v, 0.35))
            seam.end_step()
        assert ("beta_work" in cache.ledger.ratios()) == watch
    half = len(answers) // 2
    assert all(map(torch.equal, answers[:half], answers[half:]))


def test_live_bytes_follow_every_storage() -> None:
    known = torch.empty(100, device="meta")
    with LiveBytes() as memory:
        a = torch.empty(10, device="meta")  # 40
        b = a + 1  # 80
        view = b[2:]
        del b
        assert (memory.live, memory.peak) == (80, 80)  # the view holds it
        del view
        assert memory.live == 40
        c = known * 2
        assert (memory.live, memory.peak) == (440, 440)
        del a, c
        torch.empty(5)  # the host's
    assert (memory.live, memory.peak) == (0, 440)
