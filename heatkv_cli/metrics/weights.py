"""Weights of metrics on disk: one rule for finding them, one way of reading them. Nothing is ever downloaded here.

A file is looked for where the metric's option names it; then in the folder that was named for all weights
(``--weights``) and in ``HEATKV_WEIGHTS_DIR``; then in the caches of torch hub (which honours ``TORCH_HOME``) and of the
Hugging Face hub (``HF_HOME``).

A file that is found under its published name must have its published content, where that is known. A file that an
option names may be any other. No code that a file holds is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import itertools
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heatkv_cli.errors import ArtifactError, ConfigError, HeatKVError, SetupError
from heatkv_cli.results import hub_snapshot, sha256_known

FOLDER = "HEATKV_WEIGHTS_DIR"
TORCHSCRIPT = frozenset({"b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"})
"""Digests of the archives with code that may be opened: OpenAI's ViT-L-14.pt, whose address holds its digest."""


@dataclass(frozen=True)
class NetworkFile:
    """A published file that a metric needs.

    Attributes:
        name: its name on disk.
        source: address or place that has it, in words.
        repository: its hub repository, owner/name; '' where the hub has none.
        remote: its path in the repository; '' where that is its name.
        licence: licence of the file.
        revision: commit of the repository; None is main.
        sha256: digests of its published forms; empty where none is known.
        bytes: its size; None where it is not known.
    """

    name: str
    source: str
    repository: str = ""
    remote: str = ""
    licence: str = ""
    revision: str | None = None
    sha256: tuple[str, ...] = ()
    bytes: int | None = None


@dataclass(frozen=True)
class Lack:
    """Something that is missing before a metric can run.

    Attributes:
        name: a file, or ``package NAME``.
        fix: the command, or the source that has the file.
        bytes: size of the file, where it is known.
    """

    name: str
    fix: str
    bytes: int | None = None


