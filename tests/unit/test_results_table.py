"""Rows of results.csv: what is replaced, what stays, what a spreadsheet or a stranger wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heatkv_cli import results
from heatkv_cli.errors import ArtifactError
from heatkv_cli.results import (
    MANIFEST_FIELDS,
    RESULT_COLUMNS,
    encode_lines,
    parse_lines,
    read_csv,
    upsert_results,
)
from heatkv_cli.results.lines import whole_lines
from heatkv_cli.results.tables import encode_rows, parse_csv

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1, max_size=4))
def test_any_text_survives_in_csv(lines: list[list[str]]) -> None:
    rows = [dict(zip("ab", line, strict=True)) for line in lines]
    data = encode_rows(rows, "ab")
    assert parse_csv(Path("x"), b"a,b\n" + data) == (["a", "b"], [row for row in rows if any(row.values())])


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1, max_size=4))
def test_any_text_survives_in_lines_and_any_cut_is_found(lines: list[list[str]]) -> None:
    fields = {"a": str, "b": str}
    rows = [dict(zip("ab", line, strict=True)) for line in lines]
    ends = [len(encode_lines(rows[:count], fields)) for count in range(len(rows) + 1)]
    data = encode_lines(rows, fields)
    assert parse_lines(Path("x"), data, fields) == rows
    for cut in range(len(data) + 1):
        assert whole_lines(data[:cut]) == max(end for end in ends if end <= cut)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "true"), (False, "false"), (0.1, "0.1"), (3, "3"), (float("inf"), "inf"), ("", "")]
    + [({"b": 1, "a": 2}, '{"a": 2, "b": 1}'), ([1, 2], "[1, 2]")],
)
def test_cells(value: Any, text: str) -> None:
    assert results.cell(value) == text


def row(run_id: str, metric: str = "kl", value: float | None = 0.0, **more: Any) -> dict[str, Any]:
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


@pytest.mark.parametrize("changed", ["asked", "reference", "metric_settings", "metric_version", "bootstrap", "variant"])
def test_everything_that_changes_a_number_is_in_the_key(tmp_path: Path, changed: str) -> None:
    path = tmp_path / "results.csv"
    upsert_results(path, [row("a", value=1.0, **{changed: "first"})])
    upsert_results(path, [row("a", value=2.0, **{changed: "second"})])
    upsert_results(path, [row("a", value=3.0, **{changed: "second"})])
    assert [(item[changed], item["value"]) for item in read_csv(path)] == [("first", "1.0"), ("second", "3.0")]


@pytest.mark.parametrize("status", ["skipped", "failed", "infeasible"])
def test_a_number_takes_the_place_of_the_reason_why_there_was_none(tmp_path: Path, status: str) -> None:
    path = tmp_path / "results.csv"
    upsert_results(path, [row("a", value=1.0, asked=8), row("b", value=None, status=status, asked=8)])
    upsert_results(path, [row("a", value=None, status=status, asked=64), row("b", value=2.0, status="ok", asked=64)])
    found = {(item["run_id"], item["asked"]): item["value"] for item in read_csv(path)}
    assert found == {("a", "8"): "1.0", ("a", "64"): "", ("b", "64"): "2.0"}
    upsert_results(path, [row("a", value=3.0, status="ok", asked=64)])
    found = {(item["run_id"], item["asked"]): item["value"] for item in read_csv(path)}
    assert found == {("a", "8"): "1.0", ("a", "64"): "3.0", ("b", "64"): "2.0"}


HEAD = "run_id,metric,variant,value"


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + f"{HEAD}\na,kl,,1\nb,kl,,2\n".encode(),  # a byte-order mark
        f"{HEAD}\r\na,kl,,1\r\nb,kl,,2\r\n".encode(),
        f"{HEAD},,\na,kl,,1,,\nb,kl,,2,,\n,,,,,\n".encode(),  # trailing empty columns and rows
        b'"run_id","metric","variant","value"\n"a","kl","","1"\n"b","kl","","2"\n',
    ],
)
def test_what_a_spreadsheet_saves_is_understood(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(data)
    upsert_results(path, [row("c", value=3.0)])
    assert [(item["run_id"], item["value"]) for item in read_csv(path)] == [("a", "1"), ("b", "2"), ("c", "3.0")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a,b\n1\n", "row 2 has 1 cells"),
        (b"\xff\xfe", "not a CSV file"),
        (b"name,score\nx,1\ny,2\n", "not a results file of heatkv: no column run_id, metric, variant"),
        (b"run_id;metric;variant\na;kl;\n", "semicolons"),
        (b"run_id\tmetric\tvariant\na\tkl\t\n", "tabs"),
        (b"RUN_ID,METRIC,VARIANT\na,kl,\n", "it has 'RUN_ID', 'METRIC', 'VARIANT'"),
        (b" run_id,metric,variant\na,kl,\n", "it has ' run_id'"),
        (b"run,metric,variant\na,kl,\n", "no column run_id"),
        (b"run_id,metric,variant,variant\na,kl,,\n", "names column 'variant' twice"),
        (b"run_id,metric,variant\n,kl,\n", "row 2 names no run_id"),
        (b"run_id,metric,variant,value\na,kl,,1\na,kl,,2\n", "row 3 is there twice"),
        (b'run_id,metric,variant\n"a,kl,\n', "not a CSV file"),
        (b"a,kl,0.1\nb,kl,0.2\n", "not a results file"),
    ],
)
def test_what_heatkv_did_not_write_is_refused_and_stays(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=words) as caught:
        upsert_results(path, [row("b")])
    assert caught.value.hint
    assert path.read_bytes() == data
    assert read_csv(tmp_path / "none.csv") == []


def test_columns_are_those_of_the_design() -> None:
    assert {"beta_live", "beta_alloc", "beta_work", "beta_meta", "rho", "low", "high", "variant"} <= set(RESULT_COLUMNS)
    assert {"image_id", "seed", "sha256", "status", "error"} <= set(MANIFEST_FIELDS)
    assert len(set(RESULT_COLUMNS)) == len(RESULT_COLUMNS)
