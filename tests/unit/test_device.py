"""Which device a run takes and measures; torch's GPU functions are replaced, for no GPU need be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heatkv_cli.config import RunConfig, compose
from heatkv_cli.errors import SetupError
from heatkv_cli.planning import job


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let torch find two GPUs; what is made the current device is noted."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def config(*overrides: str) -> RunConfig:
    return compose(["method=full", *overrides]).first


def test_a_gpu_is_taken_where_there_is_one(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert config().runtime.torch_device == "cuda:0"
    assert config("runtime=cpu").runtime.torch_device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert config().runtime.torch_device == "cpu"


@pytest.mark.parametrize("index", [0, 1])
def test_the_run_s_gpu_becomes_the_current_one(
    index: int, two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    monkeypatch.setattr(job, "build_leaf", lambda *_, device, **__: built.append(device))
    job.load_model(config("runtime=gpu", f"runtime.device_index={index}"), {})
    assert (two_gpus, built) == ([index], [f"cuda:{index}"])  # timers and peaks are those of the current device


def test_a_gpu_that_is_not_there_is_a_setup_error(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match="torch finds 2 GPUs"):
        job.check_device(config("runtime=gpu", "runtime.device_index=2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="no GPU"):
        job.check_device(config("runtime=gpu"))
