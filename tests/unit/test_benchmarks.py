"""Published benchmarks from files in their own formats; official folder trees, written and read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from heatkv_cli.benchmarks.base import ORIGINAL, Benchmark, PromptItem
from heatkv_cli.benchmarks.trees import LAYOUTS, Picture, read_geneval, read_hpsv2, write_geneval, write_hpsv2
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError

CONF = Path(__file__).resolve().parents[2] / "conf" / "benchmark"
PUBLISHED = ("geneval", "hpsv2", "image-reward", "coco2017", "mjhq30k", "dpg")
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "a photo of two cups",
    },
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files in the official formats, below HEATKV_DATA."""
    folder = tmp_path / "data"
    monkeypatch.setenv("HEATKV_DATA", str(folder))
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: Any) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    write("geneval/evaluation_metadata.jsonl", "".join(json.dumps(line) + "\n" for line in GENEVAL))
    for style in ("photo", "anime", "paintings", "concept-art"):
        write(f"hpsv2/{style}.json", [f"{style} one", f"{style} two"])
    write("hpsv2/drawbench.json", ["not asked for"])
    write(
        "image-reward/benchmark-prompts.json", [{"id": "000904-0035", "prompt": "a girl", "classification": "People"}]
    )
    coco = {
        "info": {},
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 4, "file_name": "000000000004.jpg"}],
        "annotations": [
            {"image_id": 4, "id": 70, "caption": "A dog. "},
            {"image_id": 9, "id": 90, "caption": "First of nine."},
            {"image_id": 9, "id": 20, "caption": "Second of nine."},
            {"image_id": 4, "id": 10, "caption": "Another dog."},
        ],
    }
    write("coco2017/captions_val2017.json", coco)
    write(
        "mjhq30k/meta_data.json",
        {
            "ab12": {"prompt": "a fox", "category": "animals", "aspect": 1},
            "cd34": {"prompt": "a hat", "category": "fashion"},
            "ef56": {"prompt": "a hen", "category": "animals"},
        },
    )
    write("dpg/prompts/partiprompts2.txt", "Two cups\non a table.\n")
    write("dpg/prompts/COCO1.txt", "A bus.")
    return folder


def benchmark(name: str, **changes: Any) -> Benchmark:
    fields = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert fields.pop("_target_") == "heatkv_cli.benchmarks.base.Benchmark"
    own = {key: value for key, value in fields.items() if key not in ("default_metrics", "world")}
    return Benchmark(**{**own, **changes})


def small(name: str, **changes: Any) -> Benchmark:
    return benchmark(name, **{"count": None, "sha256": None, **changes})


