"""GenEval from picture to rows on tiny random networks: colours, detections on disk, self-test, tasks, errors."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.metrics import weights as weights_module
from heatkv_cli.metrics.base import ImageMetric, Sample, Score
from heatkv_cli.metrics.clip.network import OPENAI, Clip, load_clip
from heatkv_cli.metrics.intervals import Bootstrap
from heatkv_cli.metrics.networks import release
from heatkv_cli.metrics.objects import geneval as module
from heatkv_cli.metrics.objects.colours import COLOURS, ColourNamer, cut_out
from heatkv_cli.metrics.objects.decisions import TASKS, Rules
from heatkv_cli.metrics.objects.detector import NAMES, Detector, Instance
from heatkv_cli.metrics.objects.geneval import KNOWN, GenEval, read_detections, rescore
from heatkv_cli.metrics.weights import Wanted

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch (extra geneval) is not installed")
pytest.importorskip("transformers", reason="transformers (extra geneval) is not installed")
import mmdet_literal as literal  # noqa: E402

ARCH = "tiny-openai"
CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (20, 160, 3), dtype=np.uint8)
"""Long, since the detector looks at 1333 x 800 pixels where it can."""
LEAST = 1e-6
"""Almost everything that the random detector finds."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("geneval")
    (folder / f"{ARCH}.json").write_text(json.dumps(CLIP))
    (folder / "plain-gelu.json").write_text(json.dumps(CLIP | {"quick_gelu": False}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(ARCH, pretrained=None).state_dict(), folder / "clip.pt")
    torch.save({"meta": {}, "state_dict": literal.random_mmdet(2).state_dict()}, folder / "detector.pth")
    return {"detector_weights": str(folder / "detector.pth"), "clip_weights": str(folder / "clip.pt")}


def metric(files: dict[str, str], **options: Any) -> GenEval:
    options = {"self_test": False, "min_score": LEAST, "threshold": LEAST, "counting_threshold": LEAST} | options
    return GenEval(**files, clip_arch=ARCH, detector_config=literal.CONFIG, **options)


def opened(path: Path, arch: str = ARCH) -> Clip:
    wanted = Wanted(OPENAI, str(path))
    return load_clip(arch, wanted, "cpu", option="metric.geneval.clip_arch", extra="geneval", quick_gelu=True)


def ask(task: str, *include: dict[str, Any], index: int = 0, prompt_id: str = "00000", **more: Any) -> Sample:
    meta = {"tag": task, "include": list(include), **more}
    return Sample(prompt_id, "a prompt", meta, PICTURE, index=index)


def test_constants_are_those_of_geneval() -> None:
    assert GenEval().rules == Rules(0.3, 0.9, 16, 1.0, 0.1, 0.5, False)
    assert COLOURS == ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    assert TASKS == ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert isinstance(GenEval(), ImageMetric)


# ---- colours


def test_cut_out_is_pillows_composite_and_crop() -> None:
    mask = RNG.random((20, 160)) > 0.5
    blank = Image.new("RGB", (160, 20), color="#999")
    box = (3, 5, 40, 19)
    expected = Image.composite(Image.fromarray(PICTURE), blank, Image.fromarray(mask)).crop(box)
    assert (cut_out(PICTURE, Instance(0, 1.0, tuple(map(float, box)), mask)) == np.asarray(expected)).all()


def test_colours_are_those_of_a_plain_zero_shot_classifier(files: dict[str, str]) -> None:
    boxes = [(0, 0, 48, 20), (10, 8, 160, 18), (5, 0, 9, 19), (30, 10, 31, 11)]
    objects = [Instance(0, 1.0, tuple(map(float, b)), RNG.random((20, 160)) > 0.3) for b in boxes] * 5  # over one batch
    found = ColourNamer(opened(Path(files["clip_weights"])))(PICTURE, objects, "hot dog")

    model, _, transform = open_clip.create_model_and_transforms(ARCH, pretrained=None)
    model.load_state_dict(torch.load(files["clip_weights"], weights_only=True))
    model.eval()
    tokenize = open_clip.get_tokenizer(ARCH)
    expected = []
    with torch.no_grad():
        weights = []
        for c in COLOURS:
            texts = [f"a photo of a {c} hot dog", f"a photo of a {c}-colored hot dog", f"a photo of a {c} object"]
            mean = F.normalize(model.encode_text(tokenize(texts)), dim=-1).mean(0)
            weights.append(mean / mean.norm())
        for each in objects:
            picture = Image.fromarray(cut_out(PICTURE, each))
            feature = F.normalize(model.encode_image(transform(picture)[None]), dim=-1)
            expected.append(COLOURS[int((100 * feature @ torch.stack(weights, 1)).argmax())])
    assert found == expected


def test_openai_archive_and_wrong_architecture(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holder(torch.nn.Module):
        """State dict keys as OpenAI's archive has them: the network's and three numbers."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model, holder = open_clip.create_model(ARCH, pretrained=None), Holder()
    for name, child in model.named_children():
        holder.add_module(name, torch.nn.Module())
        _copy(child, getattr(holder, name))
    for name, parameter in model.named_parameters(recurse=False):
        holder.register_parameter(name, torch.nn.Parameter(parameter.detach()))
    for name in ("input_resolution", "context_length", "vocab_size"):
        holder.register_buffer(name, torch.tensor(7))
    torch.jit.save(torch.jit.script(holder), tmp_path / "ViT-L-14.pt")
    with pytest.raises(ArtifactError, match="which can hold code"):
        opened(tmp_path / "ViT-L-14.pt")
    release()
    digest = hashlib.sha256((tmp_path / "ViT-L-14.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(weights_module, "TORCHSCRIPT", {digest})
    found = opened(tmp_path / "ViT-L-14.pt").network
    assert torch.equal(found.token_embedding.weight, model.token_embedding.weight)
    with pytest.raises(ArtifactError, match="no QuickGELU"):
        opened(Path(files["clip_weights"]), "plain-gelu")


def _copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
    for name, parameter in source.named_parameters(recurse=False):
        target.register_parameter(name, torch.nn.Parameter(parameter.detach()))
    for name, child in source.named_children():
        target.add_module(name, torch.nn.Module())
        _copy(child, getattr(target, name))


# ---- the whole way


def test_detector_colours_and_judgement_together(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "run" / "detections.jsonl"
    judge = metric(files, detections=str(path))
    record = judge._record(ask("single_object", {"class": "cat", "count": 1}))
    names = [o["class"] for o in record["objects"]]
    assert record["size"] == [20, 160] and len(names) > 3 and set(names) <= set(NAMES)
    present = max(set(names), key=names.count)
    absent = next(name for name in NAMES if name not in names)
    number = names.count(present)
    samples = [
        ask("single_object", {"class": present, "count": 1}, prompt_id="00001"),
        ask("two_object", {"class": present, "count": 1}, {"class": absent, "count": 1}, prompt_id="00002"),
        ask(
            "counting",
            {"class": present, "count": number},
            exclude=[{"class": present, "count": number + 1}],
            prompt_id="3",
        ),
        ask(
            "counting",
            {"class": present, "count": number},
            exclude=[{"class": present, "count": number}],
            prompt_id="4",
        ),
        ask("colors", {"class": present, "count": 1, "color": "red"}, prompt_id="red"),
    ]
    scores = [judge.score(sample) for sample in samples]
    assert [s.value for s in scores[:4]] == [1, 0, 1, 0]
    assert scores[1].note == f"expected 1 {absent}, found 0" and scores[1].stratum == "two_object"
    kept = read_detections(path)
    assert len(kept) == len(samples) + 1
    coloured = [o for o in kept["red", 0]["objects"] if "colour" in o]
    group = {"class": present, "count": 1}
    asked = [kept["red", 0] | {"metadata": {"tag": "colors", "include": [group | {"color": c}]}} for c in COLOURS]
    assert sum(judge.judge(record).value for record in asked) == 1  # the object has one colour
    assert len(coloured) == min(number, 16) and {o["class"] for o in coloured} == {present}

    # From the lines alone, with files that no longer exist: the same scores; with other constants: others.
    blind = GenEval(
        detector_weights="/gone",
        clip_weights="/gone",
        detections=str(path),
        min_score=LEAST,
        clip_arch=ARCH,
        threshold=LEAST,
        counting_threshold=LEAST,
    )
    assert [blind.score(sample) for sample in samples] == scores
    assert [blind.score(replace(sample, image=None)) for sample in samples] == scores
    assert rescore(path, blind)[1:] == scores
    assert sum(s.value for s in rescore(path, replace(blind, threshold=1.0, counting_threshold=1.0))) == 0
    with pytest.raises(SetupError, match="/gone"):
        blind.score(replace(samples[0], image=PICTURE + 1))  # another picture is looked at again
    with pytest.raises(SetupError, match="/gone"):
        blind.score(replace(samples[0], meta=samples[4].meta))  # and so is another question
    for other in (replace(blind, max_objects=17), replace(blind, min_score=0.0)):
        with pytest.raises(SetupError, match="/gone"):
            other.score(samples[0])  # the lines do not say enough for this


def test_interrupted_file_goes_on(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    sample = ask("single_object", {"class": "cat", "count": 1})
    first = metric(files, detections=str(path)).score(sample)
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert metric({"detector_weights": "/gone", "clip_weights": "/gone"}, detections=str(path)).score(sample) == first
    assert path.read_text() == whole
    metric(files, detections=str(path)).score(replace(sample, prompt_id="b"))
    assert len(path.read_text().splitlines()) == 2
    path.write_text("[1]\n")
    with pytest.raises(ArtifactError, match="line 1 is no detection"):
        read_detections(path)


def test_writing_to_respects_the_configured_file(tmp_path: Path) -> None:
    assert GenEval().writing_to(tmp_path, (1, 2)).detections == str(tmp_path / "detections" / "1-of-2.jsonl")
    assert GenEval(detections="mine").writing_to(tmp_path, (0, 1)).detections == "mine"


def test_self_test_refuses_networks_that_see_nonsense(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    release()
    judge = metric(files, self_test=True)
    loaded: list[Any] = []
    monkeypatch.setattr(module, "Detector", lambda *args: loaded.append(args) or Detector(*args))
    for _ in range(2):
        with pytest.raises(
            ArtifactError, match="refuses to judge: on a picture of one cat the detector sees"
        ) as caught:
            judge.score(ask("single_object", {"class": "cat", "count": 1}))
    assert "self_test=false" in caught.value.hint
    assert len(loaded) == 1  # not once per picture
    assert judge.self_check().startswith("on a picture of one cat")


class Seeing:
    """A detector that finds what it is told, and a classifier that names pure colours as it is told."""

    def __init__(self, *names_scores: tuple[str, float], colours: tuple[str, ...] = ("red", "green", "blue")) -> None:
        box, mask = (0.0, 0.0, 9.0, 9.0), np.ones((300, 451), np.bool_)
        self.objects = [Instance(NAMES.index(n), s, box, mask) for n, s in names_scores]
        self.colours = iter(colours)

    def __call__(self, image: np.ndarray, *rest: Any) -> list[Any]:
        if len(rest) == 1:
            assert image.shape == (300, 451, 3)
            return self.objects
        return [next(self.colours)]


@pytest.mark.parametrize(
    ("eyes", "wrong"),
    [
        (Seeing(("cat", 0.98), ("bed", 0.4)), ""),
        (Seeing(("cat", 0.98), ("cat", 0.4)), ""),
        (Seeing(), "sees nothing"),
        (Seeing(("dog", 0.9), ("cat", 0.8)), "sees dog 0.90, cat 0.80"),
        (Seeing(("cat", 0.9), ("cat", 0.8)), "sees cat 0.90, cat 0.80"),
        (Seeing(("cat", 0.3)), "sees cat 0.30"),
        (Seeing(("cat", 0.9), colours=("red", "blue")), "a green square is called blue"),
    ],
)
def test_self_test_on_the_known_picture(eyes: Seeing, wrong: str) -> None:
    found = module.check(eyes, eyes)  # type: ignore[arg-type]
    assert found.endswith(wrong) and bool(found) == bool(wrong)
    assert KNOWN.stat().st_size < 40_000


def test_golden_self_test_with_the_real_weights() -> None:
    judge = GenEval()
    try:
        judge.digest()
    except SetupError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    assert judge.self_check() == ""


# ---- rows and errors


def test_rows() -> None:
    values = {"single_object": [1, 1, 0, 0], "counting": [0, 0], "colors": [1, 1]}
    scores = [Score(f"{task}{i // 2}", i % 2, float(v), task) for task, vs in values.items() for i, v in enumerate(vs)]
    full = [replace(s, value=1.0) for s in scores]
    rows = {v.variant: v for v in GenEval().summarise(scores, full, Bootstrap(200))}
    assert list(rows) == ["", "single_object", "counting", "colors", "images", "prompts"]
    assert math.isclose(rows[""].value, (0.5 + 0 + 1) / 3) and rows[""].extra["tasks"] == 3
    assert math.isclose(rows["images"].value, 4 / 8) and math.isclose(rows["prompts"].value, 2 / 4)
    assert math.isclose(rows[""].extra["difference"], 0.5 - 1) and rows[""].n == 8


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ({}, "no 'tag' and 'include'"),
        ({"tag": "colors", "include": []}, "no 'tag' and 'include'"),
        ({"tag": "colors", "include": [{"class": "unicorn", "count": 1}]}, "asks for unicorn"),
    ],
)
def test_prompts_that_cannot_be_judged(files: dict[str, str], meta: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        metric(files).score(Sample("7", "p", meta, PICTURE))


def test_relation_that_does_not_exist() -> None:
    metadata = {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["beside", 0]}]}
    found = {"class": "cat", "box": [0, 0, 1, 1], "score": 0.9}
    with pytest.raises(ConfigError, match="prompt 7: unknown relation 'beside'"):
        GenEval().judge({"prompt_id": "7", "index": 0, "metadata": metadata, "objects": [found]})


def test_missing_weights_name_the_file_and_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SetupError, match=r"weights missing: mask2former_swin-s.*743b7d99\.pth") as caught:
        GenEval().score(ask("single_object", {"class": "cat", "count": 1}))
    assert "openmmlab" in caught.value.hint and "HEATKV_WEIGHTS_DIR" in caught.value.hint


def test_min_score_must_not_hide_objects() -> None:
    with pytest.raises(ConfigError, match="above a threshold"):
        GenEval(min_score=0.4)
