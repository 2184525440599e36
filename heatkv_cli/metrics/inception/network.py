"""Inception 2015-12-05 with named preprocessings: the features of FID, Inception score, precision and recall.

One network and one file of weights serve all modes; they differ in how a picture becomes 299 x 299, and that alone
moves FID by more than methods do.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Networked, SetMetric
from heatkv_cli.metrics.networks import loaded, ready
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.pictures import by_size, resized_planes, sample_pictures, stack
from heatkv_cli.metrics.scores import Features, Pixels
from heatkv_cli.metrics.weights import NetworkFile, Wanted, check_name, package, read_state

Mode = Literal["clean", "tf1", "antialias"]
FILE = NetworkFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    licence="Apache-2.0",
    sha256=("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",),
    bytes=95_628_359,
)
SIDE = 299
DIM = 2048
NAME = "inception"
BYTES = 95_542_320
"""Size of the network in memory, its batch norms' statistics included."""


@dataclass(frozen=True)
class Inception:
    """(n, 2048) pool3 features.

    Modes, from 8-bit pixels to [-1, 1]:
        ``clean``: Pillow's bicubic filter per channel in float, cut to 0..255, not rounded (clean-fid).
        ``tf1``: TensorFlow 1's bilinear, no antialiasing, half-pixel corners off (torch-fidelity, ADM's evaluator).
        ``antialias``: torch's antialiased bilinear (torchmetrics' default; used for nothing published).

    Args:
        mode: the preprocessing.
        weights: file; None for the usual places.
        device: device of the network.
        weights_folder: the first of the usual places.

    Source: toshas/torch-fidelity 0.4.0 (network), GaParmar/clean-fid 0.1.35 (``clean``), torchmetrics 1.9.0.
    """

    mode: Mode
    weights: str | None = None
    device: str = "cpu"
    weights_folder: Path | None = None

    @property
    def name(self) -> str:
        """Network and mode."""
        return f"{NAME}-{self.mode}"

    @property
    def wanted(self) -> Wanted:
        """The file of weights."""
        return Wanted(FILE, self.weights, self.weights_folder)

    def digest(self) -> str:
        """Return the digest of the weights; raises SetupError where there are none."""
        return self.wanted.digest

    @property
    def layers(self) -> Any:
        """torch-fidelity's network.

        Raises:
            SetupError: torch-fidelity or the weights are missing.
            ArtifactError: the weights are not Inception's.
        """
        path = self.wanted.verified()
        return loaded((NAME, self.digest(), self.device), lambda: _load(path, self.device))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels]) -> Features:
        """Return (n, 2048) float32 features of n images of any size; raises as ``layers``."""
        pixels = by_size(self.resize, images)
        x = (pixels - 128) / 128
        for name, layer in self.layers.named_children():  # defined in the order in which they run
            if name == "fc":
                break
            x = layer(x)
        features: Features = x.flatten(1).cpu().numpy()
        return features

    def self_check(self) -> str:
        """Return '' where weights are what their name says and the network tells pictures apart, else what is wrong."""
        if wrong := check_name(self.wanted.path):
            return wrong
        features = self(sample_pictures())
        fine = np.isfinite(features).all() and features.std(0).max() > 0
        return "" if fine else "features of two pictures are not finite, or the same"

    def logits(self, features: Features) -> Tensor:
        """Return (n, 1008) logits without bias, as the Inception score takes them."""
        return torch.from_numpy(features) @ self.layers.fc.weight.detach().cpu().T

    def resize(self, images: Sequence[Pixels]) -> Tensor:
        """Return (n, 3, 299, 299) float32 in 0..255 of images of one size."""
        if self.mode == "clean":
            return torch.from_numpy(np.stack([resized_planes(image, SIDE) for image in images])).to(self.device)
        x = stack(images, self.device).float()
        if self.mode == "antialias":
            return interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        fidelity = package("torch_fidelity.interpolate_compat_tensorflow", "fid")
        resized: Tensor = fidelity.interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIDE, SIDE), align_corners=False)
        return resized


@dataclass(frozen=True)
class OnInception(Networked, SetMetric):
    """Base of metrics of Inception's features.

    Args:
        mode: the preprocessing, see ``Inception``.
        min_images: with fewer on either side the metric is skipped.
        batch_size: images per pass through the network.
        weights: Inception's file; None for the usual places.
    """

    mode: Mode = parameter("tf1")
    min_images: int = parameter(2048, least=2)
    batch_size: int = aside(32, least=1)
    weights: str | None = aside(None)

    @property
    def variant(self) -> str:
        """The preprocessing."""
        return self.mode

    @property
    def network(self) -> str:
        """Inception, in every mode."""
        return NAME

    def network_bytes(self) -> int:
        """Return the bytes of Inception's weights."""
        return BYTES

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return torch-fidelity."""
        return (("torch_fidelity", "fid"),)

    def files(self) -> tuple[Wanted, ...]:
        """Return Inception's file."""
        return (self.extractor.wanted,)

    @property
    def extractor(self) -> Inception:
        """Inception in this mode."""
        return Inception(self.mode, self.weights, self.device, self.weights_folder)


def _load(path: Path, device: str) -> Any:
    """torch-fidelity's network with the weights of a file.

    Its class reads files with a loader that runs code. So it gets a copy that was written here, from tensors alone.
    """
    module = package("torch_fidelity.feature_extractor_inceptionv3", "fid")
    copy = io.BytesIO()
    torch.save(read_state(path), copy)
    copy.seek(0)
    try:
        extractor = module.FeatureExtractorInceptionV3(NAME, [str(DIM)], feature_extractor_weights_path=copy)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300].replace("FeatureExtractorInceptionV3", "Inception")
        raise ArtifactError(f"{path} does not fit Inception: {text}", f"get it from {FILE.source}") from error
    return ready(extractor, device)
