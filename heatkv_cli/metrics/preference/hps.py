"""HPSv2 and HPSv2.1: how well people would like the picture for its prompt, by a CLIP fine-tuned on choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.metrics.base import Sample, Score, Spec, Value
from heatkv_cli.metrics.clip.input import CLIP_MEAN, CLIP_STD
from heatkv_cli.metrics.clip.network import Clip, clip_bytes, load_clip
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, by_stratum, mean_value
from heatkv_cli.metrics.parameters import parameter
from heatkv_cli.metrics.pictures import read_image
from heatkv_cli.metrics.preference.judge import Judge, Scorer
from heatkv_cli.metrics.scores import Pixels
from heatkv_cli.metrics.weights import NetworkFile, find_weights

STYLES = ("anime", "concept-art", "paintings", "photo")
"""Styles of the HPDv2 benchmark, 800 prompts each."""
GROUP = 80
"""The official tables print means over groups of so many images and the spread of these means."""
DEMO = NetworkFile(
    "hpsv2-demo_image.jpg", "https://github.com/tgxs002/HPSv2 (assets/demo_image.jpg)", licence="Apache-2.0"
)
DEMO_PROMPT = "A cat with two horns on its head"
GOLDEN = 0.2876
"""Cosine of the demo picture and its prompt with v2.0 (HPSv2 issue 27)."""


def _checkpoint(name: str, *sha256: str, size: int) -> NetworkFile:
    commit, source = "697403c78157020a1ae59d23f111aa58ced35b0a", "https://huggingface.co/xswu/HPSv2"
    return NetworkFile(name, source, "xswu/HPSv2", name, "Apache-2.0", commit, sha256, size)


CHECKPOINTS = {
    "v2.1": _checkpoint(
        "HPS_v2.1_compressed.pt",
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        size=1_972_490_005,
    ),
    "v2.0": _checkpoint("HPS_v2_compressed.pt", size=1_970_000_000),  # rounded; no digest of it is published
}


def preprocess(image: Pixels, size: int = 224, *, antialias: bool = True) -> Tensor:
    """Return the network's input.

    Rule: to [0, 1]; bicubic to ``size / max(height, width)`` of its size, each side rounded; zeros around it up to a
    square, the odd one right and below; CLIP's mean and deviation. Not open_clip's own (short side and crop).

    Args:
        image: (H, W, 3), 8 bit.
        size: side of the result.
        antialias: whether the resize smooths. The official code leaves it to torchvision: off before 0.17, on since.
            Published tables are older; see docs/metrics.md.

    Returns:
        (3, size, size) float32.

    Source: tgxs002/HPSv2 ``hpsv2/src/open_clip/transform.py``, package 1.2.0.
    Differs: a picture whose longer side is ``size`` already is padded too (there it fails unless it is square).
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    pixels = F.to_tensor(np.ascontiguousarray(image))
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    new = [round(height * scale), round(width * scale)]
    if min(new) < 1:
        raise ArtifactError(f"a picture of {height} x {width} pixels is too narrow to be scored", "leave it out")
    if scale != 1:
        pixels = F.resize(pixels, new, InterpolationMode.BICUBIC, antialias=antialias)
    below, right = size - new[0], size - new[1]
    pixels = F.pad(pixels, [right // 2, below // 2, right - right // 2, below - below // 2])
    return F.normalize(pixels, CLIP_MEAN, CLIP_STD)


@dataclass(frozen=True)
class NativeScorer:
    """HPSv2's checkpoint in open_clip.

    Args:
        clip: the network with its tokenizer.
        device: device of the network.
        antialias: see ``preprocess``.
        amp: half precision on CUDA, as the official runs; without it float32.
    """

    clip: Clip
    device: str
    antialias: bool
    amp: bool
    versions: Mapping[str, str] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> list[float]:
        """Return the cosine of each picture with its prompt; prompts over 77 tokens are cut, as officially."""
        network = self.clip.network
        pixels = torch.stack([preprocess(image, self.clip.size, antialias=self.antialias) for image in images])
        with torch.autocast("cuda", enabled=self.amp and self.device.startswith("cuda")):
            features = network.encode_image(pixels.to(self.device), normalize=True)
            texts = network.encode_text(self.clip.tokenizer(list(prompts)).to(self.device), normalize=True)
            cosines = (features * texts).sum(1)
        return [float(cosine) for cosine in cosines.float().cpu()]


@dataclass(frozen=True)
class HPS(Judge):
    """100 x cosine between picture and prompt under HPSv2's CLIP, mean over all pictures.

    Each style that the prompt list names (benchmark ``hpsv2``) is a row of its own, with the standard deviation of the
    means of its groups of 80, which the official tables print.

    Args:
        release: release of the checkpoint.
        antialias: see ``preprocess``; the official back end does what its torchvision does.
        amp: half precision on CUDA, as the official runs; for the native back end.
        arch: open_clip's name of the architecture, one with plain GELU.

    Source: Wu et al., arXiv 2306.09341; tgxs002/HPSv2, package 1.2.0 (``img_score.score``, ``evaluation.evaluate``).

    Raises:
        ConfigError: an option would do nothing.
    """

    SPEC: ClassVar[Spec] = Spec("hps_v21", "1", "100 x cosine", higher_is_better=True, kind="prompt")
    PACKAGE: ClassVar[str] = "hpsv2"

    release: Literal["v2.1", "v2.0"] = parameter("v2.1")
    antialias: bool = parameter(True)
    amp: bool = parameter(False)
    arch: str = parameter("ViT-H-14")

    def __post_init__(self) -> None:
        """Check all parameters."""
        super().__post_init__()
        name = f"metric.{self.spec.name}"
        if self.is_official and (self.amp or not self.antialias):
            raise ConfigError(
                f"{name}: backend=official takes precision and resize from its package; amp and antialias do nothing",
                f"use {name}.backend=native, or leave both as they are",
            )
        if self.amp and not self.device.startswith("cuda"):
            raise ConfigError(f"{name}.amp=true does nothing on {self.device}", f"use runtime=gpu, or {name}.amp=false")

    @property
    def checkpoint(self) -> NetworkFile:
        """The released checkpoint."""
        return CHECKPOINTS[self.release]

    @property
    def network(self) -> str:
        """The release."""
        return f"hps-{self.release}"

    def network_bytes(self) -> int:
        """Return the bytes of the network's weights; raises as ``clip_bytes``."""
        return clip_bytes(self.arch, self.files()[0])

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return open_clip; the official back end has packages of its own."""
        return () if self.is_official else (("open_clip", "hpsv2"),)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that can change a number; precision and resize only where they are ours."""
        ignored = ("antialias", "amp", "arch") if self.is_official else ()
        return {key: value for key, value in super().parameters().items() if key not in ignored}

    def _native(self) -> Scorer:
        option = f"metric.{self.spec.name}.arch"
        clip = load_clip(self.arch, self.files()[0], self.device, option=option, extra="hpsv2", quick_gelu=False)
        return NativeScorer(clip, self.device, self.antialias, self.amp)

    def _options(self) -> dict[str, Any]:
        return {"release": self.release}

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return 100 x cosine of each picture.

        Raises:
            ArtifactError: a sample has no image, or the weights file is not the network's.
            SetupError: weights, a package or the official back end are missing.
        """
        cosines, note = self.numbers(samples)
        return [
            Score(sample.prompt_id, sample.index, 100 * cosine, str(sample.meta.get("style", "")), note=note)
            for sample, cosine in zip(samples, cosines, strict=True)
        ]

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the mean over all pictures (headline), and that of each style.

        Raises:
            ValueError: no scores.
        """
        rows = []
        for row in by_stratum(scores, baseline, bootstrap, STYLES):
            values = [s.value for s in scores if s.stratum == row.variant]
            means = [float(np.mean(values[i : i + GROUP])) for i in range(0, len(values), GROUP)]
            extra = {**row.extra, "group_std": float(np.std(means))}
            rows.append(Value(row.variant, row.value, row.stderr, row.low, row.high, row.n, extra))
        return [mean_value("", scores, baseline, bootstrap), *rows]

    def self_check(self) -> str:
        """Score the official demo picture; return '' where it comes out as it should, else what is wrong.

        With v2.0 it has a published cosine; with v2.1 it only has to fit its own words better than others.

        Raises:
            SetupError: picture, weights or packages are missing.
        """
        image = read_image(find_weights(DEMO, folder=self.weights_folder))
        own, other = self.scorer()([image] * 2, [DEMO_PROMPT, "a bowl of fruit on a table"])
        if self.release == "v2.0" and abs(own - GOLDEN) >= 0.002:
            return f"the demo picture scores {own:.4f}, published {GOLDEN}"
        return "" if own > other else f"the demo picture fits other words better: {own:.4f} and {other:.4f}"
