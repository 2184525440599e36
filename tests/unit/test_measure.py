"""Measuring one metric over many images: resuming, damaged images, missing weights, memory."""

from __future__ import annotations

import io
import json
import math
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatkv_cli.console import Console
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.base import ImageMetric, Sample, Score, SetMetric, Spec, Value
from heatkv_cli.metrics.frechet import frechet, frechet_value
from heatkv_cli.metrics.inception.fid import FID
from heatkv_cli.metrics.intervals import DEFAULT, Bootstrap
from heatkv_cli.metrics.kl import KL
from heatkv_cli.metrics.parameters import aside, parameter
from heatkv_cli.metrics.pixels import PSNR
from heatkv_cli.metrics.scores import Pixels
from heatkv_cli.metrics.statistics import Moments
from heatkv_cli.pipeline.image_folder import read_image, reference_of
from heatkv_cli.pipeline.measure import Item, Measured, measure, metric_rows


@dataclass(frozen=True)
class Brightness(ImageMetric):
    """An image metric that counts its work, and stops where it is told."""

    SPEC = Spec("brightness", "1", "", True, "prompt")

    batch_size: int = aside(4, least=1)
    stop_after: int | None = aside(None)
    weights: str = aside("none")
    strict: bool = parameter(False)
    seen: list[str] = field(default_factory=list, metadata={"counts": False})

    def __post_init__(self) -> None:
        """Nothing to check."""

    def digest(self) -> str:
        return self.weights

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.extend(s.prompt_id for s in samples)
        return [Score(s.prompt_id, s.index, float(s.image.mean())) for s in samples]  # type: ignore[union-attr]

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        return [Value("", math.fsum(s.value for s in scores) / len(scores), 0.1, 0.0, 1.0, len(scores))]


class Corner:
    """Features of an image: its first 4 numbers."""

    name = "corner"

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = 0, stop_after

    def digest(self) -> str:
        return "c" * 64

    def __call__(self, images: Sequence[Pixels]) -> np.ndarray:
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += len(images)
        return np.stack([image.ravel()[:4] for image in images]).astype(np.float32)


