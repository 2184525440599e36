"""`heatkv report`: what is printed, written and refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from heatkv_cli.cli import run

Capture = pytest.CaptureFixture[str]
TINY = Path(__file__).parents[2] / "results" / "tiny"


def fails(capsys: Capture, *arguments: str, code: int, words: str) -> str:
    assert run(["report", *arguments, "--json"]) == code
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert words in error["error"], error
    assert error["fix"]
    return str(error["fix"])


def test_no_command_is_help(capsys: Capture) -> None:
    assert run(["report"]) == 0
    said = capsys.readouterr()
    assert "heatkv report compare --base heatkv" in said.out and not said.err
    for name in ("table", "compare", "hack", "published"):
        assert f"  {name} " in said.out


def test_a_table_is_printed_or_written_with_its_commands(tmp_path: Path, capsys: Capture) -> None:
    results = str(TINY / "demo.csv")
    assert run(["report", "table", results]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| method | budget | beta_live |")
    path = tmp_path / "below" / "demo.md"
    assert run(["report", "table", results, "--to", str(path), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    command = f"heatkv report table {results} --to {path}"
    assert path.read_text() == f"{printed}\nMade by\n\n    heatkv eval experiment=demo\n    {command}\n"
    assert (document["status"], document["command"], document["written"]) == ("done", command, [str(path)])
    assert len(document["tables"][0]["rows"]) == printed.count("\n") - 2


def test_parts_of_a_metric_and_several_files(capsys: Capture) -> None:
    files = [str(TINY / "demo.csv"), str(TINY / "full-660.csv")]
    assert run(["report", "table", *files, "--variants", "shapes"]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    assert [part.count("| full | 1 |") for part in parts] == [8, 8]
    assert "| full | 1 | color_attr | 0.473 [0.382, 0.564] | 110 |" in parts[1]


def test_hack_beside_print(tmp_path: Path, capsys: Capture) -> None:
    files = [str(TINY / "hack-ablations.csv"), str(TINY / "hack-ablations-compared.csv")]
    assert run(["report", "hack", *files, "--to", str(tmp_path / "hack.md")]) == 0
    committed, made = (
        (folder / name).read_text() for folder, name in ((TINY, "hack-ablations.md"), (tmp_path, "hack.md"))
    )
    assert made.splitlines()[:-1] == committed.splitlines()[:-1]
    assert made.endswith(f"    heatkv report hack {' '.join(files)} --to {tmp_path / 'hack.md'}\n")


def test_mistakes(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    fails(capsys, "table", str(tmp_path / "none.csv"), code=3, words=f"there is no file {tmp_path / 'none.csv'}")
    fails(capsys, "table", str(tmp_path / "other.csv"), code=4, words="is not a results file of heatkv")
    fails(capsys, "table", str(TINY / "demo.csv"), "--compared", str(TINY / "demo.csv"), code=4, words="no column base")
    assert "shapes" in fails(capsys, "table", str(TINY / "demo.csv"), "--variants", "shape", code=2, words="'shape'")
    fails(capsys, "table", str(TINY / "demo.csv"), "--to", "/proc/x/y.md", code=3, words="cannot write /proc/x/y.md")
    fails(
        capsys, "hack", *[str(TINY / f"methods{end}.csv") for end in ("", "-compared")], code=2, words="no run of hack"
    )
    monkeypatch.setenv("HEATKV_OUT", str(tmp_path / "out"))
    for command in ("compare", "published"):
        fix = fails(capsys, command, code=3, words=f"there is no {tmp_path / 'out' / 'results.csv'}")
        assert fix == f"heatkv eval experiment=methods-tiny --out {tmp_path / 'out'}"
    assert run(["report", "table"]) == 2
    assert run(["report", "tables", "x"]) == 2
    assert "fix: heatkv report -h" in capsys.readouterr().err


def test_compare_from_a_folder(tmp_path: Path, capsys: Capture) -> None:
    out, compared = str(tmp_path / "out"), tmp_path / "compared.csv"
    sweep = ["method=full,streaming,heatkv", "budget=0.2", "limit=4", "metric=kl,psnr", "runtime.batch_size=2"]
    assert run(["eval", *sweep, "contact_sheet=0", "--out", out, "--quiet"]) == 0
    capsys.readouterr()
    assert run(["report", "compare", "--out", out, "--to", str(compared)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["at", "metric", "heatkv", "-"]
    assert {(line.split()[1], line.split()[2]) for line in lines[1:]} == {("kl", "streaming"), ("psnr", "streaming")}
    with compared.open(newline="") as handle:
        rows = {row["metric"]: row for row in csv.DictReader(handle)}
    assert {row["command"] for row in rows.values()} == {
        f"heatkv report compare --out {out} --base heatkv --to {compared}"
    }
    assert (rows["kl"]["rho"], rows["kl"]["images"], rows["kl"]["seeds"]) == ("", "4", "1")
    assert run(["report", "table", f"{out}/results.csv", "--compared", str(compared)]) == 0
    table = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in table[0].split("|")]
    (line,) = [line for line in table if line.startswith("| streaming")]
    shown = line.split("|")[columns.index("heatkv - this, kl")].split()[0]
    assert float(shown) == pytest.approx(float(rows["kl"]["base_mean"]) - float(rows["kl"]["other_mean"]), rel=0.01)
    assert "did you mean 'heatkv'?" in fails(
        capsys, "compare", "--out", out, "--base", "heatk", code=2, words="'heatk'"
    )
    fails(capsys, "published", "--out", out, code=2, words="no published order has three methods")
