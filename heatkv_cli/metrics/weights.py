"""Weights of metrics on disk: one rule for finding them, one way of reading them. Nothing is ever downloaded here.

Where a file is looked for: what the metric's ``weights`` option names; then the folder that was named for all weights
(``--weights``), and ``HEATKV_WEIGHTS_DIR``; then the caches of torch hub (which honours ``TORCH_HOME``) and of the
Hugging Face hub (``HF_HOME``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import hub_snapshot, sha256_known

FOLDER = "HEATKV_WEIGHTS_DIR"


@dataclass(frozen=True)
class WeightsFile:
    """A file that a metric needs.

    Attributes:
        name: its name on disk.
        source: where it can be had, in words.
        repository, remote: hub repository and the file's path in it; '' where the hub has none.
        licence: of the file.
    """

    name: str
    source: str
    repository: str = ""
    remote: str = ""
    licence: str = ""


def find_weights(file: WeightsFile, given: str | None = None, folder: Path | None = None) -> Path:
    """Path of a file that a metric needs.

    Args:
        file: which.
        given: a path from the configuration; nothing else is tried then.
        folder: the folder that was named for all weights, or None.

    Raises:
        SetupError: the file is nowhere; message and hint name it, the places and its source.
    """
    if given:
        path = Path(given).expanduser()
        if path.is_file():
            return path
        raise SetupError(f"weights missing: {path} does not exist", f"{file.name} comes from {file.source}")
    named = dict.fromkeys(Path(place).expanduser() for place in (folder, os.environ.get(FOLDER)) if place)
    cached = (Path(torch.hub.get_dir()) / "checkpoints" / file.name, _in_hub_cache(file))
    for found in (*(place / file.name for place in named), *cached):
        if found is not None and found.is_file():
            return found
    raise SetupError(
        f"weights missing: {file.name}; looked at {', '.join((*map(str, named), 'the caches of hubs'))}",
        f"get it from {file.source} and put it into a folder named by --weights DIR or {FOLDER}",
    )


def _in_hub_cache(file: WeightsFile) -> Path | None:
    return hub_snapshot(file.repository) / (file.remote or file.name) if file.repository else None


def weights_sha256(path: Path) -> str:
    """Digest of a weights file; each version of a file is read once."""
    return sha256_known(path)


def check_name(path: Path) -> str:
    """'' where the digest begins with the last part of the file's name, as torch hub names files; else what is wrong.

    Raises:
        SetupError: the file is missing.
    """
    promised = path.stem.rpartition("-")[2]
    found = weights_sha256(path)
    if len(promised) != 8 or found.startswith(promised):
        return ""
    return f"{path} has sha256 {found[:8]}..., its name says {promised}: fetch it again"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint file holds, tensors on the CPU; no pickled code from the file is run.

    Raises:
        ArtifactError: the file is neither safetensors nor a plain torch checkpoint nor a TorchScript archive.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files in torch's format before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ArtifactError(f"{path} is not a readable checkpoint: {reason}", "fetch it again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a state dict", "fetch it again")
    return content


def _is_torchscript(path: Path) -> bool:
    """Whether this is how OpenAI published CLIP: a zip with constants beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill ``module`` with ``state``, every parameter from one key and every key into one parameter.

    Raises:
        ArtifactError: keys are missing or left over, or shapes differ.
    """
    own = module.state_dict()
    wrong = [f"missing {key}" for key in own if key not in state]
    wrong += [f"unknown {key}" for key in state if key not in own]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ArtifactError(f"{path} does not fit the network: {shown}", "is it the file that the metric names?")
    module.load_state_dict(dict(state))


def package(module: str, extra: str) -> ModuleType:
    """Import a module of a package that an extra brings.

    Raises:
        SetupError: the package is not installed.
    """
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise SetupError(f"package {top} is not installed", f"pip install 'heatkv[{extra}]'")
    return importlib.import_module(module)
