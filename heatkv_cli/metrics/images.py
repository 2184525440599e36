"""8-bit images to batches of tensors, as the networks of the metrics take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from heatkv_cli.metrics.base import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def stack(images: Sequence[Image], device: str = "cpu") -> Tensor:
    """(n, 3, H, W) uint8 of images of one size."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)


def by_size(function: Callable[..., Tensor], *sides: Sequence[Image]) -> Tensor:
    """Call a function of image lists with images of one size at a time; its (m, ...) results in the given order.

    Args:
        function: takes as many lists as there are ``sides``, returns a row for each image.
        *sides: lists of equal length; images of one place have one size.
    """
    sizes = [image.shape for image in sides[0]]
    order: list[int] = []
    parts = []
    for size in dict.fromkeys(sizes):
        chosen = [i for i, other in enumerate(sizes) if other == size]
        order += chosen
        parts.append(function(*([side[i] for i in chosen] for side in sides)))
    rows = torch.cat(parts)
    return rows[torch.tensor(order).argsort().to(rows.device)]


def sample_pictures() -> tuple[Image, Image]:
    """Two pictures for self-tests, 64 x 64: a ramp of colours, and the same with a checked corner."""
    side = np.arange(64)
    ramp = np.stack(np.broadcast_arrays(4 * side[:, None], 4 * side[None], 255 - 2 * side[:, None]), -1).astype(
        np.uint8
    )
    checked = ramp.copy()
    checked[:32, :32] = 255 * ((side[:32, None, None] // 8 + side[None, :32, None] // 8) % 2)
    return ramp, checked
