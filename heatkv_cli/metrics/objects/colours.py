"""GenEval's colours: which of ten words CLIP finds nearest to an object that is cut out of its picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.metrics.clip.input import cropped
from heatkv_cli.metrics.clip.network import Clip
from heatkv_cli.metrics.objects.detector import Instance
from heatkv_cli.metrics.scores import Pixels

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = 0x99
"""Grey level that hides what is not the object."""
BATCH = 16


def cut_out(image: Pixels, instance: Instance) -> Pixels:
    """Return the part of a picture in an object's box, grey where it is not the object.

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
        clip: OpenAI's ViT-L/14 in float32.
        device: device of the network.
    """

    def __init__(self, clip: Clip, device: str = "cpu") -> None:
        self._clip, self._device = clip, device
        self._classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Pixels, objects: Sequence[Instance], name: str) -> list[str]:
        """Return the colours of some objects of one picture, which are all called ``name``."""
        if name not in self._classifiers:
            self._classifiers[name] = torch.stack([self._describe(colour, name) for colour in COLOURS])
        found: list[str] = []
        for start in range(0, len(objects), BATCH):
            parts = [cropped(cut_out(image, each), self._clip.size) for each in objects[start : start + BATCH]]
            features = self._clip.network.encode_image(torch.stack(parts).to(self._device), normalize=True)
            found += [COLOURS[i] for i in (features @ self._classifiers[name].T).argmax(1).tolist()]
        return found

    def _describe(self, colour: str, name: str) -> Tensor:
        texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
        mean = self._clip.network.encode_text(self._clip.tokenizer(texts).to(self._device), normalize=True).mean(0)
        direction: Tensor = mean / mean.norm()
        return direction
