"""The files of the published benchmarks as they come.

Each reader gives rows with ``id``, ``prompt`` and what else is said of a prompt, in the benchmark's own order. Where a
benchmark is a folder, its digest is of the names and digests of the files that were read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heatkv_cli.errors import ConfigError, SetupError, did_you_mean
from heatkv_cli.results import load_json, read_regular

Rows = list[dict[str, Any]]
STYLES = ("anime", "concept-art", "paintings", "photo")
"""HPDv2's styles, in the order of its tables."""


def read_official(path: Path, kind: str) -> tuple[Rows, str]:
    """Rows and sha256 of a benchmark's own files.

    Args:
        path: the file or folder.
        kind: a key of ``READERS``.

    Raises:
        SetupError: a file cannot be read.
        ConfigError: an unknown kind, or a file that is not of this form.
    """
    if kind not in READERS:
        raise ConfigError(f"unknown benchmark.format '{kind}'", did_you_mean(kind, list(READERS)))
    digests: list[tuple[str, str]] = []

    def text(file: Path) -> str:
        data = _bytes(file)
        digests.append((file.name, hashlib.sha256(data).hexdigest()))
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text: {error}", "get the original file again") from error

    try:
        rows = READERS[kind](path, text)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path} is not of the form {kind}: {reason}", "get the original file again") from error
    if len(digests) == 1 and path.is_file():
        return rows, digests[0][1]
    return rows, hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in digests).encode()).hexdigest()


def _bytes(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError as error:
        raise SetupError(
            f"cannot read {file}: {error.strerror or error}", "get the benchmark's files, or set benchmark.file"
        ) from error


Text = Callable[[Path], str]
"""Reads a file of a benchmark, and notes its digest."""


def coco_captions(path: Path, text: Text) -> Rows:
    """``captions_val2017.json``: images in the file's order, of each the caption that stands first in ``annotations``.

    Source: the selection of DistriFusion's and ScaleKV's COCO scripts (``captions[0]`` of the validation set).
    """
    content = load_json(text(path))
    first: dict[int, dict[str, Any]] = {}
    for annotation in content["annotations"]:
        first.setdefault(annotation["image_id"], annotation)
    return [
        {"id": image["id"], "prompt": first[image["id"]]["caption"].strip(), "file_name": image["file_name"]}
        for image in content["images"]
        if image["id"] in first
    ]


def hpdv2(path: Path, text: Text) -> Rows:
    """HPDv2's ``benchmark`` folder: one JSON list of prompts per style; ``style`` and the place in it are kept."""
    rows = []
    for style in STYLES:
        for i, prompt in enumerate(load_json(text(path / f"{style}.json"))):
            rows.append({"id": f"{style}-{i:05d}", "prompt": prompt, "style": style, "style_index": i})
    return rows


def image_reward(path: Path, text: Text) -> Rows:
    """ImageReward's ``benchmark-prompts.json``: a list of objects with ``id`` and ``prompt``."""
    return [{"id": row["id"], "prompt": row["prompt"]} for row in load_json(text(path))]


def mjhq(path: Path, text: Text) -> Rows:
    """MJHQ-30K's ``meta_data.json``: an object of id to prompt and ``category``; images are ``<category>/<id>.jpg``."""
    return [
        {"id": key, "prompt": row["prompt"], "category": row["category"]} for key, row in load_json(text(path)).items()
    ]


def dpg(path: Path, text: Text) -> Rows:
    """DPG-Bench's ``prompts`` folder: one text file per prompt, by name."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not files:
        raise SetupError(f"{path} is no folder of txt files", "get the benchmark's files, or set benchmark.file")
    return [{"id": file.stem, "prompt": " ".join(text(file).split())} for file in files]


READERS: dict[str, Callable[[Path, Text], Rows]] = {
    "coco-captions": coco_captions,
    "dpg": dpg,
    "hpdv2": hpdv2,
    "image-reward": image_reward,
    "mjhq": mjhq,
}
