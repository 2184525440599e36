"""Metrics against other people's code: scikit-image, torchmetrics, lpips, clean-fid, torch-fidelity, timm, open_clip.

Networks have random weights where the real ones are not in a package: the same file goes to both sides.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image as Pixels

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.clip_score import CLIPScore
from heatkv_cli.metrics.efficientnet_lite0 import EfficientNetLite0
from heatkv_cli.metrics.fd_efficientnet_lite0 import FDEfficientNetLite0
from heatkv_cli.metrics.fid import FID
from heatkv_cli.metrics.inception import Inception
from heatkv_cli.metrics.isc import InceptionScore
from heatkv_cli.metrics.lpips import LPIPS
from heatkv_cli.metrics.moments import Gaussian, Moments, Rows, frechet_distance, frechet_value
from heatkv_cli.metrics.pd_efficientnet_lite0 import PDEfficientNetLite0
from heatkv_cli.metrics.precision_recall import PrecisionRecall
from heatkv_cli.metrics.ssim import SSIM

torch_fidelity = pytest.importorskip("torch_fidelity")
N = 12
"""Images a side; Inception takes 0.3 s for each."""


def picture(seed: int, height: int = 72, width: int = 64) -> np.ndarray:
    """A smooth coloured picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Pixels.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Pixels.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def photos() -> list[np.ndarray]:
    data = pytest.importorskip("skimage.data")
    return [data.astronaut()[::4, ::4].copy(), data.chelsea()[::3, ::4].copy(), data.coffee()[::4, ::5].copy()]


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures of four sizes, each with a disturbed copy."""
    rng = np.random.default_rng(1)
    images = [picture(0), *photos()]
    return [(i, (i + rng.normal(0, 12, i.shape)).clip(0, 255).astype(np.uint8)) for i in images]


def samples() -> list[Sample]:
    return [Sample(str(n), image=a, reference=b) for n, (a, b) in enumerate(pairs())]


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


# ---- SSIM


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    for score, (a, b) in zip(SSIM().score_batch(samples()), pairs(), strict=True):
        # skimage leaves out the border that its own padding spoils: pad as we do, and its mean is over the picture.
        wide = [np.pad(side, ((5, 5), (5, 5), (0, 0)), mode="reflect") for side in (a, b)]
        theirs = metrics.structural_similarity(
            *wide, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert score.value == pytest.approx(theirs, abs=1e-9)


def test_ssim_agrees_with_torchmetrics_and_is_one_for_equals() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    for score, (a, b) in zip(SSIM().score_batch(samples()), pairs(), strict=True):
        expected = theirs(tensor(a).double(), tensor(b).double(), data_range=255.0)
        assert score.value == pytest.approx(expected.item(), abs=1e-9)
    image = picture(3)
    assert SSIM().score(Sample("a", image=image, reference=image)).value == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ArtifactError, match="5 x 40 pixels are too few"):
        SSIM().score(Sample("a", image=picture(0, 5, 40), reference=picture(1, 5, 40)))


# ---- LPIPS


def backbone(net: str) -> torch.nn.Sequential:
    """Convolutions of torchvision's network; its classifier would take seconds to draw."""
    from torchvision import models

    with torch.device("meta"):
        features = models.alexnet().features if net == "alex" else models.vgg16().features
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return features


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random AlexNet and VGG-16 in torchvision's format, without the classifier."""
    folder = tmp_path_factory.mktemp("backbones")
    for net in ("alex", "vgg"):
        torch.save({f"features.{k}": v for k, v in backbone(net).state_dict().items()}, folder / f"{net}.pth")
    return {net: folder / f"{net}.pth" for net in ("alex", "vgg")}


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_agrees_with_the_lpips_package_and_torchmetrics(net: str, backbones: dict[str, Path]) -> None:
    package = pytest.importorskip("lpips")
    from torchmetrics.functional.image import lpips as functional
    from torchvision import models

    name, features = {"alex": "alexnet", "vgg": "vgg16"}[net], backbone(net)
    with mock.patch.object(models, name, lambda **_: SimpleNamespace(features=features)):
        theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        tm = functional._NoTrainLpips(net=net, pnet_rand=True)  # type: ignore[arg-type]
    scores = LPIPS(net, weights=str(backbones[net])).score_batch(samples())  # type: ignore[arg-type]
    for score, (a, b) in zip(scores, pairs(), strict=True):
        x, y = tensor(a) / 127.5 - 1, tensor(b) / 127.5 - 1
        with torch.inference_mode():
            assert score.value == pytest.approx(theirs(x, y).item(), rel=2e-4)  # its epsilon differs
            assert score.value == pytest.approx(tm(x, y).item(), rel=1e-5)
    again = Sample("a", image=picture(0), reference=picture(0))
    assert LPIPS(net, weights=str(backbones[net])).score(again).value == 0  # type: ignore[arg-type]


def test_lpips_refuses_another_networks_file(backbones: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="does not fit"):
        LPIPS("alex", weights=str(backbones["vgg"])).score_batch(samples())


