"""Bytes are real: tensors that hold keys or values are found on the heap and weighed, without asking the cache.

Keys and values are tagged: every entry of K is +-2000, every entry of V +-1000. A tensor whose storage consists of
such numbers holds K or V, whoever made it. The garbage collector lists all tensors of the process; their storages are
compared with what the ledger says is allocated.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from heatkv_cli.core.attention import concat_current
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, Visit
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.methods.full import Full
from heatkv_cli.methods.heatkv import HeatKV
from heatkv_cli.methods.heatkv.schedule import Schedule
from heatkv_cli.methods.sinks import Sinks
from heatkv_cli.methods.streaming import Streaming
from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.sampling import Sampling
from heatkv_cli.models.infinity.tokenizer import Codes, Tokenizer, TokenizerConfig
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig, Text

K_TAG, V_TAG, ROWS = 2000.0, 1000.0, 2
GEOMETRY = Geometry("toy", 3, 4, 8, ScaleSchedule.squares((1, 2, 3, 4, 5, 6)), 1)
CASES: list[tuple[Method, str]] = [
    (Full(), "1"),
    (HeatKV(order="random"), "1"),
    (HeatKV(order="random"), "0.3"),
    (HeatKV(order="random"), "0.1"),
    (Streaming(), "0.3"),
    (Streaming(), "0.1"),
    (Sinks(), "0.1"),
]
cases = pytest.mark.parametrize(("method", "text"), CASES, ids=lambda value: str(value))


def policy_of(method: Method, text: str) -> tuple[Policy, Schedule | None]:
    budget = Budget.parse(text)
    schedule = method.plan(Setting(GEOMETRY, budget, ROWS)) if method.plan_type else None
    return method.policy(Setting(GEOMETRY, budget, ROWS, plan=schedule)), schedule  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def heap() -> Iterator[None]:
    """Hide what was there before from `gc.get_objects`: other tests' tensors, and a million objects to walk over."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def storages(ignore: Iterable[Tensor] = ()) -> dict[int, Tensor]:
    """All float storages that some living tensor looks at, by address, each as rows of a head's width."""
    found: dict[int, Tensor] = {}
    skip = {x.untyped_storage().data_ptr() for x in ignore}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.is_floating_point():
            storage = thing.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in skip:
                found[storage.data_ptr()] = torch.empty(0, dtype=thing.dtype).set_(storage)
    return found


def tagged(flat: Tensor) -> Tensor:
    """Which entries are a key's or a value's."""
    return (flat.abs() == K_TAG) | (flat.abs() == V_TAG)


def held_bytes(cache: KVCache | None = None) -> int:
    """Bytes of all storages with a whole key or value vector in them; the pool counts, whatever is in its slots."""
    pool = [] if cache is None else [x for x in (cache.pool.k, cache.pool.v) if x.numel()]
    total = sum(x.untyped_storage().nbytes() for x in pool)
    for flat in storages(ignore=pool).values():
        whole = len(flat) - len(flat) % 8
        total += flat.nbytes if bool(tagged(flat[:whole]).view(-1, 8).all(-1).any()) else 0
    return total


def tag(shape: tuple[int, ...], value: float, generator: torch.Generator) -> Tensor:
    return value * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1)


def generate(cache: KVCache, after_visit: Callable[[int, int], None] = lambda scale, layer: None) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale, tokens in enumerate(GEOMETRY.schedule.lengths):
        for layer in range(GEOMETRY.num_layers):
            shape = (ROWS, GEOMETRY.num_heads, tokens, GEOMETRY.head_dim)
            q = torch.randn(shape, generator=generator) * 1e-4
            cache.attend(layer, q, tag(shape, K_TAG, generator), tag(shape, V_TAG, generator), 1.0)
            after_visit(scale, layer)
        cache.end_step()


