"""The four stages on the bundled model, as a user types them."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from heatkv_cli.calibration.calibration import Calibration
from heatkv_cli.models.infinity.sampling import bit_kl

Call = Callable[..., dict[str, Any]]
SMALL = ["runtime.batch_size=4", "runtime.threads=1"]
TIMED = {"seconds", "numbers"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the module: what one test has made, another finds."""
    return tmp_path_factory.mktemp("out")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    rows = lines(folder / "manifest.jsonl")
    assert len({row["image_id"] for row in rows}) == len(rows), "an image has two rows"
    return {row["image_id"]: {k: v for k, v in row.items() if k not in TIMED} for row in rows}


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in folder.iterdir() if p.suffix in (".png", ".safetensors")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_straight_line(out: Path, call: Call) -> None:
    calibrated = call("calibrate", "--model", "tiny", "--out", str(out), *SMALL)
    assert set(calibrated["stability"]["jaccard"]) == {"0.2", "0.1", "0.04"}
    assert set(calibrated["overlap"]["jaccard"]) == {"0.2", "0.1", "0.04"}
    path = Path(calibrated["path"])
    names = ["calibration-variance.png", "calibration-scas.png"]
    assert [Path(each) for each in calibrated["figures"]] == [path.with_name(name) for name in names]
    assert all(path.with_name(name).stat().st_size > 1000 for name in names)
    before = path.stat().st_mtime_ns
    built = call("build-schedule", "budget=0.1", "--out", str(out), *SMALL)
    assert path.stat().st_mtime_ns == before, "a calibration that is there was made again"
    assert built["physical_peak_ratio"] <= 0.1
    made = call("generate", "method=heatkv", "budget=0.1", "--limit", "6", "--out", str(out), *SMALL)
    assert made["images"] == 6
    report = call("eval", "method=full,streaming,heatkv", "budget=0.2,0.1", "--limit", "6", "--out", str(out), *SMALL)
    runs = {(r["method"], r["budget"]): r for r in report["runs"]}
    assert set(runs) == {("full", "1"), *((m, b) for m in ("streaming", "heatkv") for b in ("0.2", "0.1"))}
    for (method, budget), item in runs.items():
        assert item["costs"]["beta_alloc"] <= float(budget) * 1.005
        assert ("kl" in item["metrics"]) == (method != "full")
    with Path(report["path"]).open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["metric"] for r in rows} >= {"kl", "psnr", "psnr_layout", "shapes", "attention_share"}
    assert all(r["command"].startswith("heatkv eval") and r["status"] == "ok" for r in rows)
    assert len({(r["run_id"], r["metric"], r["variant"]) for r in rows}) == len(rows)
    assert Path(report["contact_sheet"]).exists()


def test_calibration_holds_what_methods_need(out: Path, call: Call) -> None:
    path = call("calibrate", "--out", str(out), *SMALL)["path"]
    calibration = Calibration.load(path)
    geometry, prompts = calibration.geometry, len(calibration.seeds)
    assert prompts == 10
    mass = torch.nansum(calibration.scas, 3)  # over sources
    torch.testing.assert_close(mass[..., 1:], calibration.history_mass[..., 1:].double(), atol=1e-5, rtol=0)
    assert bool((calibration.history_mass >= 0).all() and (calibration.history_mass <= 1 + 1e-5).all())
    keys = torch.tensor(geometry.schedule.offsets[1:], dtype=torch.float64)
    assert bool((calibration.entropy <= keys.log() + 1e-5).all())
    assert bool((calibration.variance >= 0).all())


def test_limit_and_shards_resume_and_merge(tmp_path: Path, call: Call) -> None:
    base = ["generate", "method=streaming", "budget=0.2", *SMALL, "--out"]
    whole = Path(call(*base, str(tmp_path / "a"), "--limit", "12")["path"])
    parts = tmp_path / "b"
    call(*base, str(parts), "--limit", "3")
    for shard in ("0/2", "1/2"):
        call(*base, str(parts), "--limit", "12", "--shard", shard)
    merged = Path(call(*base, str(parts), "--limit", "12")["path"])
    assert hashes(merged) == hashes(whole)
    assert manifest(merged) == manifest(whole)


def test_kill_at_random_points_loses_nothing(tmp_path: Path, call: Call) -> None:
    base = ["generate", "method=full", "--limit", "32", *SMALL, "--out"]
    undisturbed = Path(call(*base, str(tmp_path / "a"))["path"])
    rng, command = random.Random(0), [sys.executable, "-m", "heatkv_cli", *base, str(tmp_path / "b")]
    for goal in (1, 9, 18):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "b").glob("images/*/free/*.png"))) >= goal:
                time.sleep(rng.random() * 0.4)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = Path(call(*base, str(tmp_path / "b"))["path"])
    assert hashes(resumed) == hashes(undisturbed)
    assert manifest(resumed) == manifest(undisturbed)


def test_full_budget_is_the_full_cache(out: Path, call: Call) -> None:
    full = Path(call("generate", "method=full", "--limit", "4", "--out", str(out), *SMALL)["path"])
    same = Path(call("generate", "method=heatkv", "budget=1.0", "--limit", "4", "--out", str(out), *SMALL)["path"])
    pictures = [name for name in hashes(same) if name.endswith(".png")]
    assert len(pictures) == 4
    assert {name: hashes(same)[name] for name in pictures} == {name: hashes(full)[name] for name in pictures}


