"""Ctrl-C from the first moment on: at once while nothing is at stake, orderly while work is under way.

Libraries swallow KeyboardInterrupt while they are imported, or turn it into errors of their own. So the process leaves
by itself until work begins. Then the first Ctrl-C raises KeyboardInterrupt and is remembered; the second one leaves.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C, by the shell's convention of 128 + signal number."""

_seen = False


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process: there is nothing to lose yet."""
    signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    sys.stderr.write("warning: interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


@contextmanager
def orderly() -> Iterator[None]:
    """Within, the first Ctrl-C raises KeyboardInterrupt, and `seen` tells of it where somebody swallows it."""
    global _seen
    _seen = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _raise(*_: object) -> None:
    global _seen
    if _seen:
        _leave()
    _seen = True
    raise KeyboardInterrupt


def seen() -> bool:
    """Return whether Ctrl-C was pressed since the work began."""
    return _seen


def check() -> None:
    """Raise KeyboardInterrupt where one was swallowed."""
    if _seen:
        raise KeyboardInterrupt
