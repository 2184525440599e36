"""The scripts that make tables: names of rows, paired differences, orders, and that committed tables are not stale."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

import compare
import hack_tables
import make_docs
import make_tables
import published_order
import runs
from heatkv_cli.config import choices, compose
from heatkv_cli.config.groups import read_yaml
from heatkv_cli.config.typed import load_target
from heatkv_cli.pipeline.rows import SCORE_FIELDS
from heatkv_cli.results import encode_lines, encode_rows, read_csv

ROOT = Path(__file__).parents[2]
PUBLISHED = read_csv(ROOT / "results" / "paper" / "published.csv")


def row(method: str, budget: str = "0.1", rho: str = "", **args: object) -> dict[str, str]:
    params = {key: value for key, value in runs._defaults(method).items() if key in args or key == "timing"} | args
    about = {"model": "tiny", "benchmark": "shapes", "seed": "0", "resolution": "80px", "batch_size": "8"}
    own = {"method": method, "method_args_json": json.dumps(params), "budget": budget, "rho": rho}
    return {**about, **own, "attention_backend": "grouped", "status": "ok"}


def made(values: list[float], method: str = "heatkv", metric: str = "kl", strata: str = "", **args: object) -> runs.Run:
    scores = {f"p{i}": (value, strata[i] if strata else "") for i, value in enumerate(values)}
    return runs.Run(row(method, **args), {metric: scores})  # type: ignore[arg-type]


def test_a_variant_is_what_differs_from_the_defaults() -> None:
    assert runs.variant(row("hack", merge=True)) == "hack"
    assert runs.variant(row("hack", merge=False, query_seed=3, chosen={"queries": 4})) == "hack merge=false"
    assert runs.variant(row("snapkv", timing="before")) == "snapkv timing=before"
    assert runs.variant(row("random", order_seed=4)) == "random"
    assert runs.variant({**row("full"), "attention_backend": "masked"}) == "full masked"
    assert (runs.point(row("hack", "", "0.70")), runs.point(row("hack"))) == ("rho 0.7", "0.1")


def test_a_difference_is_paired_and_leaves_identical_images_out() -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=200), rng.normal(size=200) * 0.01
    ours, theirs = made([*base, math.inf]), made([*(base + 1 + noise), 3.0], "snapkv")
    found = runs.difference("kl", [ours], [theirs])
    assert found is not None
    interval, means = found
    assert (interval.n, means["images"]) == (200, 201)
    assert interval.mean == pytest.approx(-1 - noise.mean())
    assert interval.high - interval.low < 0.01  # unpaired it would be 0.4
    assert runs.better("kl", interval) == "yes"
    assert runs.better("psnr", interval) == "no"
    assert runs.difference("psnr", [ours], [theirs]) is None
    same = runs.difference("psnr", *([[made([math.inf] * 3, metric="psnr")]] * 2))
    assert same is not None
    assert runs.better("psnr", same[0]) == ""
    assert runs.number(same[0].mean) == "-"


def test_a_stratified_metric_is_a_mean_over_its_strata() -> None:
    ours, theirs = (made(values, metric="shapes", strata="aaab") for values in ([1, 1, 0, 1], [0, 1, 0, 0]))
    found = runs.difference("shapes", [ours], [theirs])
    assert found is not None
    assert found[0].mean == pytest.approx((1 / 3 + 1) / 2)


def test_only_runs_at_the_same_point_are_compared() -> None:
    every = [made([1.0, 2.0]), made([2.0, 3.5], "snapkv"), made([9.0, 9.0], "cake", budget="0.2")]
    (found,) = compare.comparisons(every, "heatkv", [], ["kl"])
    assert (found["other"], found["budget"], found["difference"]) == ("snapkv", "0.1", -1.25)


def test_tau_is_scipys() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b = rng.integers(0, 5, size=(2, 7)).tolist()
        x, y = (dict(zip("abcdefg", values, strict=True)) for values in (a, b))
        assert published_order.tau_b(x, y) == pytest.approx(kendalltau(a, b).statistic)
    assert math.isnan(published_order.tau_b({"a": 1, "b": 1}, {"a": 1, "b": 2}))


def test_published_orders_are_those_of_one_experiment() -> None:
    """By hand from the papers' tables: ScaleKV's at 10 % with HeatKV's own row, and HACK's at 70 %."""
    found = {
        (about["model"], about["axis"], float(about["level"]), about["published_metric"]): group
        for about, group in published_order.groups(list(PUBLISHED))
    }
    fid = found["infinity-2b", "budget", 0.1, "fid"]
    assert sorted(fid, key=fid.__getitem__) == ["heatkv", "scalekv", "pyramidkv", "snapkv", "streaming", "window"]
    reward = found["infinity-2b", "rho", 0.7, "image_reward"]
    order = sorted(reward, key=lambda name: -reward[name])
    assert order == ["hack", "h2o", "cake", "snapkv", "streaming", "meda", "lookm"]
    assert all("full" not in group for group in found.values())
    metrics = {r["metric"] for r in PUBLISHED} - {"memory", "latency", "speedup", "compression_overhead", "kv_cache"}
    assert metrics <= {*runs.LOWER_IS_BETTER, *published_order.HIGHER_IS_BETTER}, "a metric without a direction"


def test_reversed_pairs_are_found_and_judged() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=100)
    level = {"scalekv": 0.2, "snapkv": 0.3, "streaming": 0.1, "window": 0.9, "pyramidkv": 0.3 + 1e-5}
    every = [made([*(value + 0.01 * rng.normal(size=100) + noise)], name) for name, value in level.items()]
    rows = {
        r["published_metric"]: r for r in published_order.rows_of(list(PUBLISHED), every) if r["model"] != "infinity-8b"
    }
    fid = rows["fid"]  # in print: scalekv 2.53, pyramidkv 4.52, snapkv 4.66, streaming 5.49, window 8.58
    assert fid["published_order"].startswith("scalekv 2.53 > pyramidkv 4.52")
    decided = {"streaming > scalekv", "streaming > pyramidkv", "streaming > snapkv"}
    assert set(fid["reversed_decided"].split("; ")) == decided
    assert fid["same"] + fid["reversed"] == 10
    assert fid["reversed_undecided"] in ("", "snapkv > pyramidkv")
    assert "streaming > scalekv" in published_order.text(list(rows.values()))


def test_tables_of_ablations_name_the_runs_of_the_experiment() -> None:
    plan = compose(["experiment=hack-ablations-tiny"], command="eval", options={}, dry_run=True)
    names = {runs.variant(row("hack", **run.method.params)) for run in plan.runs if run.method.name == "hack"}
    variants = [each for _, each in hack_tables.TABLES.values()]
    assert set(itertools.chain(*variants)) == names
    notes = {note for each in variants for _, note in each.values()} - {""}
    assert notes == {r["note"] for r in PUBLISHED if published_order._ablation(r)}


def test_a_point_that_cannot_exist_says_why() -> None:
    reason = "budget 0.01 is too small"
    point = {
        **row("snapkv", "0.01"),
        "run_id": "a",
        "metric": "kl",
        "variant": "",
        "status": "infeasible",
        "reason": reason,
    }
    columns, (line,) = make_tables.wide([point])
    assert len(columns) == len(line)
    assert line[:2] == ["snapkv", "0.01"]
    assert f"does not exist: {reason}" in line


def test_the_tables_in_the_readme_are_fresh() -> None:
    text = make_docs.README.read_text(encoding="utf-8")
    assert make_docs.updated(text) == text, "make docs"
    stale = text.replace("what a window of the current queries looks at", "something else")
    assert stale != text
    assert make_docs.updated(stale) == text


def test_every_paper_has_its_deviations() -> None:
    for name in choices("method"):
        content = read_yaml("method", name)
        if content.get("paper"):
            assert len(make_docs.differs(load_target(content["_target_"]))) > 20, f"{name}: a paper, but no `Differs:`"


def test_comparing_from_files(tmp_path: Path) -> None:
    columns = ("run_id", *row("heatkv"))
    rows = [{"run_id": name, **row(name)} for name in ("heatkv", "snapkv")]
    rows.append({"run_id": "none", **row("hack"), "status": "infeasible"})
    head = dict(zip(columns, columns, strict=True))
    (tmp_path / "results.csv").write_bytes(encode_rows([head, *rows], columns))
    for name, values in (("heatkv", (1.0, 2.0)), ("snapkv", (2.0, math.inf))):
        (tmp_path / "images" / name).mkdir(parents=True)
        scores = [
            {"image_id": f"p{i}", "metric": "psnr", "value": value, "stratum": "", "note": ""}
            for i, value in enumerate(values)
        ]
        (tmp_path / "images" / name / "scores.jsonl").write_bytes(encode_lines(scores, SCORE_FIELDS))
    ours, theirs = runs.load_runs(tmp_path)
    found = runs.difference("psnr", [ours], [theirs])
    assert found is not None
    assert (found[0].mean, found[0].n) == (-1.0, 1)
    with pytest.raises(FileNotFoundError, match="heatkv eval"):
        runs.load_runs(tmp_path / "nowhere")
