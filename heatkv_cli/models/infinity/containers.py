"""Checkpoint files: the tensors in them by name, each read when it is asked for.

Containers: one file (`torch.save` or safetensors), or a Hugging Face folder with an index and shards. Files are mapped
into memory, weights only: a pickle that asks for code is refused, none is run.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import load_json

Shape = tuple[int, ...]

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
AGAIN = "fetch the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape, and how to read it."""

    shape: Shape
    read: Callable[[], Tensor]


def open_checkpoint(path: Path, inside: Sequence[tuple[str, ...]] = ((),)) -> dict[str, Entry]:
    """All tensors of a checkpoint by name; nothing but headers is read.

    Args:
        path: a file, or a folder with an index and shards.
        inside: where in a pickle the state dict may be, keys from the outside in; the first that fits is taken.

    Raises:
        SetupError: the file or a shard is not there.
        ArtifactError: it is damaged, asks for code to be run, or is no checkpoint.
    """
    if not path.exists():
        raise SetupError(f"{path} is missing", "check the folder of the weights")
    return _open_folder(path, inside) if path.is_dir() else _open_file(path, inside)


def _open_folder(folder: Path, inside: Sequence[tuple[str, ...]]) -> dict[str, Entry]:
    found = [folder / n for n in INDEXES if (folder / n).is_file()] or sorted(folder.glob("*.index.json"))
    if not found:
        whole = next((folder / n for n in WHOLE if (folder / n).is_file()), None)
        if whole is not None:
            return _open_file(whole, inside)
        raise ArtifactError(f"{folder} holds no index ({' or '.join(INDEXES)})", "fetch the whole folder, index too")
    index = found[0]
    try:
        shard_of = dict(load_json(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(shard) for shard in shard_of.values()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{index} is not an index of shards: {type(error).__name__} {error}", AGAIN) from error
    if any(Path(name).name != name for name in names):
        raise ArtifactError(f"{index} names files outside its folder", AGAIN)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise SetupError(f"{folder} lacks {len(absent)} of {len(names)} shards: {', '.join(absent[:3])}", AGAIN)
    entries: dict[str, Entry] = {}
    for name in names:
        shard = _open_file(folder / name, inside)
        lost = [key for key, where in shard_of.items() if where == name and key not in shard]
        twice = [key for key in shard if key in entries]
        if lost or twice:
            what = f"lacks {lost[0]}, which the index expects in it" if lost else f"repeats {twice[0]}"
            raise ArtifactError(f"{folder / name} {what}", "shards and index are of different downloads: fetch all")
        entries |= shard
    return entries


def _open_file(path: Path, inside: Sequence[tuple[str, ...]]) -> dict[str, Entry]:
    with path.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ArtifactError(f"{path} is a git-lfs pointer, not the file itself", "run `git lfs pull`, or download it")
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith((b"PK", b"\x80")):
        return _open_pickle(path, inside)
    raise ArtifactError(f"{path} is not a checkpoint: neither a torch file nor safetensors", AGAIN)


def _open_safetensors(path: Path) -> dict[str, Entry]:
    try:
        file = safe_open(path, "pt")
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or cut short: {error}", AGAIN) from error

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(name)

    return {name: Entry(shape, reader(name)) for name, shape in shapes.items()}


def _open_pickle(path: Path, inside: Sequence[tuple[str, ...]]) -> dict[str, Entry]:
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as handle:
        if handle.read(2) == b"PK" and not zipped:
            raise ArtifactError(f"{path} is cut short: its table of contents is missing", AGAIN)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; the error says what is to be said
            # the format before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named or _names_code(path, zipped):
            asked = f" ({named.group(1)})" if named else ""
            raise ArtifactError(
                f"{path} holds more than tensors: it asks for code to be run{asked}; nothing was run",
                "take the file from its official source, or have its author save the state dict alone",
            ) from error
        raise ArtifactError(f"{path} is not a checkpoint: no tensors can be read from it", AGAIN) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ArtifactError(f"{path} is damaged or cut short: {first_line(error)}", AGAIN) from error
    tensors = _state_dict(path, loaded, inside)

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: tensors.pop(name)  # an unmapped tensor is freed once it is copied

    return {name: Entry(tuple(tensor.shape), reader(name)) for name, tensor in tensors.items()}


def _names_code(path: Path, zipped: bool) -> bool:
    """Whether a pickle names a class or function: what torch could not even parse is looked through, not executed."""
    try:
        with contextlib.ExitStack() as stack:
            if zipped:
                archive = stack.enter_context(zipfile.ZipFile(path))
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                handle: IO[bytes] = stack.enter_context(archive.open(name))
            else:
                handle = stack.enter_context(path.open("rb"))
            return any(op.name in ("GLOBAL", "STACK_GLOBAL", "INST") for op, _, _ in pickletools.genops(handle))
    except (ValueError, OSError, StopIteration, zipfile.BadZipFile):
        return False


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _state_dict(path: Path, loaded: Any, inside: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    for keys in inside:
        node = loaded
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping) and node and all(isinstance(value, Tensor) for value in node.values()):
            return {str(name): tensor for name, tensor in node.items()}
    places = ", ".join(".".join(keys) or "the file itself" for keys in inside)
    seen = f"keys {[str(key) for key in loaded][:4]}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
    raise ArtifactError(f"{path} holds no state dict (looked at {places}), but {seen}", "check which file this is")
