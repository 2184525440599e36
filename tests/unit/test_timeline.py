"""Stages of a timeline: to whom time belongs, that none of it is lost, and that nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from heatkv_cli.core import timeline as module
from heatkv_cli.core.timeline import Timeline, at_scale, mark_seconds, stage, staged


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(module, "perf_counter", made)
    yield made


def test_time_belongs_to_the_innermost_stage_and_the_scale_begun_last(clock: Clock) -> None:
    @staged("ffn")
    def ffn(seconds: float) -> str:
        clock.work(seconds)
        return "done"

    with Timeline() as timeline:
        clock.work(1)
        for scale in (0, 1):
            at_scale(scale)
            with stage("norms"):
                clock.work(2)
                assert ffn(4 + scale) == "done"
                clock.work(8)
            clock.work(16)
        at_scale(None)
        clock.work(32)
    assert timeline.seconds() == {
        (None, "other"): 33,
        (0, "other"): 16,
        (1, "other"): 16,
        (0, "norms"): 10,
        (1, "norms"): 10,
        (0, "ffn"): 4,
        (1, "ffn"): 5,
    }
    assert timeline.by_stage() == {"other": 65, "norms": 20, "ffn": 9}


def test_a_part_is_named_by_the_stage_around_it(clock: Clock) -> None:
    @staged("/read")
    def read() -> None:
        clock.work(1)

    with Timeline() as timeline:
        for name in ("attention", "policy"):
            with stage(name):
                clock.work(2)
                read()
    assert timeline.seconds() == {
        (None, "other"): 0,
        (None, "attention"): 2,
        (None, "attention/read"): 1,
        (None, "policy"): 2,
        (None, "policy/read"): 1,
    }
    assert timeline.by_stage() == {"other": 0, "attention": 3, "policy": 3}


def test_stages_sum_to_the_whole() -> None:
    begin = time.perf_counter()
    with Timeline() as timeline:
        for _ in range(50):
            with stage("a"), stage("/b"):
                time.sleep(0.0005)
            at_scale(1)
    whole = time.perf_counter() - begin
    assert sum(timeline.seconds().values()) == pytest.approx(whole, rel=0.01, abs=5e-4)


def test_an_error_closes_its_stages(clock: Clock) -> None:
    @staged("breaks")
    def breaks() -> None:
        clock.work(1)
        raise KeyError

    with Timeline() as timeline:
        with pytest.raises(KeyError):
            breaks()
        clock.work(2)
    assert timeline.by_stage() == {"other": 2, "breaks": 1}
    with stage("outside"):
        at_scale(3)
    assert timeline.by_stage() == {"other": 2, "breaks": 1}, "a timeline went on after its end"


def test_timelines_nest_without_mixing(clock: Clock) -> None:
    with Timeline() as outer, stage("a"):
        with Timeline() as inner, stage("b"):
            clock.work(1)
        clock.work(2)
    assert inner.by_stage() == {"other": 0, "b": 1}
    assert outer.by_stage() == {"other": 0, "a": 3}


def test_on_a_gpu_boundaries_are_events_and_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are stood in for: the kernels' clock runs behind the host's."""
    waited: list[Event] = []

    class Event:
        recorded = 0

        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            Event.recorded += 1
            self.at = 5.0 * Event.recorded

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Timeline("cuda:0") as timeline, stage("a"):
        assert not waited
    assert timeline.seconds() == pytest.approx({(None, "other"): 0.010, (None, "a"): 0.005})
    assert len(waited) == 1


def test_taking_times_is_cheap() -> None:
    with Timeline() as timeline:
        with stage("a"):
            pass
        at_scale(0)
    assert timeline.marks == 4
    assert 0 < mark_seconds() < 1e-4
