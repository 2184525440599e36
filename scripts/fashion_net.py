"""tiny-var as it is trained: the data set, sizes, the classifier, whole-sequence attention.

Used by `train_tiny_var.py`. Tokenizer and transformer are the package's own; what is here exists only in training, but
for the classifier, whose weights ship with the model.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.models.var.tokenizer import TokenizerConfig

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDES = (1, 2, 3, 4, 5, 6, 8)
SIZES = [(p, p) for p in SIDES]
TOKENIZER = TokenizerConfig(
    vocabulary=512, channels=16, base_channels=32, multipliers=(1, 2), blocks=1, norm_groups=8, stem=2
)
HOW = "apt-get install dataset-fashion-mnist puts it into /usr/share/datasets/fashion-mnist"


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: two zeros, the type 8, the number of dimensions, the dimensions, the bytes."""
    data = gzip.decompress(path.read_bytes())
    zeros, kind, dims = data[0] << 8 | data[1], data[2], data[3]
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dims, 4))
    if zeros or kind != 8 or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise SystemExit(f"{path} is not an idx file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_fashion(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures uint8 (n, 1, 32, 32), padded by 2 black pixels, and classes (n,) of "train" or "t10k"."""
    files = [folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in files):
        raise SystemExit(f"{folder} does not hold Fashion-MNIST ({files[0].name}): {HOW}; name it with --data")
    images, labels = (torch.from_numpy(read_idx(path).copy()) for path in files)
    return F.pad(images[:, None], (2, 2, 2, 2)), labels.long()


def pixels(images: Tensor) -> Tensor:
    """uint8 (n, 1, 32, 32) -> RGB in [-1, 1] (n, 3, 32, 32)."""
    return images.float().div(127.5).sub(1).expand(-1, 3, -1, -1)


class Classifier(nn.Module):
    """Pictures -> features and logits of the ten classes: the judge of tiny-var's pictures."""

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64, self.FEATURES)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(self.FEATURES, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Grey pictures (n, 1, 32, 32) in [0, 1] -> features (n, 64), the mean over positions, and logits (n, 10)."""
        x = images
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i < 3:
                x = F.max_pool2d(x, 2)
        features = x.mean((2, 3))
        return features, self.head(features)
