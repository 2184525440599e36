"""CLIP score: does the picture show what its prompt says, by a picture-and-text model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as Pixels

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Kind, Pass, Sample, Score, Value, image_of
from heatkv_cli.metrics.summary import Bootstrap, mean_value
from heatkv_cli.metrics.weights import (
    WeightsFile,
    find_weights,
    load_exactly,
    package,
    read_checkpoint,
    weights_sha256,
)

_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries of OpenAI's archives that are no weights."""


@dataclass(frozen=True)
class CLIPScore:
    """100 x cosine of the embeddings of an image and its prompt; negative values stay as they are.

    Rule: short side to the network's size (224) by PIL's bicubic filter, centre crop; the text is cut after 77 tokens,
    and ``truncated`` counts the prompts it was cut from.

    Args:
        arch: open_clip's name of the architecture. OpenAI's weights need one with QuickGELU: with the plain one they
            load without a word and give other numbers.
        quick_gelu: what ``arch`` must have; checked on the network itself.
        model: what the row calls it (its variant).
        file: name of the weights in the usual places; hub: the repository that has it.
        weights: path of the weights; None for the usual places.
        batch_size: images per pass through the network.
        device: of the network.
        weights_folder: the first of the usual places.
        resamples, confidence, seed: of the bootstrap over prompts.

    Source: Hessel et al., arXiv 2104.08718, without its factor 2.5 and its clamp; as FastVAR's evaluation
        (OpenAI ViT-L/14, plain cosine, mean).
    """

    arch: str = "ViT-L-14-quickgelu"
    quick_gelu: bool = True
    model: str = "vit-l-14-openai"
    file: str = "open_clip_model.safetensors"
    hub: str = "timm/vit_large_patch14_clip_224.openai"
    weights: str | None = None
    batch_size: int = 32
    device: str = "cpu"
    weights_folder: Path | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    name: str = "clip_score"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "cosine x 100"
    higher_is_better: ClassVar[bool] = True
    kind: ClassVar[Kind] = "prompt"
    needs: ClassVar[Pass] = "free"

    @property
    def path(self) -> Path:
        """The file of weights; raises SetupError where there is none."""
        file = WeightsFile(self.file, f"huggingface.co/{self.hub}", self.hub, self.file)
        return find_weights(file, self.weights, self.weights_folder)

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights."""
        return weights_sha256(self.path)

    def score(self, sample: Sample) -> Score:
        """Score of one image; raises as ``score_batch``."""
        return self.score_batch([sample])[0]

    @torch.inference_mode()
    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Score of each image.

        Raises:
            SetupError: open_clip or the weights are missing.
            ArtifactError: the weights do not fit, the activation is another one, or a sample has no image.
        """
        images = [image_of(self.name, sample) for sample in samples]
        package("open_clip", "clip")
        clip = _load(self.arch, self.path, self.weights_sha256, self.device, self.quick_gelu)
        pixels = torch.stack([clip.preprocess(Pixels.fromarray(image)) for image in images]).to(self.device)
        prompts = [sample.prompt for sample in samples]
        text = clip.network.encode_text(clip.tokenizer(prompts).to(self.device), normalize=True)
        cosines = (clip.network.encode_image(pixels, normalize=True) * text).sum(1).tolist()
        room = clip.tokenizer.context_length - 2  # start and end
        cut = [float(len(clip.tokenizer.encode(prompt)) > room) for prompt in prompts]
        return [
            Score(s.prompt_id, s.index, 100 * value, parts={"truncated": truncated})
            for s, value, truncated in zip(samples, cosines, cut, strict=True)
        ]

    def self_check(self) -> str:
        """'' where a red picture is nearer to "red" than to "blue", and a blue one the other way round.

        Raises:
            SetupError: open_clip or the weights are missing.
            ArtifactError: the weights do not fit.
        """
        colours = {"red": (220, 20, 20), "blue": (20, 20, 220)}
        for name, rgb in colours.items():
            image = np.full((224, 224, 3), rgb, np.uint8)
            scores = {word: self.score(Sample("", f"a plain {word} picture", image=image)).value for word in colours}
            if max(scores, key=lambda word: scores[word]) != name:
                return f"a {name} picture scores {scores}"
        return ""

    def summarise(self, scores: Sequence[Score], baseline: Sequence[Score] | None = None) -> list[Value]:
        """Mean over images, with the number of truncated prompts beside it."""
        bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)
        extra = {"truncated": sum(s.parts["truncated"] for s in scores)}
        return [mean_value(self.model, scores, baseline, bootstrap, extra=extra)]


@dataclass(frozen=True)
class _CLIP:
    network: Any
    preprocess: Any
    tokenizer: Any


@lru_cache(maxsize=1)
def _load(arch: str, path: Path, sha256: str, device: str, quick_gelu: bool) -> _CLIP:
    import open_clip
    from open_clip.transformer import QuickGELU

    network, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=None)
    for side, blocks in (("visual", network.visual), ("text", network.transformer)):
        found = any(isinstance(module, QuickGELU) for module in blocks.modules())
        if found != quick_gelu:
            has, wants = ("QuickGELU", "GELU") if found else ("GELU", "QuickGELU")
            raise ArtifactError(
                f"the {side} tower of {arch} has {has}, its weights were trained with {wants}",
                f"set metric.clip_score.arch={arch.removesuffix('-quickgelu')}{'-quickgelu' if quick_gelu else ''}",
            )
    content = read_checkpoint(path)
    tensors = {key: value for key, value in content.get("state_dict", content).items() if key not in _OPENAI}
    load_exactly(network, tensors, path)
    return _CLIP(network.requires_grad_(False).eval().to(device), preprocess, open_clip.get_tokenizer(arch))
