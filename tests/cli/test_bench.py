"""bench on the bundled model and on random weights, as a user types it."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_models import SMALL_INFINITY

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.pipeline import bench, bench_table
from heatkv_cli.pipeline.bench_table import Pass, numbers
from heatkv_cli.pipeline.process_memory import Memory
from heatkv_cli.planning import job
from heatkv_cli.planning.resolver import Resolver

Capture = pytest.CaptureFixture[str]
Call = Callable[..., dict[str, Any]]
Row = dict[str, str]
RUNS = [("full", "1"), ("heatkv", "0.2"), ("heatkv", "0.1")]
FAST = ["runtime.threads=1", "warmup=0"]
SMALL_2B = [
    "model=infinity-2b",
    "weights=random",
    *SMALL_INFINITY,
    "model.params.tokenizer.multipliers=[1,1]",
]


def read(path: str | Path) -> list[Row]:
    with Path(path).open(newline="") as f:
        return list(csv.DictReader(f))


def table(rows: list[Row], measure: str, value: str = "median") -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """{(method, budget): {(scale, stage): number}} of one measure."""
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for row in rows:
        if row["measure"] == measure:
            found[row["method"], row["budget"]][row["scale"], row["stage"]] = float(row[value])
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def document(out: Path) -> dict[str, Any]:
    """Two turns of three runs on the bundled model, calibration included."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[dict[str, Any]] = []
        patch.setattr("heatkv_cli.console.Console.result", lambda self, found: said.append(dict(found)))
        arguments = ["bench", "method=heatkv", "budget=0.2,0.1", "repeats=2", f"out={out}", "limit=1", *FAST, "-q"]
        assert run([*arguments, "--json"]) == 0
    return said[0]


@pytest.fixture(scope="module")
def rows(document: dict[str, Any]) -> list[Row]:
    return read(document["path"])


