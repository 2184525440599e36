"""Artifacts on disk: safetensors files whose metadata holds one JSON header under the key "heatkv".

It knows files, versions and damage, not what the tensors mean. A file is written beside its
place and moved there, so a reader never meets half a file. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from heatkv_cli import __version__
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import ArtifactError, HeatKVError
from heatkv_cli.results import load_json

FORMAT_VERSION = 2
"""Version of the header and the tensor names; it rises when an older heatkv could misread the file."""

_KEY = "heatkv"
_DIGEST = "content_sha256"
_MAKE = {"calibration": "heatkv calibrate --model {model}", "schedule": "heatkv build-schedule --model {model}"}


def library_versions() -> dict[str, str]:
    """Return the versions that can change a number: heatkv, torch, python."""
    return {"heatkv": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def make_hint(kind: str, model: str = "MODEL") -> str:
    """Return the command that makes an artifact of this kind anew."""
    return _MAKE[kind].format(model=model)


def geometry_header(geometry: Geometry) -> dict[str, Any]:
    """Return the geometry as JSON values."""
    return {
        "model": geometry.model,
        "num_layers": geometry.num_layers,
        "num_heads": geometry.num_heads,
        "head_dim": geometry.head_dim,
        "scales": scales_header(geometry.schedule),
        "sink_scales": geometry.sink_scales,
        "dtype_bytes": geometry.dtype_bytes,
    }


def geometry_from(header: Mapping[str, Any]) -> Geometry:
    """Return the geometry that a header holds.

    Raises:
        KeyError, TypeError, ConfigError: the header is damaged.
    """
    fields = dict(header)
    return Geometry(schedule=ScaleSchedule(fields.pop("scales")), **fields)


def scales_header(schedule: ScaleSchedule) -> list[list[int]]:
    """Return a scale schedule as JSON values."""
    return [list(size) for size in schedule.sizes]


def write_artifact(path: Path | str, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an artifact; missing folders are made, an existing file is replaced in one step.

    Raises:
        ArtifactError: the file cannot be written (folder, rights, space).
    """
    path = Path(path)
    whole = {"kind": kind, "format_version": FORMAT_VERSION, **header}
    text = json.dumps({**whole, _DIGEST: content_sha256(whole, tensors)}, allow_nan=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # safetensors refuses tensors that share memory, such as two slices of one: write copies
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata={_KEY: text})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{kind} {path} cannot be written: {error}", "choose another folder with --out, or make room"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(path: Path | str, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an artifact of this kind: its header and its tensors, on the CPU.

    Raises:
        ArtifactError: missing, truncated, changed, not written by heatkv, or of another kind or format version.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{kind} {path} {what}", f"make it: {make_hint(kind)}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(
            f"{kind} {path} cannot be read: it is truncated or no safetensors file ({error})",
            f"delete it and make it again: {make_hint(kind)}",
        ) from error
    header = _header(path, kind, text)
    digest = header.pop(_DIGEST, None)
    if digest != content_sha256(header, tensors):
        raise ArtifactError(
            f"{kind} {path} was changed since it was written: its digest differs", f"make it again: {make_hint(kind)}"
        )
    return header, tensors


def _header(path: Path, kind: str, text: str | None) -> dict[str, Any]:
    """Return the JSON header after checking whose it is, of which kind and version."""
    if text is None:
        raise ArtifactError(
            f"{path} is a safetensors file, but heatkv did not write it", f"make a {kind}: {make_hint(kind)}"
        )
    try:
        header = load_json(text)
    except ValueError as error:
        raise damaged(path, kind, error) from error
    if not isinstance(header, dict):
        raise damaged(path, kind, TypeError("not a JSON object"))
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ArtifactError(
            f"{path} has format version {version}, this heatkv ({__version__}) reads version {FORMAT_VERSION}",
            "update heatkv" if newer else f"make it again: {make_hint(kind)}",
        )
    if header.get("kind") != kind:
        raise ArtifactError(f"{path} is a {header.get('kind')}, expected a {kind}", f"make one: {make_hint(kind)}")
    return header


def damaged(path: Path | str, kind: str, error: Exception) -> ArtifactError:
    """Return the error for a file whose header or tensors are not what this version writes."""
    if isinstance(error, HeatKVError):  # already says what is wrong and what to do, but not where
        return ArtifactError(f"{kind} {path}: {error.message}", error.hint)
    return ArtifactError(
        f"{kind} {path} is damaged: {type(error).__name__}: {error}",
        f"delete it and make it again: {make_hint(kind)}",
    )


def mismatch(kind: str, made_for: Geometry, wanted: Geometry, where: str = "") -> ArtifactError:
    """Return the error for an artifact that was made for another model or resolution; names both."""
    name = f"{kind} {where}".rstrip()
    return ArtifactError(
        f"{name} was made for {made_for}, but the run is {wanted}; they differ in "
        + "; ".join(made_for.differences(wanted)),
        f"make one for this model and resolution: {make_hint(kind, wanted.model)}",
    )


def expect_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Check a tensor's shape, and its type if given.

    Raises:
        ArtifactError: names what it is and what was expected.
    """
    if tuple(tensor.shape) != shape:
        raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}", "make the artifact again")
    if dtype is not None and tensor.dtype != dtype:
        raise ArtifactError(f"{name} is {tensor.dtype}, expected {dtype}", "make the artifact again")


def content_sha256(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of JSON values and the bytes of tensors, in an order that does not depend on theirs."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
