"""Large files that others made, weights above all: where the hub's cache has them, and what their digests are.

The hub's cache is asked through huggingface_hub, never the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

from heatkv_cli.errors import SetupError
from heatkv_cli.results.files import sha256_file, write_file

REMEMBERED = 64 * 2**20
"""Digests of files from this size on outlive the process: reading the 46 GB of Infinity-8B takes a minute or more."""

SETTLED_NS = 2 * 10**9
"""A file changed more recently than this might change again within one tick of the file system's clock."""


def hub_cache() -> Path:
    """Return the folder of the hub's cache: HF_HUB_CACHE, else `hub` below HF_HOME, as huggingface_hub reads them."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_snapshot(repository: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Return the folder of a repository's files in the hub's cache; a folder that is not there where it has none.

    Args:
        repository: owner/name.
        files: paths in the repository; the first that the cache has tells the folder.
        revision: a branch, a tag or a commit; None is main.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    with suppress(ValueError):  # a damaged reference names no snapshot
        for name in files:
            found = try_to_load_from_cache(repository, name, cache_dir=hub_cache(), revision=revision)
            if isinstance(found, str):
                return Path(found).parents[len(PurePosixPath(name).parts) - 1]
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    return hub_cache() / folder / "snapshots" / (revision or "main")


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