def test_one_row_for_every_run_scale_stage_and_measure(rows: list[Row]) -> None:
    assert tuple(rows[0]) == bench_table.COLUMNS
    keys = [(r["run_id"], r["scale"], r["stage"], r["measure"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert list(dict.fromkeys((r["method"], r["budget"]) for r in rows)) == RUNS
    seconds = table(rows, "seconds")
    needed = {"attention", "attention/read", "projections", "cross_attention", "ffn", "norms", "pool", "policy", "head"}
    for run_, found in seconds.items():
        assert {stage for scale, stage in found if scale == "all"} >= needed | {"sampling", "decode", "pass", "total"}
        assert {stage for scale, stage in found if scale == "7"} >= (needed | {"sampling", "pass"}) - {"policy"}, run_
        assert {scale for scale, _ in found} == {"all", *(str(s) for s in range(8))}
    for row in rows:
        assert float(row["low"]) <= float(row["median"]) <= float(row["high"]) and row["repeats"] == "2"
        assert row["device"] == "cpu" and row["device_name"] and row["threads"] == "1" and row["dtype"] == "float32"
        assert row["attention_backend"] == "grouped" and row["batch_size"] == "1" and row["rows"] == "2"
        assert row["command"].startswith("heatkv bench method=heatkv") and row["torch_version"]
    units = {r["measure"]: r["unit"] for r in rows}
    assert units["seconds"] == units["cpu_seconds"] == "s" and units["flops"] == "FLOP"
    assert units["process_peak_bytes"] == "B" and units["beta_alloc"] == "fraction"


def test_full_is_one_and_spread_is_of_the_repeats(rows: list[Row]) -> None:
    full = [r for r in rows if r["method"] == "full" and r["ratio_to_full"]]
    assert full and all(float(r["ratio_to_full"]) == 1 for r in full)
    others = [r for r in rows if r["method"] == "heatkv" and (r["stage"], r["measure"]) == ("attention", "flops")]
    assert all(0 < float(r["ratio_to_full"]) <= 1 for r in others)


def test_stages_sum_to_the_pass(tmp_path: Path) -> None:
    """In one pass; medians of two need not add up."""
    plan = compose([f"out={tmp_path}", "method=full", "limit=1", *FAST], command="bench")
    job_ = Resolver().job(plan.first)
    model = bench.Models().get(job_)
    condition = model.encode([job_.images[0].item])
    values = bench._measure(job_, model, condition).values()
    seconds = {(scale, stage): value for (scale, stage, measure), value in values.items() if measure == "seconds"}
    scales = [str(s) for s in range(8)]
    for scale in ("all", *scales):
        parts = [v for (s, n), v in seconds.items() if s == scale and "/" not in n and n not in WHOLES]
        assert sum(parts) == pytest.approx(seconds[scale, "pass"], rel=1e-9)
        inside = sum(v for (s, n), v in seconds.items() if s == scale and n.startswith("attention/"))
        assert 0 <= inside < seconds[scale, "attention"]
    assert sum(seconds[s, "pass"] for s in scales) < seconds["all", "pass"]
    assert seconds["all", "total"] == pytest.approx(seconds["all", "pass"] + seconds["all", "decode"])
    assert seconds["all", "other"] < 0.2 * seconds["all", "pass"], "most of a pass has a name"
    assert 0 < values["all", "pass", "profiling_seconds"] < 0.2 * seconds["all", "pass"]


WHOLES = ("pass", "total", "decode")


def test_flops_of_full_are_the_closed_form(rows: list[Row]) -> None:
    model = compose([]).first.model
    lengths = [h * w for h, w in model.sizes]
    flops = table(rows, "flops")
    for t, n in enumerate(lengths):
        keys = sum(lengths[: t + 1])
        expected = 4 * model.head_dim * n * keys * model.num_layers * model.num_heads * 2
        assert flops["full", "1"][str(t), "attention"] == expected
        assert all(flops[run_][str(t), "attention"] <= expected for run_ in RUNS)
    assert flops["full", "1"]["all", "attention"] == sum(flops["full", "1"][str(t), "attention"] for t in range(8))


def test_a_slow_minute_drops_out(rows: list[Row], document: dict[str, Any]) -> None:
    """In units of the FFN's time a pass that takes twice as long throughout is the same."""
    jobs = [SimpleNamespace(run_id=name) for name in ("full", "mine")]
    once = {(0, "attention"): 2.0, (0, "ffn"): 4.0, (1, "ffn"): 4.0, (None, "other"): 1.0}
    half = {**once, (0, "attention"): 1.0}
    passes = {"full": [made(once), made(once)], "mine": [made(half), made({k: 2 * v for k, v in half.items()})]}
    found = numbers(jobs[1], jobs[0], passes)  # type: ignore[arg-type]
    assert found["all", "attention", "seconds"].ratio == (0.5 + 1) / 2
    assert found["all", "attention", "per_ffn"].ratio == 0.5
    assert found["all", "pass", "per_ffn"].ratio == pytest.approx(10 / 11)
    seconds, per_ffn = table(rows, "seconds"), table(rows, "per_ffn", "ratio_to_full")
    for item in document["runs"]:
        key = item["method"], item["budget"]
        assert item["quotient_by_ffn"] == pytest.approx(per_ffn[key]["all", "attention"] / item["flop_ratio"])
        assert item["pass_ratio_by_ffn"] == per_ffn[key]["all", "pass"] > 0
        assert seconds[key]["all", "ffn"] > 0


def made(seconds: dict[Any, float]) -> Pass:
    return Pass(seconds, 0.0, 0.0, 0.0, (), {}, 0, Memory(), Memory())


def test_bytes_are_those_of_eval(rows: list[Row], out: Path, call: Call) -> None:
    arguments = ["method=full,heatkv", "budget=0.2,0.1", "metric=psnr", "limit=1", "contact_sheet=0", f"out={out}"]
    report = call("eval", *arguments, "runtime.batch_size=1", "runtime.threads=1")
    for name in ("beta_live", "beta_alloc", "beta_meta", "attended_tokens", "attended_ratio"):
        measured = table(rows, name)
        for item in report["runs"]:
            found = measured[item["method"], item["budget"]]["all", "pass"]
            assert found == pytest.approx(item["costs"][name], rel=1e-12)
    budgets = {key: float(key[1]) for key in RUNS}
    for key, found in table(rows, "beta_alloc").items():
        assert 0.97 * budgets[key] <= found["all", "pass"] <= 1.005 * budgets[key]


def test_process_bytes_hold_the_cache(rows: list[Row]) -> None:
    added = table(rows, "process_added_bytes")
    if not added:
        pytest.skip("this system does not tell the peak of resident memory")
    for key in RUNS:
        assert added[key]["all", "pass"] > 0
        before, peak = (table(rows, f"process_{w}_bytes")[key]["all", "pass"] for w in ("before", "peak"))
        assert 0 < before < peak


def test_document_table_and_meta(document: dict[str, Any], rows: list[Row]) -> None:
    assert [(r["method"], r["budget"]) for r in document["runs"]] == RUNS
    seconds, flops = table(rows, "seconds"), table(rows, "flops", "ratio_to_full")
    for item in document["runs"]:
        key = item["method"], item["budget"]
        assert item["seconds_per_image"] == seconds[key]["all", "total"]
        assert item["flop_ratio"] == flops[key]["all", "attention"]
        assert item["quotient"] == pytest.approx(item["attention_ratio"] / item["flop_ratio"])
        for name in ("pool", "policy"):
            assert item[f"{name}_share"] == seconds[key]["all", name] / seconds[key]["all", "pass"]
    text = Path(document["table"]).read_text()
    assert document["command"] in text
    assert text.count("| heatkv |") == 2 and "| attention/read |" in text
    meta = json.loads((Path(document["path"]).parent / "meta.json").read_text())
    assert meta["status"] == "done" and len(meta["runs"]) == 3 and meta["environment"]["packages"]["torch"]


def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = bench._measure, []

    def interrupted(job: Any, *rest: Any) -> Any:
        seen.append(job.cfg.method.name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measure(job, *rest)

    monkeypatch.setattr(bench, "_measure", interrupted)
    arguments = ["bench", "method=streaming", "budget=0.1", f"out={tmp_path}", "limit=1", "runtime.threads=1"]
    assert run(arguments) == 130
    assert seen == ["full", "full", "streaming", "streaming"], "warm-up, first turn, and another one begins the second"
    (path,) = (tmp_path / "bench").glob("*/bench.csv")
    assert {(r["method"], r["repeats"]) for r in read(path)} == {("full", "1"), ("streaming", "1")}


def test_random_weights_of_real_names_in_bfloat16(tmp_path: Path, call: Call) -> None:
    document = call("bench", *SMALL_2B, "method=random", "budget=0.2", "repeats=1", f"out={tmp_path}", "limit=1", *FAST)
    rows = read(document["path"])
    assert {r["weights_sha256"] for r in rows} == {"random"} and {r["dtype"] for r in rows} == {"bfloat16"}
    assert {r["resolution"] for r in rows} == {"0.06M"}
    assert math.isclose(document["runs"][0]["beta_alloc"], 1)


def test_random_weights_need_no_files_to_be_planned(tmp_path: Path, call: Call) -> None:
    planned = call("bench", "model=infinity-2b", "weights=random", f"out={tmp_path}", "--dry-run")
    assert not planned["missing"] and planned["runs"][0]["runtime"]["batch_size"] == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["weights=random", "method=heatkv"], "--orders"),
        (["model=tiny", "model.sampling.cfg=1,2", "method=full"], "one loaded model"),
        (["repeats=0"], "repeats=1"),
        (["warmup=-1"], "warmup=0"),
    ],
)
def test_errors_say_what_to_type(overrides: list[str], said: str, tmp_path: Path, capsys: Capture) -> None:
    assert run(["bench", *overrides, f"out={tmp_path}"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("bench/*/bench.csv"))


def test_batches_of_bench_are_one_image_unless_named() -> None:
    assert compose([], command="bench").first.runtime.batch_size == 1
    assert compose(["runtime.batch_size=4"], command="bench").first.runtime.batch_size == 4
    assert compose([], command="eval").first.runtime.batch_size == 8
    assert job.seed_of(compose([], command="bench").first, "a", 0, 0) == job.seed_of(compose([]).first, "a", 0, 0)
