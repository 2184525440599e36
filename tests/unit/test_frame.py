"""Results as pandas tables: types of columns, what is empty, what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from heatkv_cli import results
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.results import RESULT_COLUMNS, SCORE_FIELDS, encode_lines, upsert_results

TINY = Path(__file__).parents[2] / "results" / "tiny"


@pytest.mark.parametrize("path", sorted(TINY.glob("*.csv")), ids=lambda path: path.stem)
def test_every_committed_results_file_is_read_cell_by_cell(path: Path) -> None:
    """The oracle is the csv module: every number is that of its text, every text is itself."""
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    if "run_id" not in rows[0]:
        with pytest.raises(ArtifactError, match="not a results file of heatkv"):
            results.read(path)
        return
    table = results.read(path)
    assert len(table) == len(rows)
    for name, text in ((name, [row[name] for row in rows]) for name in rows[0] if name != "method_args_json"):
        for cell, (value, missing) in zip(text, zip(table[name], table[name].isna(), strict=True), strict=True):
            if isinstance(value, str):
                assert value == cell
            elif isinstance(value, (bool, np.bool_)):
                assert str(value).lower() == cell
            else:
                assert missing if cell in ("", "nan") else float(cell) == value


def test_types(tmp_path: Path) -> None:
    args = {"timing": "before", "chosen": {"queries": 4}}
    row = {"run_id": "a", "metric": "kl", "variant": "", "budget": "1300/6425", "method_args_json": args, "rho": None}
    upsert_results(
        tmp_path / "results.csv", [{**row, "value": math.inf, "n": 3, "higher_is_better": False, "tasks": 6}]
    )
    table = results.read(tmp_path / "results.csv")
    assert [*table] == [name.replace("method_args_json", "method_args") for name in RESULT_COLUMNS] + ["tasks"]
    (found,) = table.to_dict("records")
    assert (found["budget"], found["method_args"], found["value"], found["tasks"]) == ("1300/6425", args, math.inf, 6.0)
    assert math.isnan(found["rho"]) and math.isnan(found["low"])
    assert found["n"] == 3 and pd.isna(found["asked"]) and not found["higher_is_better"]
    assert found["reason"] == ""


def test_several_files_are_one_table_with_the_columns_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("run_id,metric,variant,value,remark\na,kl,,1,good\n")
    (tmp_path / "b.csv").write_text("run_id,metric,variant,value\nb,kl,,2\n")
    table = results.read(tmp_path / "a.csv", tmp_path / "b.csv")
    assert list(table["run_id"]) == ["a", "b"] and list(table["value"]) == [1.0, 2.0] and list(table.index) == [0, 1]
    assert table["remark"].iloc[0] == "good" and table["method_args"].iloc[0] == {}


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("a,kl,,1,,{}\nb,kl,,many,,{}", "row 3 has 'many' as value"),
        ("a,kl,,1,2.5,{}", "row 2 has '2.5' as n"),
        ("a,kl,,1,2,{", "row 2 has '{' as method_args_json"),
        ("a,kl,,1,2,[1]", r"row 2 has '\[1\]' as method_args_json"),
        ("a,,,1,2,{}", "row 2 names no run_id or no metric"),
    ],
)
def test_what_heatkv_did_not_write_is_refused(tmp_path: Path, cells: str, words: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(f"run_id,metric,variant,value,n,method_args_json\n{cells}\n".replace("{}", ""))
    with pytest.raises(ArtifactError, match=words):
        results.read(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there is no file"):
        results.read(tmp_path / "results.csv")
    (tmp_path / "other.csv").write_text("a\n1\n")
    with pytest.raises(ArtifactError, match="no column b"):
        results.read_table(tmp_path / "other.csv", (), ("a", "b"))


def test_scores_are_those_of_all_runs(tmp_path: Path) -> None:
    for run, values in (("b", [1.0, math.inf]), ("a", [0.5])):
        rows = [
            {"image_id": f"p{i}", "metric": "psnr", "value": value, "stratum": "colors", "note": ""}
            for i, value in enumerate(values)
        ]
        (tmp_path / "images" / run).mkdir(parents=True)
        (tmp_path / "images" / run / "scores.jsonl").write_bytes(encode_lines(rows, SCORE_FIELDS))
    table = results.scores(tmp_path)
    assert [*table] == ["run_id", "metric", "image_id", "value", "stratum"]
    assert table[["run_id", "image_id", "value"]].to_numpy().tolist() == [
        ["a", "p0", 0.5],
        ["b", "p0", 1.0],
        ["b", "p1", math.inf],
    ]
    assert results.scores(tmp_path / "nowhere").empty
    (tmp_path / "images" / "a" / "scores.jsonl").write_text('{"image_id": "p0"}\n')
    with pytest.raises(ArtifactError, match=r"scores\.jsonl, line 1"):
        results.scores(tmp_path)
