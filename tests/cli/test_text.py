"""generate with an official model at tiny size: text is encoded once, and the encoder may be gone after."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_models import SMALL_INFINITY

from heatkv_cli.benchmarks.base import items_of

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import infinity_golden as golden
from infinity_files import flat, official, pixels, wrapped
from t5_files import write_t5

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.models.infinity.text_t5 import T5Encoder
from heatkv_cli.pipeline import generate
from heatkv_cli.planning import job
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import RunFolder, read_meta

SMALL = [
    "model=infinity-2b",
    *SMALL_INFINITY,
    "force_resolution=true",
    "model.weights.verify=false",
    f"model.params.tokenizer.bits={golden.CODES['A'].bits}",
    f"model.params.tokenizer.multipliers={[*golden.MULTIPLIERS['A']]}",
    "benchmark=natural",
    "runtime.batch_size=2",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("weights")
    flat(folder, official("A")).rename(folder / "infinity_2b_reg.pth")
    wrapped(folder, pixels("A")).rename(folder / "infinity_vae_d32reg.pth")
    write_t5(folder / "flan-t5-xl", 256)
    return folder


def make(weights: Path, out: Path, *overrides: str) -> tuple[Path, dict[str, bytes]]:
    """Generate; returns the run's folder and its images."""
    plan = compose([*SMALL, f"weights={weights}", f"out={out}", *overrides], command="generate")
    generate.run(plan, Console(quiet=True))
    (run,) = (out / "images").iterdir()
    return run, {path.name: path.read_bytes() for path in (run / "free").glob("*.png")}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time the encoder is read."""
    seen: list[str] = []
    load = T5Encoder.load

    def spied(self: T5Encoder) -> None:
        if self._loaded is None:
            seen.append(str(self.folder))
        load(self)

    monkeypatch.setattr(T5Encoder, "load", spied)
    return seen


def test_text_is_encoded_once_and_the_encoder_may_go(weights: Path, tmp_path: Path, loads: list[str]) -> None:
    run, images = make(weights, tmp_path / "out", "method=full", "limit=4")
    assert len(images) == 4 and len(loads) == 1  # two batches, one look at the encoder
    row = RunFolder.reading(run / "free").row(next(iter(images)).removesuffix(".png"))
    assert row is not None
    numbers = row["numbers"]
    assert 0 < numbers["text_seconds"] < numbers["seconds_per_image"]

    bare = tmp_path / "bare"
    shutil.copytree(weights, bare, ignore=shutil.ignore_patterns("flan*"))
    # another folder of results, no encoder: the very same run
    text = tmp_path / "out" / "text"
    other, again = make(bare, tmp_path / "other", "method=full", "limit=4", f"text={text}")
    assert other.name == run.name and again == images and len(loads) == 1
    assert (read_meta(other) or {})["weights_sha256"] == (read_meta(run) or {})["weights_sha256"]

    with pytest.raises(SetupError, match=r"lacks the text features of 2 prompts") as caught:
        make(bare, tmp_path / "out", "method=full", "limit=6")
    assert "text=DIR" in caught.value.hint
    with pytest.raises(SetupError, match="flan-t5-xl is missing"):
        make(bare, tmp_path / "fresh", "method=full", "limit=4")
    make(weights, tmp_path / "out", "method=full", "limit=6")  # the encoder is back: what is missing, and no more
    assert len(loads) == 2 and len(list(text.rglob("*.safetensors"))) == 6


@pytest.mark.parametrize("command", ["generate", "calibrate", "eval", "bench"])
@pytest.mark.parametrize("damage", ["a tensor is gone", "transformer cut", "encoder cut"])
def test_files_that_cannot_be_read_leave_no_folder(
    weights: Path, tmp_path: Path, command: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what loading finds: `verify=false` compares no digests, and an encoder has none to compare with."""
    bad, out = tmp_path / "bad", tmp_path / "out"
    shutil.copytree(weights, bad)
    path = bad / "infinity_2b_reg.pth"
    if damage == "encoder cut":
        (path,) = (bad / "flan-t5-xl").glob("*.safetensors")
    if damage == "a tensor is gone":
        tensors = torch.load(path, weights_only=True)
        torch.save({name: tensor for name, tensor in tensors.items() if name != "head.weight"}, path)
    else:
        path.write_bytes(path.read_bytes()[:-1000])
    words = [*SMALL, f"weights={bad}", f"out={out}", *([] if command == "calibrate" else ["method=full"])]
    assert run([command, *words, *(["limit=2"] if command in ("generate", "eval") else [])]) in (3, 4)
    assert "Traceback" not in capsys.readouterr().err
    assert [path for path in out.rglob("*") if path.is_file()] == []
    assert not {path.name for path in out.iterdir()} & {"images", "calibration", "bench"}


def test_a_sweep_reads_what_is_there(weights: Path, tmp_path: Path, loads: list[str]) -> None:
    make_all = compose(
        [*SMALL, f"weights={weights}", f"out={tmp_path}", "method=full,sinks", "budget=0.5", "limit=2"],
        command="generate",
    )
    generate.run(make_all, Console(quiet=True))
    assert len(loads) == 1


def test_precision_and_positive_prompt_reach_the_encoder(weights: Path, tmp_path: Path) -> None:
    features = []
    for change in ("t5_dtype=float16", "t5_dtype=bfloat16"):
        cfg = compose([*SMALL, f"weights={weights}", f"out={tmp_path}", f"model.params.{change}"]).first
        model = job.load_model(cfg, Resolver().weights(cfg)[0])
        model.prepare(items_of(["a red circle"]), cfg.text_root)
        features.append(model.encode(items_of(["a red circle"])).features)
    assert 0 < (features[0] - features[1]).abs().max() < 0.2
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 2


def test_the_features_of_another_encoder(weights: Path, tmp_path: Path) -> None:
    root = tmp_path / ("0" * 64)
    root.mkdir()
    with pytest.raises(ArtifactError, match="another encoder"):
        make(weights, tmp_path / "out", "method=full", "limit=2", f"text={root}")