class Scale:
    """Observer: weighs keys and values in the middle of every visit."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []  # scale, current tokens of all heads, bytes
        self.cache: KVCache | None = None

    def observe(self, visit: Visit) -> None:
        if visit.scale:  # at scale 0 there is one key: attention's output is V
            self.seen.append((visit.scale, visit.k.shape[1] * visit.k.shape[2], held_bytes(self.cache)))


def weigh_visits(cache: KVCache) -> set[int]:
    """Bytes on the heap after each visit of a generation."""
    weighed: list[int] = []
    generate(cache, lambda *_: weighed.append(held_bytes(cache)))
    assert len(weighed) == GEOMETRY.num_layers * GEOMETRY.num_scales
    return set(weighed)


@cases
def test_nothing_but_the_pool_survives_a_visit(method: Method, text: str) -> None:
    assert held_bytes() == 0
    policy, _ = policy_of(method, text)
    cache = KVCache(GEOMETRY, policy, ROWS, 1)
    assert weigh_visits(cache) == {cache.ledger.alloc_bytes}
    assert cache.ledger.alloc_bytes == cache.pool.k.nbytes + cache.pool.v.nbytes
    assert cache.ledger.alloc_bytes <= 1.005 * Fraction(text) * GEOMETRY.full_bytes(ROWS)
    pool, keys = weakref.ref(cache.pool), weakref.ref(cache.pool.k)
    del cache
    assert pool() is None  # by reference counting alone: no cycle keeps it until the next collection
    assert keys() is None
    assert held_bytes() == 0


@cases
def test_during_a_visit_there_is_the_current_scale_beside_the_pool(method: Method, text: str) -> None:
    policy, _ = policy_of(method, text)
    scale = Scale()
    cache = KVCache(GEOMETRY, policy, ROWS, 1, observers=(scale,))
    scale.cache = cache
    generate(cache)
    assert len(scale.seen) == GEOMETRY.num_layers * (GEOMETRY.num_scales - 1)
    for at, current, weighed in scale.seen:
        assert weighed == cache.ledger.alloc_bytes + current * ROWS * GEOMETRY.bytes_per_token, f"scale {at}"
    scale.cache = None


@cases
def test_used_slots_hold_what_the_ledger_says(method: Method, text: str) -> None:
    """Occupancy, counted in the pool itself: free slots are painted over after every visit."""
    policy, _ = policy_of(method, text)
    cache, peak = KVCache(GEOMETRY, policy, ROWS, 1), 0
    cache.pool.k.fill_(math.nan), cache.pool.v.fill_(math.nan)

    def count(scale: int, layer: int) -> None:
        nonlocal peak
        used = torch.cat([table.slots for table in cache.tables]).long()
        free = torch.ones(cache.pool.capacity, dtype=torch.bool).index_fill_(0, used, False)
        cache.pool.k[:, free], cache.pool.v[:, free] = math.nan, math.nan
        written = (cache.pool.k.abs() == K_TAG).all(-1) & (cache.pool.v.abs() == V_TAG).all(-1)
        assert bool((written == ~free).all())  # in every row
        live = int(written.sum()) * GEOMETRY.bytes_per_token
        peak = max(peak, live)
        assert cache.ledger.live_peak == peak

    generate(cache, count)
    assert bool(cache.pool.k.isnan().all())


class Looks(Policy):
    """Copies its layer's keys before and after attention, and keeps half of them, others in each row."""

    def before_attend(self, visit: Visit) -> Keep | None:
        visit.view()
        return None

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        count = visit.view().k.shape[2] // 2 * 2
        even = torch.arange(count) % 2 == 0
        mask = torch.ones(ROWS, GEOMETRY.num_heads, visit.positions().shape[2], dtype=torch.bool)
        mask[0, :, :count], mask[1, :, :count] = even, ~even
        return (Keep(visit.layer, mask=mask),)


@pytest.mark.parametrize("backend", ["grouped", "masked"])
def test_policies_that_copy_leave_nothing_behind(backend: str) -> None:
    cache = KVCache(GEOMETRY, Looks(GEOMETRY.full_tokens), ROWS, 1, backend=backend)
    assert weigh_visits(cache) == {cache.ledger.alloc_bytes}


class Uneven(Policy):
    """Heads of three lengths; looks at all their keys."""

    def __init__(self) -> None:
        super().__init__(GEOMETRY.full_tokens)

    def before_attend(self, visit: Visit) -> Keep | None:
        visit.by_column(visit.q, lambda q, keys: keys.sum(-1))
        return None

    def after_attend(self, visit: Visit) -> Iterable[Keep]:
        segments = torch.ones(GEOMETRY.num_heads, GEOMETRY.num_scales, dtype=torch.bool)
        for head in range(GEOMETRY.num_heads):
            segments[head, : head % 3] = False
        return (Keep(visit.layer, atoms=segments),)


def test_keys_of_one_group_are_gone_when_the_next_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, weighed = KVCache(GEOMETRY, Uneven(), ROWS, 1), []

    def spy(history: Tensor, current: Tensor, heads: Sequence[int]) -> Tensor:
        if cache.scale:
            scale = 2 * current.nbytes  # the current keys and values
            weighed.append((held_bytes(cache) - cache.ledger.alloc_bytes - scale, history.nbytes))
        return concat_current(history, current, heads)

    monkeypatch.setattr("heatkv_cli.core.cache.concat_current", spy)
    generate(cache)
    assert len(weighed) > 2 * GEOMETRY.num_layers * (GEOMETRY.num_scales - 1)
    assert all(measured == history for measured, history in weighed)


class Tagging:
    """The seam with tagged keys and values in place of the model's; weighs the heap at every visit and scale."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.generator = cache, torch.Generator().manual_seed(0)
        self.weighed: list[int] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        k, v = (tag(tuple(k.shape), value, self.generator) for value in (K_TAG, V_TAG))
        y = self.cache.attend(layer, q * 1e-4, k, v, softmax_scale)
        del k, v
        y = y / V_TAG
        self.weighed.append(held_bytes(self.cache))
        return y

    def end_step(self) -> None:
        self.cache.end_step()
        self.weighed.append(held_bytes(self.cache))


@pytest.mark.parametrize("text", ["1", "0.1"])
def test_a_model_s_generation_holds_the_pool_alone(text: str) -> None:
    geometry = Geometry("small", 2, 4, 16, ScaleSchedule.squares((1, 2, 3, 4)), 1)
    torch.manual_seed(0)
    codes, tokenizer = Codes(4), Tokenizer(TokenizerConfig(4, 8, (1, 1), 4, 2))
    transformer = Infinity(InfinityConfig(2, 64, 4, 1, codes, text_channels=128, text_length=5))
    model = InfinityModel(geometry, transformer.eval().requires_grad_(False), tokenizer, None, (4, 4))
    method, budget = HeatKV(order="random"), Budget.parse(text)
    policy = method.policy(Setting(geometry, budget, 4))
    seam = Tagging(KVCache(geometry, policy, 4, 2))
    sampling, prompts = Sampling((2.0,) * 4, (1.0,) * 4), Text.pack([torch.randn(5, 128), torch.randn(3, 128)])
    trace = model.generate(prompts, sampling, seam, [torch.Generator().manual_seed(i) for i in range(2)])
    assert set(seam.weighed) == {seam.cache.ledger.alloc_bytes}
    assert len(seam.weighed) == 2 * 4 + 4
    del seam
    assert held_bytes() == 0
    assert trace.latent.isfinite().all()
