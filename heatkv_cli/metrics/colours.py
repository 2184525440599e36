"""GenEval's colours: which of ten words CLIP finds nearest to an object that is cut out of its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.errors import ArtifactError
from heatkv_cli.metrics.base import Image
from heatkv_cli.metrics.clip_input import cropped
from heatkv_cli.metrics.detector import Instance
from heatkv_cli.metrics.weights import WeightsFile, load_exactly, package, read_checkpoint

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = 0x99
"""Grey level that hides what is not the object."""
BATCH = 16
_NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries of OpenAI's archives that are no weights."""
CHECKPOINT = WeightsFile(
    "ViT-L-14.pt",
    "openaipublic.azureedge.net (CLIP's ViT-L-14.pt), or huggingface.co/timm/vit_large_patch14_clip_224.openai "
    "(open_clip_model.safetensors)",
    "timm/vit_large_patch14_clip_224.openai",
    "open_clip_model.safetensors",
    "MIT",
)


def cut_out(image: Image, instance: Instance) -> Image:
    """The part of a picture in an object's box, grey where it is not the object.

    Args:
        image: (H, W, 3).
        instance: with a mask of (H, W).
    """
    x0, y0, x1, y1 = (round(edge) for edge in instance.box)
    shown = np.where(instance.mask[..., None], image, np.uint8(GROUND))
    return shown[y0:y1, x0:x1]


class ColourNamer:
    """CLIP as a zero-shot classifier of colours.

    Rule: per colour the three templates' text features, normalised, averaged, normalised again; the colour with the
    largest cosine to the picture of the object.

    Args:
        path: OpenAI's weights, as their archive or a state dict.
        arch: open_clip's name of the architecture; one with QuickGELU, with which OpenAI trained.
        device: where it runs, in float32.

    Raises:
        SetupError: open_clip is not installed.
        ArtifactError: the weights are not this network's, or the architecture has no QuickGELU.
    """

    def __init__(self, path: Path, arch: str = "ViT-L-14-quickgelu", device: str = "cpu") -> None:
        open_clip = package("open_clip", "geneval")
        quick_gelu = package("open_clip.transformer", "geneval").QuickGELU
        model: Any = open_clip.create_model(arch, pretrained=None, precision="fp32")
        if not any(isinstance(module, quick_gelu) for module in model.modules()):
            raise ArtifactError(f"architecture {arch} has no QuickGELU, which OpenAI's weights need", "add -quickgelu")
        content = read_checkpoint(path)
        state = {k: v for k, v in content.get("state_dict", content).items() if k not in _NUMBERS}
        load_exactly(model, state, path)
        self._model, self._tokenize = model.to(device).eval(), open_clip.get_tokenizer(arch)
        self._size, self._device = int(model.visual.image_size[0]), device
        self._classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image, objects: Sequence[Instance], name: str) -> list[str]:
        """Colours of some objects of one picture, which are all called ``name``."""
        if name not in self._classifiers:
            self._classifiers[name] = torch.stack([self._describe(colour, name) for colour in COLOURS])
        found: list[str] = []
        for start in range(0, len(objects), BATCH):
            parts = [cropped(cut_out(image, each), self._size) for each in objects[start : start + BATCH]]
            features = self._model.encode_image(torch.stack(parts).to(self._device), normalize=True)
            found += [COLOURS[i] for i in (features @ self._classifiers[name].T).argmax(1).tolist()]
        return found

    def _describe(self, colour: str, name: str) -> Tensor:
        texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
        mean = self._model.encode_text(self._tokenize(texts).to(self._device), normalize=True).mean(0)
        direction: Tensor = mean / mean.norm()
        return direction
