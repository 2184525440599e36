"""Metrics of sets against clean-fid, torch-fidelity and torchmetrics, with random Inception weights on both sides."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_pictures import moments, photos, picture, tensor
from PIL import Image

from heatkv_cli.metrics.frechet import frechet_distance, frechet_value
from heatkv_cli.metrics.inception.fid import FID
from heatkv_cli.metrics.inception.isc import InceptionScore
from heatkv_cli.metrics.inception.network import Inception
from heatkv_cli.metrics.inception.precision_recall import PrecisionRecall
from heatkv_cli.metrics.intervals import Bootstrap
from heatkv_cli.metrics.lite0.fd import FDEfficientNetLite0
from heatkv_cli.metrics.statistics import Gaussian, Moments, Rows

torch_fidelity = pytest.importorskip("torch_fidelity")
N = 12
"""Images a side; Inception takes 0.3 s for each."""


# ---- Inception: FID, Inception score, precision and recall


@pytest.fixture(scope="session")
def sides() -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [picture(i) for i in range(N)], [picture(100 + i, 80, 96) for i in range(N)]


@pytest.fixture(scope="session")
def features(inception: Path, sides: tuple[list[np.ndarray], list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    extract = Inception("tf1", str(inception))
    return extract(sides[0]), extract(sides[1])


def theirs(inception: Path, images: list[np.ndarray], layers: list[str]) -> list[torch.Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=str(inception))
    with torch.inference_mode():
        return list(network(torch.cat([tensor(image) for image in images])))


def test_tf1_features_are_torch_fidelitys(
    inception: Path, sides: tuple[list[np.ndarray], list[np.ndarray]], features: tuple[np.ndarray, np.ndarray]
) -> None:
    pooled, logits = theirs(inception, sides[0][:3], ["2048", "logits_unbiased"])
    np.testing.assert_allclose(features[0][:3], pooled.numpy(), rtol=1e-4, atol=1e-5)
    ours = Inception("tf1", str(inception)).logits(features[0][:3])
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_clean_pixels_are_clean_fids(inception: Path) -> None:
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    for image in (picture(0), picture(1, 500, 400), *photos()):
        ours = Inception("clean").resize([image])[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours, resize(image))


def test_antialias_features_are_torchmetrics(inception: Path) -> None:
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("tm", ["2048"], str(inception), antialias=True)
    image = picture(5, 400, 350)
    with torch.inference_mode():
        expected = network._torch_fidelity_forward(tensor(image))[0].numpy()
    np.testing.assert_allclose(Inception("antialias", str(inception))([image]), expected, rtol=1e-4, atol=1e-5)


def test_modes_are_three_different_metrics(inception: Path) -> None:
    image = picture(5, 400, 350)
    found = [Inception(mode, str(inception)).resize([image]) for mode in ("clean", "tf1", "antialias")]  # type: ignore[arg-type]
    for i in range(3):
        assert float((found[i] - found[i - 1]).abs().mean()) > 0.5


def test_frechet_distance_agrees_with_clean_fid_and_torch_fidelity(features: tuple[np.ndarray, np.ndarray]) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    cleanfid = pytest.importorskip("cleanfid.fid")
    a, b = (side[:, :300].astype(np.float64) for side in features)  # all 2,048 take 20 s with their code
    ours = frechet_value("", moments(a), moments(b)).value
    stats = [fid_features_to_statistics(torch.from_numpy(side)) for side in (a, b)]
    other = fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, about how clean-fid calls it
        clean = cleanfid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    # Their roots of eigenvalues that should be 0, nine tenths of 300, are off by 1e-8 of the largest each.
    assert ours == pytest.approx(other, rel=1e-4)
    assert ours == pytest.approx(clean, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["clean", "tf1"])
def test_fid_of_folders_agrees_with_clean_fid_and_torch_fidelity(
    mode: str, inception: Path, sides: tuple[list[np.ndarray], list[np.ndarray]], tmp_path: Path
) -> None:
    folders = []
    for name, images in zip("ab", sides, strict=True):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(folders[-1] / f"{i}.png")
    metric = FID(mode, weights=str(inception))  # type: ignore[arg-type]
    ours = metric.compute(moments(metric.extractor(sides[0])), moments(metric.extractor(sides[1])))[0]
    if mode == "tf1":
        found = torch_fidelity.calculate_metrics(
            input1=str(folders[0]),
            input2=str(folders[1]),
            fid=True,
            cuda=False,
            verbose=False,
            batch_size=N,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(inception),
            cache=False,
        )
        assert ours.value == pytest.approx(found["frechet_inception_distance"], rel=1e-4)
        return
    cleanfid = pytest.importorskip("cleanfid.fid")
    network = Inception("clean", str(inception))

    def model(batch: torch.Tensor) -> torch.Tensor:  # clean-fid's own network cannot be had without a download
        x = (batch - 128) / 128
        for name, layer in network.layers.named_children():
            x = x if name == "fc" else layer(x)
        return x.flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cleanfid.compare_folders(
            str(folders[0]),
            str(folders[1]),
            model,
            mode="clean",
            num_workers=0,
            batch_size=N,
            device=torch.device("cpu"),
            verbose=False,
        )
    assert ours.value == pytest.approx(found, rel=1e-4)


def test_frechet_distance_in_the_span_is_that_in_full(features: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (moments(side[:, :300].astype(np.float64)) for side in features)
    whole = frechet_distance(a.gaussian(), b.gaussian())
    assert frechet_value("", a, b).value == pytest.approx(whole, rel=1e-5)
    assert frechet_value("", a, a).value == 0
    assert frechet_value("", a, b.gaussian()).value == pytest.approx(whole, rel=1e-5)  # against a fixed reference
    assert frechet_value("", b, a).value == pytest.approx(frechet_value("", a, b).value, rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    eye = np.eye(3)
    a, b = Gaussian(np.zeros(3), eye, 9), Gaussian(np.array([3.0, 4.0, 0.0]), 4 * eye, 9)
    assert frechet_distance(a, b) == pytest.approx(25 + 3 * (1 + 4 - 2 * 2))


def test_jackknife_against_a_fixed_reference_agrees_with_the_spread_over_draws() -> None:
    rng = np.random.default_rng(0)
    reference = Gaussian(np.zeros(4), np.eye(4), 0)
    drawn = [frechet_value("", moments(rng.normal(0.3, 1.2, (400, 4)), 20), reference) for _ in range(60)]
    spread = np.std([v.value for v in drawn], ddof=1)
    assert np.mean([v.stderr for v in drawn]) == pytest.approx(spread, rel=0.3)


def test_inception_score_agrees_with_torch_fidelity(inception: Path, features: tuple[np.ndarray, np.ndarray]) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    metric = InceptionScore(splits=3, weights=str(inception))
    rows = metric.statistics()
    rows.add(range(N), features[0])
    (value,) = metric.compute(rows)
    found = isc_features_to_metric(metric.extractor.logits(features[0]), splits=3)
    assert value.value == pytest.approx(found["inception_score_mean"], rel=1e-6)
    assert value.extra["std"] == pytest.approx(found["inception_score_std"], rel=1e-6)
    in_order = InceptionScore(splits=3, shuffle=False, weights=str(inception)).compute(rows)[0].value
    found = isc_features_to_metric(metric.extractor.logits(features[0]), splits=3, shuffle=False)
    assert in_order == pytest.approx(found["inception_score_mean"], rel=1e-6)
    with pytest.raises(ValueError, match="12 images cannot be parted into 13"):
        InceptionScore(splits=13, weights=str(inception)).compute(rows)


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    rng = np.random.default_rng(0)
    ours, real = rng.normal(0, 1, (150, 6)).astype(np.float32), rng.normal(0.6, 0.7, (190, 6)).astype(np.float32)
    metric, rows, others = PrecisionRecall(), Rows(), Rows()
    rows.add(range(150), ours)
    others.add(range(190), real)
    precision, recall = metric.compute(rows, others, Bootstrap(200))
    expected = calculate_precision_recall_full(torch.from_numpy(ours), torch.from_numpy(real))
    assert (precision.value, recall.value) == pytest.approx(expected)
    assert (precision.variant, recall.variant, precision.n, recall.n) == ("precision", "recall", 150, 190)
    assert 0 < precision.value < recall.value < 1 and precision.low < precision.value < precision.high


# ---- additivity


@pytest.mark.parametrize("size", [1, 7, 64])
def test_statistics_of_batches_and_shards_are_those_of_the_whole(size: int) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(3, 1, (90, 40)).astype(np.float32), rng.normal(3.1, 1.1, (90, 40)).astype(np.float32)
    metric = FDEfficientNetLite0()
    whole, reference = moments(a), moments(b)
    shards = [Moments(40), Moments(40)]
    for start in range(0, 90, size):
        index = range(start, min(start + size, 90))
        shards[start // size % 2].add(index, a[index])
    shards[1].merge(shards[0])  # out of order too
    ours, expected = metric.compute(shards[1], reference)[0], metric.compute(whole, reference)[0]
    assert (ours.value, ours.stderr) == pytest.approx((expected.value, expected.stderr), rel=1e-6)
    rows = [Rows(), Rows()]
    for start in range(0, 90, size):
        index = range(start, min(start + size, 90))
        rows[start // size % 2].add(index, a[index])
    if rows[1].n:
        rows[1].merge(rows[0])
        np.testing.assert_array_equal(rows[1].ordered(), a)
