"""The class-conditional model as a user types it: calibration, passes, KL per token, scores of its classifier."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from heatkv_cli.cli import run

Capture = pytest.CaptureFixture[str]
SMALL = ["runtime.threads=1", "bootstrap.resamples=200", "contact_sheet=2"]


def call(capsys: Capture, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == code, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_sweep_from_calibration_to_scores(tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path)
    report = call(
        capsys,
        "eval",
        "model=tiny-var",
        "method=streaming,heatkv",
        "budget=0.1",
        "--limit",
        "16",
        "metric=kl,psnr,psnr_layout,fashion_accuracy,fashion_fd,fashion_score,fashion_precision_recall",
        "--out",
        out,
        *SMALL,
    )
    assert report["status"] == "done"
    assert len(list(tmp_path.glob("calibration/tiny-var-*/calibration.safetensors"))) == 1
    with Path(report["path"]).open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["variant"] in ("", "precision", "recall")]
    found = {(row["method"], row["metric"], row["variant"]): row for row in rows}
    kl = {method: float(found[method, "kl", ""]["value"]) for method in ("streaming", "heatkv")}
    assert 0 < kl["heatkv"] < kl["streaming"] < 6.3  # of 512 codes: the logarithm is 6.2
    for method in ("full", "streaming", "heatkv"):
        right = found[method, "fashion_accuracy", ""]
        assert float(right["value"]) >= 0.5 and right["n"] == "16" and right["benchmark"] == "fashion"
        assert found[method, "fashion_fd", ""]["status"] == found[method, "fashion_score", ""]["status"] == "ok"
        assert (method, "fashion_precision_recall", "recall") in found
    assert float(found["heatkv", "kl", ""]["beta_alloc"]) <= 0.1
    pictures = sorted(tmp_path.rglob("free/*.png"))
    assert len(pictures) == 3 * 16 and Image.open(pictures[0]).size == (32, 32)
    again = call(
        capsys,
        "eval",
        "model=tiny-var",
        "method=streaming,heatkv",
        "budget=0.1",
        "--limit",
        "16",
        "metric=kl",
        "--out",
        out,
        *SMALL,
    )
    values = {run["method"]: run["metrics"]["kl"][0]["value"] for run in again["runs"]}
    assert values == pytest.approx(kl)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["benchmark=natural", "limit=2"], "model tiny-var draws classes, and prompt 00000 has no class_index"),
        (["benchmark=imagenet", "limit=11"], "the class_index '10'"),
        (["model.sampling.tau=1"], "unknown key 'model.sampling.tau'"),
        (["model.sampling.cfg=[1,2]"], "model.sampling.cfg is"),
        (["model.params.width=80"], "width 80"),
    ],
)
def test_what_is_refused_before_anything_is_made(words: list[str], text: str, tmp_path: Path, capsys: Capture) -> None:
    report = call(capsys, "eval", "model=tiny-var", "method=full", *words, "--out", str(tmp_path), code=2)
    assert text in " ".join(error["error"] for error in report["errors"])
    assert all(error["fix"] for error in report["errors"]) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["var-d16", "var-d20", "var-d24", "var-d30", "var-d36-s"])
def test_official_files_are_asked_for_by_name(name: str, tmp_path: Path, capsys: Capture, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)
    words = ["eval", f"model={name}", "method=heatkv", "budget=0.1", "metric=psnr", "--out", str(tmp_path / "out")]
    planned = call(capsys, *words, "--dry-run", code=3)
    file = {"var-d36-s": "var_d36.pth"}.get(name, f"{name.replace('-', '_')}.pth")
    for name_of_file, lack in zip((file, "vae_ch160v4096z32.pth"), planned["missing"], strict=True):
        assert name_of_file in lack["error"]
    assert all(f"heatkv download {name}" in lack["fix"] for lack in planned["missing"])
    (planned_run,) = planned["runs"]
    layers = planned_run["model"]["num_layers"]
    kept = sum(h * w for h, w in planned_run["model"]["resolutions"][planned_run["model"]["resolution"]][:-1])
    assert planned_run["kv_full_bytes"] == 8 * 2 * 2 * 2 * kept * layers * 64 * layers  # images, rows, k and v, bytes
    assert planned_run["byte_plan"]["batches"]
    call(capsys, *words, "--yes", code=3)
    assert not list((tmp_path / "out").glob("*"))