@dataclass(frozen=True)
class Wanted:
    """A file as a metric wants it.

    Attributes:
        file: the published file.
        given: path from the metric's option; None for the usual places.
        folder: the folder that was named for all weights.
        sha256: digest that the user expects; None leaves it to the published ones.
    """

    file: NetworkFile
    given: str | None = None
    folder: Path | None = None
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Its path; raises SetupError where the file is nowhere."""
        return find_weights(self.file, self.given, self.folder)

    @property
    def digest(self) -> str:
        """Its sha256; raises as ``path``."""
        return weights_sha256(self.path)

    def lack(self) -> Lack | None:
        """Return what is missing where the file is nowhere."""
        try:
            find_weights(self.file, self.given, self.folder)
        except SetupError as error:
            return Lack(self.file.name, error.hint, self.file.bytes)
        return None

    def verified(self) -> Path:
        """Return its path, once its content is the one the user says, or else the published one.

        A file that an option names, without a digest, may be any.

        Raises:
            SetupError: it is nowhere.
            ArtifactError: it has another content.
        """
        return self._with(self._expected if self.given is None or self.sha256 else ())

    def trusted(self, option: str) -> Path:
        """Return its path for a package that runs what the file holds: its content must be known.

        Args:
            option: the key by which the user says the digest.

        Raises:
            SetupError: it is nowhere.
            ConfigError: no digest is known, and the user said none.
            ArtifactError: it has another content.
        """
        if not self._expected:
            raise ConfigError(
                f"{self.file.name} would go to a package that runs code from it, and no digest of it is known here",
                f"{option}=DIGEST, which 'sha256sum {self.file.name}' prints for a file from a source you trust",
            )
        return self._with(self._expected)

    @property
    def _expected(self) -> tuple[str, ...]:
        return (self.sha256,) if self.sha256 else self.file.sha256

    def _with(self, expected: tuple[str, ...]) -> Path:
        path = self.path
        if expected and (found := weights_sha256(path)) not in expected:
            raise ArtifactError(
                f"{path} has sha256 {found[:8]}..., {self.file.name} should have {expected[0][:8]}...",
                "fetch it again; the metric's key for its weights takes another file on purpose",
            )
        return path


def find_weights(file: NetworkFile, given: str | None = None, folder: Path | None = None) -> Path:
    """Return the path of a file that a metric needs.

    Args:
        file: the published file.
        given: a path from the configuration; nothing else is tried then.
        folder: the folder that was named for all weights, or None.

    Raises:
        SetupError: the file is nowhere; message and hint name it, the places and its source.
    """
    if given is not None:
        path = Path(os.path.expanduser(given))
        if os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, false for a name that is too long
            return path
        raise SetupError(f"weights missing: {path} is not a file", f"{file.name} comes from {file.source}")
    named = dict.fromkeys(Path(os.path.expanduser(place)) for place in (folder, os.environ.get(FOLDER)) if place)
    places = (*(place / file.name for place in named), Path(torch.hub.get_dir()) / "checkpoints" / file.name)
    for found in itertools.chain(places, _in_hub_cache(file)):
        if os.path.isfile(found):  # noqa: PTH113
            return found
    raise SetupError(
        f"weights missing: {file.name}; looked at {', '.join((*map(str, named), 'the caches of hubs'))}",
        f"get it from {file.source} and put it into a folder named by --weights DIR or {FOLDER}",
    )


def _in_hub_cache(file: NetworkFile) -> Iterator[Path]:
    """The hub is asked last: its package takes most of a second to import."""
    if file.repository:
        name = file.remote or file.name
        with contextlib.suppress(OSError):
            yield hub_snapshot(file.repository, [name], file.revision) / name


def weights_sha256(path: Path) -> str:
    """Return the digest of a weights file; each version of a file is read once."""
    return sha256_known(path)


def joined_sha256(digests: list[str]) -> str:
    """Return one digest for several files: that of their digests, a line each; '' for none, itself for one."""
    if len(digests) < 2:
        return "".join(digests)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def check_name(path: Path) -> str:
    """Return '' where the digest begins with the last part of the file's name, as torch hub names files.

    Returns:
        Else what is wrong.

    Raises:
        SetupError: the file is missing.
    """
    promised = path.stem.rpartition("-")[2]
    found = weights_sha256(path)
    if len(promised) != 8 or found.startswith(promised):
        return ""
    return f"{path} has sha256 {found[:8]}..., its name says {promised}: fetch it again"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file, tensors on the CPU.

    Plain torch checkpoints are read by torch's restricted unpickler, which builds tensors and containers alone. An
    archive with code (TorchScript) is opened only where its digest is in ``TORCHSCRIPT``.

    Raises:
        ArtifactError: the file is neither safetensors nor a plain torch checkpoint nor a known archive.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _has_code(path):
            return _read_archive(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files in torch's format before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (HeatKVError, MemoryError):
        raise
    except Exception as error:  # readers raise whatever the bytes lead them to
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise ArtifactError(f"{path} is not a readable checkpoint: {reason}", "fetch it again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a state dict", "fetch it again")
    return content


def _has_code(path: Path) -> bool:
    """Return whether this is a zip with TorchScript's constants or code beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        inside = [name.split("/")[1:] for name in archive.namelist()]  # all lies in one folder
    return any(parts[:1] == ["constants.pkl"] or (parts[:1] == ["code"] and len(parts) > 1) for parts in inside)


def _read_archive(path: Path) -> dict[str, Any]:
    """Return the tensors of a TorchScript archive; what is opened is what was hashed."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest not in TORCHSCRIPT:
        raise ArtifactError(
            f"{path} is a TorchScript archive, which can hold code; its sha256 {digest[:8]}... is not a known one",
            "use a .safetensors file, or one written by torch.save(network.state_dict(), FILE)",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch gives TorchScript up; OpenAI's file stays as it is
        return dict(torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict())


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, which may stand under ``state_dict``.

    Raises:
        ArtifactError: as ``read_checkpoint``, and where it holds anything but named tensors.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ArtifactError(f"{path} holds no state dict: not all of its entries are tensors", "fetch it again")
    return state


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
    """Import a module of a package that an extra brings; extra '' is none.

    Raises:
        SetupError: the package is not installed, or cannot be imported.
    """
    if lack := lacking_package(module, extra):
        raise SetupError(f"{lack.name} is not installed", lack.fix)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise SetupError(f"package {top} cannot be imported: {error}", _install(top, extra)) from error


def lacking_package(module: str, extra: str) -> Lack | None:
    """Return what is missing where the package of a module is not installed; nothing is imported."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is not None:
        return None
    return Lack(f"package {top}", _install(top, extra))


def _install(top: str, extra: str) -> str:
    return f"pip install 'heatkv[{extra}]'" if extra else f"pip install {top}"
