"""Our ImageReward and HPS against the official packages' code: stored numbers, and live where the packages are.

``data/official_scores.json`` comes from ``make_official_vectors.py``. ``HEATKV_OFFICIAL_PYTHON`` names a Python that
has both packages; the tests that ask it are skipped without.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import official_tiny as tiny
import pytest
import torch

import heatkv_cli.metrics.preference.hps as hps
import heatkv_cli.metrics.preference.image_reward as reward
from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.clip.input import cropped
from heatkv_cli.metrics.preference.blip import Sizes
from heatkv_cli.metrics.preference.official import OfficialScorer

DATA = json.loads((Path(__file__).parent / "data" / "official_scores.json").read_text())
PICTURES = tiny.pictures()
TINY = Sizes(
    vision_width=tiny.VISION["embed_dim"],
    vision_layers=tiny.VISION["depth"],
    vision_heads=tiny.VISION["num_heads"],
    vocabulary=tiny.MED["vocab_size"],
    positions=tiny.MED["max_position_embeddings"],
    width=tiny.MED["hidden_size"],
    layers=tiny.MED["num_hidden_layers"],
    heads=tiny.MED["num_attention_heads"],
    feedforward=tiny.MED["intermediate_size"],
)
PAIRS = [(i, p) for i in range(len(PICTURES)) for p in range(len(tiny.PROMPTS))]
pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the official containers hold them."""
    folder = tmp_path_factory.mktemp("official")
    torch.save(tiny.fill(DATA["image_reward"]["shapes"]), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(tiny.vocabulary()) + "\n", encoding="utf-8")
    (folder / "med_config.json").write_text(json.dumps(tiny.MED))
    torch.save({"epoch": 0, "name": "x", "state_dict": tiny.fill(DATA["hps"]["shapes"])}, folder / "hps.pt")
    return folder


@pytest.fixture(scope="module")
def arch(folder: Path) -> str:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch (extra hpsv2) is not installed")
    (folder / f"{tiny.ARCH}.json").write_text(json.dumps(tiny.CLIP))
    open_clip.add_model_config(folder / f"{tiny.ARCH}.json")
    return tiny.ARCH


def samples() -> list[Sample]:
    return [Sample(f"{i}-{p}", tiny.PROMPTS[p], image=PICTURES[i]) for i, p in PAIRS]


def expected(part: dict[str, Any]) -> list[float]:
    return [part["scores"][i][p] for i, p in PAIRS]


def reward_metric(folder: Path, **options: Any) -> reward.ImageReward:
    return reward.ImageReward(
        weights=str(folder / "ImageReward.pt"), vocabulary=str(folder / "vocab.txt"), sizes=vars(TINY), **options
    )


def test_image_reward_scores(folder: Path) -> None:
    found = [s.value for s in reward_metric(folder).score_batch(samples())]
    np.testing.assert_allclose(found, expected(DATA["image_reward"]), atol=1e-5, rtol=1e-5)
    assert np.std(found) > 0.01  # the weights do not make all pictures alike


def test_image_reward_does_not_depend_on_the_batch(folder: Path) -> None:
    metric = reward_metric(folder)
    singly = [metric.score(sample).value for sample in samples()]
    np.testing.assert_allclose(singly, [s.value for s in metric.score_batch(samples())], atol=1e-5)


def test_image_reward_tokens(folder: Path) -> None:
    tokenizer = reward.tokenizer_of(folder / "vocab.txt")
    assert [tokenizer.encode(prompt).ids for prompt in tiny.PROMPTS] == DATA["image_reward"]["tokens"]
    assert tokenizer.token_to_id("[ENC]") == tiny.MED["vocab_size"] - 1


