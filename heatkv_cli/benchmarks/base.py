"""Prompt lists: read, checked, and identified by the sha256 of their file.

A benchmark is one YAML under ``conf/benchmark`` that fills in ``Benchmark``; Python is needed only for a new format
(``formats.py``). Files are the user's: nothing is downloaded, and no service rewrites a prompt.
Called by the calibrate and generate stages; the order of the items is the order of the file, on which batches,
``--limit`` and shards rely.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heatkv_cli.benchmarks.formats import read_official
from heatkv_cli.errors import ConfigError, SetupError, did_you_mean
from heatkv_cli.results import check_path, load_json, read_regular

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FORMATS = ("txt", "jsonl", "csv")
DATA = "HEATKV_DATA"
"""Names the folder with the files of benchmarks; without it they are looked for in ``data``."""
MOST_SAMPLES = 10_000
"""Images of one prompt."""
LONGEST_ID = 200
"""Bytes of a prompt's id, which names files."""
ORIGINAL = "original_prompt"
"""Where a prompt was rewritten, the entry of ``meta`` that holds it as it was: metrics judge by that."""


@dataclass(frozen=True)
class PromptItem:
    """One prompt; ``meta`` holds every other field of its line (GenEval's tag and include, a class index, ...)."""

    id: str
    prompt: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def items_of(prompts: Iterable[str]) -> tuple[PromptItem, ...]:
    """Return items for bare prompts, named by their places: 00000, 00001, ..."""
    return tuple(PromptItem(f"{place:05}", prompt) for place, prompt in enumerate(prompts))


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


@dataclass(frozen=True)
class OnHub:
    """Where the hub has a benchmark's files; fetched only when asked (``heatkv download benchmark=NAME``).

    Args:
        dataset: owner/name of the dataset repository.
        files: paths in it of the prompt list; several make up a folder.
        revision: commit; None is main.
        bytes: of the list, as the hub shows it.
        licence: of the files, '' where the repository states none.
        images: path in it of the images that the benchmark is compared with; '' where there are none.
        images_bytes: their size.
    """

    dataset: str
    files: tuple[str, ...]
    revision: str | None = None
    bytes: int = 0
    licence: str = ""
    images: str = ""
    images_bytes: int = 0

    def url(self, file: str) -> str:
        """Where a file can be fetched by hand."""
        return f"https://huggingface.co/datasets/{self.dataset}/resolve/{self.revision or 'main'}/{file}"


@dataclass(frozen=True)
class Benchmark:
    """A prompt list and how it is used; one YAML of ``conf/benchmark``.

    Args:
        name: as on the command line and in the result rows.
        version: changes whenever the list or its use changes.
        file: a path; a bare file name that the package brings along (``assets/``) means that file, ``./name`` never.
            What is not there is looked for below ``HEATKV_DATA``.
        sha256: of the file; None accepts any content.
        format: of ``formats.READERS``; None goes by the file's ending.
        count: prompts that the whole list has; None accepts any number.
        category: only prompts of this category (MJHQ-30K); None takes all.
        rewrites: a JSON file, an object of prompt to the words that the model gets instead; its digest becomes part of
            the list's.
        source: where the file can be had, for messages.
        hub: where the hub has it; None where it is not there.
        rounds: how often the whole list is walked through, so that every prefix holds all prompts alike; from two on
            the round stands behind the id.
        samples_per_prompt: images per prompt, one after the other.
        id_field, prompt_field: keys of a jsonl line or columns of a csv file.
    """

    name: str
    version: str
    file: str
    sha256: str | None = None
    format: str | None = None
    count: int | None = None
    category: str | None = None
    rewrites: str | None = None
    source: str = ""
    hub: OnHub | None = None
    rounds: int = 1
    samples_per_prompt: int = 1
    id_field: str = "id"
    prompt_field: str = "prompt"

    def __post_init__(self) -> None:
        """Check what no file is needed for.

        Raises:
            ConfigError: a number out of range.
        """
        for key in ("samples_per_prompt", "rounds"):
            if not 1 <= getattr(self, key) <= MOST_SAMPLES:
                raise ConfigError(
                    f"benchmark {self.name}: {key} is {getattr(self, key)}",
                    f"1 to {MOST_SAMPLES}: benchmark.{key}=1",
                )
        if self.count is not None and self.count < 1:
            raise ConfigError(f"benchmark {self.name}: count is {self.count}", "benchmark.count=null takes any number")

    @property
    def path(self) -> Path:
        """The file that ``file`` means.

        Raises:
            SetupError: it is not the name of a file.
        """
        check_path(Path(self.file))
        bundled = ASSETS / self.file
        return bundled if is_bare(self.file) and bundled.is_file() else below_data(self.file)

    def load(self) -> PromptSet:
        """Read the list.

        Raises:
            SetupError: a file cannot be read, or is not the one whose sha256 or number of prompts the YAML names.
            ConfigError: as ``load_prompts``; an unknown category; a prompt without its rewriting.
        """
        path = self.path
        check_path(path)
        if self.source and not path.exists():
            fetch = f"heatkv download benchmark={self.name}, or get it from" if self.hub else "get it from"
            raise SetupError(
                f"benchmark {self.name}: {path} is missing ({DATA} is {os.environ.get(DATA) or 'not set'})",
                f"{fetch} {self.source} and put it there, or set benchmark.file",
            )
        if not path.exists():
            also = "" if Path(self.file) == path else f", nor {path}"
            raise SetupError(
                f"benchmark {self.name}: there is no {self.file}{also}",
                "check benchmark.file; relative paths start at the current folder",
            )
        prompts = load_prompts(
            path,
            name=self.name,
            version=self.version,
            id_field=self.id_field,
            prompt_field=self.prompt_field,
            kind=self.format,
        )
        if self.sha256 is not None and prompts.sha256 != self.sha256:
            raise SetupError(
                f"benchmark {self.name}: {path} has sha256 {prompts.sha256}, expected {self.sha256}",
                "get the original file again, or set benchmark.sha256=null and benchmark.version to use this one",
            )
        if self.count is not None and len(prompts) != self.count:
            raise SetupError(
                f"benchmark {self.name}: {path} has {len(prompts)} prompts, expected {self.count}",
                "get the original file again, or set benchmark.count=null and benchmark.version to use this one",
            )
        return self._walked(self._rewritten(self._chosen(prompts)))

    def _walked(self, prompts: PromptSet) -> PromptSet:
        """The prompts of all rounds; each begins one prompt later, so that no every n-th place holds one prompt alone.

        Groups of a jackknife and shards are such places.
        """
        if self.rounds == 1:
            return prompts
        each = prompts.items * 2
        turns = ((i, each[i % len(prompts) :][: len(prompts)]) for i in range(self.rounds))
        items = (replace(item, id=f"{item.id}-{i:04}") for i, turn in turns for item in turn)
        return replace(prompts, items=tuple(items))

    def _chosen(self, prompts: PromptSet) -> PromptSet:
        """The prompts of the category."""
        if self.category is None:
            return prompts
        items = tuple(item for item in prompts.items if item.meta.get("category") == self.category)
        if not items:
            known = sorted({str(item.meta["category"]) for item in prompts.items if "category" in item.meta})
            raise ConfigError(
                f"benchmark {self.name}: there is no category '{self.category}'", did_you_mean(self.category, known)
            )
        return replace(prompts, items=items)

    def _rewritten(self, prompts: PromptSet) -> PromptSet:
        """The prompts in other words, which a file gives."""
        if self.rewrites is None:
            return prompts
        path = below_data(self.rewrites)
        check_path(path)
        try:
            data = read_regular(path)
            table = load_json(data)
        except OSError as error:
            raise SetupError(f"cannot read {path}: {error.strerror or error}", "check benchmark.rewrites") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}", "write an object of prompt to rewriting") from error
        if not isinstance(table, dict) or not all(isinstance(words, str) and words.strip() for words in table.values()):
            raise ConfigError(f"{path} is no object of prompt to rewriting", 'write {"a cat": "a fluffy cat, ..."}')
        missing = [item.prompt for item in prompts.items if item.prompt not in table]
        if missing:
            raise ConfigError(
                f"{path} lacks {len(missing)} of {len(prompts)} prompts, the first: {missing[0]!r}",
                "add them; a prompt that stays as it is stands for itself",
            )
        items = tuple(
            replace(item, prompt=table[item.prompt], meta={**item.meta, ORIGINAL: item.prompt})
            for item in prompts.items
        )
        both = hashlib.sha256(f"{prompts.sha256} {hashlib.sha256(data).hexdigest()}".encode()).hexdigest()
        return replace(prompts, items=items, sha256=both)