# ---- Inception: FID, Inception score, precision and recall


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception; without He's initialisation its features are so small that every distance is 0."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    cls = module.FeatureExtractorInceptionV3
    with mock.patch.object(cls, "load_state_dict"), mock.patch.object(module, "load_state_dict_from_url"):
        network = cls("random", ["2048"])
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


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
        ours = Inception("clean")._resize([image])[0].permute(1, 2, 0).numpy()
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
    found = [Inception(mode, str(inception))._resize([image]) for mode in ("clean", "tf1", "antialias")]  # type: ignore[arg-type]
    for i in range(3):
        assert float((found[i] - found[i - 1]).abs().mean()) > 0.5


def moments(features: np.ndarray, groups: int = 10) -> Moments:
    found = Moments(features.shape[1], groups)
    found.add(range(len(features)), features)
    return found


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
    assert ours == pytest.approx(other, rel=1e-5)
    assert ours == pytest.approx(clean, rel=1e-5)


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
            Pixels.fromarray(image).save(folders[-1] / f"{i}.png")
    metric = FID(mode, weights=str(inception))  # type: ignore[arg-type]
    ours = metric.compute(moments(metric.extractor(sides[0])), moments(metric.extractor(sides[1])))[0]
    if mode == "tf1":
        found = torch_fidelity.calculate_metrics(
            input1=str(folders[0]), input2=str(folders[1]), fid=True, cuda=False, verbose=False, batch_size=N,
            feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception), cache=False,
        )  # fmt: skip
        assert ours.value == pytest.approx(found["frechet_inception_distance"], rel=1e-5)
        return
    cleanfid = pytest.importorskip("cleanfid.fid")
    network = Inception("clean", str(inception))

    def model(batch: torch.Tensor) -> torch.Tensor:  # clean-fid's own network cannot be had without a download
        from heatkv_cli.metrics.inception import _network

        x = (batch - 128) / 128
        for name, layer in _network(network.path, network.weights_sha256, "cpu").named_children():
            x = x if name == "fc" else layer(x)
        return x.flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cleanfid.compare_folders(
            str(folders[0]), str(folders[1]), model, mode="clean", num_workers=0, batch_size=N,
            device=torch.device("cpu"), verbose=False,
        )  # fmt: skip
    assert ours.value == pytest.approx(found, rel=1e-5)


def test_frechet_distance_in_the_span_is_that_in_full(features: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (moments(side[:, :300].astype(np.float64)) for side in features)
    whole = frechet_distance(a.gaussian(), b.gaussian())
    assert frechet_value("", a, b).value == pytest.approx(whole, rel=1e-5)
    assert frechet_value("", a, a).value == pytest.approx(0, abs=1e-9)
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
    metric, rows, others = PrecisionRecall(resamples=200), Rows(), Rows()
    rows.add(range(150), ours)
    others.add(range(190), real)
    precision, recall = metric.compute(rows, others)
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


@pytest.mark.parametrize("size", [1, 2])
def test_scores_do_not_depend_on_the_batch(size: int, backbones: dict[str, Path]) -> None:
    every = [samples()[i] for i in (0, 3, 0)]  # two sizes, mixed
    for metric in (SSIM(), LPIPS("alex", weights=str(backbones["alex"])), PDEfficientNetLite0()):
        whole = [score.value for score in metric.score_batch(every)]
        parts = [s.value for i in range(0, len(every), size) for s in metric.score_batch(every[i : i + size])]
        assert parts == pytest.approx(whole, rel=1e-6, abs=1e-7)


# ---- EfficientNet-Lite0


def test_lite0_is_timms_network_and_knows_a_cat() -> None:
    timm, data = pytest.importorskip("timm"), pytest.importorskip("skimage.data")
    extract = EfficientNetLite0()
    x = extract.prepare([data.chelsea()])
    logits = extract.network(x)
    assert logits.argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    own, mapped = extract.network.state_dict(), {}
    names = {"bn0": "bn1", "conv_stem": "conv_stem", "conv_head": "conv_head", "bn1": "bn2", "fc": "classifier"}
    places = [(stage, i) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(count)]
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    later = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
    later |= {"project_conv": "conv_pwl", "bn2": "bn3"}
    for key, value in own.items():
        if key.startswith("_blocks."):
            _, number, layer, rest = key.split(".")
            stage, i = places[int(number)]
            mapped[f"blocks.{stage}.{i}.{(first if number == '0' else later)[layer[1:]]}.{rest}"] = value
        else:
            layer, rest = key.split(".")
            mapped[f"{names[layer[1:]]}.{rest}"] = value
    network.load_state_dict(mapped)
    with torch.inference_mode():
        torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-4)
        pooled = network.global_pool(network.forward_features(x))
    np.testing.assert_allclose(extract([data.chelsea()]), pooled.numpy(), rtol=1e-4, atol=1e-4)


