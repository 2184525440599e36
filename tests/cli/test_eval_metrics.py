"""`heatkv eval` with metrics that need packages or weights, the noise floor, and what `doctor` says of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heatkv_cli.config import choices
from heatkv_cli.metrics.pictures import read_image
from heatkv_cli.pipeline import samples

Call = Callable[..., dict[str, Any]]


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)


@pytest.mark.parametrize("kind", ["attention", "batch"])
def test_noise_floor_is_a_row_of_full_against_full(kind: str, tmp_path: Path, call: Call, no_weights: None) -> None:
    report = call(
        "eval",
        "method=streaming",
        "budget=0.2",
        "metric=psnr,ssim,fid",
        f"noise_floor={kind}",
        "--limit",
        "4",
        "runtime.batch_size=4",
        "runtime.threads=1",
        "contact_sheet=0",
        "--out",
        str(tmp_path / "out"),
        code=6,
    )
    assert [item["method"] for item in report["runs"]] == ["streaming", "full"]
    found = rows(report["path"])
    (floor,) = [row for row in found if row["method"] == "full" and row["metric"] == "ssim"]
    assert (floor["attention_backend"], floor["batch_size"]) == {
        "attention": ("masked", "4"),
        "batch": ("grouped", "1"),
    }[kind]
    assert (floor["reference"], floor["status"], floor["n"]) == ("full", "ok", "4")
    assert float(floor["value"]) > 0.99
    (ours,) = [row for row in found if row["method"] == "streaming" and row["metric"] == "ssim"]
    assert float(ours["value"]) < float(floor["value"])
    skipped = [row for row in found if row["metric"] == "fid"]
    assert {(row["method"], row["status"], row["value"]) for row in skipped} == {
        ("streaming", "skipped", ""),
        ("full", "skipped", ""),
    }
    assert all("weights-inception" in row["reason"] for row in skipped)


@pytest.mark.parametrize(
    ("metric", "own", "fulls"),
    [("shapes", 1, 1), ("kl", 0, 0), ("psnr", 1, 1), ("ssim,psnr_layout", 1, 2), ("fd_efficientnet_lite0", 1, 1)],
)
def test_images_are_read_for_metrics_that_look_at_them(
    metric: str, own: int, fulls: int, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`own`, `fulls`: how often each image of a run's free pass, and of the full run, is read.

    shapes scores both runs; psnr and ssim compare each image with the full run's, psnr_layout that of another pass;
    fd compares all with all.
    """
    seen = Counter[Path]()

    def read(path: Path) -> Any:
        seen[path] += 1
        return read_image(path)

    monkeypatch.setattr(samples, "read_image", read)
    call(
        "eval",
        "method=sinks",
        f"metric={metric}",
        "--limit",
        "2",
        "runtime.batch_size=2",
        "contact_sheet=0",
        "runtime.threads=1",
        *(["metric.fd_efficientnet_lite0.min_images=2"] if "lite0" in metric else []),
        "--out",
        str(tmp_path),
    )
    made = list(tmp_path.glob("images/*/free/*.png"))
    assert len(made) == 4
    assert {path: seen[path] for path in made} == {path: fulls if "tiny-full" in str(path) else own for path in made}


def test_noise_floor_of_batches_needs_batches(tmp_path: Path, call: Call) -> None:
    document = call(
        "eval",
        "metric=psnr",
        "method=full",
        "noise_floor=batch",
        "runtime.batch_size=1",
        "--limit",
        "1",
        "--out",
        str(tmp_path),
        code=2,
    )
    assert "batches of 1" in document["errors"][0]["error"]


def test_doctor_has_a_line_for_every_metric(tmp_path: Path, call: Call, no_weights: None) -> None:
    report = call("doctor", "--out", str(tmp_path))
    lines = {check["what"]: check for check in report["checks"]}
    assert {f"metric {name}" for name in choices("metric")} <= set(lines)
    assert lines["metric ssim"]["ok"] is True and "self-test passed" in lines["metric ssim"]["found"]
    missing = lines["metric lpips"]
    assert missing["ok"] is None, "what a download would bring is missing, not wrong"
    assert "alexnet-owt-7be5be79.pth" in missing["found"] and "HEATKV_WEIGHTS_DIR" in missing["found"]


def test_the_folder_of_weights_is_the_metrics_too(tmp_path: Path, call: Call, no_weights: None) -> None:
    (tmp_path / "weights").mkdir()
    damaged = tmp_path / "weights" / "alexnet-owt-7be5be79.pth"
    damaged.write_bytes(b"no weights at all")
    options = ["--weights", str(damaged.parent), "--out", str(tmp_path / "out")]
    report = call("doctor", *options, code=3)
    (line,) = [check for check in report["checks"] if check["what"] == "metric lpips"]
    assert line["ok"] is False and str(damaged) in line["found"]
    report = call(
        "eval",
        "method=sinks",
        "metric=lpips",
        "runtime.batch_size=1",
        "runtime.threads=1",
        "--limit",
        "1",
        "contact_sheet=0",
        *options,
        code=6,
    )
    (item,) = report["incomplete"]
    assert item["status"] == "failed" and str(damaged) in item["reason"]
