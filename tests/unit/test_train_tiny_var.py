"""What tiny-var's training computes is what the package computes; a resumed training; what is exported is loaded."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import check_tiny_var
import fashion_net
import train_tiny_var
from fashion_net import (
    SIDES,
    SIZES,
    TOKENIZER,
    TRANSFORMER,
    TrainingAttention,
    forward,
    new_transformer,
    noisy_inputs,
    read_fashion,
    tiny_var,
)
from fashion_score import frechet, judge, score
from heatkv_cli.metrics.fashion.network import CLASSES, Classifier
from heatkv_cli.models.var.sampling import Sampling
from heatkv_cli.models.var.tokenizer import Tokenizer
from heatkv_cli.models.var.transformer import Var
from tiny_net import FullAttention
from train_tiny_var import Usage, quantise_with_gradient


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@cache
def networks() -> tuple[Var, Tokenizer]:
    """Random networks in which every parameter matters."""
    torch.manual_seed(7)
    net, tokenizer = new_transformer(), Tokenizer(TOKENIZER)
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return net.eval().requires_grad_(False), tokenizer.eval().requires_grad_(False)


def latents(count: int) -> Tensor:
    return normal(count, TOKENIZER.channels, *SIZES[-1], seed=11)


# ------------------------------------------------------------------------------------------------- the training pass


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_the_training_attention_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    level = torch.cat([torch.full((p * p,), i) for i, p in enumerate(SIDES)])
    leaves = [normal(2, 3, len(level), 8, seed=i, dtype=dtype).requires_grad_() for i in range(3)]
    weight, attention = normal(2, 3, len(level), 8, seed=3, dtype=dtype), TrainingAttention(dtype)
    ours = attention.attend(0, *leaves, 1.0)
    logits = leaves[0] @ leaves[1].transpose(-1, -2)
    wanted = logits.masked_fill(level[:, None] < level[None], -torch.inf).softmax(-1) @ leaves[2]
    torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad((ours * weight).sum(), leaves)
    for mine, theirs in zip(gradients, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    with pytest.raises(ValueError, match="softmax scale"):
        attention.attend(0, *leaves, 0.5)


def test_inputs_without_noise_are_the_tokenizer_s() -> None:
    _, tokenizer = networks()
    codes, inputs = noisy_inputs(tokenizer.quantize, latents(3), 0.0)
    _, wanted = tokenizer.quantize.quantise(latents(3), SIZES)
    assert torch.equal(codes, torch.cat(wanted, 1))
    torch.testing.assert_close(inputs, tokenizer.quantize.inputs(wanted, SIZES))


def test_noise_is_in_the_inputs_and_not_in_the_first_target() -> None:
    _, tokenizer = networks()
    torch.manual_seed(0)
    clean, before = noisy_inputs(tokenizer.quantize, latents(200), 0.0)
    shares = []
    for flip in (0.2, 0.8):
        codes, inputs = noisy_inputs(tokenizer.quantize, latents(200), flip)
        assert torch.equal(codes[:, 0], clean[:, 0])
        assert not torch.equal(codes, clean)  # later targets repair what was changed
        shares.append((inputs[:, 0] != before[:, 0]).any(-1).float().mean().item())
    other = 1 - (clean[:, 0][:, None] == clean[:, 0][None]).float().mean().item()  # another picture's code may be equal
    assert shares == pytest.approx([0.1 * other, 0.4 * other], abs=0.08)  # uniform between 0 and flip


def test_the_whole_sequence_gives_the_logits_of_the_cache_path() -> None:
    net, tokenizer = networks()
    classes = torch.tensor([1, 9, 4])
    _, codes = tokenizer.quantize.quantise(latents(3), SIZES)
    _, inputs = noisy_inputs(tokenizer.quantize, latents(3), 0.0)
    attention = TrainingAttention(torch.float32)
    yes = forward(net, classes, inputs, attention)
    no = forward(net, torch.full_like(classes, len(CLASSES)), inputs, attention)
    assert (yes - no).abs().max() > 0.1
    model = tiny_var(net, tokenizer)
    for cfg in (0.0, 1.5):
        trace = model.generate(classes, Sampling(cfg), FullAttention(), None, codes)
        t = torch.cat([torch.full((p * p, 1), cfg * s / (len(SIDES) - 1)) for s, p in enumerate(SIDES)])
        torch.testing.assert_close(torch.cat(trace.logits, 1), (1 + t) * yes - t * no, atol=1e-4, rtol=1e-4)


def test_the_quantiser_in_training_is_the_quantiser() -> None:
    """Straight-through: the value is the sum of codes, the gradient that of the latent."""
    _, tokenizer = networks()
    latent = latents(2).requires_grad_()
    decoded, loss, hits, seen = quantise_with_gradient(tokenizer, latent)
    total, codes = tokenizer.quantize.quantise(latent.detach(), SIZES)
    torch.testing.assert_close(decoded, total)
    assert torch.equal(hits.long(), torch.bincount(torch.cat(codes, 1).flatten(), minlength=TOKENIZER.vocabulary))
    assert seen.shape == (2 * sum(p * p for p in SIDES), TOKENIZER.channels)
    after = tokenizer.quantize.totals(codes, SIZES)
    wanted = sum(1.25 * (t - latent.detach()).square().mean() for t in after) / len(SIZES)
    torch.testing.assert_close(loss.detach(), wanted)
    gradient = torch.autograd.grad(decoded.sum(), latent)[0]
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_codes_that_died_are_put_where_the_latents_are() -> None:
    usage, embedding, seen = Usage(4), torch.zeros(4, 2), torch.full((3, 2), 7.0)
    usage.hits.copy_(torch.tensor([1.0, 0.0, 2.0, 0.051]))
    usage.update(torch.tensor([4.0, 0.0, 4.0, 0.0]), embedding, seen)
    assert embedding[:, 0].tolist() == [0, 7, 0, 7]  # the last one fell to 0.98 of what it was


# ------------------------------------------------------------------------------------------------------- the judge


def test_the_frechet_distance_is_scipy_s() -> None:
    x, y = normal(300, 6, seed=1), normal(300, 6, seed=2) * 2 + 1
    mean, covariance = y.double().mean(0), y.double().T.cov()
    own = x.double().T.cov()
    root = np.trace(scipy.linalg.sqrtm((own @ covariance).numpy()).real)
    wanted = (x.double().mean(0) - mean).square().sum() + own.trace() + covariance.trace() - 2 * root
    assert frechet(x, mean, covariance) == pytest.approx(float(wanted), rel=1e-6)
    assert frechet(y, mean, covariance) == pytest.approx(0, abs=1e-6)


def test_scores_know_right_from_wrong() -> None:
    """A judge that reads the class from the brightness."""

    class Brightness(Classifier):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            level = images.mean((1, 2, 3)) * 10
            return torch.stack((level, level**2), 1), -100 * (level[:, None] - torch.arange(10) - 0.5).square()

    classes = torch.arange(10).repeat(3)
    pictures = ((classes + 0.5) * 25.5).round().byte()[:, None, None, None].expand(-1, 1, 32, 32)
    features, _ = judge(Brightness(), pictures)
    statistics = features.mean(0), features.double().T.cov()
    right = score(Brightness(), pictures, classes, statistics)
    assert right == {"accuracy": 1.0, "frechet": pytest.approx(0, abs=1e-3), "score": pytest.approx(10, abs=0.01)}
    assert score(Brightness(), pictures, classes.roll(1), statistics)["accuracy"] == 0


# ------------------------------------------------------------------------------------------------------- the stages


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty pictures a split: a class is a bright bar at a height of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        labels = np.arange(40) % 10
        images = rng.integers(0, 60, (40, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] = 250
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


def test_the_data_set_is_read_and_padded(data: Path) -> None:
    images, labels = read_fashion(data, "train")
    assert images.shape == (40, 1, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [i % 10 for i in range(40)]
    assert not images[:, :, :2].any() and not images[..., 30:].any()
    assert (images[13, 0, 8:12, 2:30] == 250).all()


def test_a_folder_without_the_data_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        read_fashion(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01a"))
    with pytest.raises(SystemExit, match="not an idx file"):
        read_fashion(tmp_path, "train")


def stage(out: Path, data: Path, name: str, *options: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        argv = ("train_tiny_var.py", name, "--out", out, "--data", data, *options)
        patch.setattr(sys, "argv", [str(o) for o in argv])
        train_tiny_var.main()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_stages_go_on_from_their_checkpoints_and_are_exported(tmp_path: Path, data: Path) -> None:
    few: tuple[Any, ...] = ("--batch", 4, "--every", 1e9)
    stage(tmp_path, data, "classifier", "--seconds", 1, *few)
    stage(tmp_path, data, "tokenizer", "--seconds", 1, *few)
    more = (*few, "--no-compile", "--per-class", 1)
    stage(tmp_path, data, "transformer", "--seconds", 1, *more)
    first = torch.load(tmp_path / "transformer.pt")
    # at rate 0 nothing moves: what is saved next is what was loaded, although steps are made
    stage(tmp_path, data, "transformer", "--seconds", first["spent"] + 1, "--lr", 0, *more)
    second = torch.load(tmp_path / "transformer.pt")
    assert second["step"] > first["step"] >= 1 and second["spent"] > first["spent"]
    assert all(torch.equal(second["model"][name], value) for name, value in first["model"].items())
    stage(tmp_path, data, "transformer", "--seconds", second["spent"] + 1, *more)
    third = torch.load(tmp_path / "transformer.pt")
    assert not torch.equal(third["model"]["head.weight"], second["model"]["head.weight"])
    rows = rows_of(tmp_path / "transformer.csv")
    assert [int(row["step"]) for row in rows] == [first["step"], second["step"], third["step"]]
    assert all(0.5 < float(row["val"]) < 8 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    check_export(tmp_path, data, third["average"])


def check_export(out: Path, data: Path, average: dict[str, Tensor]) -> None:
    """The bundle is the averaged weights in float16 and what was computed with the classifier as it is shipped."""
    stage(out, data, "export", "--to", out, "--reference", 2)
    model, judging, (mean, covariance) = check_tiny_var.shipped(out)
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, average[f"net.{name}"].half().float()), name
    features, _ = judge(judging, read_fashion(data, "t10k")[0])
    torch.testing.assert_close(features.mean(0), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.T.cov(), covariance, atol=1e-4, rtol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        options = ("check_tiny_var.py", "--to", out, "--out", out, "--data", data, "--per-class", 10)
        patch.setattr(sys, "argv", [str(o) for o in options])
        check_tiny_var.main()
    gates = {row["pictures"]: row for row in rows_of(out / "gates.csv")}
    assert float(gates["real (training set)"]["frechet"]) < float(gates["noise"]["frechet"])
    assert (out / "contact-sheet.png").is_file()


def test_sizes_fit_together() -> None:
    """At 4 % of the cache HeatKV keeps at least two heads of every source."""
    heads, stored = TRANSFORMER.depth * TRANSFORMER.heads, sum(p * p for p in SIDES[:-1])
    assert (TRANSFORMER.head_dim, stored, sum(p * p for p in SIDES)) == (12, 91, 155)
    assert heads * (0.04 * stored - 1) / (stored - 1) >= 2
    assert SIZES[-1][0] * TOKENIZER.stride == 32
    assert dataclasses.replace(TRANSFORMER, depth=16).tokens == 155
    assert fashion_net.GEOMETRY.sink_tokens == 1
