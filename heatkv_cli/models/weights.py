"""Model files on disk: finding and verifying them. Nothing is ever downloaded here."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import sha256_file


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
    if sha256 and sha256_file(path) != sha256:
        raise ArtifactError(f"model {model}: {path} is not the file the config names (sha256)", "fetch it again")
    return path
