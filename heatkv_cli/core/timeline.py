"""Where the time of one generation goes.

Functions carry the name of the stage they are (`@staged("ffn")`). While a `Timeline` is active, every interval of time
belongs to the innermost stage that is open, and to the scale that was begun last, so that the stages of a timeline
always sum to its whole. A name that begins with a slash is a part of the stage around it: `/read` inside `attention`
is `attention/read`. Without a timeline a stage costs a look-up and a call.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

Place = tuple[int | None, str]
"""A scale (None: before the first, after the last), and a stage."""

OTHER = "other"
"""Whatever runs outside of every stage."""

_active: ContextVar[Timeline | None] = ContextVar("timeline", default=None)


class Timeline:
    """The intervals between `with Timeline(device):` and its end.

    On a GPU each boundary is an event on the current stream: nothing waits for the device until `seconds` is asked
    for, and what is measured is when kernels ran, not when they were sent.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._cuda = torch.device(device).type == "cuda"
        self._ends: list[tuple[Place, Any]] = []
        self._open = [OTHER]
        self._scale: int | None = None

    def __enter__(self) -> Timeline:
        self._token = _active.set(self)
        self._begin = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark()
        _active.reset(self._token)

    @property
    def marks(self) -> int:
        """How many boundaries were taken; times `mark_seconds()` that is what measuring cost."""
        return len(self._ends)

    def seconds(self) -> dict[Place, float]:
        """Seconds of every scale and stage; their sum is the whole."""
        spent: dict[Place, float] = defaultdict(float)
        if self._cuda:
            self._ends[-1][1].synchronize()
        last = self._begin
        for place, end in self._ends:
            spent[place] += last.elapsed_time(end) / 1000 if self._cuda else end - last
            last = end
        return dict(spent)

    def by_stage(self) -> dict[str, float]:
        """Seconds of every stage, its parts included, over all scales."""
        total: dict[str, float] = defaultdict(float)
        for (_, name), seconds in self.seconds().items():
            total[name.partition("/")[0]] += seconds
        return dict(total)

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self) -> None:
        """What ends now belonged to the innermost open stage."""
        self._ends.append(((self._scale, self._open[-1]), self._now()))

    def _enter(self, name: str) -> None:
        self._mark()
        self._open.append(self._open[-1] + name if name.startswith("/") else name)

    def _leave(self) -> None:
        self._mark()
        self._open.pop()

    def _at(self, scale: int | None) -> None:
        self._mark()
        self._scale = scale


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The time inside belongs to stage `name`, but for the stages opened inside of it."""
    timeline = _active.get()
    if timeline is None:
        yield
        return
    timeline._enter(name)
    try:
        yield
    finally:
        timeline._leave()


def staged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Calls of the function are stage `name`; see `stage`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            timeline = _active.get()
            if timeline is None:
                return function(*args, **kwargs)
            timeline._enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                timeline._leave()

        return timed

    return decorate


def at_scale(scale: int | None) -> None:
    """What follows belongs to this scale; None: to the generation as a whole. Models say so where a scale begins."""
    if (timeline := _active.get()) is not None:
        timeline._at(scale)


def mark_seconds(device: torch.device | str = "cpu", count: int = 2000) -> float:
    """What one boundary costs on the host, measured now."""
    begin = perf_counter()
    with Timeline(device) as timeline:
        for _ in range(count // 2):
            with stage("nothing"):
                pass
    return (perf_counter() - begin) / timeline.marks
