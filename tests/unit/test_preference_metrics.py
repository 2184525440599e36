"""HPS and ImageReward as metrics: rows, what is missing and how it is said, self-tests, back ends chosen by config."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.metrics.base import ImageMetric, Sample, Score
from heatkv_cli.metrics.clip.input import CLIP_MEAN, CLIP_STD, cropped
from heatkv_cli.metrics.intervals import Bootstrap
from heatkv_cli.metrics.networks import release
from heatkv_cli.metrics.preference import judge, official
from heatkv_cli.metrics.preference.hps import HPS, preprocess
from heatkv_cli.metrics.preference.image_reward import ImageReward

CONF = Path(__file__).resolve().parents[2] / "conf" / "metric"
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SAMPLE = Sample("00000", "a cat", image=PICTURE)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("heatkv_cli.metrics.weights._in_hub_cache", lambda file: ())
    return tmp_path


def shown(pixels: torch.Tensor) -> np.ndarray:
    """Brightness in [0, 1] again."""
    return (pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]).numpy()


@dataclass
class Saying:
    """A back end that says what it is told."""

    numbers: list[float]
    versions: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
        return self.numbers


# ---- preprocessing, against numbers of the specification


@pytest.mark.parametrize(
    ("height", "width", "inner"),
    [(60, 40, (224, 149)), (40, 60, (149, 224)), (512, 1024, (112, 224)), (1000, 7, (224, 2)), (224, 100, (224, 100))],
)
def test_hps_pads_to_a_square_with_the_odd_one_behind(height: int, width: int, inner: tuple[int, int]) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    pixels = preprocess(white)
    assert pixels.shape == (3, 224, 224)
    top, left = (224 - inner[0]) // 2, (224 - inner[1]) // 2
    bright = shown(pixels)
    expected = np.zeros((224, 224))
    expected[top : top + inner[0], left : left + inner[1]] = 1
    np.testing.assert_allclose(bright, np.broadcast_to(expected, (3, 224, 224)), atol=2e-2)


def test_hps_antialias_switch_is_torchvisions() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (896, 896, 3), dtype=np.uint8)
    smooth, harsh = (shown(preprocess(noise, antialias=on)).std() for on in (True, False))
    assert harsh > 2 * smooth  # reduced to a quarter, noise is averaged with antialias and kept without
    assert (preprocess(PICTURE[:8, :8], 8) - preprocess(PICTURE[:8, :8], 8, antialias=False)).abs().max() == 0


def test_cropping_is_pillows() -> None:
    expected = Image.fromarray(PICTURE).resize((336, 224), Image.Resampling.BICUBIC).crop((56, 0, 280, 224))
    np.testing.assert_allclose(shown(cropped(PICTURE)).transpose(1, 2, 0) * 255, np.asarray(expected), atol=1e-3)


def test_too_narrow_a_picture() -> None:
    with pytest.raises(ArtifactError, match="too narrow"):
        preprocess(np.zeros((1000, 1, 3), np.uint8))


# ---- rows


def test_hps_rows_by_style_with_the_spread_of_groups() -> None:
    rng = np.random.default_rng(1)
    scores = [
        Score(f"{style}-{i}", 0, float(rng.normal(28, 2)), style) for style in ("photo", "anime") for i in range(200)
    ]
    rows = HPS().summarise(scores, [replace(s, value=s.value + 1) for s in scores], Bootstrap(200))
    assert [row.variant for row in rows] == ["", "anime", "photo"]
    anime = [s.value for s in scores if s.stratum == "anime"]
    groups = [np.mean(anime[:80]), np.mean(anime[80:160]), np.mean(anime[160:])]
    assert math.isclose(rows[1].value, np.mean(anime)) and math.isclose(rows[1].extra["group_std"], np.std(groups))
    assert math.isclose(rows[0].value, np.mean([s.value for s in scores]))
    assert math.isclose(rows[0].extra["difference"], -1) and rows[0].low < rows[0].value < rows[0].high
    assert len(HPS().summarise([replace(s, stratum="") for s in scores], bootstrap=Bootstrap(200))) == 1


def test_image_reward_row() -> None:
    scores = [Score(str(i), k, i + k / 10) for i in range(4) for k in range(2)]
    (row,) = ImageReward().summarise(scores, bootstrap=Bootstrap(200))
    assert math.isclose(row.value, 1.55) and row.n == 8 and row.stderr > 0


def test_style_comes_from_the_prompt_list(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = HPS()
    monkeypatch.setattr(HPS, "scorer", lambda self: Saying([0.25]))
    assert metric.score(replace(SAMPLE, meta={"style": "photo"})) == Score("00000", 0, 25.0, "photo")


# ---- what is missing


@pytest.mark.parametrize(
    ("metric", "text", "hint"),
    [
        (HPS(), r"HPS_v2\.1_compressed\.pt", "xswu/HPSv2"),
        (HPS(release="v2.0", name="hps_v20"), r"HPS_v2_compressed\.pt", "xswu/HPSv2"),
        (ImageReward(), r"ImageReward\.pt|bert-base-uncased-vocab\.txt", "huggingface"),
        (HPS(backend="official", python="/usr/bin/python3"), r"HPS_v2\.1_compressed\.pt", "xswu/HPSv2"),
    ],
)
def test_missing_weights_name_the_file_and_where_it_is(nowhere: Path, metric: Any, text: str, hint: str) -> None:
    assert isinstance(metric, ImageMetric)
    for action in (lambda: metric.score(SAMPLE), lambda: metric.identity()):
        with pytest.raises(SetupError, match="weights missing: .*" + text) as caught:
            action()
        assert hint in caught.value.hint and "HEATKV_WEIGHTS_DIR" in caught.value.hint


def test_sample_without_image() -> None:
    with pytest.raises(ArtifactError, match="no image"):
        HPS().score(replace(SAMPLE, image=None))


@pytest.mark.parametrize("make", [HPS, ImageReward])
def test_official_back_end_needs_its_python(nowhere: Path, make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="backend=official needs the Python") as caught:
        make(backend="official").score(SAMPLE)
    assert "python=/path/to/venv/bin/python" in caught.value.hint


def test_official_back_end_is_asked_as_the_worker_expects(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    class Recorder:
        def __init__(self, *arguments: Any) -> None:
            asked.append(arguments)
            self.versions = {"hpsv2": "1.2.0", "torchvision": "0.16"}

        def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
            return [0.5] * len(images)

    for name in ("HPS_v2.1_compressed.pt", "ImageReward.pt", "med_config.json"):
        (nowhere / name).write_bytes(b"x")
    release()
    monkeypatch.setattr(judge, "OfficialScorer", Recorder)
    known = {"backend": "official", "python": "py", "weights_sha256": hashlib.sha256(b"x").hexdigest()}
    score = HPS(**known, device="cuda:1").score(SAMPLE)
    assert (score.value, score.note) == (50, "hpsv2 1.2.0, torchvision 0.16")
    assert ImageReward(**known, timeout=7).score(SAMPLE).value == 0.5
    checkpoint = str(nowhere / "HPS_v2.1_compressed.pt")
    options = {"checkpoint": checkpoint, "release": "v2.1", "device": "cuda:1"}
    assert asked[0] == ("hpsv2", "py", options, 600.0, "metric.hps_v21")
    assert asked[1][0] == "image-reward" and asked[1][3] == 7
    assert asked[1][2] == {
        "checkpoint": str(nowhere / "ImageReward.pt"),
        "med_config": str(nowhere / "med_config.json"),
        "vocab": None,
        "device": "cpu",
    }
    (nowhere / "mine.txt").write_bytes(b"x")
    ImageReward(**known, vocabulary=str(nowhere / "mine.txt")).score(SAMPLE)
    assert asked[2][2]["vocab"] == str(nowhere / "mine.txt")
    (nowhere / "bert-base-uncased-vocab.txt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"bert-base-uncased-vocab\.txt should have 07eced37"):
        ImageReward(**known).score(SAMPLE)
    release()
    assert official.WORKER.is_file()


# ---- self-tests


def test_self_checks_compare_with_the_published_numbers(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PICTURE).save(nowhere / "hpsv2-demo_image.jpg")
    for i in (1, 2, 3, 4):
        Image.fromarray(PICTURE).save(nowhere / f"image-reward-{i}.webp")

    def saying(metric: Any, numbers: list[float]) -> Any:
        monkeypatch.setattr(type(metric), "scorer", lambda self: Saying(numbers))
        return metric.self_check()

    assert saying(HPS(release="v2.0", name="hps_v20"), [0.2877, 0.1]) == ""
    assert (
        saying(HPS(release="v2.0", name="hps_v20"), [0.2500, 0.1]) == "the demo picture scores 0.2500, published 0.2876"
    )
    assert saying(HPS(), [0.31, 0.1]) == "" and "other words" in saying(HPS(), [0.1, 0.2])
    assert saying(ImageReward(), [0.58, 0.27, -1.41, -2.03]) == ""
    assert "published [0.58, 0.27, -1.41, -2.03]" in saying(ImageReward(), [0.58, 0.27, 1.41, -2.03])


@pytest.mark.parametrize(
    "metric", [HPS(), HPS(release="v2.0", name="hps_v20"), ImageReward()], ids=["hps_v21", "hps_v20", "ir"]
)
def test_golden_self_test_with_the_real_weights(metric: Any) -> None:
    try:
        wrong = metric.self_check()
    except SetupError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    assert wrong == ""


@pytest.mark.parametrize("name", ["hps_v21", "hps_v20", "image_reward", "geneval"])
def test_yaml_spells_the_defaults_out(name: str) -> None:
    from heatkv_cli.metrics.objects.geneval import GenEval

    fields = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    cls = {"HPS": HPS, "ImageReward": ImageReward, "GenEval": GenEval}[fields.pop("_target_").rpartition(".")[2]]
    shown = vars(cls(**fields))
    default = vars(HPS(release="v2.0", name="hps_v20") if name == "hps_v20" else cls(name=fields.get("name")))
    assert shown == default and set(default) - set(fields) <= {"name", "device", "weights_folder"}
