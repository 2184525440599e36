"""What changes the images of a model with several shapes: resolution, aspect ratio, presets; and what is refused."""

from __future__ import annotations

import pytest

from heatkv_cli.config import RunConfig, compose, config_hash
from heatkv_cli.config.groups import read_yaml
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.infinity.schedules import RATIOS, RESOLUTIONS, rope_base, scale_sizes

OFFICIAL = ("infinity-2b", "infinity-8b", "infinity-8b-512")


def one(*overrides: str, command: str = "bench") -> RunConfig:
    return compose(overrides, command=command).first


def digest(run: RunConfig) -> str:
    return config_hash(run.identity())


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_ratio_at_every_resolution(ratio: float, resolution: str) -> None:
    model = one("model=infinity-2b", f"aspect_ratio={ratio}", f"resolution={resolution}").model
    assert model.sizes == scale_sizes(resolution, ratio)
    assert model.params["rope_base"] == rope_base(ratio) == scale_sizes("1M", ratio)[-1]
    assert model.order_scales == scale_sizes("1M")  # published orders are those of square images


def test_the_named_shapes_are_those_of_the_official_table() -> None:
    """The table is FoundationVision/Infinity @ 4c27bbb, `dynamic_resolution.py`; 16 pixels to a token."""
    for ratio, pixels in ((1.5, (1248, 832)), (0.571, (768, 1344)), (2.0, (1440, 720)), (1, (1024, 1024))):
        height, width = one("model=infinity-8b", f"aspect_ratio={ratio}").model.sizes[-1]
        assert (16 * height, 16 * width) == pixels
    assert one("model=infinity-8b-512").model.sizes[-1] == (32, 32)
    assert one("model=infinity-2b", "aspect_ratio=1.5").model.shape_label == "1M@1.5"
    assert one().model.shape_label == "80px"


@pytest.mark.parametrize(
    ("model", "preset", "cfg", "tau", "precision"),
    [("infinity-2b", "heatkv", 3, 1, "float16"), ("infinity-2b", "paper-eval", 4, 1, "float16")]
    + [("infinity-2b", "infer", 4, 0.5, "bfloat16"), ("infinity-8b", "infer", 3, 1, "float16")]
    + [("infinity-8b-512", "heatkv", 3, 1, "float16")],
)
def test_presets(model: str, preset: str, cfg: float, tau: float, precision: str) -> None:
    chosen = one(f"model={model}", f"preset={preset}").model
    assert set(chosen.sampling.strengths()) == {(cfg, tau)} and chosen.params["t5_dtype"] == precision
    assert (chosen.sampling.top_k, chosen.sampling.top_p, chosen.sampling.guide_layers) == (900, 0.97, (0,))
    assert chosen.preset == preset


@pytest.mark.parametrize("model", OFFICIAL)
def test_every_preset_says_the_same_things(model: str) -> None:
    """A value that only some presets set would stay behind from another: all set the same keys."""
    content = read_yaml("model", model)
    keys = [{part: sorted(values) for part, values in preset.items()} for preset in content["presets"].values()]
    assert all(key == keys[0] for key in keys)
    assert one(f"model={model}").model.preset == content["preset"] == "heatkv"


def test_a_single_key_wins_over_the_preset_wherever_it_stands() -> None:
    for typed in (("preset=infer", "model.sampling.cfg=7"), ("model.sampling.cfg=7", "model.preset=infer")):
        sampling = one("model=infinity-2b", *typed).model.sampling
        assert set(sampling.strengths()) == {(7, 0.5)}


def test_the_preset_is_its_values() -> None:
    """Two ways to the same numbers are one run; the name of the preset is no number."""
    named, spelled = one("model=infinity-2b", "preset=paper-eval"), one("model=infinity-2b", "model.sampling.cfg=4")
    assert digest(named) == digest(spelled) != digest(one("model=infinity-2b"))


def test_presets_sweep() -> None:
    runs = compose(["model=infinity-2b", "preset=infer,heatkv", "method=full"]).runs
    assert [run.model.sampling.tau[0] for run in runs] == [0.5, 1]


@pytest.mark.parametrize("command", ["generate", "eval", "calibrate"])
def test_untrained_resolutions_are_refused_where_images_are_made(command: str) -> None:
    with pytest.raises(ConfigError, match=r"model=infinity-2b was trained at 1M, not at 0\.25M") as caught:
        one("model=infinity-2b", "resolution=0.25M", command=command)
    assert "force_resolution=true" in caught.value.hint and "model=infinity-8b-512" in caught.value.hint
    forced = one("model=infinity-2b", "resolution=0.25M", "force_resolution=true", command=command)
    assert forced.model.identity()["forced_resolution"] is True
    assert one("model=infinity-8b-512", command=command).model.resolution == "0.25M"


@pytest.mark.parametrize("command", ["build-schedule", "bench", "doctor"])
def test_schedules_and_bytes_need_no_training(command: str) -> None:
    assert one("model=infinity-2b", "resolution=0.25M", command=command).model.sizes == scale_sizes("0.25M")


def test_force_changes_nothing_where_it_is_not_needed() -> None:
    assert digest(one("model=infinity-2b", "force_resolution=true")) == digest(one("model=infinity-2b"))
    assert "forced_resolution" not in one().model.identity()


def test_the_512_model_is_the_8b_otherwise() -> None:
    small, large = one("model=infinity-8b-512").model, one("model=infinity-8b", "resolution=0.25M").model
    assert small.params == large.params and small.sampling == large.sampling and small.sizes == large.sizes
    assert [file.name for file in small.weights.files][1:] == [file.name for file in large.weights.files][1:]
    assert small.weights.files[0].name == "infinity_8b_512x512_weights"


@pytest.mark.parametrize(
    ("overrides", "run", "calibration"),
    [(["method=full"], "3680fba3dd41", "2a8c33733e57"), (["budget=0.1"], "b0179bf0063b", "2a8c33733e57")]
    + [(["budget=0.04", "method=random", "runtime.batch_size=4"], "c06fe952ebca", "6f3623a41fab")],
)
def test_runs_of_the_bundled_model_keep_their_hash(overrides: list[str], run: str, calibration: str) -> None:
    """No edit of conf/ or of the config changes what a run is by accident."""
    config = one(*overrides, "runtime=cpu", command="eval")
    assert digest(config)[:12] == run
    assert config_hash(config.calibration_identity())[:12] == calibration
