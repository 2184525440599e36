"""The experiment of all methods, tiny, as a user types it; and points of a sweep that cannot exist."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from heatkv_cli.cli import run
from heatkv_cli.config import choices, compose

Capture = pytest.CaptureFixture[str]
Call = Callable[..., dict[str, Any]]
EXPERIMENT = [
    "eval",
    "experiment=methods-tiny",
    "budget=0.1,0.01",
    "limit=2",
    "runtime.batch_size=1",
    "runtime.threads=1",
]
SMALL = {"window", "heatkv"}
"""Those that can live on 1 % of tiny's cache: one token a head."""


def test_all_methods_in_one_table(tmp_path: Path, call: Call) -> None:
    out = str(tmp_path / "out")
    planned = call(*EXPERIMENT, "--out", out, "--dry-run", code=6)
    assert not Path(out).exists()
    document = call(*EXPERIMENT, "--out", out, code=6)
    assert planned["infeasible"] == document["infeasible"]
    assert len(planned["runs"]) == len(document["runs"])
    assert all(one["byte_plan"] for one in planned["runs"])
    assert document["status"] == "partial"
    methods = set(choices("method")) - {"random", "sinks", "full"}
    refused = {item["method"] for item in document["infeasible"]}
    assert {(r["method"], r["budget"]) for r in document["runs"]} == {
        ("full", "1"), *((name, "0.1") for name in methods), *((name, "0.01") for name in methods - refused),
    }  # fmt: skip
    assert SMALL.isdisjoint(refused)
    assert {"snapkv", "hack", "streaming"} <= refused
    with Path(document["path"]).open(newline="") as f:
        rows = list(csv.DictReader(f))
    status: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        status[row["method"], row["budget"]].add(row["status"])
        assert (row["status"] == "infeasible") == ("the smallest feasible budget is" in row["reason"])
    assert {key for key, values in status.items() if values == {"infeasible"}} == {(name, "0.01") for name in refused}
    ok = [row for row in rows if row["status"] == "ok"]
    assert all(float(row["beta_alloc"]) <= float(row["budget"]) * 1.005 for row in ok)
    assert {row["metric"] for row in ok} >= {"kl", "psnr", "shapes", "policy_share"}

    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*.png")}
    again = call(*EXPERIMENT, "--out", out, code=6)
    assert before == {path: path.stat().st_mtime_ns for path in Path(out).rglob("*.png")}, "made twice"
    assert again["runs"] == document["runs"]

    compared = tmp_path / "compared.csv"
    call("report", "compare", "--out", out, "--metrics", "kl,psnr,shapes", "--to", str(compared))
    with compared.open(newline="") as f:
        pairs = list(csv.DictReader(f))
    assert {r["other"] for r in pairs if r["budget"] == "0.1"} == methods - {"heatkv"}
    table = tmp_path / "methods.md"
    call("report", "table", document["path"], "--compared", str(compared), "--to", str(table))
    lines = table.read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 1 + 2 * len(methods)
    assert sum("does not exist: budget 0.01" in line for line in lines) == len(refused)
    assert "heatkv - this, kl" in lines[0]


def test_a_sweep_of_which_nothing_can_exist_is_an_error(tmp_path: Path, call: Call) -> None:
    document = call("eval", "method=snapkv,heatkv", "budget=0.002", "--out", str(tmp_path), code=2)
    assert len(document["errors"]) == 2
    assert all("smallest feasible" in error["error"] for error in document["errors"])
    words = ["eval", "method=snapkv,heatkv", "budget=0.002", "--out", str(tmp_path), "--dry-run"]
    assert call(*words, code=2) == document


def test_a_dry_run_says_what_is_left_out_and_bench_refuses_it(capsys: Capture, tmp_path: Path) -> None:
    sweep = ["method=heatkv", "budget=0.2,0.001", "memory=1GiB", "--out", str(tmp_path / "out"), "--dry-run"]
    reason = "budget 0.001 is too small for method heatkv"
    assert run(["generate", *sweep]) == 6
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines() if line.startswith("heatkv")]
    assert ["infeasible" in row for row in rows] == [False, True]
    assert f"left out: {reason}" in said.err
    assert run(["bench", *sweep]) == 2
    assert f"error: {reason}" in capsys.readouterr().err


def test_a_dry_run_tells_first_what_is_missing(call: Call, tmp_path: Path) -> None:
    words = ["model=infinity-2b", "method=random", "budget=0.001", "--weights", str(tmp_path), "--dry-run"]
    document = call("generate", *words, code=3)
    assert document["missing"]
    assert [point["method"] for point in document["infeasible"]] == ["random"]


def test_the_experiment_is_what_the_issue_asks_for() -> None:
    plan = compose(["experiment=methods-tiny"], command="eval", options={}, dry_run=True)
    assert {run.budget.text for run in plan.runs} == {"1", "0.5", "0.3", "0.2", "0.1", "0.04"}
    assert len(plan.runs) == 1 + 11 * 5
    assert all(run.limit is None and {m.name for m in run.metrics} == {"kl", "psnr", "shapes"} for run in plan.runs)


def test_the_papers_tables_are_their_protocols() -> None:
    heatkv = compose(["experiment=heatkv-table1"], command="eval", options={}, dry_run=True)
    exact = {f"{cap}/6425" for cap in (1300, 650, 265)}
    budgets = {run.budget.ratio for run in heatkv.runs if run.method.name == "heatkv"}
    assert budgets == {Fraction(text) for text in {"0.2", "0.1", "0.04"} | exact}
    assert len(heatkv.runs) == 1 + len(budgets)
    for one in heatkv.runs:
        assert (one.benchmark.name, one.limit, one.seed, one.seed_mode) == ("coco2017", None, 0, "paper")
        assert [metric.name for metric in one.metrics] == ["psnr", "lpips", "fid"]
        assert (set(one.model.sampling.strengths()), one.runtime.device) == ({(3, 1)}, "cuda")
    hack = compose(["experiment=hack-table1"], command="eval", options={}, dry_run=True)
    methods = {"full", "streaming", "h2o", "snapkv", "cake", "lookm", "meda", "hack"}
    pairs = {(run.benchmark.name, run.method.name) for run in hack.runs}
    assert pairs == {(b, m) for b in ("geneval", "hpsv2", "image-reward", "mjhq30k") for m in methods}
    for one in hack.runs:
        assert (one.budget.rho, one.limit) == (None if one.method.name == "full" else Fraction(7, 10), None)
        assert set(one.model.sampling.strengths()) == {(4, 1)}


def test_a_dry_run_names_what_is_swept(capsys: Capture, tmp_path: Path) -> None:
    sweep = ["benchmark=shapes,shapes-calibration-a", "method=full,snapkv", "budget=0.1"]
    assert run(["eval", *sweep, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for benchmark in ("shapes", "shapes-calibration-a"):
        assert sum(line.startswith(f"{benchmark} ") for line in lines) == 2
    assert not (tmp_path / "out").exists()
