"""HPSv2 and HPSv2.1: how well people would like the picture for its prompt, by a CLIP ViT-H/14 fine-tuned on choices.

Two back ends give the same number: ``native`` runs the checkpoint in open_clip; ``official`` asks the package hpsv2 in
a Python of its own (``metrics/official.py``), for which see the README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.errors import ArtifactError, ConfigError
from heatkv_cli.metrics.base import Image, Kind, Pass, Sample, Score, Value, image_of
from heatkv_cli.metrics.clip_input import CLIP_MEAN, CLIP_STD, read_picture
from heatkv_cli.metrics.official import OfficialScorer
from heatkv_cli.metrics.summary import Bootstrap, by_stratum, mean_value
from heatkv_cli.metrics.weights import WeightsFile, find_weights, load_exactly, package, read_checkpoint, weights_sha256

STYLES = ("anime", "concept-art", "paintings", "photo")
"""Styles of the HPDv2 benchmark, 800 prompts each."""
GROUP = 80
"""The official tables print means over groups of so many images and the spread of these means."""
DEMO = WeightsFile("hpsv2-demo_image.jpg", "github.com/tgxs002/HPSv2 (assets/demo_image.jpg)", licence="Apache-2.0")
DEMO_PROMPT = "A cat with two horns on its head"
GOLDEN = 0.2876
"""Cosine of the demo picture and its prompt with v2.0 (HPSv2 issue 27)."""

CHECKPOINTS = {
    "v2.1": WeightsFile(
        "HPS_v2.1_compressed.pt", "huggingface.co/xswu/HPSv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "Apache-2.0"
    ),
    "v2.0": WeightsFile(
        "HPS_v2_compressed.pt", "huggingface.co/xswu/HPSv2", "xswu/HPSv2", "HPS_v2_compressed.pt", "Apache-2.0"
    ),
}


class Scorer(Protocol):
    """Cosines of pictures with their prompts."""

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One number per picture, in order."""
        ...


def preprocess(image: Image, size: int = 224, *, antialias: bool = True) -> Tensor:
    """The network's input.

    Rule: to [0, 1]; bicubic to ``size / max(height, width)`` of its size, each side rounded; zeros around it up to a
    square, the odd one right and below; CLIP's mean and deviation. Not open_clip's own (short side and crop).

    Args:
        image: (H, W, 3), 8 bit.
        size: side of the result.
        antialias: of the resize. The official code leaves it to torchvision: off before 0.17, on since. Published
            tables are older; see the README.

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


def versions_of(scorer: Scorer) -> str:
    """What an official back end runs on, for the table of images; '' for our own networks."""
    return ", ".join(f"{name} {version}" for name, version in getattr(scorer, "versions", {}).items())


class NativeScorer:
    """HPSv2's checkpoint in open_clip.

    Args:
        path: checkpoint with a ``state_dict``; every key must fit.
        arch: open_clip's name of the architecture; plain GELU, as HPSv2 was trained.
        device: of the network.
        antialias: of ``preprocess``.
        amp: half precision on CUDA, as the official runs; without it float32.

    Raises:
        SetupError: open_clip is not installed.
        ArtifactError: the file is not this network's.
    """

    def __init__(self, path: Path, arch: str, device: str, antialias: bool, amp: bool) -> None:
        open_clip = package("open_clip", "hpsv2")
        state = read_checkpoint(path)
        model: Any = open_clip.create_model(arch, pretrained=None, force_quick_gelu=False, output_dict=True)
        load_exactly(model, state.get("state_dict", state), path)
        self._model = model.to(device).eval()
        self._tokenize = open_clip.get_tokenizer(arch)
        self._size = int(model.visual.image_size[0])
        self._device, self._antialias, self._amp = device, antialias, amp

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Cosine of each picture with its prompt; prompts over 77 tokens are cut, as officially."""
        pixels = torch.stack([preprocess(image, self._size, antialias=self._antialias) for image in images])
        with torch.autocast("cuda", enabled=self._amp and self._device.startswith("cuda")):
            features = self._model.encode_image(pixels.to(self._device), normalize=True)
            texts = self._model.encode_text(self._tokenize(list(prompts)).to(self._device), normalize=True)
            cosines = (features * texts).sum(1)
        return [float(cosine) for cosine in cosines.float().cpu()]


