"""CLIP score: does the picture show what its prompt says, by a picture-and-text model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from heatkv_cli.metrics.base import ImageMetric, Networked, Sample, Score, Spec, Value
from heatkv_cli.metrics.clip.network import OPENAI_ARCH, TIMM, Clip, clip_bytes, load_clip
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap, mean_value
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.scores import image_of
from heatkv_cli.metrics.weights import NetworkFile, Wanted


@dataclass(frozen=True)
class CLIPScore(Networked, ImageMetric):
    """100 x cosine of the embeddings of an image and its prompt; negative values stay as they are.

    Rule: short side to the network's size (224) by Pillow's bicubic filter, centre crop; the text is cut after 77
    tokens, and ``truncated`` counts the prompts it was cut from.

    Args:
        arch: open_clip's name of the architecture. OpenAI's weights need one with QuickGELU: with the plain one they
            load without a word and give other numbers.
        quick_gelu: whether ``arch`` must have QuickGELU; checked on the network itself.
        model: its name in the rows (their variant).
        file: name of the weights in the usual places.
        hub: the repository that has them.
        weights: path of the weights; None for the usual places.
        batch_size: images per pass through the network.

    Source: Hessel et al., arXiv 2104.08718, without its factor 2.5 and its clamp; as FastVAR's evaluation
        (OpenAI ViT-L/14, plain cosine, mean).
    """

    SPEC: ClassVar[Spec] = Spec("clip_score", "1", "cosine x 100", higher_is_better=True, kind="prompt")

    arch: str = parameter(OPENAI_ARCH)
    quick_gelu: bool = parameter(True)
    model: str = parameter("vit-l-14-openai")
    file: str = aside(TIMM.name)
    hub: str = aside(TIMM.repository)
    weights: str | None = aside(None)
    batch_size: int = aside(32, least=1)

    @property
    def variant(self) -> str:
        """The model's name."""
        return self.model

    @property
    def network(self) -> str:
        """The model's name."""
        return f"clip-{self.model}"

    def network_bytes(self) -> int:
        """Return the bytes of the network's weights; raises as ``clip_bytes``."""
        return clip_bytes(self.arch, self.files()[0])

    def packages(self) -> tuple[tuple[str, str], ...]:
        """Return open_clip."""
        return (("open_clip", "clip"),)

    def files(self) -> tuple[Wanted, ...]:
        """Return the file of weights."""
        published = (self.file, self.hub) == (TIMM.name, TIMM.repository)
        other = NetworkFile(self.file, f"https://huggingface.co/{self.hub}", self.hub, self.file)
        return (Wanted(TIMM if published else other, self.weights, self.weights_folder),)

    def _load(self) -> Clip:
        option = f"metric.{self.spec.name}.arch"
        return load_clip(
            self.arch, self.files()[0], self.device, option=option, extra="clip", quick_gelu=self.quick_gelu
        )

    @torch.inference_mode()
    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the score of each image.

        Raises:
            SetupError: open_clip or the weights are missing.
            ArtifactError: the weights do not fit, the activation is another one, or a sample has no image.
        """
        images = [image_of(self.spec.name, sample) for sample in samples]
        clip = self._load()
        pixels = torch.stack([clip.preprocess(Image.fromarray(image)) for image in images]).to(self.device)
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
        """Return '' where a red picture is nearer to "red" than to "blue", and a blue one the other way round.

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

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        """Return the mean over images, with the number of truncated prompts beside it."""
        extra = {"truncated": sum(s.parts["truncated"] for s in scores)}
        return [mean_value(self.variant, scores, baseline, bootstrap, extra=extra)]
