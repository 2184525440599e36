"""GenEval's colours: which of ten words CLIP finds nearest to an object that is cut out of its picture."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.base import Image
from heatkv_cli.metrics.clip_input import cropped
from heatkv_cli.metrics.detector import Instance
from heatkv_cli.metrics.weights import WeightsFile, load_exactly, read_checkpoint

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = 0x99
"""Grey level that hides what is not the object."""
BATCH = 16
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
        try:
            import open_clip
            from open_clip.transformer import QuickGELU
        except ImportError as error:
            raise SetupError("package open_clip_torch is not installed", "pip install 'heatkv[geneval]'") from error
        model: Any = open_clip.create_model(arch, pretrained=None, precision="fp32")
        if not any(isinstance(module, QuickGELU) for module in model.modules()):
            raise ArtifactError(f"architecture {arch} has no QuickGELU, which OpenAI's weights need", "add -quickgelu")
        load_exactly(model, _state(path), path)
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


def _state(path: Path) -> dict[str, Tensor]:
    """State dict of OpenAI's TorchScript archive, or of a plain checkpoint."""
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        state = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        for number in ("input_resolution", "context_length", "vocab_size"):
            state.pop(number, None)
        return state
    content = read_checkpoint(path)
    return dict(content.get("state_dict", content))
