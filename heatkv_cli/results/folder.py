"""The folder of one pass: a manifest that grows by whole batches, and resuming from whatever a kill left behind.

* a file appears under its name complete or not at all (written beside it, then renamed);
* `manifest.jsonl` grows by whole batches, one write each; a line torn by a kill is cut off when the folder is opened;
* an image counts as done when its row is there and its files have the row's sha256; a batch, when all its images do;
* a batch that is done again replaces its rows, so no row is lost and none is double.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results.files import (
    cannot_write,
    ensure_writable,
    locked,
    read_regular,
    remove_leftovers,
    sha256_file,
    write_file,
)
from heatkv_cli.results.lines import (
    FILE_FIELDS,
    MANIFEST_FIELDS,
    Fields,
    Row,
    encode_lines,
    parse_lines,
    whole_lines,
)


class RunFolder:
    """The files of one pass of one run (`free/`, `layout/`, `forced/`), open for one writer.

    Use as a context manager; opening takes the lock, cuts off a torn line and gathers what other shards have done.

    Args:
        path: the folder; made when missing.
        shard: (i, n) of this process; every shard of n > 1 has a manifest of its own, which the next unsharded
            process merges.
        fields: fields of the manifest's lines.

    Raises:
        SetupError: (on entering) the folder cannot be written, or another process does.
        ArtifactError: (on entering) a manifest is damaged, or another heatkv wrote it.
    """

    def __init__(self, path: Path, shard: tuple[int, int] = (0, 1), fields: Fields = MANIFEST_FIELDS) -> None:
        self.path = path
        self.fields = fields
        self._tag = "" if shard[1] == 1 else f"-{shard[0]}of{shard[1]}"
        self.manifest = path / f"manifest{self._tag}.jsonl"
        self._mine: dict[str, dict[str, Any]] = {}
        self._others: dict[str, dict[str, Any]] = {}
        self._checked: dict[tuple[int, str], bool] = {}
        self._stack = contextlib.ExitStack()

    @classmethod
    def reading(cls, path: Path, fields: Fields = MANIFEST_FIELDS) -> RunFolder:
        """Return the folder for reading only: no lock, nothing repaired; for whoever wants another run's images.

        Raises:
            ArtifactError: a manifest is damaged, or another heatkv wrote it.
        """
        folder = cls(path, fields=fields)
        folder._refuse_old()
        for manifest in sorted(path.glob("manifest*.jsonl")):
            folder._take(folder._others, manifest)
        return folder

    def __enter__(self) -> RunFolder:
        self._refuse_old()
        ensure_writable(self.path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.path / f".lock{self._tag}"))
            self._recover()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _refuse_old(self) -> None:
        """Leave alone what heatkv 0.1 wrote, whose manifests were CSV files."""
        old = sorted(self.path.glob("manifest*.csv"))
        if old:
            raise ArtifactError(
                f"{old[0]} was written by an older heatkv, which this one does not read",
                "choose another --out, or remove its folder",
            )

    def _recover(self) -> None:
        for folder in [self.path, *(path for path in self.path.iterdir() if path.is_dir())]:
            remove_leftovers(folder)
        data = self._read(self.manifest) if self.manifest.exists() else b""
        end = whole_lines(data)
        self._mine = self._load(self.manifest, data[:end])  # what is no manifest is refused before it is touched
        if not self.manifest.exists():
            self._rewrite()
        elif end < len(data):
            os.truncate(self.manifest, end)
        for other in self._other_manifests():
            self._take(self._others, other)
        if not self._tag:
            self._merge()

    def _other_manifests(self) -> list[Path]:
        return [path for path in sorted(self.path.glob("manifest*.jsonl")) if path != self.manifest]

    def _take(self, rows: dict[str, dict[str, Any]], manifest: Path) -> None:
        """Add the whole rows of a manifest to `rows`, unless the image is done there already."""
        data = self._read(manifest)
        found = self._load(manifest, data[: whole_lines(data)])
        rows |= {key: row for key, row in found.items() if not self._valid(rows.get(key))}

    def _read(self, manifest: Path) -> bytes:
        try:
            return read_regular(manifest)
        except OSError as error:
            raise ArtifactError(
                f"cannot read {manifest}: {error.strerror or error}", "choose another --out, or remove its folder"
            ) from error

    def _load(self, path: Path, data: bytes) -> dict[str, dict[str, Any]]:
        return {row["image_id"]: row for row in parse_lines(path, data, self.fields)}

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
        write_file(self.manifest, encode_lines(self._mine.values(), self.fields))

    def _valid(self, row: Mapping[str, Any] | None) -> bool:
        """Return whether a row is of an image that was made, and its files are there with the right content."""
        if row is None or row.get("status") not in (None, "", "ok"):
            return False
        for name, digest in FILE_FIELDS:
            if file := row.get(name):
                path = self.path / file
                if not (path.is_file() and sha256_file(path) == row[digest]):
                    return False
        return True

    def row(self, image_id: str) -> dict[str, Any] | None:
        """Return the row of an image that is done, else None."""
        for source, rows in enumerate((self._mine, self._others)):
            if image_id not in rows:
                continue
            if (source, image_id) not in self._checked:
                self._checked[source, image_id] = self._valid(rows[image_id])
            if self._checked[source, image_id]:
                return rows[image_id]
        return None

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of all images that are done, of every shard, each once."""
        found = (self.row(image_id) for image_id in {**self._mine, **self._others})
        return [row for row in found if row is not None]

    def listed(self) -> list[dict[str, Any]]:
        """Return the rows of all images that the manifests name, whatever became of their files."""
        return list({**self._others, **self._mine}.values())

    def done(self, image_ids: Iterable[str]) -> bool:
        """Return whether every image of a batch is done; a batch is the unit of resuming."""
        return all(self.row(image_id) is not None for image_id in image_ids)

    def append_batch(self, rows: Sequence[Row], files: Mapping[str, bytes]) -> None:
        """Write the files of a batch, then all its rows at once; older rows of the same images go.

        Args:
            rows: one per image, with `image_id`; the sha256 fields are filled in here from `files`.
            files: content by name, relative to the folder.

        Raises:
            SetupError: the disk is full or gone; the manifest is as before.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            write_file(self.path / name, data)
        filled: dict[str, dict[str, Any]] = {}
        for row in rows:
            given = dict(row)
            given |= {digest: digests[given[name]] for name, digest in FILE_FIELDS if given.get(name) in digests}
            filled[given["image_id"]] = given
        if not self._mine.keys().isdisjoint(filled):
            self._mine = {key: row for key, row in self._mine.items() if key not in filled}
            self._rewrite()
        data = encode_lines(filled.values(), self.fields)
        self._append(data)
        self._mine |= self._load(self.manifest, data)
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
            raise cannot_write(self.manifest, error) from error
