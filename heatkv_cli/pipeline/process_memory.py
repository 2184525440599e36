"""The most memory a piece of work needed, as the system counts it: resident memory, or the GPU's allocator."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Memory:
    """Bytes when the work began, and the peak until it ended; None where the system does not tell."""

    before: int | None = None
    peak: int | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[Memory]:
    """Watch the process (CPU) or its GPU; `peak` is known when the block has ended.

    On a CPU it is Linux's high-water mark of resident memory, set back at the start: no thread samples, nothing is
    missed. What the allocator had kept of earlier work is given back first, so that it hides nothing. What it keeps
    during the block counts: glibc holds on to freed blocks of up to 32 MiB, hundreds of MB in a pass of
    Infinity-2B at 0.25M. With `MALLOC_MMAP_THRESHOLD_=1048576` in the environment it does not, and passes are slower.
    """
    memory = Memory()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device)
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # proc(5): sets the high-water mark to what is resident now
    except OSError:  # another system, or one that does not allow it
        yield memory
        return
    memory.before = _status("VmRSS")
    yield memory
    memory.peak = _status("VmHWM")


def _status(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