@dataclass(frozen=True)
class CornerDistance(SetMetric):
    """A set metric on them."""

    SPEC = Spec("corner_distance", "1", "", False, "set")

    corner: Corner = field(default_factory=Corner, metadata={"counts": False})
    batch_size: int = aside(4, least=1)
    min_images: int = parameter(2, least=2)
    reference: str = parameter("full")

    def __post_init__(self) -> None:
        """Nothing to check."""

    @property
    def extractor(self) -> Corner:
        return self.corner

    def statistics(self) -> Moments:
        return Moments(4)

    def compute(self, images: Moments, reference: Any = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
        return [frechet_value("", images, reference, bootstrap)]


def picture(i: int) -> Pixels:
    return np.random.default_rng(i).integers(0, 256, (2, 2, 3), dtype=np.uint8)


def items(count: int, keys: str = "k") -> list[Item]:
    return [Item(f"{i:05}", keys, partial(_made, i)) for i in range(count)]


def _made(i: int) -> Sample:
    return Sample(f"{i:05}", image=picture(i))


@pytest.fixture
def ui() -> Console:
    return Console(quiet=True)


def run(metric: Any, images: list[Item], folder: Path, ui: Console, **more: Any) -> Measured:
    return measure(metric, images, folder, ui, **more)


def test_scores_go_on_at_the_image_where_they_stopped(tmp_path: Path, ui: Console) -> None:
    first = Brightness(stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        run(first, items(30), tmp_path, ui)
    second = Brightness()
    found = run(second, items(30), tmp_path, ui)
    assert first.seen + second.seen == [f"{i:05}" for i in range(30)]
    assert found.status == "ok" and found.values[0].n == 30
    assert found.values[0].value == pytest.approx(np.mean([picture(i).mean() for i in range(30)]))
    assert [s.value for s in found.scores] == [float(picture(i).mean()) for i in range(30)]
    third = Brightness()
    assert run(third, items(30), tmp_path, ui) == found and not third.seen


def test_scores_are_made_again_when_anything_they_depend_on_changes(tmp_path: Path, ui: Console) -> None:
    run(Brightness(), items(6), tmp_path, ui)
    changed = items(5) + items(6, "other")[5:]
    for metric, images, expected in (
        (Brightness(), changed, 1),  # an image
        (Brightness(weights="d" * 64), items(6), 6),
        (Brightness(strict=True), items(6), 6),
        (Brightness(batch_size=1, name="brightness"), items(6), 1),  # 05 again
    ):
        run(metric, images, tmp_path, ui, bootstrap=Bootstrap(7))
        assert len(metric.seen) == expected


def test_features_go_on_too_and_are_shared(tmp_path: Path, ui: Console) -> None:
    reference = Moments(4)
    reference.add(range(40), Corner()([picture(900 + i) for i in range(40)]))
    stopped = CornerDistance(Corner(stop_after=20))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, items(40), tmp_path, ui, reference=lambda _: reference)
    resumed, whole = CornerDistance(batch_size=7), CornerDistance()
    found = run(resumed, items(40), tmp_path, ui, reference=lambda _: reference)
    assert (stopped.extractor.calls, resumed.extractor.calls) == (20, 20)
    expected = run(whole, items(40), tmp_path / "new", ui, reference=lambda _: reference)
    assert whole.extractor.calls == 40
    made = Moments(4)
    made.add(range(40), Corner()([picture(i) for i in range(40)]))
    error = 2 * frechet(made.gaussian(), reference.gaussian())[1]  # two orders of addition, each within its bound
    assert found.values[0].value == pytest.approx(expected.values[0].value, abs=error)
    assert found.values[0].stderr == pytest.approx(expected.values[0].stderr, abs=10 * error)  # of ten distances
    again = CornerDistance()
    run(again, items(40), tmp_path, ui, reference=lambda _: reference)
    assert again.extractor.calls == 0


def test_shards_make_the_whole(tmp_path: Path, ui: Console) -> None:
    reference = Moments(4)
    reference.add(range(20), Corner()([picture(900 + i) for i in range(20)]))
    images = items(20)
    for shard in range(2):
        for metric in (CornerDistance(), Brightness()):
            run(metric, images[shard::2], tmp_path, ui, shard=(shard, 2), reference=lambda _: reference)
    for kind in (CornerDistance, Brightness):
        merged, alone = kind(), kind()
        found = run(merged, images, tmp_path, ui, reference=lambda _: reference)
        expected = run(alone, images, tmp_path / "alone", ui, reference=lambda _: reference)
        assert (merged.extractor.calls if kind is CornerDistance else len(merged.seen)) == 0  # type: ignore[union-attr]
        assert found.values[0].value == pytest.approx(expected.values[0].value, rel=1e-6)


def test_a_damaged_image_is_named_and_the_others_count(tmp_path: Path, ui: Console) -> None:
    files = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(files):
        Image.fromarray(picture(i)).save(path)
    whole = files[4].read_bytes()
    files[4].write_bytes(whole[: len(whole) // 2])
    files[6].unlink()

    def load(path: Path) -> Sample:
        return Sample(path.stem, image=read_image(path))

    images = [Item(path.stem, "k", partial(load, path)) for path in files]
    for metric in (Brightness(), CornerDistance()):
        reference = Moments(4)
        reference.add(range(9), Corner()([picture(i) for i in range(9)]))
        found = run(metric, images, tmp_path / "out", ui, reference=lambda _, r=reference: r)
        assert (found.status, found.values[0].n) == ("partial", 7)
        assert "2 images could not be measured" in found.reason and "4.png" in found.reason
    files[4].write_bytes(whole)
    Image.fromarray(picture(6)).save(files[6])
    repaired = Brightness()
    found = run(repaired, images, tmp_path / "out", ui)
    assert (found.status, found.values[0].n, repaired.seen) == ("ok", 9, ["4", "6"])


def test_wrong_size_spoils_one_image_and_wrong_weights_the_metric(tmp_path: Path, ui: Console) -> None:
    def load(i: int) -> Sample:
        small = np.zeros((1, 1, 3), np.uint8) if i == 2 else picture(50)
        return Sample(str(i), image=picture(i), reference=small)

    found = run(PSNR(), [Item(str(i), "k", partial(load, i)) for i in range(5)], tmp_path, ui)
    assert (found.status, found.values[0].n) == ("partial", 4)
    assert "(2, 2, 3) but its reference has (1, 1, 3)" in found.reason

    class Broken(Brightness):
        def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
            raise ArtifactError("weights.pt does not fit the network")

    broken = run(Broken(), items(9), tmp_path, ui)
    assert (broken.status, broken.values, broken.reason) == ("failed", [], "weights.pt does not fit the network")


def test_what_is_missing_skips_one_metric_with_a_row_that_says_so(
    tmp_path: Path, ui: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)

    class Unable(Brightness):
        def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
            raise SetupError("package nothing is not installed", "pip install nothing")

    found = run(Unable(), items(3), tmp_path, ui)
    (row,) = metric_rows(Unable(), found)
    assert (row["status"], row["n"]) == ("skipped", 0) and "value" not in row
    assert row["reason"] == "package nothing is not installed; pip install nothing"
    fid = FID(min_images=2)
    skipped = run(fid, items(3), tmp_path, ui)
    assert skipped.status == "skipped" and "weights-inception-2015-12-05-6726825d.pth" in skipped.reason
    few = CornerDistance(min_images=2048)
    (row,) = metric_rows(few, run(few, items(3), tmp_path, ui))
    assert row["status"] == "skipped" and "3 images, at least 2048 are needed" in row["reason"]
    assert few.extractor.calls == 0, "nothing is extracted for a metric that will be skipped"
    for metric in (CornerDistance(), Brightness()):
        none = run(metric, [], tmp_path, ui)
        assert none.status == "skipped" and none.reason.startswith("0 images")


def test_a_reference_that_cannot_be_used_fails_its_metric_alone(tmp_path: Path, ui: Console) -> None:
    def gone(_: Any) -> Any:
        raise ArtifactError("ref.npz holds no 'mu' and 'sigma'")

    found = run(CornerDistance(), items(4), tmp_path, ui, reference=gone)
    assert (found.status, found.reason) == ("failed", "ref.npz holds no 'mu' and 'sigma'")
    for path in (tmp_path / "none", tmp_path / "none.npz"):
        found = run(CornerDistance(), items(4), tmp_path, ui, reference=reference_of(path, tmp_path, ui))
        assert found.status in ("failed", "skipped") and str(path) in found.reason


def test_reference_statistics_are_kept_by_content(tmp_path: Path, ui: Console) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(picture(70 + i)).save(folder / f"{i}.png")
    first = CornerDistance()
    found = run(first, items(12), tmp_path / "a", ui, reference=reference_of(folder, tmp_path / "out", ui))
    assert first.extractor.calls == 24
    (kept,) = (tmp_path / "out" / "references").glob("*/corner-cccccccc.npz")
    with np.load(kept) as stored:
        rows = np.stack([picture(70 + i).ravel()[:4] for i in range(12)]).astype(np.float64)
        np.testing.assert_allclose(stored["mu"], rows.mean(0))
        np.testing.assert_allclose(stored["sigma"], np.cov(rows.T))
    second = CornerDistance()
    again = run(second, items(12), tmp_path / "a", ui, reference=reference_of(folder, tmp_path / "out", ui))
    by_file = run(CornerDistance(), items(12), tmp_path / "a", ui, reference=reference_of(kept, tmp_path, ui))
    assert second.extractor.calls == 0 and again == found == by_file
    Image.fromarray(picture(99)).save(folder / "0.png")
    third = CornerDistance()
    other = run(third, items(12), tmp_path / "a", ui, reference=reference_of(folder, tmp_path / "out", ui))
    assert third.extractor.calls == 12 and other.values[0].value != found.values[0].value


# ---- what somebody else wrote into the folder


def edited(manifest: Path, row: int, column: str, value: Any) -> None:
    """Change one field of a manifest as an editor would."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[row][column] = value
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("value", "many"),
        ("value", ""),
        ("value", "nan"),
        ("value", 99.5),
        ("sample", 7),
        ("parts", {"x": 1}),
        ("prompt_id", "00009"),
        ("key", "z"),
        ("stratum", "x"),
        ("sha256_row", ""),
        ("status", "failed"),
    ],
)
def test_a_score_that_was_edited_is_made_again(column: str, value: Any, tmp_path: Path, ui: Console) -> None:
    whole = run(Brightness(), items(6), tmp_path, ui)
    (manifest,) = tmp_path.glob("scores/*/manifest.jsonl")
    edited(manifest, 2, column, value)
    again = Brightness()
    assert run(again, items(6), tmp_path, ui) == whole
    assert again.seen == ["00002"]
    unharmed = Brightness()
    assert run(unharmed, items(6), tmp_path, ui) == whole and not unharmed.seen


@pytest.mark.parametrize(("column", "value"), [("sample", "one"), ("sample", 3.5), ("parts", []), ("value", None)])
def test_a_score_of_another_type_is_refused(column: str, value: Any, tmp_path: Path, ui: Console) -> None:
    run(Brightness(), items(6), tmp_path, ui)
    (manifest,) = tmp_path.glob("scores/*/manifest.jsonl")
    edited(manifest, 2, column, value)
    with pytest.raises(ArtifactError, match=f"line 3: '{column}' is"):
        run(Brightness(), items(6), tmp_path, ui)


@pytest.mark.parametrize(
    "damage",
    ["gone", "pipe", "empty", "text", "header", "cut", "pickle", "double", "NaN", "place", "outside", "empty name"],
)
def test_features_that_cannot_be_read_are_made_again(damage: str, tmp_path: Path, ui: Console) -> None:
    reference = Moments(4)
    reference.add(range(12), Corner()([picture(900 + i) for i in range(12)]))
    whole = run(CornerDistance(), items(12), tmp_path, ui, reference=lambda _: reference)
    (manifest,) = tmp_path.glob("features/*/manifest.jsonl")
    block = manifest.parent / json.loads(manifest.read_text().splitlines()[5])["block"]
    content = {
        "empty": b"",
        "text": b"no features",
        "header": block.read_bytes().replace(b"'descr'", b"'descr(", 1),
        "cut": block.read_bytes()[:-3],
        "pickle": saved(np.array([None])),
        "double": saved(np.zeros((4, 4))),
        "NaN": saved(np.full((4, 4), np.nan, np.float32)),
    }
    if damage == "gone":
        block.unlink()
    elif damage == "pipe":
        block.unlink()
        os.mkfifo(block)
    elif damage in content:
        block.write_bytes(content[damage])
    else:
        column, value = {"place": ("place", 9), "outside": ("block", "../x.npy"), "empty name": ("block", "")}[damage]
        edited(manifest, 5, column, value)
    again = CornerDistance()
    found = run(again, items(12), tmp_path, ui, reference=lambda _: reference)
    assert again.corner.calls == (1 if damage in ("place", "outside", "empty name") else 4)
    assert found.status == "ok" and found.values[0].value == pytest.approx(whole.values[0].value, rel=1e-6)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


# ---- numbers that are none


class Saying(Brightness):
    """An image metric that says what the name of the prompt says."""

    def score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(s.prompt_id, s.index, float(s.prompt_id.split("=")[1])) for s in samples]

    def summarise(
        self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
    ) -> list[Value]:
        return ImageMetric.summarise(self, scores, baseline, bootstrap)


def named(*values: str) -> list[Item]:
    return [Item(v, "k", partial(Sample, f"{i}={v}")) for i, v in enumerate(values)]


def test_a_number_that_is_none_costs_its_image(tmp_path: Path, ui: Console) -> None:
    found = run(Saying(), named("1", "nan", "3", "inf"), tmp_path, ui)
    assert (found.status, found.values[0].n, found.values[0].value) == ("partial", 2, 2)
    assert "2 images could not be measured, the first: brightness: the number of prompt 1=nan is nan" in found.reason
    none = run(Saying(), named("nan", "-inf"), tmp_path / "none", ui)
    assert (none.status, none.values) == ("failed", [])
    assert run(Saying(), named("nan"), tmp_path / "one", ui).status == "failed"


def test_only_psnr_may_be_infinite(tmp_path: Path, ui: Console) -> None:
    same = [Item(str(i), "k", partial(Sample, str(i), image=picture(i), reference=picture(i))) for i in range(3)]
    found = run(PSNR(), same, tmp_path, ui)
    assert (found.status, found.values[0].value, found.values[0].n) == ("ok", math.inf, 3)

    class Endless(Brightness):
        def summarise(
            self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
        ) -> list[Value]:
            return [Value("all", math.inf, 0, 0, 0, 3)]

    class Empty(Brightness):
        def summarise(
            self, scores: Sequence[Score], baseline: Sequence[Score] | None = None, bootstrap: Bootstrap = DEFAULT
        ) -> list[Value]:
            return [Value("", 1.0, 0, 0, 0, 0)]

    for metric, text in ((Endless(), "brightness all is inf over 3 images"), (Empty(), "is 1.0 over 0 images")):
        found = run(metric, items(3), tmp_path, ui)
        assert (found.status, found.values) == ("failed", []) and text in found.reason


def test_features_and_distances_that_are_none_fail_the_metric(tmp_path: Path, ui: Console) -> None:
    class Blind(Corner):
        def __call__(self, images: Sequence[Pixels]) -> np.ndarray:
            return np.full((len(images), 4), np.nan, np.float32)

    reference = Moments(4)
    reference.add(range(8), Corner()([picture(i) for i in range(8)]))
    found = run(CornerDistance(Blind()), items(4), tmp_path, ui, reference=lambda _: reference)
    assert (found.status, found.reason) == ("failed", "corner gives features that are not finite")

    class Undecided(CornerDistance):
        def compute(self, images: Moments, reference: Any = None, bootstrap: Bootstrap = DEFAULT) -> list[Value]:
            return [Value("", math.nan, 0, 0, 0, images.n)]

    found = run(Undecided(), items(4), tmp_path / "b", ui, reference=lambda _: reference)
    assert (found.status, found.values) == ("failed", []) and "is nan over 4 images" in found.reason


@pytest.mark.parametrize(
    "recorded",
    [
        {},
        {"kl": "0.1"},
        {"kl": math.nan},
        {"kl": None},
        {"kl": True},
        {"kl": 0.1, "kl_s1": "x"},
        {"kl": 1, "kl_sx": 1.0},
    ],
)
def test_what_the_forced_pass_recorded_must_be_numbers(recorded: dict[str, Any], tmp_path: Path, ui: Console) -> None:
    good = Sample("good", recorded={"kl": 0.5, "kl_s1": 0.5})
    images = [Item("bad", "k", partial(Sample, "bad", recorded=recorded)), Item("good", "k", lambda: good)]
    found = run(KL(), images, tmp_path, ui)
    assert (found.status, found.values[0].n, found.values[0].value) == ("partial", 1, 0.5)
    assert "prompt bad" in found.reason


def test_bootstrap_of_the_run_reaches_the_values(tmp_path: Path, ui: Console) -> None:
    images = named(*map(str, range(20)))
    wide, narrow = (run(Saying(), images, tmp_path, ui, bootstrap=Bootstrap(500, c)).values[0] for c in (0.99, 0.5))
    assert wide.value == narrow.value and wide.low < narrow.low < narrow.high < wide.high
    (row,) = metric_rows(Saying(strict=True), run(Saying(strict=True), images, tmp_path, ui))
    assert row["metric_settings"] == '{"strict":true}'


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Brightness, CornerDistance])
def test_memory_stays_flat_over_70000_images(kind: Any, tmp_path: Path, ui: Console) -> None:
    big = np.zeros((128, 128, 3), np.uint8)  # 49 kB each, 3.4 GB together

    def load(i: int) -> Sample:
        image = big.copy()
        image[0, :2] = i % 251, i % 83, 0
        return Sample(str(i), image=image)

    reference = Moments(4)
    reference.add(range(8), Corner()([picture(i) for i in range(8)]))
    images = [Item(str(i), "k", partial(load, i)) for i in range(70_000)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = run(kind(batch_size=500), images, tmp_path, ui, reference=lambda _: reference)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert found.values[0].n == 70_000
    assert grown < 250, f"{grown:.0f} MB more; bookkeeping may take 2 kB an image"