def test_lite0_distances_grow_with_the_damage() -> None:
    rng = np.random.default_rng(0)
    images = photos()
    noise = [rng.normal(0, 1, image.shape) for image in images]
    found = []
    for strength in (0, 8, 40):
        damaged = [(i + strength * n).clip(0, 255).astype(np.uint8) for i, n in zip(images, noise, strict=True)]
        pd = PDEfficientNetLite0(resamples=20)
        scores = pd.score_batch(
            [Sample(str(n), image=a, reference=b) for n, (a, b) in enumerate(zip(damaged, images, strict=True))]
        )
        fd = FDEfficientNetLite0()
        a, b = fd.statistics(), fd.statistics()
        a.add(range(3), fd.extractor(damaged))
        b.add(range(3), fd.extractor(images))
        found.append((pd.summarise(scores)[0].value, fd.compute(a, b)[0].value))
    assert found[0] == pytest.approx((0, 0), abs=1e-9)
    assert found[0][0] < found[1][0] < found[2][0] and found[0][1] < found[1][1] < found[2][1]


# ---- CLIP score


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny CLIP of ViT-L/14's structure with random weights, as open_clip knows it."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-quickgelu.json").write_text(json.dumps(config))
    (folder / "tiny.json").write_text(json.dumps({**config, "quick_gelu": False}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-quickgelu", pretrained=None)
    torch.save(network.state_dict(), folder / "tiny.pt")
    return "tiny-quickgelu", folder / "tiny.pt"


PROMPTS = ["a red circle on white", "Two  DOGS, &amp; a cat", "word " * 90, "x"]


def test_clip_score_agrees_with_a_loop_by_hand(clip: tuple[str, Path]) -> None:
    import open_clip

    arch, path = clip
    metric = CLIPScore(arch, weights=str(path), resamples=50)
    images = [a for a, _ in pairs()]
    scores = metric.score_batch(
        [Sample(str(i), p, image=a) for i, (a, p) in enumerate(zip(images, PROMPTS, strict=True))]
    )
    network = open_clip.create_model(arch, pretrained=None)
    network.load_state_dict(torch.load(path))
    network.eval()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        height, width = image.shape[:2]
        scale = 32 / min(height, width)
        size = (
            32 if width <= height else int(32 * width / height),
            32 if height <= width else int(32 * height / width),
        )
        assert max(size) >= math.floor(max(height, width) * scale)
        small = np.asarray(Pixels.fromarray(image).resize(size, Pixels.Resampling.BICUBIC))
        top, left = round((size[1] - 32) / 2), round((size[0] - 32) / 2)
        x = (small[top : top + 32, left : left + 32] / 255 - mean) / std
        with torch.inference_mode():
            picture_side = network.encode_image(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0].double()
            text_side = network.encode_text(open_clip.tokenize([prompt]))[0].double()
        cosine = picture_side @ text_side / picture_side.norm() / text_side.norm()
        assert score.value == pytest.approx(100 * cosine.item(), abs=1e-4)
    (value,) = metric.summarise(scores)
    assert (value.variant, value.n, value.extra["truncated"]) == ("vit-l-14-openai", 4, 1)
    assert min(s.value for s in scores) < 0, "a negative cosine must be in the test: it is not cut"
    for size in (1, 3):
        every = [Sample(str(i), p, image=a) for i, (a, p) in enumerate(zip(images, PROMPTS, strict=True))]
        parts = [s.value for i in range(0, 4, size) for s in metric.score_batch(every[i : i + size])]
        assert parts == pytest.approx([s.value for s in scores], rel=1e-5, abs=1e-5)


def test_clip_score_insists_on_quickgelu_and_on_every_key(clip: tuple[str, Path], tmp_path: Path) -> None:
    sample = Sample("a", "b", image=picture(0))
    with pytest.raises(ArtifactError, match="GELU") as caught:
        CLIPScore("tiny", weights=str(clip[1])).score(sample)
    assert "tiny-quickgelu" in caught.value.hint
    content = torch.load(clip[1])
    content.pop("logit_scale")
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(ArtifactError, match="missing logit_scale"):
        CLIPScore(clip[0], weights=str(tmp_path / "less.pt")).score(sample)
    with pytest.raises(SetupError, match="weights missing"):
        CLIPScore(clip[0], weights=str(tmp_path / "none.pt")).score(sample)


def test_clip_score_reads_openais_archive(clip: tuple[str, Path], tmp_path: Path) -> None:
    class Holder(torch.nn.Module):
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            super().__init__()
            for name, value in tensors.items():
                node: torch.nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(node, part):
                        node.add_module(part, torch.nn.Module())
                    node = getattr(node, part)
                node.register_buffer(last, value)
            self.register_buffer("context_length", torch.tensor(77))

        def forward(self) -> torch.Tensor:
            return self.context_length

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old, and so is OpenAI's file
        torch.jit.script(Holder(torch.load(clip[1]))).save(tmp_path / "openai.pt")
    sample = Sample("a", "b", image=picture(0))
    plain, archive = (CLIPScore(clip[0], weights=str(path)).score(sample) for path in (clip[1], tmp_path / "openai.pt"))
    assert archive.value == pytest.approx(plain.value, abs=1e-6)
