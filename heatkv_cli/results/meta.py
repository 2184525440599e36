"""`meta.json`: content, configuration, command and code of a folder; written before the work."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from heatkv_cli import __version__
from heatkv_cli.errors import ArtifactError
from heatkv_cli.results.files import ensure_writable, load_json, locked, read_regular, write_file

META_VERSION = 1


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Return what made a result: versions, platform, and the commit of the code where it runs from a checkout."""
    versions = {}
    for name in ("torch", "numpy", "pandas", "hydra-core", "safetensors", "torchmetrics"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "heatkv_version": __version__,
        **_git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


def _git() -> dict[str, Any]:
    """Return the commit, and whether code or configuration differ from it, untracked files included."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"git_sha": None, "git_dirty": None}
    try:
        command = ["git", "-C", str(root)]
        sha = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, timeout=10)
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--", "heatkv_cli", "conf"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"git_sha": None, "git_dirty": None}
    commit = sha.stdout.decode("ascii", "replace").strip()
    if sha.returncode != 0 or not re.fullmatch("[0-9a-f]{40,64}", commit):
        return {"git_sha": None, "git_dirty": None}
    return {"git_sha": commit, "git_dirty": bool(changed.stdout.strip()) or changed.returncode != 0}


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's `meta.json`, None where there is none.

    Raises:
        ArtifactError: the file is damaged.
    """
    path, fix = folder / "meta.json", f"remove {folder} and run the same command again"
    try:
        content = load_json(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", fix) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is not a JSON object", fix)
    if not isinstance(content.get("starts", []), list) or not isinstance(content.get("config_hash", ""), str):
        raise ArtifactError(f"{path} was changed: 'starts' is no list, or 'config_hash' no text", fix)
    return content


def write_meta(folder: Path, *, config_hash: str, config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Write `meta.json` before the work begins: what is made, from what, by which command; status "running".

    A folder that is resumed keeps the time it was created and gets one more entry under `starts`.

    Args:
        folder: folder of the run or artifact.
        config_hash: digest of everything that can change the result; 64 hex digits.
        config: the resolved configuration, plain.
        **fields: digests and whatever else should be on record.

    Raises:
        ArtifactError: the folder belongs to another configuration.
        SetupError: it cannot be written.
    """
    ensure_writable(folder)
    with locked(folder / ".meta.lock", wait=True):  # shards start together
        old = read_meta(folder) or {}
        if old and old.get("config_hash") != config_hash:
            raise ArtifactError(
                f"{folder} holds the results of another configuration", "choose another --out, or remove the folder"
            )
        content = {
            "meta_version": META_VERSION,
            "status": "running",
            "created_utc": old.get("created_utc", utc_now()),
            "config_hash": config_hash,
            **fields,
            "starts": [*old.get("starts", []), {"utc": utc_now(), "argv": sys.argv[1:], "pid": os.getpid()}],
            "environment": environment(),
            "config": config,
        }
        _write_json(folder / "meta.json", content)
    return content


def finish_meta(folder: Path, status: str = "done", **fields: Any) -> None:
    """Complete `meta.json` when the work has ended: status, time, and further fields."""
    with locked(folder / ".meta.lock", wait=True):
        content = read_meta(folder) or {}
        _write_json(folder / "meta.json", {**content, "status": status, "finished_utc": utc_now(), **fields})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2, default=str) + "\n").encode())
