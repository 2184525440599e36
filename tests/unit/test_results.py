"""Run folders survive a kill at any byte; result and meta files are whole or not there."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heatkv_cli import results
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import MANIFEST_COLUMNS, RESULT_COLUMNS, RunFolder, read_csv, upsert_results
from heatkv_cli.results import folder as folder_module
from heatkv_cli.results.tables import complete_prefix, encode_rows, parse_csv

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
    folder.append_batch(rows, {f"{name}.png": picture(name) for name in ids(batch)})


def resume(path: Path, batches: int) -> list[int]:
    """Do what is missing; return which batches that were."""
    made = []
    with RunFolder(path) as folder:
        for batch in range(batches):
            if not folder.done(ids(batch)):
                write_batch(folder, batch)
                made.append(batch)
    return made


def tree(path: Path) -> dict[str, bytes]:
    """All files a user sees."""
    return {item.name: item.read_bytes() for item in path.iterdir() if not item.name.startswith(".")}


# -------------------------------------------------------------------------------------------------------- resuming


def test_batches_are_written_once(tmp_path: Path) -> None:
    assert resume(tmp_path, 3) == [0, 1, 2]
    before = tree(tmp_path)
    assert resume(tmp_path, 3) == []
    assert tree(tmp_path) == before
    rows = read_csv(tmp_path / "manifest.csv")
    assert [row["image_id"] for row in rows] == ids(0) + ids(1) + ids(2)
    assert [row["prompt"] for row in rows[:3]] == list(PROMPTS[:3])
    assert all(row["sha256"] == hashlib.sha256(picture(row["image_id"])).hexdigest() for row in rows)


def test_a_cut_at_every_byte_of_the_append(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    resume(whole, 1)
    begin = len((whole / "manifest.csv").read_bytes())
    resume(whole, 2)
    expected = tree(whole)
    full = expected["manifest.csv"]
    torn = tmp_path / "torn"
    resume(torn, 2)
    for end in range(begin, len(full)):
        (torn / "manifest.csv").write_bytes(full[:end])
        assert resume(torn, 2) == [1], f"cut at byte {end}"
        assert tree(torn) == expected, f"cut at byte {end}"
    (torn / "manifest.csv").write_bytes(full)
    assert resume(torn, 2) == []


def test_a_cut_at_every_byte_of_the_header(tmp_path: Path) -> None:
    resume(tmp_path, 1)
    expected = tree(tmp_path)
    header = expected["manifest.csv"].index(b"\n")
    for end in range(header + 1):
        (tmp_path / "manifest.csv").write_bytes(expected["manifest.csv"][:end])
        assert resume(tmp_path, 1) == [0]
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
    rows = [row["image_id"] for row in read_csv(tmp_path / "manifest.csv")]
    assert sorted(rows) == sorted(ids(0) + ids(1) + ids(2))
    assert {name: data for name, data in after.items() if name != "manifest.csv"} == {
        name: data for name, data in expected.items() if name != "manifest.csv"
    }


def test_a_failed_image_is_tried_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.append_batch([{"image_id": "a", "status": "failed", "error": "out of memory"}], {})
        assert not folder.done(["a"])
        assert folder.rows() == []
        folder.append_batch([{"image_id": "a", "status": "ok"}], {})
        assert folder.done(["a"])
    assert [row["status"] for row in read_csv(tmp_path / "manifest.csv")] == ["ok"]


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
    before = (tmp_path / "manifest.csv").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path) as folder:
        for name in ids(1):
            (tmp_path / f"{name}.png").write_bytes(picture(name))
        monkeypatch.setattr(folder_module.os, "fsync", fail)
        with pytest.raises(SetupError, match="No space left"):
            folder.append_batch([{"image_id": name} for name in ids(1)], {})
    assert (tmp_path / "manifest.csv").read_bytes() == before


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
    assert [path.name for path in tmp_path.glob("*.csv")] == ["manifest.csv"]
    assert sorted(row["image_id"] for row in read_csv(tmp_path / "manifest.csv")) == ids(0) + ids(1) + ids(2)


def test_a_shard_at_work_is_not_merged(tmp_path: Path) -> None:
    with RunFolder(tmp_path, (1, 2)) as shard:
        write_batch(shard, 1)
        with RunFolder(tmp_path) as folder:
            assert folder.done(ids(1))
        assert (tmp_path / "manifest-1of2.csv").exists()


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
    torn = (tmp_path / "manifest.csv").read_bytes()[:-5]
    (tmp_path / "manifest.csv").write_bytes(torn)
    with RunFolder(tmp_path / "other"):
        assert len(RunFolder.reading(tmp_path).rows()) == 2 * SIZE - 1
    assert (tmp_path / "manifest.csv").read_bytes() == torn


def test_a_manifest_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("image_id,colour\nx,red\n")
    with pytest.raises(ArtifactError, match="other columns") as caught, RunFolder(tmp_path):
        pass
    assert "--out" in caught.value.hint


def test_unknown_columns_are_a_bug(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder, pytest.raises(ValueError, match="no such column: colour"):
        folder.append_batch([{"image_id": "a", "colour": "red"}], {})


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot write to") as caught, RunFolder(tmp_path / "file" / "run"):
        pass
    assert "--out" in caught.value.hint


# ----------------------------------------------------------------------------------------------------------- tables

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1, max_size=4))
def test_any_text_survives_and_any_cut_is_found(lines: list[list[str]]) -> None:
    rows = [dict(zip("ab", line, strict=True)) for line in lines]
    ends = [len(encode_rows(rows[:count], "ab")) for count in range(len(rows) + 1)]
    data = encode_rows(rows, "ab")
    assert parse_csv(Path("x"), b"a,b\n" + data) == (["a", "b"], rows)
    for cut in range(len(data) + 1):
        assert complete_prefix(data[:cut]) == max(end for end in ends if end <= cut)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "true"), (False, "false"), (0.1, "0.1"), (3, "3"), (float("inf"), "inf"), ("", "")]
    + [({"b": 1, "a": 2}, '{"a": 2, "b": 1}'), ([1, 2], "[1, 2]")],
)
def test_cells(value: Any, text: str) -> None:
    assert results.cell(value) == text


def row(run_id: str, metric: str = "kl", value: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"run_id": run_id, "metric": metric, "variant": "", "value": value, **more}


def test_results_are_replaced_by_key(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "results.csv"
    upsert_results(path, [row("a", value=1.0), row("a", "psnr"), row("b")])
    upsert_results(path, [row("a", value=2.0), row("c")])
    found = read_csv(path)
    assert [(item["run_id"], item["metric"], item["value"]) for item in found] == [
        ("a", "kl", "2.0"),
        ("a", "psnr", "0.0"),
        ("b", "kl", "0.0"),
        ("c", "kl", "0.0"),
    ]
    assert tuple(found[0]) == RESULT_COLUMNS


def test_unknown_columns_of_a_results_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("run_id,metric,variant,value,remark\na,kl,,1,good\n")
    upsert_results(path, [row("b", difference=0.5)])
    first, second = read_csv(path)
    assert (first["remark"], first["value"], first["difference"]) == ("good", "1", "")
    assert (second["remark"], second["difference"]) == ("", "0.5")


def test_a_results_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1\n")
    with pytest.raises(ArtifactError, match="row 2 has 1 cells"):
        upsert_results(path, [row("b")])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not a CSV file"):
        read_csv(path)
    assert read_csv(tmp_path / "none.csv") == []


def test_columns_are_those_of_the_design() -> None:
    assert {"beta_live", "beta_alloc", "beta_work", "beta_meta", "rho", "low", "high", "variant"} <= set(RESULT_COLUMNS)
    assert {"image_id", "seed", "sha256", "status", "error"} <= set(MANIFEST_COLUMNS)
    assert len(set(RESULT_COLUMNS)) == len(RESULT_COLUMNS)


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
