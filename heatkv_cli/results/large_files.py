"""Large files that others made, weights above all: where the hub's cache has them, and what their digests are.

The cache of huggingface_hub is read by its layout, without the package and without the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from functools import lru_cache
from pathlib import Path

from heatkv_cli.errors import SetupError
from heatkv_cli.results.files import sha256_file, write_file

REMEMBERED = 64 * 2**20
"""Digests of files from this size on outlive the process: reading the 46 GB of Infinity-8B takes a minute or more."""

SETTLED_NS = 2 * 10**9
"""A file changed more recently than this might change again within one tick of the file system's clock."""


def hub_cache() -> Path:
    """Return the folder of the hub's cache, named by the environment variables of huggingface_hub."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.environ[variable]))
    home = os.environ.get("HF_HOME")
    return (Path(os.path.expanduser(home)) if home else _user_cache() / "huggingface") / "hub"


def hub_snapshot(repository: str, revision: str | None = None) -> Path:
    """Return the folder of a repository's files in the hub's cache; it does not exist where they are not there.

    Args:
        repository: owner/name.
        revision: None is main.
    """
    folder, revision = hub_cache() / f"models--{repository.replace('/', '--')}", revision or "main"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return folder / "snapshots" / commit


def sha256_known(path: Path) -> str:
    """Return the digest of a file, which is read once until something writes to it.

    A large file is read once for all processes.

    A digest is remembered for path, inode, size, and the times of the last change of content and of inode. The
    latter cannot be set back, so a file that was replaced or written to is read again, whatever its date says. Only
    a disk that changes bytes by itself goes unnoticed: `heatkv models --deep` reads everything.
    """
    path = path.resolve()
    found = path.stat()
    return _digest(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, *version: int) -> str:
    _, size, _, changed = version
    if size < REMEMBERED:
        return sha256_file(path)
    name = hashlib.sha256("\n".join(map(str, (path, *version))).encode()).hexdigest()
    note = _user_cache() / "heatkv" / "sha256" / name
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", digest := note.read_text(encoding="ascii")):
            return digest
    settled = time.time_ns() - changed > SETTLED_NS
    digest = sha256_file(path)
    if settled:
        with contextlib.suppress(SetupError):  # no room for notes: then it is read again next time
            write_file(note, digest.encode())
    return digest


def _user_cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