def below_data(file: str) -> Path:
    """Return ``file`` itself where it is there, absolute or starts with a dot; else below the benchmarks' folder.

    Raises:
        SetupError: the system cannot look at such a path.
    """
    path = Path(os.path.expanduser(file))
    check_path(path)
    if path.is_absolute() or path.exists() or file.startswith("."):
        return path
    return Path(os.path.expanduser(os.environ.get(DATA) or "data")) / path


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
    kind: str | None = None,
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
        kind: a published format of ``formats.READERS``; None goes by the ending.

    Raises:
        SetupError: the file cannot be read.
        ConfigError: unknown ending, text that is not UTF-8, no prompts, a malformed line, an id given twice.
    """
    path = Path(path)
    if kind is not None:
        rows, digest = read_official(path, kind)
        items = _items(path, ((line, row) for line, row in enumerate(rows, start=1)), "id", "prompt")
        return PromptSet(name or path.stem, version, _some(path, items), digest)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"prompt list {path} has an unknown ending '{path.suffix}'", did_you_mean(kind, FORMATS))
    check_path(path)
    try:
        data = read_regular(path)
    except OSError as error:
        raise SetupError(
            f"cannot read prompt list {path}: {error.strerror or error}",
            f"check benchmark.file; relative paths start at the current folder, then at {DATA}",
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt list {path} is not UTF-8 text: {error}", "save it as UTF-8") from error
    read = {"txt": _read_txt, "jsonl": _read_jsonl, "csv": _read_csv}[kind]
    items = _items(path, read(path, text, prompt_field), id_field, prompt_field)
    return PromptSet(name or path.stem, version, _some(path, items), hashlib.sha256(data).hexdigest())


def _some(path: Path, items: tuple[PromptItem, ...]) -> tuple[PromptItem, ...]:
    if not items:
        raise ConfigError(f"prompt list {path} has no prompts", "write one prompt per line")
    return items


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
            shown = repr(raw) if len(repr(raw)) < 80 else f"{repr(raw)[:80]}..."
            words = f"a whole number or text without / and \\, at most {LONGEST_ID} bytes"
            raise _malformed(path, line, f"'{id_field}' must be {words}, got {shown}")
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
    if isinstance(raw, int):
        return not isinstance(raw, bool) and abs(raw) < 10**18
    if not isinstance(raw, str) or len(raw.encode("utf-8", "replace")) > LONGEST_ID:
        return False
    return bool(raw.strip()) and raw.isprintable() and not raw.startswith(".") and not set(raw) & set("/\\")


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
            row = load_json(raw)
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
