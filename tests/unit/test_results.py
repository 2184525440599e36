"""Run folders survive a kill at any byte; result and meta files are whole or not there."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from heatkv_cli import results
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import (
    MANIFEST_FIELDS,
    Fields,
    RunFolder,
    parse_lines,
)
from heatkv_cli.results import folder as folder_module

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red circle", 'two, "quoted"', "über\nzwei Zeilen", "tab\tand\rreturn")
SIZE = 3


def ids(batch: int) -> list[str]:
    return [f"p{SIZE * batch + i:03d}-0" for i in range(SIZE)]


def picture(image_id: str) -> bytes:
    return hashlib.sha256(image_id.encode()).digest() * 20


def write_batch(folder: RunFolder, batch: int) -> None:
    rows = [
        {"image_id": name, "prompt": PROMPTS[i % 4], "sample": 0, "batch": batch, "file": f"{name}.png", "status": "ok"}
        for i, name in enumerate(ids(batch))
    ]
    rows = [{name: value for name, value in row.items() if name in folder.fields} for row in rows]
    folder.append_batch(rows, {f"{name}.png": picture(name) for name in ids(batch)})


FEW = {name: MANIFEST_FIELDS[name] for name in ("image_id", "file", "sha256", "status")}


def resume(path: Path, batches: int, fields: Fields = MANIFEST_FIELDS) -> list[int]:
    """Do what is missing; return which batches that were."""
    made = []
    with RunFolder(path, fields=fields) as folder:
        for batch in range(batches):
            if not folder.done(ids(batch)):
                write_batch(folder, batch)
                made.append(batch)
    return made


def manifest(path: Path) -> list[dict[str, Any]]:
    return parse_lines(path, path.read_bytes(), MANIFEST_FIELDS)


def tree(path: Path) -> dict[str, bytes]:
    """All files a user sees."""
    return {item.name: item.read_bytes() for item in path.iterdir() if not item.name.startswith(".")}


# -------------------------------------------------------------------------------------------------------- resuming


def test_batches_are_written_once(tmp_path: Path) -> None:
    assert resume(tmp_path, 3) == [0, 1, 2]
    before = tree(tmp_path)
    assert resume(tmp_path, 3) == []
    assert tree(tmp_path) == before
    rows = manifest(tmp_path / "manifest.jsonl")
    assert [row["image_id"] for row in rows] == ids(0) + ids(1) + ids(2)
    assert [row["prompt"] for row in rows[:3]] == list(PROMPTS[:3])
    assert all(row["sha256"] == hashlib.sha256(picture(row["image_id"])).hexdigest() for row in rows)


def test_a_cut_at_every_byte_of_the_append(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    resume(whole, 1, FEW)
    begin = len((whole / "manifest.jsonl").read_bytes())
    resume(whole, 2, FEW)
    expected = tree(whole)
    full = expected["manifest.jsonl"]
    torn = tmp_path / "torn"
    resume(torn, 2, FEW)
    for end in range(begin, len(full)):
        (torn / "manifest.jsonl").write_bytes(full[:end])
        assert resume(torn, 2, FEW) == [1], f"cut at byte {end}"
        assert tree(torn) == expected, f"cut at byte {end}"
    (torn / "manifest.jsonl").write_bytes(full)
    assert resume(torn, 2, FEW) == []


def test_a_cut_at_every_byte_of_the_first_batch(tmp_path: Path) -> None:
    resume(tmp_path, 1, FEW)
    expected = tree(tmp_path)
    for end in range(0, len(expected["manifest.jsonl"]), 7):
        (tmp_path / "manifest.jsonl").write_bytes(expected["manifest.jsonl"][:end])
        assert resume(tmp_path, 1, FEW) == [0]
        assert tree(tmp_path) == expected


def test_a_kill_between_files_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume(tmp_path / "whole", 2)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_append", lambda self, data: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "cut", 2)
    assert resume(tmp_path / "cut", 2) == [0, 1]
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["remove", "truncate", "change"])
def test_a_damaged_image_is_made_again(tmp_path: Path, harm: str) -> None:
    resume(tmp_path, 3)
    expected = tree(tmp_path)
    path = tmp_path / f"{ids(1)[2]}.png"
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(picture("x") if harm == "change" else path.read_bytes()[:-1])
    assert resume(tmp_path, 3) == [1]
    after = tree(tmp_path)
    rows = [row["image_id"] for row in manifest(tmp_path / "manifest.jsonl")]
    assert sorted(rows) == sorted(ids(0) + ids(1) + ids(2))
    assert {name: data for name, data in after.items() if name != "manifest.jsonl"} == {
        name: data for name, data in expected.items() if name != "manifest.jsonl"
    }


def test_a_failed_image_is_tried_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.append_batch([{"image_id": "a", "status": "failed", "error": "out of memory"}], {})
        assert not folder.done(["a"])
        assert folder.rows() == []
        folder.append_batch([{"image_id": "a", "status": "ok"}], {})
        assert folder.done(["a"])
    assert [row["status"] for row in manifest(tmp_path / "manifest.jsonl")] == ["ok"]


def test_traces_are_checked_like_images(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        rows = [{"image_id": name, "trace": "batch-0.safetensors"} for name in "ab"]
        folder.append_batch(rows, {"batch-0.safetensors": b"bits"})
        assert folder.done("ab")
    (tmp_path / "batch-0.safetensors").write_bytes(b"bytes")
    with RunFolder(tmp_path) as folder:
        assert not folder.done("a")


WRITER = """
import hashlib, sys, time
from pathlib import Path
from heatkv_cli.results import RunFolder
SIZE, PROMPTS = {size}, {prompts}
{functions}
with RunFolder(Path(sys.argv[1])) as folder:
    print("open", flush=True)
    for batch in range({batches}):
        if not folder.done(ids(batch)):
            write_batch(folder, batch)
            time.sleep(0.004)
