"""The process's peak: what was allocated inside shows, what was freed before does not."""

from __future__ import annotations

import sys

import pytest
import torch

from heatkv_cli.pipeline import process_memory
from heatkv_cli.pipeline.process_memory import peak_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_peak_is_that_of_the_block() -> None:
    torch.ones(32 * MIB).sum()  # 128 MiB, gone before the block begins
    with peak_memory("cpu") as memory:
        if memory.before is None:
            pytest.skip("this system does not set the high-water mark back")
        torch.ones(16 * MIB).sum()  # 64 MiB, gone before it ends
    assert memory.peak is not None
    assert 63 * MIB < memory.peak - memory.before < 80 * MIB


def test_where_the_system_does_not_tell_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden:
        def write_text(self, text: str) -> None:
            raise PermissionError

    monkeypatch.setattr(process_memory, "_CLEAR", Forbidden())
    with peak_memory("cpu") as memory:
        pass
    assert memory.before is memory.peak is None


def test_on_a_gpu_it_is_the_allocator_s(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(device))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 35)
    with peak_memory("cuda:1") as memory:
        assert (memory.before, memory.peak) == (10, None)
    assert memory.peak == 35 and calls == ["cuda:1"]
