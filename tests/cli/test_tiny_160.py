"""tiny-160: its config, its weights where a checkout has them, and what is said where it has not."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.core.budget import Budget
from heatkv_cli.models import weights
from heatkv_cli.planning.job import geometry_of

Capture = pytest.CaptureFixture[str]
FILE = weights.asset("tiny-160.safetensors")
with_weights = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is not in this checkout")
LIMITS = ["runtime.threads=1", "runtime.batch_size=6"]


def test_the_config_composes_beside_tiny() -> None:
    small, large = (compose([f"model={name}", "method=heatkv"]).first for name in ("tiny", "tiny-160"))
    geometry, other = geometry_of(large.model), geometry_of(small.model)
    assert (geometry.num_layers, geometry.num_heads, geometry.head_dim) == (8, 8, 20)
    assert (geometry.num_layers, geometry.num_heads, geometry.head_dim) == (other.num_layers, other.num_heads, 20)
    assert (geometry.schedule.num_tokens, geometry.schedule.sizes[-1]) == (1055, (20, 20))
    assert (geometry.sink_scales, large.model.layout_scales) == (other.sink_scales, (*small.model.layout_scales, 4))
    assert large.benchmark.name == "shapes"
    assert large.benchmark == small.benchmark
    assert len(large.model.sampling.tau) == 10
    assert Budget.parse("1").slots(geometry, rows=2) == 8 * 8 * (1055 - 400)  # nobody reads the last scale's


def test_absent_weights_are_a_setup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(weights, "asset", lambda name: tmp_path / name)
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)
    for command in ("calibrate", "eval"):
        assert run([command, "model=tiny-160", "--out", str(tmp_path / "out")]) == 3
        said = capsys.readouterr().err
        assert "tiny-160.safetensors is missing" in said
        assert "--weights" in said
    assert run(["models", "tiny-160"]) == 3
    assert "download" not in capsys.readouterr().err  # no hub has it


def test_the_wheel_leaves_its_weights_out() -> None:
    build = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    assert f"heatkv_cli/assets/{FILE.name}" in build["build"]["exclude"]
    wheel = build["build"]["targets"]["wheel"]
    included = [*wheel.get("artifacts", ()), *wheel.get("force-include", ())]  # both win over what is excluded
    assert not any("assets" in pattern or FILE.suffix in pattern for pattern in included)


@with_weights
def test_weights_are_those_of_the_config_and_small() -> None:
    (file,) = compose(["model=tiny-160"]).first.model.weights.files
    assert weights.find_file("tiny-160", file, None) == FILE
    assert weights.sha256_path(FILE) == file.sha256
    assert FILE.stat().st_size < 10_000_000


@with_weights
def test_it_draws_what_is_asked_for_at_160_pixels(tmp_path: Path, capsys: Capture) -> None:
    """One prompt of each task, whole cache: a net that does not fit its maps draws nothing that is right."""
    call = ["eval", "model=tiny-160", "method=full", "metric=shapes", "--limit", "6", "--out", str(tmp_path), "--json"]
    assert run([*call, *LIMITS]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    pictures = sorted(tmp_path.rglob("shapes-v1-*.png"))
    assert len(pictures) == 6
    for path in pictures:
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (160, 160, 3)
        assert pixels.std() > 5
    with (tmp_path / "results.csv").open(newline="") as f:
        (row,) = (r for r in csv.DictReader(f) if (r["metric"], r["variant"]) == ("shapes", ""))
    assert float(row["value"]) >= 1 / 3