def test_scores_of_a_shard_bear_the_names_of_its_images(tmp_path: Path, call: Call) -> None:
    call(
        "eval",
        "method=full",
        "metric=shapes",
        "contact_sheet=0",
        "--limit",
        "8",
        "--shard",
        "1/2",
        "--out",
        str(tmp_path),
        *SMALL,
    )
    (scores,) = tmp_path.glob("images/*/scores.jsonl")
    names = [row["image_id"] for row in lines(scores)]
    made = [row["image_id"] for row in lines(scores.parent / "free" / "manifest-1of2.jsonl")]
    assert len(made) == 4
    assert names == made


def test_noise_floor_is_full_against_full(out: Path, call: Call) -> None:
    report = call(
        "eval",
        "method=full",
        "runtime.attention=masked",
        "metric=kl,psnr_layout",
        "--limit",
        "4",
        "--out",
        str(out),
        *SMALL,
    )
    (item,) = report["runs"]
    # Back ends agree within 1e-4 in logits, and a bit's KL is at most an eighth of the square; 1e-12 is its rounding.
    assert -1e-12 < item["metrics"]["kl"][0]["value"] < 1e-4**2 / 8


def test_seeds_belong_to_images(tmp_path: Path, call: Call) -> None:
    """Another batch size draws the same numbers: images agree but for float kernels."""
    paths = [
        Path(
            call(
                "generate",
                "method=full",
                "--limit",
                "4",
                "runtime.threads=1",
                f"runtime.batch_size={n}",
                "--out",
                str(tmp_path),
            )["path"]
        )
        for n in (1, 4)
    ]
    seeds = [{k: row["seed"] for k, row in manifest(path).items()} for path in paths]
    assert seeds[0] == seeds[1]
    for name in (n for n in hashes(paths[0]) if n.endswith(".png")):
        one, other = (np.asarray(Image.open(path / name), dtype=int) for path in paths)
        assert np.abs(one - other).mean() < 8, "another picture was drawn"


def test_kl_of_bits_against_a_literal_sum() -> None:
    torch.manual_seed(0)
    full, other = ([torch.randn(1, n, 3) * 3 for n in (1, 4, 9)] for _ in range(2))
    total, count = 0.0, 0
    for a, b in zip(full[1:], other[1:], strict=True):
        for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
            p, q = (1 / (1 + np.exp(-z)) for z in (x, y))
            total += p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
            count += 1
    found = bit_kl(full, other)
    assert found["kl"] == pytest.approx(total / count, rel=1e-6)
    assert found["kl"] == pytest.approx((found["kl_s1"] * 4 + found["kl_s2"] * 9) / 13)
    assert bit_kl(full, full)["kl"] == 0


@pytest.mark.parametrize("damage", ["truncated", "other model", "no such file"])
def test_bad_artifacts(damage: str, out: Path, tmp_path: Path, call: Call) -> None:
    source = Path(call("calibrate", "--out", str(out), *SMALL)["path"])
    bad, extra = tmp_path / "calibration.safetensors", ["model=tiny"]
    if damage == "truncated":
        bad.write_bytes(source.read_bytes()[:-100])
    elif damage == "other model":
        bad.write_bytes(source.read_bytes())
        extra = ["model=infinity-2b"]
    document = call("build-schedule", *extra, f"calibration={bad}", "--out", str(tmp_path), code=4)
    (error,) = document["errors"]
    assert error["fix"]
    expected = {"truncated": str(bad), "other model": "infinity-2b", "no such file": str(bad)}[damage]
    assert expected in error["error"]


def test_the_command_after_a_schedule_uses_it(tmp_path: Path, call: Call) -> None:
    words = ["method=random", "rho=0.7", f"out={tmp_path}"]
    assert call("build-schedule", *words)["next"] == " ".join(["heatkv generate", *words])


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_infeasible_budget_names_the_smallest(name: str, tmp_path: Path, call: Call) -> None:
    document = call(name, "method=heatkv", "budget=0.001", "--out", str(tmp_path), code=2)
    assert "1/155" in document["errors"][0]["fix"]


def test_generate_goes_on_past_a_budget_that_cannot_be(tmp_path: Path, call: Call) -> None:
    words = ["method=heatkv,sinks", "budget=0.001,0.2", "--limit", "1", "--out", str(tmp_path)]
    document = call("generate", *words, code=6)
    assert document["status"] == "partial"
    assert [(point["method"], point["budget"]) for point in document["infeasible"]] == [
        ("heatkv", "0.001"),
        ("sinks", "0.001"),
    ]
    assert all("smallest feasible" in point["reason"] for point in document["infeasible"])
    assert [Path(report["path"]).parent.name[:-9] for report in document["runs"]] == [
        "tiny-heatkv-0.2-shapes",
        "tiny-sinks-0.2-shapes",
    ]
    assert all(list(Path(report["path"]).glob("*.png")) for report in document["runs"])


def test_unknown_word_in_a_prompt(tmp_path: Path, call: Call) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circel on white\n")
    document = call(
        "generate",
        "method=full",
        "benchmark=prompts",
        f"benchmark.file={prompts}",
        "--out",
        str(tmp_path),
        code=2,
    )
    assert "circel" in document["errors"][0]["error"]
    assert "circle" in document["errors"][0]["fix"]
