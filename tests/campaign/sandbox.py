"""Runs command lines apart from each other: every one in a process of its own, forked from one that is warm.

A fork costs a tenth of a second where a start costs three. Each command line meets the same folder anew, at the same
path: `place/out`, results; `place/files`, what a user has; `place/home`, `place/tmp`. Whatever the process
opens for writing, starts or connects to is noted by an audit hook, so that nothing escapes which lies elsewhere.

`python sandbox.py` is the process that forks; it reads jobs from stdin, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 30.0
"""Seconds after which a command counts as hanging."""

MEMORY = 12 * 2**30
"""Bytes of addresses a command may take; torch alone takes six."""

LARGEST_FILE = 64 * 2**20
"""Bytes of the largest file it may write."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn"}
TALKS = {"socket.connect", "socket.getaddrinfo", "socket.bind"}


@dataclass(frozen=True)
class Stop:
    """When a command is stopped from outside: a moment that a busy machine does not move.

    Args:
        signal: number of the signal it gets.
        event: count of changes to files after which it gets it; the next one does not happen before.
        delay: seconds after that change.
    """

    signal: int
    event: int
    delay: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code; None where it was ended because it did not end by itself.
        signal: number of the signal that ended it, 0 for none.
        stdout, stderr: what it said.
        seconds: that it took.
        bytes: of memory at its peak, of which the warm process has some.
        events: (what, path or command) of everything it wrote, started or connected to.
    """

    code: int | None
    signal: int
    stdout: str
    stderr: str
    seconds: float
    bytes: int
    events: tuple[tuple[str, str], ...]


class Sandbox:
    """A warm process and the folder in which its children work.

    Args:
        root: of everything; it is removed by whoever made it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.place = self.root / "place"
        self.world = self.root / "world"
        self._server: subprocess.Popen[str] | None = None

    def lay_out(self) -> None:
        """Put the folder back as it was when `keep` was called."""
        remove(self.place)
        if self.world.exists():
            shutil.copytree(self.world, self.place, symlinks=True)
        for name in ("out", "files", "home", "tmp"):
            (self.place / name).mkdir(parents=True, exist_ok=True)

    def keep(self) -> None:
        """From now on every command meets the folder as it is now."""
        remove(self.world)
        shutil.copytree(self.place, self.world, symlinks=True)

    def filled(self, words: Sequence[str]) -> list[str]:
        """Return words with the paths of this sandbox in the place of @out@, @files@ and @place@."""
        names = {"@out@": self.place / "out", "@files@": self.place / "files", "@place@": self.place}
        filled = list(words)
        for name, path in names.items():
            filled = [word.replace(name, str(path)) for word in filled]
        return filled

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        conf: bool = False,
        stdout: str = "",
        stderr: str = "",
        timeout: float = TIMEOUT,
        stop: Stop | None = None,
    ) -> Outcome:
        """Run `heatkv ARGV` in the folder as it lies.

        Args:
            argv: words; see `filled`.
            env: variables beside those that every command has.
            conf: read `files/conf` in the place of the package's own.
            stdout, stderr: a device or file to write to; "" for one that is read afterwards.
            timeout: seconds.
            stop: when it is stopped, and how.
        """
        said = {"stdout": self.root / "stdout", "stderr": self.root / "stderr", "events": self.root / "events"}
        for path in said.values():
            path.write_bytes(b"")
        job = {
            "argv": self.filled(argv),
            "place": str(self.place),
            "env": dict(zip(env or (), self.filled(list((env or {}).values())), strict=True)),
            "conf": conf,
            "stdout": stdout or str(said["stdout"]),
            "stderr": stderr or str(said["stderr"]),
            "events": str(said["events"]),
            "timeout": timeout,
            "stop": asdict(stop) if stop else None,
        }
        server = self._warm()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        lines = said["events"].read_text().splitlines()
        return Outcome(
            stdout=said["stdout"].read_bytes().decode("utf-8", "replace"),
            stderr=said["stderr"].read_bytes().decode("utf-8", "replace"),
            events=tuple((what, path) for what, path in map(json.loads, lines)),
            **answer,
        )

    def _warm(self) -> subprocess.Popen[str]:
        if self._server is None:
            kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV") if name in os.environ}
            env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
            env |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HOME": str(self.place / "home")}
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
        return self._server

    def close(self) -> None:
        """End the warm process."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(120)


def remove(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- the warm process


def serve() -> None:
    """Read jobs, fork for each, say how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _command(job)
        status, usage, ended = _wait(child, began + job["timeout"])
        answer = {
            "code": os.waitstatus_to_exitcode(status) if ended and os.WIFEXITED(status) else None,
            "signal": os.WTERMSIG(status) if ended and os.WIFSIGNALED(status) else 0,
            "seconds": time.monotonic() - began,
            "bytes": usage.ru_maxrss * 1024,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(child: int, deadline: float) -> tuple[int, Any, bool]:
    """Wait for a child and end it, with all its own, when its time is over."""
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage, True
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, False
        time.sleep(0.005)


def _warm_up() -> None:
    """Import what commands import; nothing is run that a command could find again."""
    import hydra  # noqa: F401
    import PIL.Image
    import rich.console  # noqa: F401
    import torch  # noqa: F401
    import torchmetrics  # noqa: F401
    import torchvision  # noqa: F401

    from heatkv_cli import cli, doctor  # noqa: F401
    from heatkv_cli.config import compose
    from heatkv_cli.pipeline import bench, build_schedule, calibrate, evaluate, files, generate, runs, score  # noqa: F401
    from heatkv_cli.planning import preview  # noqa: F401

    PIL.Image.init()
    compose(["metric=kl,psnr,ssim,lpips,fid,shapes"])


def _command(job: Mapping[str, Any]) -> None:
    """Be the command, in a child."""
    code = 1
    try:
        os.setsid()
        os.chdir(Path(job["place"]) / "files")
        os.environ |= {"HOME": f"{job['place']}/home", "TMPDIR": f"{job['place']}/tmp", **job["env"]}
        sys.argv = ["heatkv", *job["argv"]]
        events = os.open(job["events"], os.O_WRONLY | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, name in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(name, os.O_WRONLY), number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
        if job["conf"]:
            from heatkv_cli.config import compose, groups  # noqa: F401

            groups.conf_dir.cache_clear()
            sys.modules["heatkv_cli.config.compose"]._composed.cache_clear()  # type: ignore[attr-defined]
            groups._PACKAGE = Path(job["place"]) / "files"
        from heatkv_cli.__main__ import main

        sys.addaudithook(_Noted(events, Stop(**job["stop"]) if job["stop"] else None))
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Noted:
    """An audit hook that writes down what changes the world."""

    def __init__(self, events: int, stop: Stop | None) -> None:
        self._events, self._stop = events, stop
        self._count = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES or event in STARTS:
            path = args[0]
        elif event in TALKS:
            path = args[1] if event == "socket.connect" else args[0]
        elif event == "os.putenv":
            return
        else:
            return
        where = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else repr(path)
        if event in CHANGES or event == "open":
            where = os.path.realpath(where)
        self._stop_here()
        os.write(self._events, (json.dumps([event, where]) + "\n").encode())

    def _stop_here(self) -> None:
        """Let the signal come when it is time."""
        self._count += 1
        if self._stop is None or self._count != self._stop.event:
            return
        if self._stop.delay:
            threading.Timer(self._stop.delay, os.kill, (os.getpid(), self._stop.signal)).start()
        else:
            os.kill(os.getpid(), self._stop.signal)


if __name__ == "__main__":
    serve()
