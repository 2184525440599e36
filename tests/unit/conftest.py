"""Random weights for metrics whose real ones are not in a package; the same file goes to both sides of a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from metric_pictures import backbone

from heatkv_cli.metrics.networks import release


@pytest.fixture(autouse=True, scope="module")
def networks() -> Iterator[None]:
    """Networks that a file's tests loaded are let go when it ends."""
    yield
    release()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random AlexNet and VGG-16 in torchvision's format, without the classifier."""
    folder = tmp_path_factory.mktemp("backbones")
    for net in ("alex", "vgg"):
        torch.save({f"features.{k}": v for k, v in backbone(net).state_dict().items()}, folder / f"{net}.pth")
    return {net: folder / f"{net}.pth" for net in ("alex", "vgg")}


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception; without He's initialisation its features are so small that every distance is 0."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    cls = module.FeatureExtractorInceptionV3
    with mock.patch.object(cls, "load_state_dict"), mock.patch.object(module, "load_state_dict_from_url"):
        network = cls("random", ["2048"])
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny CLIP of ViT-L/14's structure with random weights, as open_clip knows it."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-quickgelu.json").write_text(json.dumps(config))
    (folder / "tiny.json").write_text(json.dumps({**config, "quick_gelu": False}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-quickgelu", pretrained=None)
    torch.save(network.state_dict(), folder / "tiny.pt")
    return "tiny-quickgelu", folder / "tiny.pt"
