"""LPIPS of a run's images against the full cache's images of the same prompts and seeds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.base import ImageMetric, Networked, Sample, Score, Spec
from heatkv_cli.metrics.networks import loaded, ready
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.pictures import by_size, sample_pictures, stack
from heatkv_cli.metrics.scores import Pixels, pair_of
from heatkv_cli.metrics.weights import (
    NetworkFile,
    Wanted,
    check_name,
    load_exactly,
    read_checkpoint,
    read_state,
    weights_sha256,
)

Net = Literal["alex", "vgg"]


@dataclass(frozen=True)
class _Backbone:
    """A network of torchvision as LPIPS uses it.

    Attributes:
        model: torchvision's name.
        taps: the layers of ``features`` after which the distance is taken.
        parameters: numbers in the layers up to the last tap.
        least: smallest side of a picture that reaches the last tap.
        file: file of its weights.
        heads: sha256 of the learned heads (v0.1).
    """

    model: str
    taps: tuple[int, ...]
    parameters: int
    least: int
    file: NetworkFile
    heads: str


_BACKBONES: dict[str, _Backbone] = {
    "alex": _Backbone(
        "alexnet",
        taps=(1, 4, 7, 9, 11),
        parameters=2_469_696,
        least=31,
        file=NetworkFile(
            "alexnet-owt-7be5be79.pth",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            licence="BSD-3-Clause",
            sha256=("7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",),
            bytes=244_408_911,
        ),
        heads="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
    "vgg": _Backbone(
        "vgg16",
        taps=(3, 8, 15, 22, 29),
        parameters=14_714_688,
        least=16,
        file=NetworkFile(
            "vgg16-397923af.pth",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            licence="BSD-3-Clause",
            sha256=("397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",),
            bytes=553_433_881,
        ),
        heads="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class LPIPS(Networked, ImageMetric):
    """Learned perceptual distance per image; 0 for identical images.

    Rule: images to [-1, 1] at their own size; at five layers the features of a pixel are scaled to unit length,
    squared differences weighted by the learned heads (v0.1), mean over pixels, sum over layers.

    Args:
        net: ``alex`` (torchmetrics' and ScaleKV's default) or ``vgg``.
        batch_size: images per pass through the network.
        weights: the backbone's file; None for the usual places. The heads come with torchmetrics.

    Source: Zhang et al., arXiv 1801.03924; behaviour of lpips 0.1.4 and torchmetrics 1.9.0 (``normalize=True``).
    """

    SPEC: ClassVar[Spec] = Spec("lpips", "1", "", higher_is_better=False, kind="paired")

    net: Net = parameter("alex")
    batch_size: int = aside(8, least=1)
    weights: str | None = aside(None)

    @property
    def variant(self) -> str:
        """The backbone."""
        return self.net

    @property
    def network(self) -> str:
        """The backbone."""
        return f"lpips-{self.net}"

    def network_bytes(self) -> int:
        """Return the bytes of the convolutions; heads are a few kB."""
        return 4 * _BACKBONES[self.net].parameters

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return torchmetrics, which has the heads."""
        return (("torchmetrics", ""),)

    def files(self) -> tuple[Wanted, ...]:
        """Return the backbone's file."""
        return (Wanted(_BACKBONES[self.net].file, self.weights, self.weights_folder),)

    def identity(self) -> dict[str, Any]:
        """Return also the digest of the heads."""
        return {**super().identity(), "heads": weights_sha256(_heads(self.net))}

    def self_check(self) -> str:
        """Return '' where the weights are what their name says and the distance works, else what is wrong.

        Raises:
            SetupError: the weights are missing.
            ArtifactError: they do not fit.
        """
        if wrong := check_name(self.files()[0].path):
            return wrong
        a, b = sample_pictures()
        same, other = (self.score(Sample("", image=a, reference=side)).value for side in (a, b))
        return "" if same == 0 < other else f"a picture is {same} from itself and {other} from another"

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the distance of each image.

        Raises:
            SetupError: the weights are missing.
            ArtifactError: they do not fit; image or reference is missing; sizes differ; or a picture is too small.
        """
        pairs = [pair_of(self.spec.name, sample) for sample in samples]
        self._network()  # what is wrong with the weights is no picture's fault
        least = _BACKBONES[self.net].least
        for sample, (image, _) in zip(samples, pairs, strict=True):
            if min(image.shape[:2]) < least:
                raise ArtifactError(
                    f"{self.spec.name}: prompt {sample.prompt_id}: {image.shape[0]} x {image.shape[1]} pixels are too "
                    "few",
                    f"pictures need {least} pixels a side",
                )
        values = by_size(self._values, [image for image, _ in pairs], [reference for _, reference in pairs])
        return [Score(s.prompt_id, s.index, v) for s, v in zip(samples, values.tolist(), strict=True)]

    @torch.inference_mode()
    def _values(self, images: Sequence[Pixels], references: Sequence[Pixels]) -> Tensor:
        x, y = (stack(side, self.device).float() / 127.5 - 1 for side in (images, references))
        distances: Tensor = self._network()(x, y)
        return distances

    def _network(self) -> nn.Module:
        path = self.files()[0].verified()
        return loaded((self.network, self.digest(), self.device), lambda: _load(self.net, path, self.device))


class _Network(nn.Module):
    def __init__(self, features: nn.Sequential, taps: tuple[int, ...], heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.features, self.taps = features, taps
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the (n,) distances of two (n, 3, H, W) batches in [-1, 1]."""
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
    """Return features scaled to unit length along the channels."""
    return x / torch.sqrt(1e-8 + (x**2).sum(1, keepdim=True))


def _load(net: Net, path: Path, device: str) -> nn.Module:
    from torchvision import models

    backbone = _BACKBONES[net]
    with torch.device("meta"):  # the classifier is not used, and takes seconds to draw
        features = getattr(models, backbone.model)(weights=None).features[: max(backbone.taps) + 1]
    features.to_empty(device="cpu")
    stored = read_state(path)
    own = {key: stored[f"features.{key}"] for key in features.state_dict() if f"features.{key}" in stored}
    load_exactly(features, own, path)
    heads, count = read_checkpoint(_heads(net)), len(backbone.taps)
    return ready(_Network(features, backbone.taps, [heads[f"lin{i}.model.1.weight"] for i in range(count)]), device)


def _heads(net: Net) -> Path:
    """Return the learned heads, found without importing torchmetrics, which takes seconds.

    Raises:
        SetupError: torchmetrics is not installed, or has other heads than version 0.1.
    """
    found = importlib.util.find_spec("torchmetrics")
    if found is None or not found.submodule_search_locations:
        raise SetupError("package torchmetrics is not installed", "pip install torchmetrics")
    path = Path(found.submodule_search_locations[0]) / "functional" / "image" / "lpips_models" / f"{net}.pth"
    if not path.is_file() or weights_sha256(path) != _BACKBONES[net].heads:
        raise SetupError(f"{path} does not hold the heads of LPIPS v0.1", "pip install --force-reinstall torchmetrics")
    return path
