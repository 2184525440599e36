"""The library: what a notebook calls gives what the command line gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import heatkv_cli as heatkv
from heatkv_cli.errors import BudgetError, ConfigError, HeatKVError
from heatkv_cli.metrics.scores import Pixels

PROMPTS = ["a red circle on gray", "two blue squares"]
SMALL = {"runtime.threads": 1}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def model(out: Path) -> heatkv.library.Model:  # type: ignore[name-defined]
    return heatkv.load("tiny", out=out, **SMALL)


def test_images_and_costs(model: heatkv.library.Model) -> None:  # type: ignore[name-defined]
    made = model.generate(PROMPTS, method="streaming", budget=0.1, seed=0)
    assert len(made.images) == 2 and made.images[0].shape == (80, 80, 3) and made.images[0].dtype == np.uint8
    assert 0.09 < made.costs["beta_alloc"] <= 0.1005 and made.costs["seconds_per_image"] > 0
    again = model.generate(PROMPTS, method="streaming", budget=0.1, seed=0)
    other = model.generate(PROMPTS, method="streaming", budget=0.1, seed=1)
    assert all(map(np.array_equal, made.images, again.images))
    assert not np.array_equal(made.images[0], other.images[0])


def test_an_image_is_that_of_the_command_line(model: heatkv.library.Model, tmp_path: Path) -> None:  # type: ignore[name-defined]
    """The same prompts with the same ids, from a file: the same pixels."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [f'{{"id": "{place:05}", "prompt": "{prompt}"}}' for place, prompt in enumerate(PROMPTS)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    words = {"benchmark": "prompts", "benchmark.file": str(prompts), **SMALL, "runtime.batch_size": 2}
    (folder,) = heatkv.generate(method="streaming", budget=0.1, seed=0, out=tmp_path / "out", **words)
    made = model.generate(PROMPTS, method="streaming", budget=0.1, seed=0)
    for place, image in enumerate(made.images):
        drawn: Pixels = np.asarray(Image.open(folder / f"{place:05}.png"))
        assert np.array_equal(image, drawn)


def test_errors_are_those_of_the_command_line(model: heatkv.library.Model) -> None:  # type: ignore[name-defined]
    for prompts, keys, kind in (
        ("a red circle", {}, ConfigError),
        ([], {}, ConfigError),
        (PROMPTS, {"method": "streaming", "budget": 0.001}, BudgetError),
        (PROMPTS, {"method": "nosuch", "budget": 0.1}, ConfigError),
        (PROMPTS, {"method": ["full", "streaming"], "budget": 0.1}, ConfigError),
        (["a zebra"], {}, HeatKVError),
    ):
        with pytest.raises(kind) as caught:
            model.generate(prompts, **keys)
        assert caught.value.hint


def test_it_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, heatkv_cli; assert 'torch' not in sys.modules; heatkv_cli.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError):
        heatkv.nothing  # noqa: B018
