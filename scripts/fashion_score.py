"""What tiny-var's pictures are worth: pictures of every class, and the numbers of the classifier that judges them.

Used by `train_tiny_var.py` and `check_tiny_var.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heatkv_cli.metrics.fashion.network import CLASSES, Classifier
from heatkv_cli.models.var.model import VarModel
from heatkv_cli.models.var.sampling import Sampling
from tiny_net import FullAttention


def grey(pictures: Tensor) -> Tensor:
    """RGB uint8 (n, 32, 32, 3) -> uint8 (n, 1, 32, 32), the mean of the channels."""
    return pictures.float().mean(-1).round().byte()[:, None]


def sample(model: VarModel, per_class: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Grey pictures uint8 (n, 1, 32, 32) and their classes: the first of every class, the second, and so on."""
    classes, pictures = torch.arange(len(CLASSES)).repeat(per_class), []
    for start in range(0, len(classes), 50):
        part = classes[start : start + 50]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        trace = model.generate(part, sampling, FullAttention(), generators)
        pictures.append(grey(model.decode(trace.latent)))
    return torch.cat(pictures), classes


@torch.no_grad()
def judge(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (n, 1, 32, 32) -> features and logits, in float32."""
    parts = [model(part.float().div(255)) for part in images.split(500)]
    return torch.cat([f for f, _ in parts]), torch.cat([logits for _, logits in parts])


def score(
    judging: Classifier, pictures: Tensor, classes: Tensor, statistics: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Class accuracy, Frechet distance to the test set, inception-style score."""
    features, logits = judge(judging, pictures)
    p = logits.double().softmax(-1)
    kl = (p * (p.clamp(min=1e-12).log() - p.mean(0).log())).sum(-1).mean()
    right = (logits.argmax(-1) == classes).float().mean().item()
    distance = frechet(features, *statistics)
    return {"accuracy": round(right, 4), "frechet": round(distance, 3), "score": round(math.exp(kl), 3)}


def frechet(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Frechet distance between normal distributions: features (n, d) against a mean (d,) and covariance (d, d)."""
    x = features.double()
    own, other = x.T.cov(), covariance.double()
    root = torch.linalg.eigvals(own @ other).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - mean.double()).square().sum() + own.trace() + other.trace() - 2 * root).item()
