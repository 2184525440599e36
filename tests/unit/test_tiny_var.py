"""The tiny-var that ships: its size, what is said of the test set, and pictures of the right classes."""

from __future__ import annotations

import json
from functools import cache

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from check_tiny_var import shipped
from fashion_net import SAMPLING
from fashion_score import grey, judge, score
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.full import Full
from heatkv_cli.metrics.fashion.network import CLASSES
from heatkv_cli.models.base import Trace
from tiny_net import FullAttention
from train_tiny_var import ASSETS

COPIES = 4
"""Pictures of each class."""


@cache
def drawn(through: str) -> Trace:
    """Pictures of all classes in turn: through the package's cache, or with attention that keeps everything."""
    model = shipped(ASSETS)[0]
    classes = torch.arange(len(CLASSES)).repeat(COPIES)
    rows = model.rows(len(classes), SAMPLING)
    policy = Full().policy(Setting(model.geometry, Budget.parse("1"), rows))
    seam = KVCache(model.geometry, policy, rows, len(classes)) if through == "cache" else FullAttention()
    return model.generate(classes, SAMPLING, seam, [torch.Generator().manual_seed(i) for i in range(len(classes))])


def statistics() -> dict[str, Tensor]:
    return load_file(ASSETS / "fashion.safetensors")


def test_both_files_are_small() -> None:
    assert sum((ASSETS / name).stat().st_size for name in ("tiny-var.safetensors", "fashion.safetensors")) < 4e6


def test_the_classifier_finds_the_class_that_was_asked_for() -> None:
    model, judging, moments = shipped(ASSETS)
    pictures = grey(model.decode(drawn("cache").latent))
    right = score(judging, pictures, torch.arange(len(CLASSES)).repeat(COPIES), moments)
    wrong = score(judging, pictures, torch.arange(len(CLASSES)).repeat(COPIES).roll(1), moments)
    assert right["accuracy"] >= 0.8 and wrong["accuracy"] <= 0.3


def test_the_cache_of_the_package_draws_what_attention_to_everything_draws() -> None:
    """Float sums differ in their order, so a draw may flip now and then."""
    ours, plain = (torch.cat(drawn(through).codes, 1) for through in ("cache", "plain"))
    same = (ours == plain).all(1)
    assert same.float().mean() >= 0.75
    logits, wanted = (torch.cat(drawn(through).logits, 1)[same] for through in ("cache", "plain"))
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)


def test_pictures_of_a_class_differ() -> None:
    pictures = shipped(ASSETS)[0].decode(drawn("cache").latent).view(COPIES, len(CLASSES), -1)
    assert all((pictures[0, c] != pictures[1, c]).any() for c in range(len(CLASSES)))


def test_what_is_shipped_of_the_test_set() -> None:
    """Moments of 10,000 pictures, 1,000 of each class; some of their features, which agree with the moments."""
    tensors = statistics()
    assert tensors["test.histogram"].tolist() == [1000] * 10
    mean, covariance, some = (tensors[f"test.{name}"].double() for name in ("mean", "covariance", "features"))
    assert torch.equal(covariance, covariance.T) and torch.linalg.eigvalsh(covariance).min() > -1e-6
    assert some.shape == (1000, 64)
    deviation = covariance.diagonal().sqrt() / 1000**0.5
    assert ((some.mean(0) - mean).abs() <= 5 * deviation + 1e-3).all()
    with safe_open(ASSETS / "fashion.safetensors", "pt") as f:
        header = json.loads(f.metadata()["heatkv"])
    assert header["classes"] == list(CLASSES) and header["pictures"] == 10_000 and header["accuracy"] >= 0.91


def test_the_judge_is_not_sure_of_noise() -> None:
    """Noise and permuted pictures are far from the test set; the model's pictures are near."""
    model, judging, (mean, covariance) = shipped(ASSETS)
    pictures = grey(model.decode(drawn("cache").latent))
    noise = torch.randint(0, 256, pictures.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def away(some: Tensor) -> float:
        return (judge(judging, some)[0].double().mean(0) - mean.double()).square().sum().item()

    assert away(noise) > 20 * away(pictures)
    assert mean.shape == (64,) and covariance.shape == (64, 64)