@dataclass(frozen=True)
class HPS:
    """100 x cosine between picture and prompt under HPSv2's CLIP, mean over all pictures.

    Where the prompt list names styles (benchmark ``hpsv2``), each style is a row of its own, with the standard
    deviation of the means of its groups of 80, which the official tables print.

    Args:
        name: ``hps_v21`` or ``hps_v20``.
        release: of the checkpoint.
        backend: ``native`` or ``official``.
        antialias: see ``preprocess``; the official back end does what its torchvision does.
        amp: see ``NativeScorer``.
        weights: checkpoint; None looks as ``metrics/weights.py`` says.
        python: the Python that has hpsv2, for the official back end.
        timeout: seconds the official back end may take to start, and for each picture.
        arch: open_clip's name of the architecture.
        batch_size: pictures per pass through the network.
        device: where the network runs.
        weights_folder: the first of the places where files are looked for.
        resamples, confidence, seed: of the bootstrap over prompts.

    Source: Wu et al., arXiv 2306.09341; tgxs002/HPSv2, package 1.2.0 (``img_score.score``, ``evaluation.evaluate``).
    """

    name: str = "hps_v21"
    release: Literal["v2.1", "v2.0"] = "v2.1"
    backend: Literal["native", "official"] = "native"
    antialias: bool = True
    amp: bool = False
    weights: str | None = None
    python: str | None = None
    timeout: float = 600.0
    arch: str = "ViT-H-14"
    batch_size: int = 16
    device: str = "cpu"
    weights_folder: Path | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "100 x cosine"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "prompt"
    needs: ClassVar[Pass] = "free"

    @property
    def settings(self) -> str:
        """What else decides the number, for result rows."""
        how = f"antialias={str(self.antialias).lower()}" if self.backend == "native" else "antialias=torchvision's"
        return f"{self.release} {self.backend} {how}" + (" amp" if self.amp else "")

    @cached_property
    def checkpoint(self) -> Path:
        """The weights file.

        Raises:
            SetupError: it is missing.
        """
        return find_weights(CHECKPOINTS[self.release], self.weights, self.weights_folder)

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights file; raises as ``checkpoint``."""
        return weights_sha256(self.checkpoint)

    @cached_property
    def _scorer(self) -> Scorer:
        if self.backend == "native":
            return NativeScorer(self.checkpoint, self.arch, self.device, self.antialias, self.amp)
        if self.python is None:
            raise ConfigError(
                f"metric {self.name}: backend=official needs the Python that has hpsv2",
                f"set metric.{self.name}.python=/path/to/venv/bin/python",
            )
        options = {"checkpoint": str(self.checkpoint.absolute()), "release": self.release, "device": self.device}
        return OfficialScorer("hpsv2", self.python, options, self.timeout)

    def score(self, sample: Sample) -> Score:
        """100 x cosine of one picture; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """100 x cosine of each picture.

        Raises:
            ArtifactError: a sample has no image, or the weights file is not the network's.
            SetupError: weights, a package or the official back end are missing.
        """
        images = [image_of(self.name, sample) for sample in samples]
        cosines = self._scorer(images, [sample.prompt for sample in samples])
        note = versions_of(self._scorer)
        return [
            Score(sample.prompt_id, sample.index, 100 * cosine, str(sample.meta.get("style", "")), note=note)
            for sample, cosine in zip(samples, cosines, strict=True)
        ]

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over all pictures (headline), and that of each style.

        Raises:
            ValueError: no scores.
        """
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        rows = []
        for row in by_stratum(scores, baseline, bootstrap, STYLES):
            values = [s.value for s in scores if s.stratum == row.variant]
            means = [float(np.mean(values[i : i + GROUP])) for i in range(0, len(values), GROUP)]
            extra = {**row.extra, "group_std": float(np.std(means))}
            rows.append(Value(row.variant, row.value, row.stderr, row.low, row.high, row.n, extra))
        return [mean_value("", scores, baseline, bootstrap), *rows]

    def self_check(self) -> str:
        """Score the official demo picture; returns '' where it comes out as it should, else what is wrong.

        With v2.0 it has a published cosine; with v2.1 it only has to fit its own words better than others.

        Raises:
            SetupError: picture, weights or packages are missing.
        """
        image = read_picture(find_weights(DEMO, folder=self.weights_folder))
        own, other = self._scorer([image] * 2, [DEMO_PROMPT, "a bowl of fruit on a table"])
        if self.release == "v2.0" and abs(own - GOLDEN) >= 0.002:
            return f"the demo picture scores {own:.4f}, published {GOLDEN}"
        return "" if own > other else f"the demo picture fits other words better: {own:.4f} and {other:.4f}"
