"""Metrics of single images against scikit-image, torchmetrics, lpips, timm and open_clip."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from metric_pictures import backbone, pairs, photos, picture, samples, tensor
from PIL import Image

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics import weights as weights_module
from heatkv_cli.metrics.base import Sample
from heatkv_cli.metrics.clip.clip_score import CLIPScore
from heatkv_cli.metrics.inception.fid import FID
from heatkv_cli.metrics.intervals import Bootstrap
from heatkv_cli.metrics.lite0.fd import FDEfficientNetLite0
from heatkv_cli.metrics.lite0.network import EfficientNetLite0
from heatkv_cli.metrics.lite0.pd import PDEfficientNetLite0
from heatkv_cli.metrics.lpips import LPIPS
from heatkv_cli.metrics.networks import release
from heatkv_cli.metrics.pixels import PSNR, SSIM

# ---- SSIM

SSIM_ERROR = 4 * 121 * 255**2 * 2.0**-53 / (0.03 * 255) ** 2
"""Two windowed means of 121 squares in double precision, on either side, over the smallest denominator: 6e-11."""
FLOAT32 = 1e-4
"""Relative, of a network in float32 whose sums a processor or a batch size orders otherwise."""


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    for score, (a, b) in zip(SSIM().score_batch(samples()), pairs(), strict=True):
        # skimage leaves out the border that its own padding spoils: pad as we do, and its mean is over the picture.
        wide = [np.pad(side, ((5, 5), (5, 5), (0, 0)), mode="reflect") for side in (a, b)]
        theirs = metrics.structural_similarity(
            *wide, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert score.value == pytest.approx(theirs, abs=SSIM_ERROR)


def test_ssim_agrees_with_torchmetrics_and_is_one_for_equals() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    for score, (a, b) in zip(SSIM().score_batch(samples()), pairs(), strict=True):
        expected = theirs(tensor(a).double(), tensor(b).double(), data_range=255.0)
        assert score.value == pytest.approx(expected.item(), abs=SSIM_ERROR)
    image = picture(3)
    assert SSIM().score(Sample("a", image=image, reference=image)).value == pytest.approx(1.0, abs=SSIM_ERROR)
    with pytest.raises(ArtifactError, match="5 x 40 pixels are too few"):
        SSIM().score(Sample("a", image=picture(0, 5, 40), reference=picture(1, 5, 40)))


# ---- LPIPS


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
            assert score.value == pytest.approx(tm(x, y).item(), rel=FLOAT32)
    again = Sample("a", image=picture(0), reference=picture(0))
    assert LPIPS(net, weights=str(backbones[net])).score(again).value == 0  # type: ignore[arg-type]


def test_lpips_refuses_another_networks_file(backbones: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="does not fit"):
        LPIPS("alex", weights=str(backbones["vgg"])).score_batch(samples())


@pytest.mark.parametrize("size", [1, 2])
def test_scores_do_not_depend_on_the_batch(size: int, backbones: dict[str, Path]) -> None:
    every = [samples()[i] for i in (0, 3, 0)]  # two sizes, mixed
    for metric in (SSIM(), LPIPS("alex", weights=str(backbones["alex"])), PDEfficientNetLite0()):
        whole = [score.value for score in metric.score_batch(every)]
        parts = [s.value for i in range(0, len(every), size) for s in metric.score_batch(every[i : i + size])]
        assert parts == pytest.approx(whole, rel=FLOAT32, abs=1e-6)


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
        pd = PDEfficientNetLite0()
        scores = pd.score_batch(
            [Sample(str(n), image=a, reference=b) for n, (a, b) in enumerate(zip(damaged, images, strict=True))]
        )
        fd = FDEfficientNetLite0()
        a, b = fd.statistics(), fd.statistics()
        a.add(range(3), fd.extractor(damaged))
        b.add(range(3), fd.extractor(images))
        found.append((pd.summarise(scores, bootstrap=Bootstrap(20))[0].value, fd.compute(a, b)[0].value))
    assert found[0] == pytest.approx((0, 0), abs=FLOAT32**2)  # squares of differences of float32 features
    assert found[0][0] < found[1][0] < found[2][0] and found[0][1] < found[1][1] < found[2][1]


# ---- CLIP score


PROMPTS = ["a red circle on white", "Two  DOGS, &amp; a cat", "word " * 90, "x"]


def test_clip_score_agrees_with_a_loop_by_hand(clip: tuple[str, Path]) -> None:
    import open_clip

    arch, path = clip
    metric = CLIPScore(arch, weights=str(path))
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
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        top, left = round((size[1] - 32) / 2), round((size[0] - 32) / 2)
        x = (small[top : top + 32, left : left + 32] / 255 - mean) / std
        with torch.inference_mode():
            picture_side = network.encode_image(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0].double()
            text_side = network.encode_text(open_clip.tokenize([prompt]))[0].double()
        cosine = picture_side @ text_side / picture_side.norm() / text_side.norm()
        assert score.value == pytest.approx(100 * cosine.item(), abs=1e-4)
    (value,) = metric.summarise(scores, bootstrap=Bootstrap(50))
    assert (value.variant, value.n, value.extra["truncated"]) == ("vit-l-14-openai", 4, 1)
    assert min(s.value for s in scores) < 0, "a negative cosine must be in the test: it is not cut"
    for size in (1, 3):
        every = [Sample(str(i), p, image=a) for i, (a, p) in enumerate(zip(images, PROMPTS, strict=True))]
        parts = [s.value for i in range(0, 4, size) for s in metric.score_batch(every[i : i + size])]
        assert parts == pytest.approx([s.value for s in scores], rel=FLOAT32, abs=100 * 1e-6)  # cosines times 100


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


def test_clip_score_reads_openais_archive_and_no_other(
    clip: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    unknown = CLIPScore(clip[0], weights=str(tmp_path / "openai.pt"))
    with pytest.raises(ArtifactError, match="TorchScript archive, which can hold code"):
        unknown.score(sample)
    release()
    digest = hashlib.sha256((tmp_path / "openai.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(weights_module, "TORCHSCRIPT", {digest})
    plain, archive = (CLIPScore(clip[0], weights=str(path)).score(sample) for path in (clip[1], tmp_path / "openai.pt"))
    assert archive.value == pytest.approx(plain.value, rel=FLOAT32, abs=100 * 1e-6)


# ---- self-tests


def test_self_checks_pass_and_know_a_wrong_file(
    inception: Path, backbones: dict[str, Path], clip: tuple[str, Path], tmp_path: Path
) -> None:
    assert SSIM().self_check() == PSNR().self_check() == FDEfficientNetLite0().self_check() == ""
    other = tmp_path / "efficientnet-lite0-00000000.pth"
    other.write_bytes(EfficientNetLite0().wanted.path.read_bytes())
    assert "its name says 00000000" in PDEfficientNetLite0(weights=str(other)).self_check()
    assert "its name says 6726825d" in FID(weights=str(inception)).self_check(), "random, under the real one's name"
    plain = tmp_path / "inception.pth"
    plain.write_bytes(inception.read_bytes())
    assert FID(weights=str(plain)).self_check() == ""
    assert LPIPS("alex", weights=str(backbones["alex"])).self_check() == ""
    assert "scores {" in CLIPScore(clip[0], weights=str(clip[1])).self_check(), "random weights know no colours"
    changed = EfficientNetLite0().network.state_dict()
    changed = {key: value + 0.1 if key == "_conv_stem.weight" else value for key, value in changed.items()}
    torch.save(changed, tmp_path / "changed.pth")
    assert "apart, not 13.738" in EfficientNetLite0(str(tmp_path / "changed.pth")).self_check()
