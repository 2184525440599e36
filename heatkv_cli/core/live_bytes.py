"""How many bytes are alive: storages counted from birth to end, and the most a visit of the cache holds.

Nobody books what a policy or a kernel's wrapper copies; it is measured, for any code.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from heatkv_cli.core.cache import KVCache


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is active and are alive, and their peak.

    A storage that an operation reads before any has made it was there before. A kernel's own scratch is not seen.

    Args:
        devices: types of the devices whose storages count.

    Attributes:
        live, peak: bytes.
    """

    def __init__(self, devices: Collection[str] = ("meta",)):
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._devices = devices
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it made."""
        if func is not torch.ops.aten.lift_fresh.default:  # it is handed what torch.tensor(...) has just made
            for tensor in self._tensors((*args, *(kwargs or {}).values())):
                self._note(tensor.untyped_storage(), 0)
        made = func(*args, **(kwargs or {}))
        for tensor in self._tensors((made,)):
            self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return made

    def _tensors(self, values: Iterable[Any]) -> Iterator[Tensor]:
        """The tensors among the arguments or results of an operation, those in lists too."""
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._tensors(value)
            elif isinstance(value, Tensor) and value.device.type in self._devices:
                yield value

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class Watched:
    """A cache in a model's hands whose visits are measured: its ledger learns the most bytes beside the pool.

    What counts is all that `attend` makes: copies, scores, the output, and on a CPU the index tables; and the current
    keys and values, which the caller holds. On a GPU it is the allocator's peak, a kernel's scratch included; on a CPU
    every storage is followed, which takes time: nobody should take the time of a watched pass.

    Args:
        cache: that does the work.

    Attributes:
        cuda_peak: the most bytes PyTorch held on the GPU, visits included, up to now; 0 elsewhere.
    """

    def __init__(self, cache: KVCache):
        self.cache, self.cuda_peak = cache, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """As the cache's own."""
        with self._watching(k.device) as held:
            y = self.cache.attend(layer, q, k, v, softmax_scale)
        self.cache.ledger.worked(k.nbytes + v.nbytes + held[0])
        return y

    def end_step(self) -> None:
        """As the cache's own."""
        self.cache.end_step()

    @contextmanager
    def _watching(self, device: torch.device) -> Iterator[list[int]]:
        """A list that will hold one number: the most bytes that were made inside and alive together."""
        held: list[int] = []
        if device.type == "cuda":
            self.cuda_peak = max(self.cuda_peak, torch.cuda.max_memory_allocated(device))
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            yield held
            held.append(torch.cuda.max_memory_allocated(device) - before)
            return
        with LiveBytes((device.type,)) as memory:
            yield held
        held.append(memory.peak)
