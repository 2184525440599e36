"""A classifier of Fashion-MNIST's ten classes, and what it sees in the data set's 10,000 test pictures.

Both are in one file of the package, made by ``scripts/train_tiny_var.py``: the weights as float16; mean and covariance
of the features of all test pictures; the features of the first 100 of each class. The data set is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Networked
from heatkv_cli.metrics.networks import loaded, ready
from heatkv_cli.metrics.parameters import aside
from heatkv_cli.metrics.pictures import resized_planes, sample_pictures
from heatkv_cli.metrics.scores import Features, Pixels
from heatkv_cli.metrics.statistics import Gaussian
from heatkv_cli.metrics.weights import NetworkFile, Wanted, load_exactly, read_state

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASS = "class_index"
"""Field of a prompt's line that names its class: 0 to 9."""
DIM = 64
SIDE = 32
NAME = "fashion-classifier"
FILE = NetworkFile(
    "fashion.safetensors",
    "the package itself: install heatkv again",
    licence="MIT",
    sha256=("201221c0d2233c8bc35150bee17bca8e6160519c1efb3ab5c89f354902d14cc8",),
    bytes=335_228,
)
BYTES = 376_008
"""Size of the network in memory, its batch norms' statistics included."""
TEST_PICTURES = 10_000
ROUNDED = 2.0**-24
"""Relative error of the shipped moments, which are float32."""
_ASSETS = Path(__file__).resolve().parents[2] / "assets"
_KNOWN = 6.064
"""Distance of the features of the two test pictures."""


class Classifier(nn.Module):
    """Grey pictures -> features and logits of the ten classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64, DIM)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(DIM, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Grey pictures (n, 1, 32, 32) in [0, 1] -> features (n, 64), the mean over positions, and logits (n, 10)."""
        x = images
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = relu(norm(conv(x)))
            if i < 3:
                x = max_pool2d(x, 2)
        features = x.mean((2, 3))
        return features, self.head(features)


@dataclass(frozen=True)
class Judge:
    """The classifier, and what it sees in the test set.

    Attributes:
        network: in float32.
        moments: mean and covariance of the features of all test pictures.
        features: (1000, 64), of the first 100 test pictures of each class, on the network's device.
    """

    network: Classifier
    moments: Gaussian
    features: Tensor


@dataclass(frozen=True)
class FashionClassifier:
    """Features of 32 x 32 pictures, of which the mean over the channels is looked at.

    Args:
        device: of the network.
    """

    device: str = "cpu"

    @property
    def name(self) -> str:
        """Network and preprocessing."""
        return NAME

    @property
    def wanted(self) -> Wanted:
        """The package's file."""
        return Wanted(FILE, str(_ASSETS / FILE.name), sha256=FILE.sha256[0])

    def digest(self) -> str:
        """Return the digest of the file; raises SetupError where it is missing."""
        return self.wanted.digest

    @property
    def judge(self) -> Judge:
        """Classifier and test set.

        Raises:
            SetupError: the file is missing.
            ArtifactError: it is not the one that belongs here.
        """
        path = self.wanted.verified()
        return loaded((NAME, self.digest(), self.device), lambda: _load(path, self.device))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels]) -> Features:
        """Return (n, 64) features of n pictures.

        Raises:
            ArtifactError: a picture is not 32 x 32.
        """
        features: Features = self.judge.network(self.prepare(images))[0].cpu().numpy()
        return features

    @torch.inference_mode()
    def logits(self, features: Features) -> Tensor:
        """Return (n, 10) logits of features."""
        judge = self.judge
        logits: Tensor = judge.network.head(torch.from_numpy(features).to(self.device))
        return logits

    def prepare(self, images: Sequence[Pixels]) -> Tensor:
        """Return (n, 1, 32, 32) in [0, 1]: the mean over the channels, a whole number of 255ths."""
        for image in images:
            if image.shape[:2] != (SIDE, SIDE):
                raise ArtifactError(
                    f"{NAME} looks at pictures of {SIDE} x {SIDE}, not of {image.shape[0]} x {image.shape[1]}",
                    "its metrics are for model=tiny-var; leave them out of the metrics",
                )
        grey = torch.from_numpy(np.stack(images)).to(self.device).float().mean(-1).round()
        return grey[:, None] / 255

    def self_check(self) -> str:
        """Return '' where the features of two pictures and the classes of the test features are the known ones.

        Returns:
            Else what is wrong.
        """
        small = [resized_planes(image, SIDE).transpose(1, 2, 0).round().astype(np.uint8) for image in sample_pictures()]
        first, second = self(small)
        distance = float(np.linalg.norm(first - second))
        if abs(distance - _KNOWN) >= 0.01:
            return f"two test pictures are {distance:.3f} apart, not {_KNOWN}"
        wanted = torch.arange(len(CLASSES)).repeat_interleave(100)
        right = (self.logits(self.judge.features.cpu().numpy()).argmax(1).cpu() == wanted).float().mean().item()
        return "" if right > 0.9 else f"{right:.0%} of the test pictures are in their class"


@dataclass(frozen=True)
class OnFashion(Networked):
    """Base of metrics of this classifier.

    Args:
        batch_size: pictures per pass through the network.
    """

    batch_size: int = aside(250, least=1)

    @property
    def network(self) -> str:
        """The classifier."""
        return NAME

    def network_bytes(self) -> int:
        """Return the bytes of the network's weights."""
        return BYTES

    def files(self) -> tuple[Wanted, ...]:
        """Return the package's file."""
        return (self.extractor.wanted,)

    @property
    def extractor(self) -> FashionClassifier:
        """The classifier's pooled features."""
        return FashionClassifier(self.device)

    def self_check(self) -> str:
        """Return '' where the classifier works, else what is wrong; raises as an extraction."""
        return self.extractor.self_check()


def class_of(meta: Mapping[str, Any]) -> int | None:
    """Return the class that a prompt's line names, None where it names none of the ten."""
    given = meta.get(CLASS)
    known = isinstance(given, (int, str)) and str(given).isdecimal() and int(given) < len(CLASSES)
    return int(given) if known else None  # type: ignore[arg-type]


def _load(path: Path, device: str) -> Judge:
    tensors = read_state(path)
    network, prefix = Classifier(), "classifier."
    state = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
    counters = {name: t for name, t in network.state_dict().items() if name.endswith("num_batches_tracked")}
    load_exactly(network, state | counters, path)  # which are of training alone, and not shipped
    mean, covariance = (tensors[f"test.{name}"].double().numpy() for name in ("mean", "covariance"))
    errors = (ROUNDED * float(np.linalg.norm(side)) for side in (covariance, mean))
    moments = Gaussian(mean, covariance, TEST_PICTURES, *errors)
    return Judge(ready(network, device), moments, tensors["test.features"].float().to(device))
