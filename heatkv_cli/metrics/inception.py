"""Inception 2015-12-05 with named preprocessings: the features of FID, Inception score, precision and recall.

One network and one file of weights serve all modes; they differ in how a picture becomes 299 x 299, and that alone
moves FID by more than methods do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as Pixels
from torch import Tensor
from torch.nn.functional import interpolate

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Extracting, Features, Image
from heatkv_cli.metrics.images import by_size, sample_pictures, stack
from heatkv_cli.metrics.weights import WeightsFile, check_name, find_weights, package, read_checkpoint, weights_sha256

Mode = Literal["clean", "tf1", "antialias"]
FILE = WeightsFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "github.com/toshas/torch-fidelity, release v0.2.0",
    licence="Apache-2.0",
)
SIDE = 299
DIM = 2048


@dataclass(frozen=True)
class Inception:
    """(n, 2048) pool3 features.

    Modes, from 8-bit pixels to [-1, 1]:
        ``clean``: PIL's bicubic filter per channel in float, cut to 0..255, not rounded (clean-fid).
        ``tf1``: TensorFlow 1's bilinear, no antialiasing, half-pixel corners off (torch-fidelity, ADM's evaluator).
        ``antialias``: torch's antialiased bilinear (torchmetrics' default; used for nothing published).

    Args:
        mode: the preprocessing.
        weights: file; None for the usual places.
        device: of the network.
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
        return f"inception-{self.mode}"

    @property
    def path(self) -> Path:
        """The file of weights; raises SetupError where there is none."""
        return find_weights(FILE, self.weights, self.weights_folder)

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights."""
        return weights_sha256(self.path)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> Features:
        """(n, 2048) float32 features of n images of any size.

        Raises:
            SetupError: torch-fidelity or the weights are missing.
            ArtifactError: the weights are not Inception's.
        """
        network = _network(self.path, self.weights_sha256, self.device)
        pixels = by_size(self._resize, images)
        x = (pixels - 128) / 128
        for name, layer in network.named_children():  # defined in the order in which they run
            if name == "fc":
                break
            x = layer(x)
        features: Features = x.flatten(1).cpu().numpy()
        return features

    def self_check(self) -> str:
        """'' where the weights are what their name says and the network tells pictures apart, else what is wrong."""
        if wrong := check_name(self.path):
            return wrong
        features = self(sample_pictures())
        fine = np.isfinite(features).all() and features.std(0).max() > 0
        return "" if fine else "features of two pictures are not finite, or the same"

    def logits(self, features: Features) -> Tensor:
        """(n, 1008) logits without bias, as the Inception score takes them."""
        network = _network(self.path, self.weights_sha256, self.device)
        return torch.from_numpy(features) @ network.fc.weight.detach().cpu().T

    def _resize(self, images: Sequence[Image]) -> Tensor:
        """(n, 3, 299, 299) float32 in 0..255."""
        if self.mode == "clean":
            return torch.from_numpy(np.stack([_clean(image) for image in images])).to(self.device)
        x = stack(images, self.device).float()
        if self.mode == "antialias":
            return interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        fidelity = package("torch_fidelity.interpolate_compat_tensorflow", "fid")
        resized: Tensor = fidelity.interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIDE, SIDE), align_corners=False)
        return resized


def _clean(image: Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(3, 299, 299)."""
    planes = [Pixels.fromarray(image[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(plane.resize((SIDE, SIDE), Pixels.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized).clip(0, 255)


class OnInception(Extracting):
    """Base of metrics of Inception's features; a dataclass over it has these fields."""

    mode: Mode
    weights: str | None
    device: str
    weights_folder: Path | None

    @property
    def extractor(self) -> Inception:
        """Inception in this mode."""
        return Inception(self.mode, self.weights, self.device, self.weights_folder)


@lru_cache(maxsize=1)
def _network(path: Path, sha256: str, device: str) -> Any:
    """torch-fidelity's network, once per process."""
    module = package("torch_fidelity.feature_extractor_inceptionv3", "fid")
    read_checkpoint(path)  # its class would run pickled code: a file that has some is refused here
    try:
        extractor = module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{path} does not fit Inception: {text}", f"get it from {FILE.source}") from error
    return extractor.to(device)
