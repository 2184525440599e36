"""The input of CLIP-like networks: short side, centre crop, CLIP's mean and deviation."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from heatkv_cli.metrics.scores import Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def cropped(image: Pixels, size: int = 224) -> Tensor:
    """Return the network's input.

    Rule: Pillow's bicubic resize of the short side to ``size``, centre crop, to [0, 1], CLIP's mean and deviation.

    Args:
        image: (H, W, 3), 8 bit.
        size: side of the result.

    Returns:
        (3, size, size) float32.

    Source: ImageReward 1.5 (``_transform``) and open_clip 3.3 (``image_transform``), which agree.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    picture = F.resize(Image.fromarray(image), [size], InterpolationMode.BICUBIC)
    return F.normalize(F.to_tensor(F.center_crop(picture, [size, size])), CLIP_MEAN, CLIP_STD)
