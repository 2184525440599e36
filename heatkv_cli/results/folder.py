"""The folder of one pass: a manifest that grows by whole batches, and resuming from whatever a kill left behind.

* a file appears under its name complete or not at all (written beside it, then renamed);
* `manifest.csv` grows by whole batches, one write each; a line torn by a kill is cut off when the folder is opened;
* an image counts as done when its row is there and its files have the row's sha256; a batch, when all its images do;
* a batch that is done again replaces its rows, so no row is lost and none is double.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from heatkv_cli import __version__
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results.files import ensure_writable, locked, remove_leftovers, sha256_file, write_file
from heatkv_cli.results.tables import (
    FILE_COLUMNS,
    MANIFEST_COLUMNS,
    Row,
    cell,
    complete_prefix,
    encode_rows,
    parse_csv,
)


class RunFolder:
    """The files of one pass of one run (`free/`, `layout/`, `forced/`), open for one writer.

    Use as a context manager; opening takes the lock, cuts off a torn line and gathers what other shards have done.

    Args:
        path: the folder; made when missing.
        shard: (i, n) of this process; every shard of n > 1 has a manifest of its own, which the next unsharded
            process merges.
        columns: of the manifest.

    Raises:
        SetupError: (on entering) the folder cannot be written, or another process does.
        ArtifactError: (on entering) a manifest is damaged, or has other columns.
    """

    def __init__(self, path: Path, shard: tuple[int, int] = (0, 1), columns: Sequence[str] = MANIFEST_COLUMNS) -> None:
        self.path = path
        self.columns = tuple(columns)
        self._tag = "" if shard[1] == 1 else f"-{shard[0]}of{shard[1]}"
        self.manifest = path / f"manifest{self._tag}.csv"
        self._mine: dict[str, dict[str, str]] = {}
        self._others: dict[str, dict[str, str]] = {}
        self._checked: dict[tuple[int, str], bool] = {}
        self._stack = contextlib.ExitStack()

    @classmethod
    def reading(cls, path: Path, columns: Sequence[str] = MANIFEST_COLUMNS) -> RunFolder:
        """Return the folder for reading only: no lock, nothing repaired; for whoever wants another run's images.

        Raises:
            ArtifactError: a manifest is damaged, or has other columns.
        """
        folder = cls(path, columns=columns)
        for manifest in sorted(path.glob("manifest*.csv")):
            folder._take(folder._others, manifest)
        return folder

    def __enter__(self) -> RunFolder:
        ensure_writable(self.path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.path / f".lock{self._tag}"))
            self._recover()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _recover(self) -> None:
        remove_leftovers(self.path)
        data = self.manifest.read_bytes() if self.manifest.exists() else b""
        end = complete_prefix(data)
        if end == 0:
            self._rewrite()
        elif end < len(data):
            os.truncate(self.manifest, end)
        self._mine = self._load(self.manifest, data[:end]) if end else {}
        for other in self._other_manifests():
            self._take(self._others, other)
        if not self._tag:
            self._merge()

    def _other_manifests(self) -> list[Path]:
        return [path for path in sorted(self.path.glob("manifest*.csv")) if path != self.manifest]

    def _take(self, rows: dict[str, dict[str, str]], manifest: Path) -> None:
        """Add the whole rows of a manifest to `rows`, unless the image is done there already."""
        data = manifest.read_bytes()
        found = self._load(manifest, data[: complete_prefix(data)])
        rows |= {key: row for key, row in found.items() if not self._valid(rows.get(key))}

    def _load(self, path: Path, data: bytes) -> dict[str, dict[str, str]]:
        header, rows = parse_csv(path, data)
        if header and tuple(header) != self.columns:
            raise ArtifactError(
                f"{path} has other columns than heatkv {__version__} writes",
                "choose another --out, or remove its folder",
            )
        return {row["image_id"]: row for row in rows}

    def _merge(self) -> None:
        """Take over the manifests of shards that nobody writes any more."""
        for other in self._other_manifests():
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(self.path / f".lock{other.stem.removeprefix('manifest')}"))
                except SetupError:
                    continue  # a shard at work: its rows are read, its file is left alone
                self._take(self._mine, other)
                self._rewrite()
                other.unlink()

    def _rewrite(self) -> None:
        header = dict(zip(self.columns, self.columns, strict=True))
        write_file(self.manifest, encode_rows([header, *self._mine.values()], self.columns))

    def _valid(self, row: Mapping[str, str] | None) -> bool:
        """Whether a row is of an image that was made, and its files are there with the right content."""
        if row is None or row.get("status", "") not in ("", "ok"):
            return False
        for name, digest in FILE_COLUMNS:
            path = self.path / row.get(name, "")
            if row.get(name) and not (path.is_file() and sha256_file(path) == row[digest]):
                return False
        return True

    def row(self, image_id: str) -> dict[str, str] | None:
        """Return the row of an image that is done, else None."""
        for source, rows in enumerate((self._mine, self._others)):
            if image_id not in rows:
                continue
            if (source, image_id) not in self._checked:
                self._checked[source, image_id] = self._valid(rows[image_id])
            if self._checked[source, image_id]:
                return rows[image_id]
        return None

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of all images that are done, of every shard, each once."""
        found = (self.row(image_id) for image_id in {**self._mine, **self._others})
        return [row for row in found if row is not None]

    def done(self, image_ids: Iterable[str]) -> bool:
        """Whether every image of a batch is done; a batch is the unit of resuming."""
        return all(self.row(image_id) is not None for image_id in image_ids)

    def append_batch(self, rows: Sequence[Row], files: Mapping[str, bytes]) -> None:
        """Write the files of a batch, then all its rows at once; older rows of the same images go.

        Args:
            rows: one per image, with `image_id`; the sha256 columns are filled in here from `files`.
            files: content by name, relative to the folder.

        Raises:
            SetupError: the disk is full or gone; the manifest is as before.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            write_file(self.path / name, data)
        filled: dict[str, dict[str, str]] = {}
        for row in rows:
            given = {key: cell(value) for key, value in row.items()}
            given |= {digest: digests[given[name]] for name, digest in FILE_COLUMNS if given.get(name) in digests}
            filled[given["image_id"]] = given
        if not self._mine.keys().isdisjoint(filled):
            self._mine = {key: row for key, row in self._mine.items() if key not in filled}
            self._rewrite()
        self._append(encode_rows(filled.values(), self.columns))
        self._mine |= {key: {column: row.get(column, "") for column in self.columns} for key, row in filled.items()}
        self._checked |= {(0, key): self._valid(self._mine[key]) for key in filled}

    def _append(self, data: bytes) -> None:
        size = self.manifest.stat().st_size
        try:
            with self.manifest.open("ab", buffering=0) as handle:
                if handle.write(data) != len(data):
                    raise OSError("short write")
                os.fsync(handle.fileno())
        except OSError as error:
            os.truncate(self.manifest, size)
            raise SetupError(f"cannot write {self.manifest}: {error.strerror or error}", "free the disk") from error
