"""What a generation holds in memory, found by running the very code without memory.

The model runs on PyTorch's meta device while a counter follows every storage from its birth to its end; the cache runs
on tokens of width 1 and books into its ledger as always. So no formula repeats what the code does: a plan is right
after the next change as well. The model's attention is skipped: its kernels hold nothing but their output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Keep, Policy, View, Visit
from heatkv_cli.core.pool import KVPool
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.models.base import Sampling, Sketch

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


# ---------------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one batch row: the pool with the method's state, the peak with the transient, and the index tables.

    The index tables do not grow with the rows where all rows hold the same tokens.
    """

    alloc: int
    work: int
    index: int

    @property
    def copied(self) -> int:
        """The transient beside the pool: the current scale and copies."""
        return self.work - self.alloc


class LooksAtKeysError(Exception):
    """The policy decides by what keys say, which a rehearsal does not know."""


def rehearse(geometry: Geometry, policy: Policy) -> CacheBytes:
    """Run all visits of a generation with queries and keys of width 1; the ledger is the ledger's own.

    Raises:
        LooksAtKeysError: the policy asks for keys or attention.
    """
    cache = _Rehearsal(geometry, policy)
    for count in geometry.schedule.lengths:
        tokens = torch.zeros(1, geometry.num_heads, count, 1, dtype=cache.pool.k.dtype)
        for layer in range(geometry.num_layers):
            cache.attend(layer, tokens, tokens, tokens, 1.0)
        cache.end_scale()
    ledger = cache.ledger
    return CacheBytes(ledger.alloc_bytes, ledger.work_peak, ledger.meta_peak)


class _Rehearsal(KVCache):
    """A cache whose tokens are one number wide: slots, tables and ledger are real, attention is that of one query."""

    def __init__(self, geometry: Geometry, policy: Policy):
        dtype = _DTYPES[geometry.dtype_bytes]
        super().__init__(geometry, policy, 1, 1, dtype, "meta")
        self.geometry = replace(geometry, head_dim=1)
        self.pool = KVPool(policy.capacity, 1, 1, dtype)  # the ledger has been told the size of the real one

    def _attend(self, visit: Visit, before: Keep | None) -> Tensor:
        return super()._attend(replace(visit, q=visit.q[:, :, :1]), before)

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
        """Bytes of a batch."""
        return self.fixed + batch * self.each

    @classmethod
    def through(cls, one: int, two: int) -> Growing:
        """From the bytes of one image and of two."""
        return cls(2 * one - two, two - one)


@dataclass(frozen=True)
class Footprint:
    """What a model holds beside the cache.

    Args:
        weights: bytes of each network.
        encoder: bytes of the text encoder, which is freed before the first image.
        blocks: the most that is alive outside of attention.
        attending: what is alive when attention of the last scale begins, the current scale's q, k and v included.
        output: of attention, at the last scale.
        decode: the most that is alive while latents become pixels.
    """

    weights: dict[str, int]
    encoder: int
    blocks: Growing
    attending: Growing
    output: Growing
    decode: Growing


def footprint(make: Callable[[Geometry], Sketch], geometry: Geometry, sampling: Sampling, on_host: bool) -> Footprint:
    """Run a sketch of a model for one image and for two: all else is linear.

    Args:
        make: geometry -> sketch.
        geometry: of the model; only its first and its last two scales are run: the last one has the peak, and the loop
            still holds what the one before has left.
        sampling: whether there are guidance rows.
        on_host: count what the host holds beside the model too: the model will run on a CPU.
    """
    scales = sorted({0, geometry.num_scales - 2, geometry.num_scales - 1})
    few = ScaleSchedule(tuple(geometry.schedule.sizes[s] for s in scales))
    sketch = make(replace(geometry, schedule=few, sink_scales=1))
    cfg, tau = (tuple(values[s] for s in scales) for values in (sampling.cfg, sampling.tau))
    sampling = replace(sampling, cfg=cfg, tau=tau)
    tensors = {name: [*net.parameters(), *net.buffers()] for name, net in sketch.networks.items()}
    known = [tensor for part in tensors.values() for tensor in part]
    one, two = (_run(sketch, sampling, batch, known, on_host) for batch in (1, 2))
    blocks, attending, output, decode = (Growing.through(*pair) for pair in zip(one, two, strict=True))
    weights = {name: sum(tensor.nbytes for tensor in part) for name, part in tensors.items()}
    return Footprint(weights, sketch.encoder_bytes, blocks, attending, output, decode)


def _run(
    sketch: Sketch, sampling: Sampling, batch: int, known: Iterable[Tensor], on_host: bool
) -> tuple[int, int, int, int]:
    """Peak outside of attention, live bytes at its beginning, its output, peak of decoding; of one batch."""
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    with _SkippedAttention(), LiveBytes(known, on_host) as memory:
        seen = _Attention(memory)
        latent = sketch.model.generate(sketch.condition(batch), sampling, seen, generators).latent
        blocks, memory.peak = memory.peak, memory.live
        sketch.model.decode(latent)
    return blocks, seen.live, seen.output, memory.peak


class _Attention:
    """In a cache's place: notes how much is alive when it is called."""

    def __init__(self, memory: LiveBytes):
        self._memory, self.live, self.output = memory, 0, 0

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
    ) -> Tensor:
        self.live, self.output = max(self.live, self._memory.live), max(self.output, q.nbytes)
        return torch.empty_like(q)

    def end_scale(self) -> None: ...


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak, while it is active.

    Args:
        known: tensors that are not counted: the weights.
        on_host: the model will run on a CPU: count the host's storages too, and that a convolution of oneDNN copies its
            input into a layout of its own.

    Attributes:
        live, peak: bytes.
    """

    def __init__(self, known: Iterable[Tensor] = (), on_host: bool = False):
        super().__init__()
        self.live = self.peak = 0
        self._on_host, self._devices = on_host, ("meta", "cpu") if on_host else ("meta",)
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.device.type in self._devices:
                self._count(tensor.untyped_storage())
        if self._on_host and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.live + args[0].nbytes)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _SkippedAttention(TorchFunctionMode):
    """Attention kernels of any back end hold no matrix: their output is all there is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))
