"""Every parameter of every metric: ranges, types, what counts, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from heatkv_cli.config import choices, compose
from heatkv_cli.errors import ConfigError, ConfigErrors
from heatkv_cli.metrics.base import ImageMetric, Metric, Spec
from heatkv_cli.metrics.clip.clip_score import CLIPScore
from heatkv_cli.metrics.inception.fid import FID
from heatkv_cli.metrics.inception.isc import InceptionScore
from heatkv_cli.metrics.intervals import Bootstrap
from heatkv_cli.metrics.objects.geneval import GenEval
from heatkv_cli.metrics.objects.shapes import ShapesScore
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.pixels import PSNR, SSIM
from heatkv_cli.metrics.preference.hps import HPS
from heatkv_cli.metrics.preference.image_reward import ImageReward

BAD: dict[str, tuple[Any, ...]] = {
    "int": (0, -1, 1.5, "3", True, None, math.nan, math.inf),
    "float": (math.nan, math.inf, -math.inf, "1", True, None, -1.0),
    "bool": ("true", 1, None),
    "str": (5, "", " ", True),
}
"""What no whole number, number, switch or text of a metric may be."""


def built(name: str) -> Metric:
    cfg = compose([f"metric={name}"]).first
    return cfg.metrics[0].object


def wrong_values(metric: Metric) -> Iterator[tuple[str, Any]]:
    for each in dataclasses.fields(metric):
        kinds = str(each.type).split(" | ")
        for kind in BAD.keys() & set(kinds):
            yield from ((each.name, value) for value in BAD[kind] if value is not None or "None" not in kinds)


@pytest.mark.parametrize("name", choices("metric"))
def test_a_wrong_value_is_refused_with_key_range_and_fix(name: str) -> None:
    metric = built(name)
    found = list(wrong_values(metric))
    for field, value in found:
        with pytest.raises(ConfigError) as caught:
            dataclasses.replace(metric, **{field: value})
        if field != "name":  # the name itself is in the key
            assert f"metric.{name}.{field} is {value!r}" in caught.value.message
            assert caught.value.hint.startswith("it must be ") and f": metric.{name}.{field}=" in caught.value.hint
    assert {field for field, _ in found} >= {"name"}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SSIM(batch_size=-1), "it must be a whole number of at least 1: metric.ssim.batch_size=16"),
        (lambda: PSNR(data_range=0), "it must be a finite number of at least 0.001 and at most 65,535"),
        (lambda: PSNR(data_range=1e300), "at most 65,535"),
        (lambda: PSNR(needs="forced"), "it must be free or layout: metric.psnr.needs=free"),  # type: ignore[arg-type]
        (lambda: FID(min_images=1), "a whole number of at least 2: metric.fid.min_images=2048"),
        (lambda: FID(mode="Clean"), "clean or tf1 or antialias"),  # type: ignore[arg-type]
        (lambda: FID(reference=None), "it must be a text: metric.fid.reference=full"),  # type: ignore[arg-type]
        (lambda: FID(device="gpu"), "cpu, cuda or cuda:N: metric.fid.device=cpu"),
        (lambda: FID(device="cuda:x"), "cpu, cuda or cuda:N"),
        (lambda: InceptionScore(splits=0), "of at least 1 and at most 10,000"),
        (lambda: HPS(timeout=0), "a finite number above 0 and at most 1e+06: metric.hps_v21.timeout=600"),
        (lambda: HPS(weights_sha256="abc"), "64 hexadecimal digits, as sha256sum prints them or null"),
        (lambda: ShapesScore(threshold=1.1), "of at least 0 and at most 1: metric.shapes.threshold=0.0"),
        (lambda: ShapesScore(nms_threshold=0), "above 0 and at most 1"),
        (lambda: GenEval(detector_config={"a": math.nan}), "a mapping of plain values or null"),
        (lambda: CLIPScore(weights=3), "a text or null: metric.clip_score.weights=null"),  # type: ignore[arg-type]
    ],
)
def test_what_is_allowed_and_what_to_type(make: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert text in caught.value.hint


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        SSIM(data_range=-1, batch_size=0, device="x")
    assert [error.message.split(" ")[0] for error in caught.value.errors] == [
        "metric.ssim.data_range",
        "metric.ssim.batch_size",
        "metric.ssim.device",
    ]


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="amp=true does nothing on cpu"):
        HPS(amp=True)
    assert HPS(amp=True, device="cuda:1").amp
    for change in ({"antialias": False}, {"amp": True, "device": "cuda"}):
        with pytest.raises(ConfigError, match="amp and antialias do nothing"):
            HPS(backend="official", python="py", **change)
    with pytest.raises(ConfigError, match="sizes does nothing with backend=official"):
        ImageReward(backend="official", python="py", sizes={"layers": 1})
    for sizes, text in (
        ({"layer": 1}, "no key 'layer'"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": 7}, "no multiple"),
    ):
        with pytest.raises(ConfigError, match=text):
            ImageReward(sizes=sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"resamples": 1},
        {"resamples": 1_000_001},
        {"resamples": 2.0},
        {"resamples": True},
        {"resamples": math.nan},
        {"confidence": 0},
        {"confidence": 1},
        {"confidence": 2},
        {"confidence": math.nan},
        {"confidence": "0.5"},
        {"confidence": True},
        {"seed": -1},
        {"seed": 0.5},
        {"seed": None},
        {"seed": math.inf},
    ],
)
def test_bootstrap_is_checked(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=f"bootstrap.{key} is") as caught:
        Bootstrap(**change)
    assert f": bootstrap.{key}=" in caught.value.hint
    assert Bootstrap(2, 0.5, 10**30) and Bootstrap(1_000_000)


# ---- what counts


@dataclasses.dataclass(frozen=True)
class Mine(ImageMetric):
    """A metric as somebody would write it: a plain field counts without a word."""

    SPEC = Spec("mine", "3", "", True, "prompt")

    knob: float = 1.0
    ratio: float = parameter(0.5, least=0)
    speed: int = aside(4, least=1)


def test_a_new_parameter_counts_by_default() -> None:
    assert Mine().settings() == '{"knob":1,"ratio":0.5}'
    assert Mine().identity() == {
        "class": f"{__name__}.Mine",
        "version": "3",
        "parameters": {"knob": 1, "ratio": 0.5},
        "weights": "",
    }
    assert Mine(speed=9, name="other").identity() == Mine().identity()
    assert Mine(knob=2).identity() != Mine().identity() != Mine(ratio=0.25).identity()
    assert (Mine(name="other").spec.name, Mine().spec.name) == ("other", "mine")


@pytest.mark.parametrize("name", choices("metric"))
def test_settings_are_canonical_json_without_places_and_speed(name: str) -> None:
    metric = built(name)
    found = json.loads(metric.settings())
    assert metric.settings() == json.dumps(found, sort_keys=True, separators=(",", ":"))
    assert not {
        "reference",
        "batch_size",
        "device",
        "weights",
        "weights_folder",
        "weights_sha256",
        "timeout",
        "python",
        "name",
        "vocabulary",
        "med_config",
        "detections",
        "detector_weights",
        "clip_weights",
    } & set(found)
    aside_from = {each.name for each in dataclasses.fields(metric) if not each.metadata.get("counts", True)}
    assert set(found) == {each.name for each in dataclasses.fields(metric)} - aside_from - {"reference"}


def test_each_number_changing_parameter_changes_identity_and_settings() -> None:
    changes = {
        "psnr": {"data_range": 1.0},
        "ssim": {"data_range": 1.0},
        "shapes": {"strict": False, "min_area": 0.02},
        "precision_recall": {"neighbours": 5, "mode": "clean"},
        "isc": {"splits": 2, "shuffle": False},
    }
    for name, parameters in changes.items():
        metric = built(name)
        for key, value in parameters.items():
            other = dataclasses.replace(metric, **{key: value})
            assert other.settings() != metric.settings() and other.parameters() != metric.parameters()
    assert PSNR(data_range=255).settings() == PSNR(data_range=255.0).settings()
    assert FID(reference="a").settings() == FID(reference="b").settings()


def test_the_official_back_end_has_its_own_identity(tmp_path: Any) -> None:
    (tmp_path / "x.pt").write_bytes(b"x")
    native, one, two = (
        HPS(weights=str(tmp_path / "x.pt"), backend=backend, python=python)  # type: ignore[arg-type]
        for backend, python in (("native", None), ("official", "a"), ("official", "b"))
    )
    assert native.identity() != one.identity() != two.identity()
    assert one.settings() == two.settings() == '{"backend":"official","release":"v2.1"}'
    assert json.loads(native.settings())["antialias"] is True
