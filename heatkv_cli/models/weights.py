"""Model files on disk: finding and verifying them. Nothing is ever downloaded here."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import resources
from pathlib import Path

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import sha256_file

READ = (".bin", ".json", ".model", ".pt", ".pth", ".safetensors", ".txt")


def find_file(model: str, name: str, folder: Path | None, sha256: str | None = None, source: str = "") -> Path:
    """Path of a model file.

    Args:
        model: for messages.
        name: of the file.
        folder: where to look; None is the package's assets.
        sha256: expected digest; None accepts any.
        source: where the file can be had, for messages.

    Raises:
        SetupError: the file is not there.
        ArtifactError: it is there with other content.
    """
    path = Path(str(resources.files("heatkv_cli") / "assets" / name)) if folder is None else folder / name
    if not path.exists():
        where = f"put it there; it comes from {source}" if source else "check the folder"
        raise SetupError(f"model {model}: {path} is missing", where)
    if sha256 and sha256_path(path) != sha256:
        raise ArtifactError(f"model {model}: {path} is not the file the config names (sha256)", "fetch it again")
    return path


def sha256_path(path: Path) -> str:
    """Digest of a file, or of a folder: of the names and digests of the files in it that a loader may read."""
    if not path.is_dir():
        found = path.stat()
        return _digest(path, found.st_size, found.st_mtime_ns)
    parts = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in READ)
    return hashlib.sha256("\n".join(f"{f.name} {sha256_path(f)}" for f in parts).encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Every run of a sweep asks for the same files: each is read once, unless it changes."""
    return sha256_file(path)
