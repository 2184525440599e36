"""tiny-var as it is trained: the data set, sizes, whole-sequence attention.

Used by `train_tiny_var.py`. Tokenizer, transformer and classifier are the package's own; what is here exists only in
training.
"""

from __future__ import annotations

import gzip
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.metrics.fashion.network import CLASSES
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Quantiser, Tokenizer, TokenizerConfig, shrink, tokens
from heatkv_cli.models.var.transformer import Var, VarConfig
from tiny_net import BlockCausal

SIDES = (1, 2, 3, 4, 5, 6, 8)
SIZES = tuple((p, p) for p in SIDES)
TOKENIZER = TokenizerConfig(
    vocabulary=512, channels=16, base_channels=32, multipliers=(1, 2), blocks=1, norm_groups=8, stem=2
)
TRANSFORMER = VarConfig(
    depth=10,
    width=84,
    heads=7,
    sizes=SIZES,
    classes=len(CLASSES),
    vocabulary=TOKENIZER.vocabulary,
    channels=TOKENIZER.channels,
    shared=True,
)
GEOMETRY = Geometry(
    "tiny-var", TRANSFORMER.depth, TRANSFORMER.heads, TRANSFORMER.head_dim, ScaleSchedule(SIZES), sink_scales=1
)
SAMPLING = Sampling(cfg=1.5, top_k=0, top_p=0.96)
MERGED_SCALES = 4  # these small scales share one masked product in training
DATA = Path("/usr/share/datasets/fashion-mnist")
HOW = f"apt-get install dataset-fashion-mnist puts it into {DATA}"


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


def new_transformer() -> Var:
    """The transformer as training begins: gates open, no modulation, small outputs."""
    net = Var(TRANSFORMER)
    for block in net.layers():
        nn.init.zeros_(block.ada_gss)
        for out in (block.attn.proj, block.ffn.fc2):
            nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * TRANSFORMER.depth))
            nn.init.zeros_(out.bias)
    shared, last = net.shared_ada_lin[1], net.head_nm.ada_lin[1]  # type: ignore[index]
    nn.init.normal_(shared.weight, std=0.01)
    shared.bias.data.zero_().view(6, -1)[:2] = 1.0
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    nn.init.normal_(net.head.weight, std=0.02)
    nn.init.normal_(net.lvl_embed.weight, std=0.3)
    nn.init.normal_(net.class_emb.weight, std=0.5)
    return net


class TrainingAttention:
    """The seam of the model in training: no cache, all scales at once."""

    def __init__(self, dtype: torch.dtype):
        ends = torch.tensor([p * p for p in SIDES]).cumsum(0).tolist()
        level = torch.cat([torch.full((p * p,), i) for i, p in enumerate(SIDES[:MERGED_SCALES])])
        mask = torch.where(level[:, None] >= level[None], 0.0, -torch.inf).to(dtype)
        self.spans = [(0, len(level), mask), *((a, b, None) for a, b in pairwise(ends[MERGED_SCALES - 1 :]))]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Attention of all tokens (B, H, L, D); queries are unit vectors times their temperature, the scale is 1."""
        if softmax_scale != 1:
            raise ValueError(f"softmax scale {softmax_scale}: only the variant with unit queries is trained")
        return BlockCausal.apply(q, k, v, self.spans)


def forward(net: Var, classes: Tensor, inputs: Tensor, attention: TrainingAttention) -> Tensor:
    """Classes (B,) and inputs (B, L - 1, Z) of the second scale on -> logits (B, L, V)."""
    cond, places = net.condition(classes), net.positions()
    x = torch.cat((net.start(cond, places[:, :1]), net.embed(inputs, places[:, 1:])), 1)
    return net.logits(net.run(x, cond, attention), cond)


@torch.no_grad()
def noisy_inputs(quantiser: Quantiser, latent: Tensor, flip: float) -> tuple[Tensor, Tensor]:
    """Latents (B, Z, 8, 8) -> target codes (B, L) and transformer inputs (B, L - 1, Z) with mistakes in them.

    A random share of the codes of each scale, up to `flip`, becomes that of another picture at the same place before
    the later scales are quantised, so that they learn to repair earlier mistakes (as Infinity does with bits, arXiv
    2412.04431, section 3.4).
    """
    total, codes, inputs = torch.zeros_like(latent), [], []
    for k, size in enumerate(SIZES):
        index = quantiser.nearest(shrink(latent - total, size))
        codes.append(index)
        if k + 1 == len(SIZES):
            break
        wrong = torch.rand(index.shape) < torch.rand(len(index), 1) * flip
        used = torch.where(wrong, index[torch.randperm(len(index))], index)
        total = total + quantiser.contribution(quantiser.lookup(used, size), k, len(SIZES), SIZES[-1])
        inputs.append(tokens(shrink(total, SIZES[k + 1])))
    return torch.cat(codes, 1), torch.cat(inputs, 1)


def tiny_var(transformer: Var, tokenizer: Tokenizer) -> VarModel:
    return VarModel(GEOMETRY, transformer, tokenizer)
