"""Files that are there completely or not at all, locks that die with their holder, and reading that cannot hang."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from heatkv_cli.errors import SetupError

LOG = logging.getLogger("heatkv.results")

PATIENCE = 5.0
"""Seconds a process waits for a lock in silence before it says whom it waits for."""


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits.

    Raises:
        OSError: the file cannot be opened or read; it names the file.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:  # one that comes while reading does not say of what
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_path(path: Path) -> None:
    """Check that the system can look at a path; the file itself may be missing.

    Raises:
        SetupError: the name is too long or not a name, or a folder above it may not be entered.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError as error:  # a NUL character
        raise SetupError(f"{str(path)!r} is not a file name: {error}", "check the path") from error
    except OSError as error:
        shown = str(path) if len(str(path)) < 300 else f"{str(path)[:100]}..."
        raise SetupError(f"cannot look at {shown}: {error.strerror or error}", "check the path") from error


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file; a pipe or a device would never end.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    with open(path, "rb", opener=_open_at_once) as handle:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise OSError(0, "not a regular file", str(path))
        return handle.read()


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _open_own(path: str, flags: int) -> int:
    """Open a file that is ours alone: no pipe, no device, and nothing that a link leads to."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file", path)
    return descriptor


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON in UTF-8, holds NaN or an infinity, or is nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all; folders are made as needed.

    Raises:
        SetupError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> SetupError:
    """Return the error of a file that the system does not let us write."""
    return SetupError(f"cannot write {path}: {error.strerror or error}", "free the disk or choose --out DIR")


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files in a folder whose processes are no more."""
    for path in folder.glob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not _alive(int(pid)):
            with contextlib.suppress(OSError):  # another process does the same, or may do it and we may not
                path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is there, and someone else's
    return True


def ensure_writable(folder: Path) -> None:
    """Make a folder, prove that a file can be written into it, and remove what killed processes left there.

    Raises:
        SetupError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(
            f"cannot write to {folder.absolute()}: {reason}", "choose another folder with --out DIR"
        ) from error
    remove_leftovers(folder)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock file that carries our process id; the system drops it when we die, however we die.

    Args:
        path: the lock file; it stays behind empty.
        wait: wait for another holder instead of failing; after a few seconds a warning names the holder.

    Raises:
        SetupError: another process holds the lock, or the file cannot be made.
    """
    import fcntl  # POSIX; imported here so that everything else runs without it

    try:
        handle = open(path, "a+b", buffering=0, opener=_open_own)  # noqa: SIM115 - closed below
    except OSError as error:
        raise SetupError(
            f"cannot write {path}: {error.strerror or error}", "choose another folder with --out DIR"
        ) from error
    with handle:
        began, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                handle.seek(0)
                owner = handle.read(20).decode("ascii", "replace").strip() or "unknown"
                if not wait:
                    raise SetupError(
                        f"{path.parent} is being written by process {owner}",
                        "wait for it, share the work with --shard i/n, or choose another folder with --out DIR",
                    ) from error
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                LOG.warning("warning: waiting for process %s, which holds %s", owner, path)
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # a disk that is full: nobody can be told who holds the lock
            handle.truncate(0)
            handle.write(str(os.getpid()).encode())
        try:
            yield
        finally:
            handle.truncate(0)
