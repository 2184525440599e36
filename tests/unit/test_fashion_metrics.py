"""The twins of ImageNet's scores: against the training script's own numbers, brute force, and the real data set."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from fashion_net import DATA, read_fashion
from fashion_score import score
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.fashion import network as room
from heatkv_cli.metrics.fashion.accuracy import FashionAccuracy
from heatkv_cli.metrics.fashion.network import CLASSES, FashionClassifier
from heatkv_cli.metrics.fashion.sets import FashionFD, FashionPrecisionRecall, FashionScore
from heatkv_cli.metrics.networks import release

FILE = Path(room.__file__).resolve().parents[2] / "assets" / "fashion.safetensors"
METRICS = (FashionAccuracy, FashionFD, FashionScore, FashionPrecisionRecall)
PICTURES = 120


@cache
def pictures(count: int = PICTURES) -> NDArray[np.uint8]:
    """Blobs: RGB with channels that differ, so that their mean matters."""
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    large = F.interpolate(noise, (32, 32), mode="bilinear")
    return large.mul(255).round().byte().permute(0, 2, 3, 1).numpy()


def samples(images: NDArray[np.uint8]) -> list[Sample]:
    return [Sample(f"p{i}", meta={"class_index": i % 10}, image=image) for i, image in enumerate(images)]


def filled(metric: Any, images: NDArray[np.uint8]) -> Any:
    statistics = metric.statistics()
    for start in range(0, len(images), 50):
        part = images[start : start + 50]
        statistics.add(range(start, start + len(part)), metric.extractor(list(part)))
    return statistics


def value(metric: Any, images: NDArray[np.uint8]) -> Any:
    return metric.compute(filled(metric, images))


@cache
def judged() -> dict[str, float]:
    """What the script says that trained the classifier: other code for all three numbers."""
    judge = FashionClassifier().judge
    grey = torch.from_numpy(pictures()).float().mean(-1).round().byte()[:, None]
    moments = tuple(torch.from_numpy(side) for side in (judge.moments.mu, judge.moments.sigma))
    return score(judge.network, grey, torch.arange(PICTURES) % 10, moments)  # type: ignore[arg-type]


def test_the_features_are_those_of_the_file() -> None:
    """Convolution, normalisation by its formula, rectifier, maxima of 2 x 2; the mean over what is left."""
    t = {name: tensor.float() for name, tensor in load_file(FILE).items()}
    x = torch.from_numpy(pictures()).float().mean(-1).round()[:, None] / 255
    for i in range(4):
        norm = [
            t[f"classifier.norms.{i}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        ]
        x = F.conv2d(x, t[f"classifier.convs.{i}.weight"], padding=1)
        x = ((x - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]).clamp(min=0)
        if i < 3:
            x = x.unflatten(2, (-1, 2)).amax(3).unflatten(3, (-1, 2)).amax(4)
    features = x.mean((2, 3))
    found = FashionClassifier()(list(pictures()))
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), features, atol=1e-4, rtol=1e-4)
    logits = features @ t["classifier.head.weight"].T + t["classifier.head.bias"]
    torch.testing.assert_close(FashionClassifier().logits(found), logits, atol=1e-3, rtol=1e-3)


def test_accuracy_is_the_share_of_right_pictures() -> None:
    metric = FashionAccuracy()
    scores = metric.score_batch(samples(pictures()))
    found = metric.summarise(scores)
    assert found[0].value == pytest.approx(judged()["accuracy"], abs=1e-4)  # as many pictures of each class
    assert [v.variant for v in found] == ["", *CLASSES] and found[0].n == PICTURES
    assert all((s.note == "") == (s.value == 1) and s.stratum in CLASSES for s in scores)
    assert found[0].value == pytest.approx(np.mean([v.value for v in found[1:]]))


def test_the_distance_is_that_of_the_textbook() -> None:
    (found,) = value(FashionFD(), pictures())
    assert found.value == pytest.approx(judged()["frechet"], abs=2e-3)
    assert (found.n, found.extra["reference_n"]) == (PICTURES, 10_000)


def test_the_score_is_that_of_the_formula_and_between_1_and_10() -> None:
    (found,) = value(FashionScore(), pictures())
    assert found.value == pytest.approx(judged()["score"], abs=1e-3) and 1 <= found.value <= 10
    (same,) = value(FashionScore(), np.repeat(pictures()[:1], 20, 0))
    assert same.value == pytest.approx(1)
    with pytest.raises(ValueError, match="120 images cannot be parted into 121 splits"):
        value(FashionScore(splits=121), pictures())


def test_precision_and_recall_by_brute_force() -> None:
    ours = torch.from_numpy(FashionClassifier()(list(pictures()))).double()
    real = FashionClassifier().judge.features.double()

    def inside(judged: Tensor, manifold: Tensor) -> float:
        radii = [sorted((manifold - x).norm(dim=1).tolist())[3] for x in manifold]
        hits = [any(d <= r for d, r in zip((manifold - x).norm(dim=1).tolist(), radii, strict=True)) for x in judged]
        return sum(hits) / len(hits)

    found = value(FashionPrecisionRecall(), pictures())
    assert [v.variant for v in found] == ["precision", "recall"]
    wanted = [inside(ours, real), inside(real, ours)]
    assert [v.value for v in found] == pytest.approx(wanted, abs=0.01)  # distances are float32 there


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}: apt-get install dataset-fashion-mnist")
def test_on_the_real_data_set() -> None:
    """The shipped moments are those of the test set; 1,000 training pictures are near, and mostly in their class."""
    images, labels = read_fashion(DATA, "t10k")
    (same,) = value(FashionFD(), images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    assert same.value < 1e-3
    images, labels = (part[:1000] for part in read_fashion(DATA, "train"))
    real = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    named = [
        Sample(f"p{i}", meta={"class_index": int(c)}, image=x)
        for i, (x, c) in enumerate(zip(real, labels, strict=True))
    ]
    metric = FashionAccuracy()
    assert metric.summarise(metric.score_batch(named))[0].value > 0.9
    assert value(FashionFD(), real)[0].value < 0.3 and value(FashionScore(), real)[0].value > 8
    assert all(v.value > 0.8 for v in value(FashionPrecisionRecall(), real))


@pytest.mark.parametrize("kind", METRICS)
def test_the_file_is_part_of_the_identity_and_nothing_is_lacking(kind: Any) -> None:
    metric = kind()
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert metric.identity()["weights"] == metric.digest() == metric.extractor.digest() == digest
    assert metric.lacks() == [] and metric.self_check() == "" and metric.network_bytes() < 1e6


@pytest.mark.parametrize(
    "meta", [{}, {"class_index": 10}, {"class_index": "-1"}, {"class_index": "x"}, {"class_index": 1.5}]
)
def test_a_prompt_without_its_class_is_told_before_any_picture(meta: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="prompt p has no class_index of 0 to 9") as caught:
        FashionAccuracy().check_prompt("p", meta)
    assert "benchmark=fashion" in caught.value.hint
    FashionAccuracy().check_prompt("p", {"class_index": "9"})


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ArtifactError, match="pictures of 32 x 32, not of 28 x 28"):
        FashionClassifier()([np.zeros((28, 28, 3), np.uint8)])
    with pytest.raises(ArtifactError, match="no image"):
        FashionAccuracy().score(Sample("p", meta={"class_index": 1}))


def test_a_file_that_is_not_the_package_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release()
    monkeypatch.setattr(room, "_ASSETS", tmp_path)
    with pytest.raises(SetupError, match=r"fashion\.safetensors is not a file"):
        FashionFD().extractor([pictures()[0]])
    save_file({"x": torch.zeros(1)}, tmp_path / "fashion.safetensors")
    with pytest.raises(ArtifactError, match=r"fashion\.safetensors should have"):
        FashionFD().extractor([pictures()[0]])
    release()