"""


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    batches, rng = 30, random.Random(7)
    resume(tmp_path / "whole", batches)
    functions = "\n".join(inspect.getsource(function) for function in (ids, picture, write_batch))
    code = WRITER.format(functions=functions, size=SIZE, prompts=PROMPTS, batches=batches)
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "cut")], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    resume(tmp_path / "cut", batches)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".*.tmp")), "half-written files are cleaned up"


def test_a_full_disk_leaves_the_manifest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume(tmp_path, 1)
    before = (tmp_path / "manifest.jsonl").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path) as folder:
        for name in ids(1):
            (tmp_path / f"{name}.png").write_bytes(picture(name))
        monkeypatch.setattr(folder_module.os, "fsync", fail)
        with pytest.raises(SetupError, match="No space left"):
            folder.append_batch([{"image_id": name} for name in ids(1)], {})
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


# --------------------------------------------------------------------------------------------------- locks, shards


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(SetupError, match=str(os.getpid())) as caught, RunFolder(tmp_path):
        pass
    assert "--shard" in caught.value.hint
    with RunFolder(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("999999999")
    assert resume(tmp_path, 1) == [0]


def test_shards_work_side_by_side_and_are_merged(tmp_path: Path) -> None:
    with RunFolder(tmp_path, (0, 2)) as first, RunFolder(tmp_path, (1, 2)) as second:
        write_batch(first, 0)
        write_batch(second, 1)
    with RunFolder(tmp_path, (0, 3)) as third:
        assert third.done(ids(0) + ids(1))
        write_batch(third, 2)
    assert len(RunFolder.reading(tmp_path).rows()) == 3 * SIZE
    assert resume(tmp_path, 3) == []
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["manifest.jsonl"]
    assert sorted(row["image_id"] for row in manifest(tmp_path / "manifest.jsonl")) == ids(0) + ids(1) + ids(2)


def test_a_shard_at_work_is_not_merged(tmp_path: Path) -> None:
    with RunFolder(tmp_path, (1, 2)) as shard:
        write_batch(shard, 1)
        with RunFolder(tmp_path) as folder:
            assert folder.done(ids(1))
        assert (tmp_path / "manifest-1of2.jsonl").exists()


def test_an_image_made_twice_counts_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path, (0, 2)) as first:
        write_batch(first, 0)
    damaged = tmp_path / f"{ids(0)[0]}.png"
    damaged.write_bytes(b"")
    with RunFolder(tmp_path, (1, 2)) as second:
        assert not second.done(ids(0))
        write_batch(second, 0)
        assert second.done(ids(0))
    with RunFolder(tmp_path) as folder:
        assert sorted(row["image_id"] for row in folder.rows()) == ids(0)


def test_reading_neither_locks_nor_repairs(tmp_path: Path) -> None:
    resume(tmp_path, 2)
    torn = (tmp_path / "manifest.jsonl").read_bytes()[:-5]
    (tmp_path / "manifest.jsonl").write_bytes(torn)
    with RunFolder(tmp_path / "other"):
        assert len(RunFolder.reading(tmp_path).rows()) == 2 * SIZE - 1
    assert (tmp_path / "manifest.jsonl").read_bytes() == torn


def test_a_folder_of_an_older_heatkv_is_refused_and_stays(tmp_path: Path) -> None:
    old = "image_id,colour\nx,red\n"
    (tmp_path / "manifest.csv").write_text(old)
    for enter in (lambda: RunFolder(tmp_path).__enter__(), lambda: RunFolder.reading(tmp_path)):
        with pytest.raises(ArtifactError, match="older heatkv") as caught:
            enter()
        assert "--out" in caught.value.hint
    assert (tmp_path / "manifest.csv").read_text() == old
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.csv"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"sample": 0', '"sample": "0"', "'sample' is '0'"),
        ('"sample": 0', '"sample": NaN', "NaN is not a JSON number"),
        ('"image_id"', '"id"', "its fields are not those this heatkv writes"),
        ('{"image_id"', '["image_id"', "line 1"),
        ('"numbers": null', '"numbers": ' + "[" * 100_000, "nested too deeply"),
        ('"image_id": "p000-0"', '"image_id": null', "'image_id' is None"),
    ],
)
def test_a_line_changed_by_hand_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    resume(tmp_path, 1)
    path = tmp_path / "manifest.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=words) as caught:
        resume(tmp_path, 1)
    assert f"{path}, line 1" in caught.value.message
    assert path.read_bytes() == before
    path.write_bytes(before[before.index(b"\n") + 1 :])  # what the hint says
    assert resume(tmp_path, 1) == [0]


def test_a_manifest_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(ArtifactError, match="cannot read"), RunFolder(tmp_path):
        pass


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\nrest", b"7\nrest", b"{}\n{"])
def test_a_file_that_is_no_manifest_stays_as_it_is(tmp_path: Path, data: bytes) -> None:
    """Its last line is not cut off as that of a manifest is."""
    (tmp_path / "manifest.jsonl").write_bytes(data)
    with pytest.raises(ArtifactError, match="line 1"), RunFolder(tmp_path):
        pass
    assert (tmp_path / "manifest.jsonl").read_bytes() == data


def test_a_pipe_in_a_manifests_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.jsonl")
    with pytest.raises(ArtifactError, match="not a regular file"), RunFolder(tmp_path):
        pass


def test_unknown_fields_are_a_bug(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder, pytest.raises(ValueError, match="no such field: colour"):
        folder.append_batch([{"image_id": "a", "colour": "red"}], {})


def test_types_and_infinities_survive(tmp_path: Path) -> None:
    numbers = {"psnr": float("inf"), "kl": 0.25, "window": 3}
    with RunFolder(tmp_path) as folder:
        folder.append_batch([{"image_id": "a", "seed": 2**62, "numbers": numbers}], {})
    (row,) = RunFolder.reading(tmp_path).rows()
    assert row["seed"] == 2**62
    assert row["numbers"] == {"psnr": "inf", "kl": 0.25, "window": 3}
    assert {name: float(value) for name, value in row["numbers"].items()} == numbers


def test_leftovers_of_dead_processes_go_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead, alive, named = (tmp_path / name for name in (".x.999999999.tmp", f".x.{os.getpid()}.tmp", ".notes.tmp"))
    for path in (dead, alive, named):
        path.touch()
    results.ensure_writable(tmp_path)
    assert not dead.exists()
    assert alive.exists() and named.exists()


def test_a_held_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatkv_cli.results.files.PATIENCE", 0.05)
    path = tmp_path / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from heatkv_cli.results import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(1)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None
    holder.stdout.readline()
    logger = logging.getLogger("heatkv.results")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with results.locked(path, wait=True):
            assert holder.poll() is not None or holder.wait(5) == 0
    finally:
        logger.removeHandler(handler)
        holder.stdout.close()
    assert said and f"process {holder.pid}" in said[0] and str(path) in said[0]


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot write to") as caught, RunFolder(tmp_path / "file" / "run"):
        pass
    assert "--out" in caught.value.hint


# ------------------------------------------------------------------------------------------------------------- meta


def test_meta_is_written_first_and_completed_later(tmp_path: Path) -> None:
    results.write_meta(tmp_path, config_hash="f" * 64, config={"a": 1}, run_id="x")
    before = json.loads((tmp_path / "meta.json").read_text())
    assert (before["status"], before["config"], before["run_id"]) == ("running", {"a": 1}, "x")
    assert before["environment"]["packages"]["torch"]
    results.finish_meta(tmp_path, images=3)
    after = json.loads((tmp_path / "meta.json").read_text())
    assert (after["status"], after["images"], after["created_utc"]) == ("done", 3, before["created_utc"])


def test_meta_of_a_resumed_folder(tmp_path: Path) -> None:
    first = results.write_meta(tmp_path, config_hash="a" * 64, config={})
    second = results.write_meta(tmp_path, config_hash="a" * 64, config={})
    assert len(second["starts"]) == 2
    assert second["created_utc"] == first["created_utc"]


def test_another_configuration_never_mixes(tmp_path: Path) -> None:
    results.write_meta(tmp_path, config_hash="a" * 64, config={})
    with pytest.raises(ArtifactError, match="another configuration"):
        results.write_meta(tmp_path, config_hash="b" * 64, config={})


def test_damaged_meta(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"status": ')
    with pytest.raises(ArtifactError, match="cannot read"):
        results.read_meta(tmp_path)
    assert results.read_meta(tmp_path / "nowhere") is None
