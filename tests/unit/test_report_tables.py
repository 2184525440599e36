"""Reports: names of runs, paired differences, orders; committed tables follow from committed results."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from heatkv_cli import results
from heatkv_cli.config import choices, compose
from heatkv_cli.config.groups import read_yaml
from heatkv_cli.errors import ConfigError, SetupError
from heatkv_cli.report import compare, hack, published, tables
from heatkv_cli.report.variants import load_runs, point, variant
from heatkv_cli.results import SCORE_FIELDS, encode_lines, upsert_results

TINY = Path(__file__).parents[2] / "results" / "tiny"


def row(method: str, run_id: str = "a", **more: Any) -> dict[str, Any]:
    about = {"model": "tiny", "benchmark": "shapes", "seed": 0, "resolution": "80px", "batch_size": 8, "budget": "0.1"}
    return {**about, "attention_backend": "grouped", "run_id": run_id, "method": method, "metric": "kl", **more}


def folder(out: Path, runs: Mapping[str, Mapping[str, Sequence[float]]], strata: str = "", **more: Any) -> Path:
    """Write what `heatkv eval` writes: {method, and a budget behind a blank: {metric: a score for each image}}."""
    for number, (name, metrics) in enumerate(runs.items()):
        method, budget = (*name.split(), "0.1")[:2]
        run_id = f"{number}-{method}"
        args = {"method_args_json": read_yaml("method", method)} | more
        upsert_results(out / "results.csv", [row(method, run_id, budget=budget, status="ok", **args)])
        scores = [
            {"image_id": f"p{i}", "metric": metric, "value": float(value), "stratum": strata[i : i + 1], "note": ""}
            for metric, values in metrics.items()
            for i, value in enumerate(values)
        ]
        (out / "images" / run_id).mkdir(parents=True)
        (out / "images" / run_id / "scores.jsonl").write_bytes(encode_lines(scores, SCORE_FIELDS))
    return out


def pair(out: Path, metric: str, base: Sequence[float], other: Sequence[float], strata: str = "") -> pd.Series:
    """Return heatkv minus snapkv."""
    made = load_runs(folder(out, {"heatkv": {metric: base}, "snapkv": {metric: other}}, strata))
    (found,) = compare.comparisons(*made, "heatkv", metrics=[metric]).to_dict("records")
    return pd.Series(found)


def test_a_variant_is_what_differs_from_the_defaults() -> None:
    assert variant("hack", {"merge": True}) == "hack"
    assert variant("hack", {"merge": False, "query_seed": 3, "chosen": {"queries": 4}}) == "hack merge=false"
    assert variant("snapkv", {"timing": "before"}) == "snapkv timing=before"
    assert variant("random", {"order_seed": 4}) == "random"
    assert variant("full", {}, "masked") == "full masked"
    assert (point("", 0.70), point("0.1", math.nan)) == ("rho 0.7", "0.1")


def test_a_method_or_parameter_that_conf_does_not_have_is_still_named() -> None:
    assert variant("mine", {"alpha": 0.5}) == "mine alpha=0.5"
    assert variant("scalekv", {"faithful": False}) == "scalekv", "the default, as long as there was the parameter"
    assert variant("scalekv", {"faithful": True}) == "scalekv faithful=true"


@pytest.mark.parametrize("name", choices("method"))
def test_defaults_are_never_part_of_a_name(name: str) -> None:
    assert variant(name, compose([f"method={name}"]).first.method.params) == name


def test_a_difference_is_paired_and_leaves_identical_images_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=200), rng.normal(size=200) * 0.01
    found = pair(tmp_path, "kl", [*base, math.inf], [*(base + 1 + noise), 3.0])
    assert (found["pairs"], found["images"], found["seeds"]) == (200, 201, 1)
    assert found["difference"] == pytest.approx(-1 - noise.mean())
    assert found["high"] - found["low"] < 0.01  # unpaired it would be 0.4
    assert found["better"] == "yes"
    assert compare.better("psnr", found["low"], found["high"]) == "no"
    assert compare.better("kl", -0.1, 0.2) == compare.better("psnr", -0.1, 0.2) == "undecided"


def test_identical_images_have_no_difference(tmp_path: Path) -> None:
    found = pair(tmp_path, "psnr", [math.inf] * 3, [math.inf] * 3)
    assert (found["better"], found["pairs"], found["base_mean"]) == ("", 0, math.inf)
    assert tables.number(found["difference"]) == "-"


def test_images_are_paired_by_name_whatever_their_order(tmp_path: Path) -> None:
    out = folder(tmp_path, {"heatkv": {"kl": [1.0, 2.0, 4.0]}, "snapkv": {"kl": [3.0, 5.0]}})
    path = out / "images" / "1-snapkv" / "scores.jsonl"
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    (found,) = compare.comparisons(*load_runs(out), "heatkv").to_dict("records")
    assert (found["images"], found["difference"]) == (2, (-2.0 - 3.0) / 2)


def test_a_stratified_metric_is_a_mean_over_its_strata(tmp_path: Path) -> None:
    found = pair(tmp_path, "shapes", [1, 1, 0, 1], [0, 1, 0, 0], strata="aaab")
    assert found["difference"] == pytest.approx((1 / 3 + 1) / 2)


def test_only_runs_at_the_same_point_are_compared(tmp_path: Path) -> None:
    every = {"heatkv": {"kl": [1.0, 2.0]}, "snapkv": {"kl": [2.0, 3.5]}, "cake 0.2": {"kl": [9.0, 9.0]}}
    made = load_runs(folder(tmp_path, every))
    (found,) = compare.comparisons(*made, "heatkv").to_dict("records")
    assert (found["other"], found["budget"], found["difference"]) == ("snapkv", "0.1", -1.25)
    with pytest.raises(ConfigError, match="no other run can be compared with 'cake'"):
        compare.comparisons(*made, "cake")
    with pytest.raises(ConfigError, match="no variant 'heatkvv'") as caught:
        compare.comparisons(*made, "heatkvv")
    assert "did you mean 'heatkv'?" in caught.value.hint
    with pytest.raises(ConfigError, match="no metric 'psnr'"):
        compare.comparisons(*made, "heatkv", metrics=["psnr"])


def test_seeds_of_a_variant_are_taken_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    folder(tmp_path, {"heatkv": {"kl": rng.normal(size=30)}})
    every = rng.normal(size=(3, 30)) + np.array([[0.0], [2.0], [4.0]])
    for seed, values in enumerate(every):
        folder(tmp_path / str(seed), {"random": {"kl": values}}, method_args_json={"order_seed": seed})
    parts = [load_runs(tmp_path), *(load_runs(tmp_path / str(seed)) for seed in range(3))]
    for seed, (runs, scores) in enumerate(parts[1:]):
        runs["run_id"], scores["run_id"] = f"random{seed}", f"random{seed}"
    runs, scores = (pd.concat(each) for each in zip(*parts, strict=True))
    (found,) = compare.comparisons(runs, scores, "heatkv").to_dict("records")
    assert (found["other"], found["seeds"], found["images"], found["pairs"]) == ("random", 3, 30, 90)
    assert found["other_mean"] == pytest.approx(every.mean())
    assert found["high"] - found["low"] > 1, "seeds far apart make the interval wide"


def test_runs_without_numbers_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, {"heatkv": {"psnr": [1.0, 2.0]}, "snapkv": {"psnr": [2.0, math.inf]}})
    upsert_results(tmp_path / "results.csv", [row("hack", "none", status="infeasible", reason="too small")])
    runs, scores = load_runs(tmp_path)
    assert list(runs["method"]) == ["heatkv", "snapkv"]
    (found,) = compare.comparisons(runs, scores, "heatkv").to_dict("records")
    assert (found["difference"], found["pairs"]) == (-1.0, 1)
    with pytest.raises(SetupError, match=r"there is no .*results\.csv") as caught:
        load_runs(tmp_path / "nowhere")
    assert "heatkv eval" in caught.value.hint
    upsert_results(tmp_path / "empty" / "results.csv", [row("hack", status="infeasible")])
    with pytest.raises(SetupError, match="no rows with a value"):
        load_runs(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------ order against print


def test_published_orders_are_those_of_one_experiment() -> None:
    """By hand from the papers' tables: ScaleKV's at 10 % with HeatKV's own row, and HACK's at 70 %."""
    figures = published.published_rows()
    found = {
        tuple(group[["model", "axis", "level", "metric"]].iloc[0]): group.set_index("method")["value"].to_dict()
        for group in published.groups(figures)
    }
    fid = found["infinity-2b", "budget", 0.1, "fid"]
    assert sorted(fid, key=fid.__getitem__) == ["heatkv", "scalekv", "pyramidkv", "snapkv", "streaming", "window"]
    reward = found["infinity-2b", "rho", 0.7, "image_reward"]
    order = sorted(reward, key=lambda name: -reward[name])
    assert order == ["hack", "h2o", "cake", "snapkv", "streaming", "meda", "lookm"]
    assert all("full" not in group for group in found.values())
    metrics = set(figures["metric"]) - {"memory", "latency", "speedup", "compression_overhead", "kv_cache"}
    known = {*compare.LOWER_IS_BETTER, *published.HIGHER_IS_BETTER}
    assert metrics <= known, "a metric without a direction"


def test_reversed_pairs_are_found_and_judged(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=100)
    level = {"scalekv": 0.2, "snapkv": 0.3, "streaming": 0.1, "window": 0.9, "pyramidkv": 0.3 + 1e-5}
    every = {name: {"kl": value + 0.01 * rng.normal(size=100) + noise} for name, value in level.items()}
    runs, scores = load_runs(folder(tmp_path, every))
    rows = published.orders(published.published_rows(), runs, scores)
    fid = rows[(rows["published_metric"] == "fid") & (rows["model"] == "infinity-2b")].iloc[0]
    # in print: scalekv 2.53, pyramidkv 4.52, snapkv 4.66, streaming 5.49, window 8.58
    assert fid["published_order"].startswith("scalekv 2.53 > pyramidkv 4.52")
    assert set(fid["reversed_decided"].split("; ")) == {f"streaming > {x}" for x in ("scalekv", "pyramidkv", "snapkv")}
    assert fid["same"] + fid["reversed"] == 10
    assert fid["reversed_undecided"] in ("", "snapkv > pyramidkv")
    means = {name: np.mean(metrics["kl"]) for name, metrics in every.items()}
    printed = {"scalekv": 2.53, "pyramidkv": 4.52, "snapkv": 4.66, "streaming": 5.49, "window": 8.58}
    expected = kendalltau(list(printed.values()), [means[name] for name in printed]).statistic
    assert fid["tau"] == pytest.approx(expected)
    assert "| streaming > scalekv |" in published.page(rows)


def test_orders_need_three_methods_of_print(tmp_path: Path) -> None:
    made = load_runs(folder(tmp_path, {"scalekv": {"kl": [1.0, 2.0]}, "snapkv": {"kl": [2.0, 3.0]}}))
    with pytest.raises(ConfigError, match="no published order has three methods"):
        published.orders(published.published_rows(), *made)


def test_the_committed_order_says_the_same_in_both_forms() -> None:
    rows = results.read_table(TINY / "published-order.csv", ("tau", "same", "reversed", "decided"), ())
    page = published.page(rows.astype(dict.fromkeys(("same", "reversed", "decided"), int)))
    assert (TINY / "published-order.md").read_text().startswith(f"{page}\nMade by\n\n")


# ------------------------------------------------------------------------------------------------------------- tables


def compared(name: str) -> pd.DataFrame:
    return results.read_table(TINY / f"{name}-compared.csv", compare.NUMBERS, compare.COLUMNS)


@pytest.mark.parametrize("name", ["methods", "hack-axis"])
def test_committed_tables_follow_from_committed_results(name: str) -> None:
    table = tables.wide(results.read(TINY / f"{name}.csv"), compared(name))
    page = tables.markdown(table.columns, table.to_numpy())
    assert (TINY / f"{name}.md").read_text().startswith(f"{page}\nMade by\n\n")


def test_committed_ablations_follow_from_committed_results() -> None:
    page = hack.page(results.read(TINY / "hack-ablations.csv"), compared("hack-ablations"))
    assert (TINY / "hack-ablations.md").read_text().startswith(f"{page}\nMade by\n\n")


def test_tables_of_ablations_name_the_runs_of_the_experiment() -> None:
    plan = compose(["experiment=hack-ablations-tiny"], command="eval", options={}, dry_run=True)
    names = {variant("hack", run.method.params) for run in plan.runs if run.method.name == "hack"}
    variants = [each for _, each in hack.TABLES.values()]
    assert set(itertools.chain(*variants)) == names
    figures = published.published_rows()
    notes = {note for each in variants for _, note in each.values()} - {""}
    assert notes == set(figures["note"][published.ablation(figures)])


def test_ablations_need_a_run_of_hack(tmp_path: Path) -> None:
    folder(tmp_path, {"hack": {"kl": [1.0]}})  # at a budget
    with pytest.raises(ConfigError, match="no run of hack at a rho"):
        hack.page(results.read(tmp_path / "results.csv"), compared("hack-ablations"))


def test_rows_without_numbers_say_why(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    costs = {"beta_live": 0.1, "beta_alloc": 0.1, "beta_work": 0.2, "beta_meta": 0.0, "attended_ratio": 0.5}
    reason = "budget 0.01 is too small"
    upsert_results(
        path,
        [
            row("snapkv", "a", budget="0.01", status="infeasible", reason=reason),
            row("heatkv", "b", metric="fid", status="skipped", reason="no weights", **costs),
            row("heatkv", "b", value=0.25, low=0.2, high=0.3, status="ok", **costs),
            row("cake", "c", status="failed", reason="out of memory"),
        ],
    )
    table = tables.wide(results.read(path)).set_index("method")
    assert table.loc["snapkv", "budget"] == "0.01"
    assert list(table.loc["snapkv"][table.loc["snapkv"] != ""]) == ["0.01", f"does not exist: {reason}"]
    assert tuple(table.loc["heatkv", ["kl", "fid", "attended", "ms/image"]]) == (
        "0.25 [0.2, 0.3]",
        "skipped",
        "0.500",
        "",
    )
    assert table.loc["cake", "kl"] == "failed"


def test_parts_of_a_metric(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    args = {"method_args_json": {"order_seed": 3}, "metric": "shapes", "status": "ok", "n": 4}
    upsert_results(path, [row("random", value=0.5, variant=name, **args) for name in ("", "colors")])
    table = tables.parts(results.read(path), "shapes")
    assert table.to_numpy().tolist() == [
        ["random #3", "0.1", "(all)", "0.5", 4],
        ["random #3", "0.1", "colors", "0.5", 4],
    ]
    with pytest.raises(ConfigError, match="no row has the metric 'shape'"):
        tables.parts(results.read(path), "shape")


def test_markdown_cells_break_no_table() -> None:
    assert tables.markdown(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | --- |\n| x/y | 1 |\n"
    assert json.dumps(tables.made_by(["one", "", "one"])) == json.dumps("Made by\n\n    one\n")