EXPECTED = {
    "geneval": (4, [("00000", "a photo of a bench"), ("00001", "a photo of two cups")]),
    "hpsv2": (
        1,
        [
            (f"{s}-{i:05d}", f"{s} {n}")
            for s in ("anime", "concept-art", "paintings", "photo")
            for i, n in enumerate(("one", "two"))
        ],
    ),
    "image-reward": (10, [("000904-0035", "a girl")]),
    "coco2017": (1, [("9", "First of nine."), ("4", "A dog.")]),
    "mjhq30k": (1, [("ab12", "a fox"), ("cd34", "a hat"), ("ef56", "a hen")]),
    "dpg": (4, [("COCO1", "A bus."), ("partiprompts2", "Two cups on a table.")]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_official_formats(data: Path, name: str) -> None:
    samples, expected = EXPECTED[name]
    prompts = small(name).load()
    assert [(item.id, item.prompt) for item in prompts.items] == expected
    assert benchmark(name).samples_per_prompt == samples
    assert len(prompts.sha256) == 64 and prompts == small(name).load()


def test_what_else_is_said_of_a_prompt(data: Path) -> None:
    assert small("geneval").load().items[1].meta == {k: v for k, v in GENEVAL[1].items() if k != "prompt"}
    assert small("hpsv2").load().items[3].meta == {"style": "concept-art", "style_index": 1}
    assert small("coco2017").load().items[0].meta == {"file_name": "000000000009.jpg"}
    assert small("mjhq30k").load().items[1].meta == {"category": "fashion"}


def test_published_sizes_are_asked_for(data: Path) -> None:
    sizes = {"geneval": 553, "hpsv2": 3200, "image-reward": 100, "coco2017": 5000, "mjhq30k": 30000, "dpg": 1065}
    for name, count in sizes.items():
        assert benchmark(name).count == count
        with pytest.raises(SetupError, match=f"expected {count}"):
            benchmark(name, sha256=None).load()
    with pytest.raises(SetupError, match="expected 5c48e0813e81"):
        benchmark("geneval").load()


def test_digests_follow_what_was_read(data: Path) -> None:
    file = data / "coco2017/captions_val2017.json"
    assert small("coco2017").load().sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for name, changed, other in (
        ("hpsv2", "hpsv2/photo.json", "hpsv2/drawbench.json"),
        ("dpg", "dpg/prompts/COCO1.txt", "dpg/readme.md"),
    ):
        before = small(name).load().sha256
        (data / other).write_text("changed")
        assert small(name).load().sha256 == before
        (data / changed).write_text((data / changed).read_text().replace("o", "0").replace("u", "v"))
        assert small(name).load().sha256 != before


def test_categories(data: Path) -> None:
    everything = small("mjhq30k").load()
    animals = small("mjhq30k", category="animals").load()
    assert [item.id for item in animals.items] == ["ab12", "ef56"] and animals.sha256 == everything.sha256
    with pytest.raises(ConfigError, match="no category 'animal'") as caught:
        small("mjhq30k", category="animal").load()
    assert "did you mean 'animals'" in caught.value.hint
    with pytest.raises(ConfigError, match="no category"):
        small("geneval", category="animals").load()


def test_rewriting_is_a_file_with_a_digest(data: Path) -> None:
    table = {"a photo of a bench": "a bench, shining", "a photo of two cups": "a photo of two cups"}
    (data / "mine.json").write_text(json.dumps(table))
    plain, other = small("geneval").load(), small("geneval", rewrites="mine.json").load()
    assert [item.prompt for item in other.items] == list(table.values())
    assert other.items[0].meta[ORIGINAL] == "a photo of a bench" and other.items[0].meta["tag"] == "single_object"
    digest = hashlib.sha256((data / "mine.json").read_bytes()).hexdigest()
    assert other.sha256 == hashlib.sha256(f"{plain.sha256} {digest}".encode()).hexdigest()
    for content, text in (('{"a": 1}', "no object of prompt"), ("{", "not JSON"), ("{}", "lacks 2 of 2 prompts")):
        (data / "mine.json").write_text(content)
        with pytest.raises(ConfigError, match=text):
            small("geneval", rewrites="mine.json").load()
    with pytest.raises(SetupError, match="cannot read"):
        small("geneval", rewrites="gone.json").load()


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_name_place_and_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATKV_DATA", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="is missing") as caught:
        benchmark(name).load()
    assert str(tmp_path / "nothing" / benchmark(name).file) in caught.value.message
    assert benchmark(name).source in caught.value.hint


def test_file_of_ones_own_comes_first(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(GENEVAL[0]) + "\n")
    assert len(small("geneval", file=str(own)).load()) == len(small("geneval", file="own.jsonl").load()) == 1


@pytest.mark.parametrize(
    ("name", "file", "content", "text"),
    [
        ("coco2017", "coco2017/captions_val2017.json", "{}", "not of the form coco-captions: no 'annotations'"),
        ("coco2017", "coco2017/captions_val2017.json", "[1]", "not of the form coco-captions"),
        ("hpsv2", "hpsv2/photo.json", "[", "not of the form hpdv2"),
        ("hpsv2", "hpsv2/photo.json", "[3]", "'prompt' is missing, blank or no text"),
        ("image-reward", "image-reward/benchmark-prompts.json", '[{"id": 1}]', "no 'prompt'"),
        ("image-reward", "image-reward/benchmark-prompts.json", "[]", "has no prompts"),
        ("mjhq30k", "mjhq30k/meta_data.json", '{"a": {"prompt": "x"}}', "no 'category'"),
    ],
)
def test_files_of_another_form(data: Path, name: str, file: str, content: str, text: str) -> None:
    (data / file).write_text(content)
    with pytest.raises(ConfigError, match=text):
        small(name).load()


def test_incomplete_folders(data: Path, tmp_path: Path) -> None:
    (data / "hpsv2" / "photo.json").unlink()
    with pytest.raises(SetupError, match=r"cannot read .*photo\.json"):
        small("hpsv2").load()
    with pytest.raises(SetupError, match="no folder of txt files"):
        small("dpg", file=str(tmp_path)).load()
    with pytest.raises(ConfigError, match=r"unknown benchmark\.format 'coco'"):
        small("coco2017", format="coco").load()


def test_imagenet_is_bundled() -> None:
    prompts = benchmark("imagenet").load()
    assert len(prompts) == 1000 and benchmark("imagenet").samples_per_prompt == 50
    assert [item.meta["class_index"] for item in prompts.items] == [str(i) for i in range(1000)]
    assert [prompts.items[i].prompt for i in (0, 207, 999)] == ["tench", "golden retriever", "toilet tissue"]


# ---- trees


def pictures(items: tuple[PromptItem, ...], samples: int, folder: Path) -> list[Picture]:
    made = []
    for i, item in enumerate(items):
        for k in range(samples):
            file = folder / f"run-{i}-{k}.png"
            Image.fromarray(np.full((5, 6, 3), (i, k, 7), np.uint8)).save(file)
            made.append(Picture(item, k, file))
    return made


def test_genevals_tree(data: Path, tmp_path: Path) -> None:
    items = small("geneval").load().items
    made = pictures(items, 2, tmp_path)
    assert write_geneval(made[1:], items, tmp_path / "tree") == 3
    names = sorted(str(p.relative_to(tmp_path / "tree")) for p in (tmp_path / "tree").rglob("*") if p.is_file())
    assert names == [
        "00000/metadata.jsonl",
        "00000/samples/0001.png",
        "00001/metadata.jsonl",
        "00001/samples/0000.png",
        "00001/samples/0001.png",
    ]
    assert [json.loads((tmp_path / "tree" / f"0000{i}" / "metadata.jsonl").read_text()) for i in (0, 1)] == GENEVAL
    back = read_geneval(tmp_path / "tree")
    assert [(p.item, p.sample) for p in back] == [(p.item, p.sample) for p in made[1:]]
    assert all(a.file.read_bytes() == b.file.read_bytes() for a, b in zip(back, made[1:], strict=True))
    assert LAYOUTS["geneval"].write(made, items, tmp_path / "again") == 4


def test_genevals_tree_has_the_original_prompt(data: Path, tmp_path: Path) -> None:
    (data / "r.json").write_text(json.dumps({line["prompt"]: "other words" for line in GENEVAL}))
    items = small("geneval", rewrites="r.json").load().items
    write_geneval(pictures(items, 1, tmp_path), items, tmp_path / "tree")
    assert json.loads((tmp_path / "tree/00001/metadata.jsonl").read_text()) == GENEVAL[1]


def test_hpsv2s_tree(data: Path, tmp_path: Path) -> None:
    items = small("hpsv2").load().items
    made = pictures(items, 1, tmp_path)
    assert LAYOUTS["hpsv2"].write(made[:3], items, tmp_path / "tree") == 3
    names = sorted(str(p.relative_to(tmp_path / "tree")) for p in (tmp_path / "tree").rglob("*.*"))
    assert names == ["anime/00000.jpg", "anime/00001.jpg", "concept-art/00000.jpg"]
    with Image.open(tmp_path / "tree/anime/00001.jpg") as opened:
        assert opened.format == "PNG" and opened.getpixel((0, 0)) == (1, 0, 7)
    write_hpsv2(made, tmp_path / "jpeg", jpeg_quality=95)
    with Image.open(tmp_path / "jpeg/photo/00001.jpg") as opened:
        assert opened.format == "JPEG" and opened.size == (6, 5)
    assert [p.item for p in read_hpsv2(tmp_path / "tree", items)] == list(items[:3])


def test_trees_of_other_runs(data: Path, tmp_path: Path) -> None:
    shapes = (PromptItem("a", "b"),)
    with pytest.raises(ConfigError, match="not of GenEval's list"):
        write_geneval(pictures(shapes, 1, tmp_path), shapes, tmp_path / "x")
    with pytest.raises(ConfigError, match="one image a prompt"):
        write_hpsv2(pictures(small("hpsv2").load().items, 2, tmp_path), tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"holds no 00000/samples"):
        read_geneval(tmp_path)
    with pytest.raises(ArtifactError, match="holds no <style>"):
        read_hpsv2(tmp_path, shapes)
    (tmp_path / "00000").mkdir()
    with pytest.raises(ArtifactError, match="no usable metadata"):
        read_geneval(tmp_path)
