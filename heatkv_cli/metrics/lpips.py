"""LPIPS of a run's images against the full cache's images of the same prompts and seeds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from heatkv_cli.errors import SetupError
from heatkv_cli.metrics.base import Image, Kind, Pass, Sample, Score, Value, pair_of
from heatkv_cli.metrics.images import by_size, sample_pictures, stack
from heatkv_cli.metrics.summary import Bootstrap, mean_value
from heatkv_cli.metrics.weights import (
    WeightsFile,
    check_name,
    find_weights,
    load_exactly,
    read_checkpoint,
    weights_sha256,
)

Net = Literal["alex", "vgg"]
_SOURCE = "download.pytorch.org/models"
_BACKBONES: dict[str, tuple[str, WeightsFile, tuple[int, ...]]] = {
    "alex": ("alexnet", WeightsFile("alexnet-owt-7be5be79.pth", _SOURCE, licence="BSD-3-Clause"), (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", WeightsFile("vgg16-397923af.pth", _SOURCE, licence="BSD-3-Clause"), (3, 8, 15, 22, 29)),
}
"""Torchvision's name, its file, and after which layers of ``features`` the distance is taken."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class LPIPS:
    """Learned perceptual distance per image; 0 for identical images.

    Rule: images to [-1, 1] at their own size; at five layers the features of a pixel are scaled to unit length,
    squared differences weighted by the learned heads (v0.1), mean over pixels, sum over layers.

    Args:
        net: ``alex`` (torchmetrics' and ScaleKV's default) or ``vgg``.
        batch_size: images per pass through the network.
        weights: the backbone's file; None for the usual places. The heads come with torchmetrics.
        device: of the network.
        weights_folder: the first of the usual places.
        resamples, confidence, seed: of the bootstrap over prompts.

    Source: Zhang et al., arXiv 1801.03924; behaviour of lpips 0.1.4 and torchmetrics 1.9.0 (``normalize=True``).
    """

    net: Net = "alex"
    batch_size: int = 8
    weights: str | None = None
    device: str = "cpu"
    weights_folder: Path | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: str = "lpips"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False
    kind: ClassVar[Kind] = "paired"
    needs: ClassVar[Pass] = "free"

    @property
    def path(self) -> Path:
        """The backbone's file; raises SetupError where there is none."""
        return find_weights(_BACKBONES[self.net][1], self.weights, self.weights_folder)

    @property
    def weights_sha256(self) -> str:
        """Digest of the backbone; the heads are those of the only version there is."""
        return weights_sha256(self.path)

    def self_check(self) -> str:
        """'' where the weights are what their name says and the distance works, else what is wrong.

        Raises:
            SetupError: the weights are missing.
            ArtifactError: they do not fit.
        """
        if wrong := check_name(self.path):
            return wrong
        a, b = sample_pictures()
        same, other = (self.score(Sample("", image=a, reference=side)).value for side in (a, b))
        return "" if same == 0 < other else f"a picture is {same} from itself and {other} from another"

    def score(self, sample: Sample) -> Score:
        """Distance of one image; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Distance of each image.

        Raises:
            SetupError: the weights are missing.
            ArtifactError: they do not fit, image or reference is missing, or sizes differ.
        """
        pairs = [pair_of(self.name, sample) for sample in samples]
        values = by_size(self._values, [image for image, _ in pairs], [reference for _, reference in pairs])
        return [Score(s.prompt_id, s.index, v) for s, v in zip(samples, values.tolist(), strict=True)]

    @torch.inference_mode()
    def _values(self, images: Sequence[Image], references: Sequence[Image]) -> Tensor:
        network = _network(self.net, self.path, self.weights_sha256, self.device)
        x, y = (stack(side, self.device).float() / 127.5 - 1 for side in (images, references))
        distances: Tensor = network(x, y)
        return distances

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over images."""
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        return [mean_value(self.net, scores, baseline, bootstrap)]


class _Network(nn.Module):
    def __init__(self, features: nn.Sequential, taps: tuple[int, ...], heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.features, self.taps = features, taps
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(n,) distances of two (n, 3, H, W) batches in [-1, 1]."""
        shift, scale = (torch.tensor(numbers, device=x.device).view(1, 3, 1, 1) for numbers in (_SHIFT, _SCALE))
        x, y = ((side - shift) / scale for side in (x, y))
        total = torch.zeros(len(x), device=x.device)
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.taps:
                head = getattr(self, f"head{self.taps.index(i)}")  # (1, c, 1, 1)
                total = total + (head * (unit(x) - unit(y)) ** 2).sum(1).mean((1, 2))
        return total


def unit(x: Tensor) -> Tensor:
    """Features scaled to unit length along the channels."""
    return x / torch.sqrt(1e-8 + (x**2).sum(1, keepdim=True))


@lru_cache(maxsize=2)
def _network(net: Net, path: Path, sha256: str, device: str) -> nn.Module:
    from torchvision import models

    name, _, taps = _BACKBONES[net]
    with torch.device("meta"):  # the classifier is not used, and takes seconds to draw
        features = getattr(models, name)(weights=None).features[: max(taps) + 1]
    features.to_empty(device="cpu")
    stored = read_checkpoint(path)
    own = {key: stored[f"features.{key}"] for key in features.state_dict() if f"features.{key}" in stored}
    load_exactly(features, own, path)
    heads = read_checkpoint(_heads(net))
    network = _Network(features, taps, [heads[f"lin{i}.model.1.weight"] for i in range(len(taps))])
    return network.requires_grad_(False).eval().to(device)


def _heads(net: Net) -> Path:
    """The learned heads, found without importing torchmetrics, which takes seconds."""
    found = importlib.util.find_spec("torchmetrics")
    if found is None or not found.submodule_search_locations:
        raise SetupError("package torchmetrics is not installed", "pip install torchmetrics")
    return Path(found.submodule_search_locations[0]) / "functional" / "image" / "lpips_models" / f"{net}.pth"
