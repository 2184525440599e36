"""Files that are there completely or not at all, and locks that die with their holder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from heatkv_cli.errors import SetupError


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all; folders are made as needed.

    Raises:
        SetupError: it cannot be written.
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
        raise SetupError(
            f"cannot write {path}: {error.strerror or error}", "free the disk or choose --out DIR"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files of processes that are no more."""
    for path in folder.rglob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, and someone else's
    return True


def ensure_writable(folder: Path) -> None:
    """Make a folder and prove that a file can be written into it.

    Raises:
        SetupError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SetupError(
            f"cannot write to {folder.absolute()}: {error.strerror or error}", "choose another folder with --out DIR"
        ) from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock file that carries our process id; the system drops it when we die, however we die.

    Args:
        path: of the lock file; it stays behind empty.
        wait: wait for another holder instead of failing.

    Raises:
        SetupError: another process holds it.
    """
    import fcntl  # POSIX; imported here so that everything else runs without it

    try:
        handle = path.open("a+", encoding="ascii")
    except OSError as error:
        raise SetupError(
            f"cannot write {path}: {error.strerror or error}", "choose another folder with --out DIR"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise SetupError(
                f"{path.parent} is being written by process {owner}",
                "wait for it, share the work with --shard i/n, or choose another folder with --out DIR",
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)
