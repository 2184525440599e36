"""The bytes that a generation holds, found by running the very code without memory.

Model and cache run on PyTorch's meta device while a counter follows every storage from its birth to its end. So no
formula repeats what the code does: a plan is right after the next change as well. Attention itself is skipped: its
kernels hold nothing but their output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.live_bytes import LiveBytes, Watched
from heatkv_cli.core.policy import Policy, View
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.base import Sampling, Sketch

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


# ---------------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one batch row.

    Args:
        alloc: the pool with the method's state.
        work: the pool and what a visit holds beside it at its peak, the current keys and values included.
        index: tables of the host; they do not grow with the rows where all rows hold the same tokens.
    """

    alloc: int
    work: int
    index: int

    @property
    def beside(self) -> int:
        """The most that a visit holds beside the pool, the current keys and values included."""
        return self.work - self.alloc


class LooksAtKeysError(Exception):
    """The policy decides by what keys say, which a rehearsal does not know."""


def rehearse(geometry: Geometry, policy: Policy) -> CacheBytes:
    """Run all visits of a generation on the meta device; the ledger is the ledger's own.

    Raises:
        LooksAtKeysError: the policy asks for keys or attention.
    """
    cache = _Rehearsal(geometry, policy, 1, 1, _DTYPES[geometry.dtype_bytes], "meta")
    watched = Watched(cache)
    with _SkippedAttention():
        for count in geometry.schedule.lengths:
            tokens = cache.pool.k.new_empty(1, geometry.num_heads, count, geometry.head_dim)
            for layer in range(geometry.num_layers):
                watched.attend(layer, tokens, tokens, tokens, 1.0)
            watched.end_step()
    ledger = cache.ledger
    assert ledger.work_peak is not None  # it was watched
    return CacheBytes(ledger.alloc_bytes, ledger.work_peak, ledger.meta_peak)


class _Rehearsal(KVCache):
    """A cache without keys and values: slots, tables and ledger are real."""

    def view(self, layer: int, heads: Tensor | None = None) -> View:
        raise LooksAtKeysError

    def keys(self, layer: int, heads: Sequence[int]) -> NoReturn:
        raise LooksAtKeysError


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Growing:
    """Bytes that grow with the images of a batch."""

    fixed: int
    each: int

    def of(self, batch: int) -> int:
        """Return the bytes of a batch."""
        return self.fixed + batch * self.each

    @classmethod
    def through(cls, one: int, two: int) -> Growing:
        """From the bytes of one image and of two."""
        return cls(2 * one - two, two - one)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model holds beside the cache.

    Args:
        weights: bytes of each network.
        encoder: bytes of the text encoder, which is freed before the first image.
        blocks: the most that is alive outside of attention.
        attending: the most that is alive when attention begins, without the current keys and values.
        decode: the most that is alive while latents become pixels.
    """

    weights: dict[str, int]
    encoder: int
    blocks: Growing
    attending: Growing
    decode: Growing


def footprint(make: Callable[[Geometry], Sketch], geometry: Geometry, sampling: Sampling, on_host: bool) -> Footprint:
    """Run a sketch of a model for one image and for two: all else is linear.

    Args:
        make: geometry -> sketch.
        geometry: shape of the model's cache; only its first and its last two scales are run: the last one has the
            peak, and the loop still holds what the one before has left.
        sampling: whether there are guidance rows.
        on_host: count what the host holds beside the model too: the model will run on a CPU.
    """
    scales = sorted({0, geometry.num_scales - 2, geometry.num_scales - 1})
    few = ScaleSchedule(tuple(geometry.schedule.sizes[s] for s in scales))
    sketch = make(replace(geometry, schedule=few, sink_scales=1))
    sampling = sampling.at(scales)
    tensors = {name: [*net.parameters(), *net.buffers()] for name, net in sketch.networks.items()}
    one, two = (_run(sketch, sampling, batch, on_host) for batch in (1, 2))
    blocks, attending, decode = (Growing.through(*pair) for pair in zip(one, two, strict=True))
    weights = {name: sum(tensor.nbytes for tensor in part) for name, part in tensors.items()}
    return Footprint(weights, sketch.encoder_bytes, blocks, attending, decode)


def _run(sketch: Sketch, sampling: Sampling, batch: int, on_host: bool) -> tuple[int, int, int]:
    """Peak outside of attention, live bytes at its beginning, peak of decoding; of one batch."""
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    with _SkippedAttention(), _HostBytes() if on_host else LiveBytes() as memory:
        seen = _Attention(memory)
        latent = sketch.model.generate(sketch.condition(batch), sampling, seen, generators).latent
        blocks, memory.peak = memory.peak, memory.live
        sketch.model.decode(latent)
    return blocks, seen.live, memory.peak


class _Attention:
    """In a cache's place: notes how much is alive when it is called."""

    def __init__(self, memory: LiveBytes):
        self._memory, self.live = memory, 0

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
    ) -> Tensor:
        self.live = max(self.live, self._memory.live - k.nbytes - v.nbytes)
        return torch.empty_like(q)

    def end_step(self) -> None: ...


class _HostBytes(LiveBytes):
    """Live bytes of a model on a CPU, where a convolution of oneDNN copies its input into a layout of its own."""

    def __init__(self) -> None:
        super().__init__(("meta", "cpu"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it made and copied."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.live + args[0].nbytes)
        return made


class _SkippedAttention(TorchFunctionMode):
    """Attention kernels of any back end hold no matrix: their output is all there is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))