def test_image_reward_pixels() -> None:
    for picture, numbers in zip(PICTURES, DATA["image_reward"]["pixels"], strict=True):
        np.testing.assert_allclose(cropped(picture).flatten()[::997], numbers, atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
def test_hps_scores_and_pixels(folder: Path, arch: str, antialias: bool) -> None:
    official = DATA["hps"]["antialias" if antialias else "no_antialias"]
    for picture, numbers in zip(PICTURES, official["pixels"], strict=True):
        # A pixel of the reduced picture is a float32 sum over a hundred and more.
        np.testing.assert_allclose(hps.preprocess(picture, antialias=antialias).flatten()[::997], numbers, atol=1e-5)
    metric = hps.HPS(weights=str(folder / "hps.pt"), arch=arch, antialias=antialias)
    found = [s.value / 100 for s in metric.score_batch(samples())]
    np.testing.assert_allclose(found, expected(official), atol=1e-5)


def test_antialias_matters() -> None:
    with_, without = (np.array(DATA["hps"][key]["scores"]) for key in ("antialias", "no_antialias"))
    changes = np.abs(with_ - without).max(1)
    assert changes[2] > 1e-4  # the tall picture is reduced
    assert changes[3] == 0  # this one has the network's size


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
@pytest.mark.parametrize("which", ["ImageReward.pt", "hps.pt"])
def test_every_key_is_consumed(folder: Path, arch: str, tmp_path: Path, which: str, change: str) -> None:
    content = torch.load(folder / which, weights_only=True)
    state = content.get("state_dict", content)
    key = next(k for k in state if "mlp" in k and k.endswith("weight"))
    if change == "missing":
        del state[key]
    elif change == "extra":
        state["blip.mystery"] = torch.zeros(1)
    else:
        state[key] = state[key][1:]
    path = tmp_path / which
    torch.save(content, path)
    text = {"missing": f"missing {key}", "extra": "unknown blip.mystery", "shape": f"{key} has shape"}[change]
    with pytest.raises(ArtifactError, match=text.replace(".", r"\.")):
        if which == "hps.pt":
            hps.HPS(weights=str(path), arch=arch).score_batch(samples()[:1])
        else:
            reward.ImageReward(weights=str(path), vocabulary=str(folder / "vocab.txt"), sizes=vars(TINY)).score_batch(
                samples()[:1]
            )


def test_official_keys_are_those_of_the_released_models() -> None:
    """Names from the released checkpoints' code; the tiny ones differ in depth and width only."""
    keys = set(DATA["image_reward"]["shapes"])
    assert {"blip.visual_encoder.blocks.1.attn.qkv.weight", "mlp.layers.7.bias", "blip.text_proj.weight"} <= keys
    assert "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight" in keys
    assert {"visual.transformer.resblocks.1.attn.in_proj_weight", "logit_scale"} <= set(DATA["hps"]["shapes"])


@pytest.mark.slow
@pytest.mark.skipif("HEATKV_OFFICIAL_PYTHON" not in os.environ, reason="HEATKV_OFFICIAL_PYTHON is not set")
@pytest.mark.parametrize("package", ["image-reward", "hpsv2"])
def test_live_packages_through_the_protocol(folder: Path, arch: str, package: str) -> None:
    options = {
        "image-reward": {
            "checkpoint": str(folder / "ImageReward.pt"),
            "med_config": str(folder / "med_config.json"),
            "vocab": str(folder / "vocab.txt"),
        },
        "hpsv2": {"checkpoint": str(folder / "hps.pt"), "release": "v2.1"},
    }[package]
    worker = Path(tiny.__file__)
    official = OfficialScorer(package, os.environ["HEATKV_OFFICIAL_PYTHON"], options, 300, "metric.hps_v21", worker)
    assert package in " ".join(official.versions) and "torch" in official.versions
    images, prompts = [PICTURES[i] for i, _ in PAIRS], [tiny.PROMPTS[p] for _, p in PAIRS]
    found = official(images, prompts)
    if package == "hpsv2":
        ours = [s.value / 100 for s in hps.HPS(weights=str(folder / "hps.pt"), arch=arch).score_batch(samples())]
    else:
        ours = [s.value for s in reward_metric(folder).score_batch(samples())]
    np.testing.assert_allclose(ours, found, atol=1e-5, rtol=1e-5)
