"""Digests of large files are remembered, never of another content; models and metrics look into the same places."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from heatkv_cli.metrics.weights import NetworkFile, find_weights, weights_sha256
from heatkv_cli.models.weights import WeightFile, damage, find_file, sha256_path
from heatkv_cli.results import large_files, sha256_known
from heatkv_cli.results.files import sha256_file

SIZE = 1000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """Every file that is read for its digest; files of SIZE bytes are large, and settle at once."""
    seen: list[Path] = []
    clear = large_files._digest.cache_clear

    def read(path: Path) -> str:
        seen.append(path)
        return sha256_file(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(large_files, "REMEMBERED", SIZE)
    monkeypatch.setattr(large_files, "SETTLED_NS", -(10**12))
    monkeypatch.setattr(large_files, "sha256_file", read)
    yield seen
    clear()


def another_process() -> None:
    large_files._digest.cache_clear()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_large_file_is_read_once_and_a_small_one_by_every_process(reads: list[Path], tmp_path: Path) -> None:
    large, small = written(tmp_path / "large", b"x" * SIZE), written(tmp_path / "small", b"x" * (SIZE - 1))
    for _ in range(3):
        for path in (large, small):
            assert sha256_known(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        another_process()
    assert [reads.count(path.resolve()) for path in (large, small)] == [1, 3]


def test_other_content_of_the_same_size_and_date_is_read_again(reads: list[Path], tmp_path: Path) -> None:
    path = written(tmp_path / "net.pth", b"a" * SIZE)
    date = path.stat().st_mtime_ns
    first = sha256_known(path)
    for content in (b"b" * SIZE, b"c" * SIZE):  # in place, and by another file under its name
        if content[:1] == b"b":
            path.write_bytes(content)
        else:
            written(tmp_path / "new", content).replace(path)
        os.utime(path, ns=(date, date))
        another_process()
        assert sha256_known(path) == hashlib.sha256(content).hexdigest() != first


def test_what_has_just_been_written_is_not_remembered(
    reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_files, "SETTLED_NS", 10**12)
    path = written(tmp_path / "net.pth", b"a" * SIZE)
    for _ in range(2):
        sha256_known(path)
        another_process()
    assert len(reads) == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("note", [b"", b"0" * 63, b"\xff" * 64, b"g" * 64])
def test_a_damaged_note_is_not_believed(reads: list[Path], tmp_path: Path, note: bytes) -> None:
    path = written(tmp_path / "net.pth", b"a" * SIZE)
    right = sha256_known(path)
    (kept,) = (tmp_path / "cache" / "heatkv" / "sha256").iterdir()
    kept.write_bytes(note)
    another_process()
    assert sha256_known(path) == right
    assert kept.read_text() == right


def test_without_a_place_for_notes_it_is_read_again(reads: list[Path], tmp_path: Path) -> None:
    written(tmp_path / "cache", b"a file, no folder")
    path = written(tmp_path / "net.pth", b"a" * SIZE)
    for _ in range(2):
        assert sha256_known(path) == hashlib.sha256(b"a" * SIZE).hexdigest()
        another_process()
    assert len(reads) == 2


def test_deep_trusts_no_note(reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "net.model", b"a" * SIZE)
    file = WeightFile("r", path.name, sha256=hashlib.sha256(b"b" * SIZE).hexdigest())
    monkeypatch.setattr(large_files, "_digest", lambda *_: file.sha256)  # a disk that lies
    assert sha256_path(path) == file.sha256
    assert damage(file, path) == ""
    assert damage(file, path, deep=True) == "sha256 differs"


def test_models_and_metrics_look_into_the_same_places(
    reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = WeightFile("r", "net.pth", hub="owner/name/sub/net.pth")
    metric = NetworkFile("net.pth", "a page", "owner/name", "sub/net.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)
    repository = tmp_path / "hf" / "hub" / "models--owner--name"
    (repository / "snapshots" / "0123" / "sub").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    in_cache = written(repository / "snapshots" / "0123" / "sub" / "net.pth", b"c" * SIZE)
    assert find_file("m", model, None) == find_weights(metric) == in_cache
    (tmp_path / "named").mkdir()
    named = written(tmp_path / "named" / "net.pth", b"n" * SIZE)
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", "~/named")
    assert find_file("m", model, tmp_path / "named") == find_weights(metric) == named
    (tmp_path / "option").mkdir()
    assert find_weights(metric, folder=tmp_path / "option") == named, "what that folder lacks is looked for further"
    optional = written(tmp_path / "option" / "net.pth", b"o" * SIZE)
    assert find_file("m", model, tmp_path / "option") == find_weights(metric, folder=tmp_path / "option") == optional
    assert find_weights(metric, str(in_cache)) == in_cache
    assert weights_sha256(named) == sha256_path(named)
