"""Pictures and small random networks on which metrics are compared with other people's code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.statistics import Moments


def picture(seed: int, height: int = 72, width: int = 64) -> np.ndarray:
    """A smooth coloured picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def photos() -> list[np.ndarray]:
    data = pytest.importorskip("skimage.data")
    return [data.astronaut()[::4, ::4].copy(), data.chelsea()[::3, ::4].copy(), data.coffee()[::4, ::5].copy()]


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures of four sizes, each with a disturbed copy."""
    rng = np.random.default_rng(1)
    images = [picture(0), *photos()]
    return [(i, (i + rng.normal(0, 12, i.shape)).clip(0, 255).astype(np.uint8)) for i in images]


def samples() -> list[Sample]:
    return [Sample(str(n), image=a, reference=b) for n, (a, b) in enumerate(pairs())]


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def moments(features: np.ndarray, groups: int = 10) -> Moments:
    found = Moments(features.shape[1], groups)
    found.add(range(len(features)), features)
    return found


def backbone(net: str) -> torch.nn.Sequential:
    """Convolutions of torchvision's network; its classifier would take seconds to draw."""
    from torchvision import models

    with torch.device("meta"):
        features = models.alexnet().features if net == "alex" else models.vgg16().features
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return features
