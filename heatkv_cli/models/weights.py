"""Model files on disk: where they may be, finding and verifying them. Nothing is ever downloaded here.

One rule: the folder that was named (`--weights`, else HEATKV_WEIGHTS_DIR), directly or below the model's name; then the
cache of huggingface_hub. A file that is not on the hub is looked for in the package's assets instead: a checkout has
more of them than a wheel.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import hub_snapshot, load_json, sha256_file, sha256_known

READ = (".bin", ".json", ".model", ".pt", ".pth", ".safetensors", ".txt")
SIZE_TOLERANCE = 0.01
"""Sizes in conf/model are those the hub shows, rounded to three digits."""


@dataclass(frozen=True)
class WeightFile:
    """One file, or folder, that a model needs.

    Args:
        role: what the model's loader calls it.
        name: below the weights folder.
        sha256: of a file's content, where it is known.
        bytes: size, of a folder the sum of its parts; may be rounded to three digits.
        source: where it comes from, where that is not the hub.
        licence: of the weights.
        hub: owner/repository, and the path in it unless it is the whole repository.
        revision: of the repository; None is main.
        parts: the files of a folder; empty for a file.
    """

    role: str
    name: str
    sha256: str | None = None
    bytes: int | None = None
    source: str = ""
    licence: str = ""
    hub: str = ""
    revision: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def repository(self) -> str:
        """owner/name on the hub."""
        return "/".join(self.hub.split("/")[:2])

    @property
    def inside(self) -> str:
        """Its path in the repository: "" for the whole."""
        return "/".join(self.hub.split("/")[2:])

    @property
    def hub_files(self) -> tuple[str, ...]:
        """Paths of its files in the repository."""
        return tuple(f"{self.inside}/{part}".lstrip("/") for part in self.parts) or (self.inside,)

    @property
    def urls(self) -> tuple[str, ...]:
        """Where its files can be fetched by hand."""
        start = f"https://huggingface.co/{self.repository}/resolve/{self.revision or 'main'}"
        return tuple(f"{start}/{path}" for path in self.hub_files) if self.hub else ()

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"huggingface.co/{self.hub}" if self.hub else self.source


# ---------------------------------------------------------------------------------------------------------- finding


def places(model: str, file: WeightFile, folder: Path | None) -> Iterator[Path]:
    """Every path where a file may be, first choice first.

    Args:
        model: its name may be a folder below `folder`.
        file: what is looked for.
        folder: the folder that was named, or None.
    """
    if folder is not None:
        yield from (folder / file.name, folder / model / file.name)
    if file.hub:
        yield hub_snapshot(file.repository, file.hub_files, file.revision) / file.inside
    else:
        yield asset(file.name)


def lacking(file: WeightFile, path: Path) -> list[str]:
    """Parts of a folder that are not there."""
    return [part for part in file.parts if not (path / part).exists()] if path.is_dir() else []


def find_file(model: str, file: WeightFile, folder: Path | None, package: bool = False, verify: bool = True) -> Path:
    """Path of a model file.

    Args:
        model: its name, for messages and as a folder.
        file: what is looked for.
        folder: where to look first; None where no folder was named.
        package: it lies in the package's assets and nowhere else.
        verify: refuse another content than the file's digest says.

    Raises:
        SetupError: the file is not there; says where it was looked for and what fetches it.
        ArtifactError: it is there with other content.
    """
    where = [asset(file.name)] if package else list(places(model, file, folder))
    there = sorted((path for path in where if path.exists()), key=lambda path: bool(lacking(file, path)))
    if not there:
        raise missing(model, file, where, package)
    found = there[0]  # a folder that lacks a part may be of another format: its loader knows
    if not (found.is_file() or found.is_dir()):
        raise ArtifactError(f"model {model}: {found} is neither a file nor a folder", "put the file itself there")
    if verify and file.sha256 and sha256_path(found) != file.sha256:
        own = "" if package else ", or set model.weights.verify=false for weights of your own"
        raise ArtifactError(f"model {model}: {found} is not the file the config names (sha256)", f"fetch it again{own}")
    return found


def asset(name: str) -> Path:
    """Path of a file in the package."""
    return Path(str(resources.files("heatkv_cli") / "assets" / name))


def missing(model: str, file: WeightFile, where: list[Path], package: bool = False) -> SetupError:
    """The error of a file that is in none of the places."""
    what = f"model {model}: {file.name} is missing"
    if package:
        return SetupError(what, "install heatkv again")
    looked = f"; looked at {', '.join(map(str, where))}" if where else ""
    fetch = f"heatkv download {model}, or put it into " if file.hub else f"it comes from {file.origin}; put it into "
    return SetupError(f"{what}{looked}", f"{fetch}a folder named by --weights DIR or HEATKV_WEIGHTS_DIR")


# -------------------------------------------------------------------------------------------------------- verifying


def sha256_path(path: Path, of_file: Callable[[Path], str] = sha256_known) -> str:
    """Digest of a file, or of a folder: of the names and digests of the files in it that a loader may read."""
    if not path.is_dir():
        return of_file(path)
    parts = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in READ)
    return hashlib.sha256("\n".join(f"{f.name} {of_file(f)}" for f in parts).encode()).hexdigest()


def damage(file: WeightFile, path: Path, deep: bool = False) -> str:
    """What is wrong with a file or folder that is there, "" where nothing is found.

    Sizes and headers are looked at: a cut download, a page of HTML or a git-lfs pointer in place of weights, shards
    that an index names and that are not there. `deep` also compares digests, which reads everything.
    """
    if absent := lacking(file, path):
        return f"lacks {', '.join(absent[:3])}"
    files = [path / part for part in file.parts] if path.is_dir() else [path]
    for one in files:
        if wrong := _header_damage(one):
            return f"{one.name}: {wrong}"
    size = sum(one.stat().st_size for one in files)
    if file.bytes and abs(size - file.bytes) > SIZE_TOLERANCE * file.bytes:
        return f"{size} bytes, {file.bytes} expected"
    if deep and file.sha256 and sha256_path(path, sha256_file) != file.sha256:
        return "sha256 differs"
    return ""


def _header_damage(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself"
    if size == 0:
        return "empty"
    if path.suffix == ".safetensors":
        return _safetensors_damage(path, size)
    if path.suffix in (".pth", ".pt", ".bin"):
        if head.startswith(b"PK"):
            return "" if zipfile.is_zipfile(path) else "cut short: its table of contents is missing"
        return "" if head.startswith(b"\x80") else "neither a torch file nor safetensors"
    return _json_damage(path) if path.suffix == ".json" else ""


def _safetensors_damage(path: Path, size: int) -> str:
    """The header's own length, and the end of the last tensor, must be those of the file."""
    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            return "cut short, or no safetensors file"
        try:
            header = load_json(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header cannot be read"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"{size} bytes, its header says {expected}"


def _json_damage(path: Path) -> str:
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return "not JSON"
    if not path.name.endswith(".index.json"):
        return ""
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    shards = set(map(str, shard_of.values())) if isinstance(shard_of, dict) else set()
    absent = sorted(name for name in shards if not (path.parent / name).exists())
    if not shards:
        return "not an index of shards"
    return f"names {absent[0]}, which is not there" if absent else ""
