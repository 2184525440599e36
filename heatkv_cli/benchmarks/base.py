"""Prompt lists: read, checked, and identified by the sha256 of their file.

A benchmark is one YAML under ``conf/benchmark`` that fills in ``Benchmark``; Python is needed only for a new format.
Called by the calibrate and generate stages; the order of the items is the order of the file, on which batches,
``--limit`` and shards rely.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heatkv_cli.errors import ConfigError, SetupError, did_you_mean

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FORMATS = ("txt", "jsonl", "csv")


@dataclass(frozen=True)
class PromptItem:
    """One prompt; ``meta`` holds every other field of its line (GenEval's tag and include, a class index, ...)."""

    id: str
    prompt: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """An ordered prompt list; ``sha256`` is of the file it was read from, whole even where ``items`` is a prefix."""

    name: str
    version: str
    items: tuple[PromptItem, ...]
    sha256: str

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.items)

    def head(self, limit: int | None) -> PromptSet:
        """The first ``limit`` prompts; all of them for None.

        Raises:
            ConfigError: ``limit`` is less than 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ConfigError(f"limit must be at least 1, got {limit}", "use --limit all for every prompt")
        return replace(self, items=self.items[:limit])


@dataclass(frozen=True)
class Benchmark:
    """A prompt list and how it is used; one YAML of ``conf/benchmark``.

    Args:
        name: as on the command line and in the result rows.
        version: changes whenever the list or its use changes.
        file: a path; a bare file name that the package brings along (``assets/``) means that file, ``./name`` never.
        sha256: of the file; None accepts any content.
        samples_per_prompt: images per prompt.
        default_metrics: names of ``conf/metric`` that ``eval`` uses when none is asked for.
        id_field, prompt_field: keys of a jsonl line or columns of a csv file.
    """

    name: str
    version: str
    file: str
    sha256: str | None = None
    samples_per_prompt: int = 1
    default_metrics: tuple[str, ...] = ()
    id_field: str = "id"
    prompt_field: str = "prompt"

    def __post_init__(self) -> None:
        """Check what no file is needed for.

        Raises:
            ConfigError: ``samples_per_prompt`` is less than 1.
        """
        object.__setattr__(self, "default_metrics", tuple(self.default_metrics))
        if self.samples_per_prompt < 1:
            raise ConfigError(
                f"benchmark {self.name}: samples_per_prompt must be at least 1, got {self.samples_per_prompt}",
                "set benchmark.samples_per_prompt=1",
            )

    @property
    def path(self) -> Path:
        """The file that ``file`` means."""
        bundled = ASSETS / self.file
        return bundled if is_bare(self.file) and bundled.is_file() else Path(self.file).expanduser()

    def load(self) -> PromptSet:
        """Read the list.

        Raises:
            SetupError: the file cannot be read, or is not the one whose sha256 the YAML names.
            ConfigError: as ``load_prompts``.
        """
        prompts = load_prompts(
            self.path, name=self.name, version=self.version, id_field=self.id_field, prompt_field=self.prompt_field
        )
        if self.sha256 is not None and prompts.sha256 != self.sha256:
            raise SetupError(
                f"benchmark {self.name}: {self.path} has sha256 {prompts.sha256}, expected {self.sha256}",
                "get the original file again, or set benchmark.sha256=null and benchmark.version to use this one",
            )
        return prompts


def is_bare(file: str) -> bool:
    """Whether ``file`` is a name without any folder."""
    return "/" not in file and "\\" not in file


def load_prompts(
    path: str | Path,
    *,
    name: str | None = None,
    version: str = "1",
    id_field: str = "id",
    prompt_field: str = "prompt",
) -> PromptSet:
    """Read a prompt list; the format follows the file's ending.

    ``txt``: one prompt per line, blank lines are skipped. ``jsonl``: one object per line. ``csv``: with a header line.
    Prompts without an id get their number in the list, five digits. The text is UTF-8.

    Args:
        path: the file.
        name: of the set; None takes the file's stem.
        version: of the set.
        id_field: key of a jsonl line or column of a csv file.
        prompt_field: the same.

    Raises:
        SetupError: the file cannot be read.
        ConfigError: unknown ending, text that is not UTF-8, no prompts, a malformed line, an id given twice.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"prompt list {path} has an unknown ending '{path.suffix}'", did_you_mean(kind, FORMATS))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SetupError(
            f"cannot read prompt list {path}: {error.strerror or error}",
            "check benchmark.file; relative paths start at the current folder",
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt list {path} is not UTF-8 text: {error}", "save it as UTF-8") from error
    read = {"txt": _read_txt, "jsonl": _read_jsonl, "csv": _read_csv}[kind]
    items = _items(path, read(path, text, prompt_field), id_field, prompt_field)
    if not items:
        raise ConfigError(f"prompt list {path} has no prompts", "write one prompt per line")
    return PromptSet(name or path.stem, version, items, hashlib.sha256(data).hexdigest())


def _items(
    path: Path, rows: Iterator[tuple[int, dict[str, Any]]], id_field: str, prompt_field: str
) -> tuple[PromptItem, ...]:
    items: list[PromptItem] = []
    line_of: dict[str, int] = {}
    for line, row in rows:
        prompt = row.pop(prompt_field, None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise _malformed(path, line, f"'{prompt_field}' is missing, blank or no text")
        raw = row.pop(id_field, None)
        if raw is not None and not _is_id(raw):
            raise _malformed(path, line, f"'{id_field}' must be a whole number or text without / and \\, got {raw!r}")
        key = f"{len(items):05d}" if raw is None else str(raw)
        if key in line_of:
            raise ConfigError(
                f"prompt list {path}: id '{key}' of line {line} was given in line {line_of[key]} already",
                "seeds and files are named by the id: make every id different, or give none at all",
            )
        line_of[key] = line
        items.append(PromptItem(key, prompt, row))
    return tuple(items)


def _is_id(raw: object) -> bool:
    """Ids name files, so they hold no path separators and do not start with a dot."""
    if isinstance(raw, str):
        return bool(raw.strip()) and raw.isprintable() and not raw.startswith(".") and not set(raw) & set("/\\")
    return isinstance(raw, int) and not isinstance(raw, bool)


def _read_txt(path: Path, text: str, prompt_field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # split("\n") and not splitlines(): a prompt may contain U+2028 and its like.
    for line, prompt in enumerate(text.split("\n"), start=1):
        if prompt.strip():
            yield line, {prompt_field: prompt.strip()}


def _read_jsonl(path: Path, text: str, prompt_field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise _malformed(path, line, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _malformed(path, line, f"expected an object, got {type(row).__name__}")
        yield line, row


def _read_csv(path: Path, text: str, prompt_field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise _malformed(path, 1, "a column name appears twice")
        if header and prompt_field not in header:
            raise ConfigError(
                f"prompt list {path} has no column '{prompt_field}'",
                f"set benchmark.prompt_field to one of: {', '.join(header)}",
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise _malformed(path, reader.line_num, f"{len(row)} fields, but the header has {len(header)}")
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _malformed(path, reader.line_num, f"not CSV: {error}") from error


def _malformed(path: Path, line: int, what: str) -> ConfigError:
    return ConfigError(f"prompt list {path}, line {line}: {what}", "correct or remove that line")
