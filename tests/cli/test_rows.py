"""Rows of results.csv over several commands, sweeps and failures: no number is lost, replaced or taken for another."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.core.cache import KVCache
from heatkv_cli.errors import ConfigError
from heatkv_cli.methods.window import Window

Capture = pytest.CaptureFixture[str]
SMALL = ["runtime.batch_size=4", "runtime.threads=1", "contact_sheet=0"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose images several tests share."""
    return tmp_path_factory.mktemp("out")


def evaluate(capsys: Capture, out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run eval with --json and return its document."""
    assert run(["eval", *arguments, *SMALL, "--out", str(out), "--json"]) == code, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def rows(out: Path, metric: str) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["metric"] == metric and not row["variant"]]


def test_another_limit_and_other_settings_add_rows(tmp_path: Path, out: Path, capsys: Capture) -> None:
    for limit in ("8", "2", "8"):
        evaluate(capsys, out, "method=full", "metric=shapes", f"limit={limit}")
    assert sorted((row["n"], row["status"]) for row in rows(out, "shapes")) == [("2", "ok"), ("8", "ok")]
    evaluate(capsys, out, "method=full", "metric=shapes", "limit=8", "metric.shapes.threshold=0.5")
    evaluate(capsys, out, "method=full", "metric=shapes", "limit=8", "bootstrap.resamples=200")
    assert sorted(row["n"] for row in rows(out, "shapes")) == ["2", "8", "8", "8"]


def test_fewer_images_than_asked_for_are_partial(tmp_path: Path, capsys: Capture) -> None:
    evaluate(capsys, tmp_path, "method=full", "metric=shapes", "limit=12", "shard=1/2")
    evaluate(capsys, tmp_path, "method=full", "metric=shapes", "limit=20", "shard=0/2")
    found = {(row["metric"], row["n"], row["asked"], row["status"]) for row in rows(tmp_path, "shapes")}
    assert found == {("shapes", "4", "12", "partial"), ("shapes", "16", "20", "partial")}
    shares = rows(tmp_path, "attention_share")
    assert [(row["n"], row["asked"], row["status"]) for row in shares] == [("16", "20", "partial")]


def test_a_shard_without_batches_is_told(tmp_path: Path, capsys: Capture) -> None:
    document = evaluate(capsys, tmp_path, "method=full", "metric=shapes", "limit=4", "shard=1/2", code=6)
    assert document["status"] in ("done", "partial")
    assert [row["status"] for row in rows(tmp_path, "shapes")] == ["skipped"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"name,score\na,1\nb,2\n", "no column run_id"),
        (b"RUN_ID,METRIC,VARIANT,VALUE\nr,psnr,,1\n", "it has 'RUN_ID'"),
        (b"run_id;metric;variant\nr;psnr;\n", "semicolons"),
        (b"\xff\xfer\x00u\x00n\x00", "not a CSV file"),
        (b'run_id,metric,variant\nr,psnr,"', "not a CSV file"),
    ],
)
def test_a_foreign_table_is_refused_before_any_work(data: bytes, words: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(data)
    for more in ([], ["--dry-run"]):
        document = evaluate(capsys, tmp_path, "method=full", "metric=shapes", "limit=2", *more, code=4)
        assert words in str(document)
        assert path.read_bytes() == data
        assert not (tmp_path / "images").exists()


def test_a_byte_order_mark_costs_no_row(out: Path, capsys: Capture) -> None:
    evaluate(capsys, out, "method=full", "metric=shapes", "limit=2")
    path = out / "results.csv"
    before = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + before.replace(b"\n", b"\r\n"))
    evaluate(capsys, out, "method=full", "metric=psnr,shapes", "limit=2")
    with path.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == before.count(b"\n") - 1


# ------------------------------------------------------------------------------------------------------------- sweeps

AXES = {
    "limit": ("2", "3"),
    "out": ("a", "b"),
    "shard": ("0/2", "1/2"),
    "noise_floor": ("attention", "batch"),
    "metric.shapes.threshold": ("0.3", "0.5"),
    "bootstrap.resamples": ("10", "20"),
    "contact_sheet": ("1", "2"),
    "memory": ("1GB", "2GB"),
    "seed": ("0", "1"),
    "budget": ("0.2", "0.1"),
    "method.window": ("1", "4"),
    "method.sink": ("1", "2"),
    "model.sampling.cfg": ("1", "3"),
    "model.dtype": ("float32", "bfloat16"),
    "runtime.attention": ("grouped", "masked"),
    "runtime.threads": ("1", "2"),
    "runtime.device_index": ("0", "1"),
    "benchmark": ("shapes", "shapes-calibration-a"),
    "calibration_prompts": ("shapes-calibration-a", "shapes-calibration-b"),
    "method": ("streaming", "random"),
    "reference": ("full", "random"),
    "seed_mode": ("hash", "paper"),
    "code": ("same", "any"),
    "yes": ("true", "false"),
    "text": ("a", "b"),
    "weights": ("a", "random"),
    "schedule": ("a", "b"),
    "repeats": ("1", "2"),
}
"""Two values of each key; `compose` meets any two or three of them."""


def sweeps() -> list[tuple[str, ...]]:
    rng = random.Random(11)
    return [tuple(rng.sample(sorted(AXES), rng.choice((2, 3)))) for _ in range(40)]


SWEPT = [((key,), command) for key in AXES for command in ("eval", "generate", "bench")]
SWEPT += [(keys, "eval") for keys in sweeps()]


@pytest.mark.parametrize(("keys", "command"), SWEPT)
def test_a_sweep_is_the_product_or_is_refused(keys: tuple[str, ...], command: str) -> None:
    typed = [f"{key}={','.join(AXES[key])}" for key in keys]
    base = [] if "method" in keys else ["method=streaming"]
    base += [] if "budget" in keys else ["budget=0.2"]
    base += ["runtime.batch_size=1"] if "seed_mode" in keys else []
    try:
        plan = compose([*base, *typed], command=command)
    except ConfigError as error:
        assert error.exit_code == 2
    else:
        assert len(plan.runs) == 2 ** len(keys)


VARIED = {
    "method.window": ("parameters", ["window=1", "window=4"]),
    "seed": ("seed", ["0", "1"]),
    "model.sampling.cfg": ("sampling.cfg", ["1", "3"]),
    "runtime.attention": ("attention", ["grouped", "masked"]),
}
"""Key, column of the table, and texts that tell its values apart."""


@pytest.mark.parametrize("keys", [*itertools.combinations(VARIED, 2)][::2], ids="-".join)
def test_tables_and_json_show_every_axis_that_varies(keys: tuple[str, str], out: Path, capsys: Capture) -> None:
    typed = [f"{key}={','.join(AXES[key])}" for key in keys]
    typed += ["method=snapkv", "budget=0.3", "metric=psnr", "limit=1"]
    command = ["eval", *typed, *SMALL, "--out", str(out)]
    assert run(command) == 0
    header, *lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines() if line][1:]
    assert len(lines) == 4
    for key in keys:
        column, texts = VARIED[key]
        shown = [line[header.index(column)].removesuffix(".0") for line in lines]
        assert sorted(shown) == sorted(2 * texts)
    axes = [
        (r["parameters"]["window"], r["seed"], str(r["sampling"]), str(r["runtime"]))
        for r in evaluate(capsys, out, *typed)["runs"]
    ]
    assert len(set(axes)) == 4


def test_one_table_for_each_benchmark(out: Path, capsys: Capture) -> None:
    lists = ("shapes", "shapes-calibration-a")
    command = ["eval", f"benchmark={','.join(lists)}", "method=sinks", "budget=0.3", "metric=psnr", "limit=1"]
    assert run([*command, *SMALL, "--out", str(out)]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if "images of" in line]
    assert [title.split("images of ")[1].split()[0] for title in titles] == list(lists)
    assert [r["benchmark"] for r in evaluate(capsys, out, *command[1:])["runs"]] == list(lists)


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_run_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Window, "policy", _marked(Window.policy))
    monkeypatch.setattr(KVCache, "attend", _failing(KVCache.attend))
    document = evaluate(capsys, tmp_path, "method=window,sinks", "budget=0.3", "metric=psnr", "limit=4", code=6)
    assert [(r["method"], r["status"]) for r in document["runs"]] == [("window", "failed"), ("sinks", "done")]
    found = {row["method"]: (row["status"], row["value"] != "") for row in rows(tmp_path, "psnr")}
    assert found == {"window": ("failed", False), "sinks": ("ok", True)}
    assert "out of host memory" in next(row["reason"] for row in rows(tmp_path, "psnr") if row["status"] == "failed")
    monkeypatch.undo()
    evaluate(capsys, tmp_path, "method=window,sinks", "budget=0.3", "metric=psnr", "limit=4")
    assert [row["status"] for row in rows(tmp_path, "psnr")] == ["ok", "ok"]


def _marked(policy: Any) -> Any:
    def marked(self: Window, *arguments: Any) -> Any:
        made = policy(self, *arguments)
        made.too_large = True
        return made

    return marked


def _failing(attend: Any) -> Any:
    def failing(self: KVCache, *arguments: Any, **more: Any) -> Any:
        if getattr(self.policy, "too_large", False):
            raise MemoryError
        return attend(self, *arguments, **more)

    return failing


def test_an_interrupt_keeps_and_shows_what_is_known(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "heatkv_cli", "eval", "method=random,window,sinks,snapkv,h2o", "budget=0.3"]
    command += ["metric=psnr", "limit=40", *SMALL, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "results.csv").exists() and rows(tmp_path, "psnr"):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, warned = process.communicate(timeout=240)
    assert process.returncode == 130, warned
    known = rows(tmp_path, "psnr")
    assert 1 <= len(known) < 5
    assert all(row["value"] and row["status"] == "ok" for row in known)
    assert known[0]["method"] in said
    assert "next: heatkv eval" in warned


def test_a_schedule_of_another_method_or_budget_is_refused(tmp_path: Path, capsys: Capture) -> None:
    command = ["build-schedule", "method=random", "budget=0.1", "--out", str(tmp_path), "--json"]
    assert run(command) == 0, capsys.readouterr().err
    schedule = f"schedule={json.loads(capsys.readouterr().out)['path']}"
    for method, budget, words in (("heatkv", "0.1", "built for method random"), ("random", "0.5", "built for budget")):
        document = evaluate(capsys, tmp_path, f"method={method}", f"budget={budget}", schedule, "limit=2", code=4)
        assert words in str(document["errors"])
    assert not (tmp_path / "images").exists()
