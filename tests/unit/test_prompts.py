"""Prompt lists: the bundled ones are what they say, and any unusable list is an error that names file and line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

import make_shapes_prompts as maker
import shapes_world as world
from heatkv_cli.benchmarks.base import ASSETS, Benchmark, PromptItem, PromptSet, load_prompts
from heatkv_cli.errors import ConfigError, HeatKVError, SetupError
from heatkv_cli.metrics.fashion.network import CLASSES

CONF = Path(__file__).resolve().parents[2] / "conf"
BUNDLED = ("shapes", "shapes-calibration-a", "shapes-calibration-b")


def bundled(name: str) -> Benchmark:
    fields = yaml.safe_load((CONF / "benchmark" / f"{name}.yaml").read_text())
    assert fields.pop("_target_") == "heatkv_cli.benchmarks.base.Benchmark"
    return Benchmark(**{key: value for key, value in fields.items() if key not in ("default_metrics", "world")})


@pytest.fixture(scope="module")
def sets() -> dict[str, PromptSet]:
    return {name: bundled(name).load() for name in BUNDLED}


# ---- the bundled lists


def test_script_writes_the_committed_files() -> None:
    for stem, lines in maker.build_lists().items():
        committed = [json.loads(line) for line in (ASSETS / f"{stem}.jsonl").read_text().splitlines()]
        assert committed == lines


def test_sizes_and_ids(sets: dict[str, PromptSet]) -> None:
    assert {name: len(s) for name, s in sets.items()} == dict(zip(BUNDLED, (660, 10, 10), strict=True))
    assert sets["shapes"].items[0].id == "shapes-v1-0000"
    assert sets["shapes"].items[-1].id == "shapes-v1-0659"


def test_every_prefix_is_balanced_over_the_tasks(sets: dict[str, PromptSet]) -> None:
    tags = [item.meta["tag"] for item in sets["shapes"].items]
    assert Counter(tags) == dict.fromkeys(world.TASKS, 110)
    for n in range(1, 661):
        counts = Counter(tags[:n])
        assert max(counts.values()) - min(counts.get(task, 0) for task in world.TASKS) <= 1


def test_captions_repeat_only_where_a_task_has_too_few(sets: dict[str, PromptSet]) -> None:
    by_task: dict[str, Counter[str]] = {task: Counter() for task in world.TASKS}
    for item in sets["shapes"].items:
        by_task[item.meta["tag"]][item.prompt] += 1
    assert {task for task, c in by_task.items() if max(c.values()) > 1} == {"single_object", "two_object", "colors"}
    for counter in by_task.values():
        assert max(counter.values()) - min(counter.values()) <= 1


def test_no_scene_is_in_two_lists(sets: dict[str, PromptSet]) -> None:
    def meanings(name: str) -> set[str]:
        out = set()
        for item in sets[name].items:
            ground = next(word for word in item.prompt.split() if word in world.GROUNDS)
            groups = [json.dumps({k: v for k, v in g.items() if k != "position"}) for g in item.meta["include"]]
            relation = item.meta["include"][-1].get("position", [""])[0]
            # Both orders of a pair, so that "A left of B" meets "B right of A".
            for pair, name_ in ((groups, relation), (groups[::-1], maker.OPPOSITE.get(relation, ""))):
                out.add(" | ".join([item.meta["tag"], ground, name_, *pair]))
        return out

    for i, first in enumerate(BUNDLED):
        for second in BUNDLED[:i]:
            assert not meanings(first) & meanings(second), (first, second)


def test_calibration_lists_cover_all_tasks_in_two_wordings(sets: dict[str, PromptSet]) -> None:
    a, b = sets["shapes-calibration-a"].items, sets["shapes-calibration-b"].items
    tags = Counter(item.meta["tag"] for item in a)
    assert tags == Counter(item.meta["tag"] for item in b) and set(tags) == set(world.TASKS)
    assert all(item.prompt.startswith(("a ", "an ", "two ", "three ", "four ")) for item in a)
    assert all(item.prompt.startswith("on ") and " there " in item.prompt for item in b)
    for item in (*a, *b):
        world.encode_words(item.prompt)


def test_changed_file_is_refused(tmp_path: Path) -> None:
    benchmark = bundled("shapes")
    changed = tmp_path / "shapes-v1.jsonl"
    changed.write_text((ASSETS / "shapes-v1.jsonl").read_text().replace("red", "green", 1))
    with pytest.raises(SetupError, match="expected " + str(benchmark.sha256)):
        Benchmark("shapes", "1", str(changed), benchmark.sha256).load()
    assert len(Benchmark("shapes", "1", str(changed)).load()) == 660


def test_bare_name_means_the_bundled_file_and_a_path_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shapes-v1.jsonl").write_text('{"prompt": "mine"}\n')
    assert Benchmark("x", "1", "shapes-v1.jsonl").path == ASSETS / "shapes-v1.jsonl"
    assert Benchmark("x", "1", "./shapes-v1.jsonl").load().items == (PromptItem("00000", "mine"),)
    Path("other.txt").write_text("mine too\n")
    assert Benchmark("x", "1", "other.txt").load().items[0].prompt == "mine too"


# ---- formats


def test_txt(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  ein Hund, größer \n".encode())
    prompts = load_prompts(path)
    assert prompts.items == (PromptItem("00000", "a cat"), PromptItem("00001", "ein Hund, größer"))
    assert (prompts.name, prompts.version) == ("list", "1")


def test_jsonl_keeps_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(
        '{"tag": "colors", "include": [{"class": "cat"}], "prompt": "a red cat"}\n\n{"id": 7, "prompt": "b"}\n'
    )
    prompts = load_prompts(path)
    assert prompts.items[0] == PromptItem("00000", "a red cat", {"tag": "colors", "include": [{"class": "cat"}]})
    assert prompts.items[1].id == "7"


def test_csv_with_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "coco.CSV"
    path.write_text('image,caption,split\n42,"a cat, a dog\nand a cow",val\n43,b,val\n')
    prompts = load_prompts(path, id_field="image", prompt_field="caption")
    assert prompts.items[0] == PromptItem("42", "a cat, a dog\nand a cow", {"split": "val"})
    assert len(prompts) == 2


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a\r\nb\n")
    prompts = load_prompts(path)
    assert prompts.sha256 == hashlib.sha256(b"a\r\nb\n").hexdigest()
    assert [item.prompt for item in prompts.items] == ["a", "b"]


# ---- errors


@pytest.mark.parametrize(
    ("file", "content", "kind", "text"),
    [
        ("missing.txt", None, SetupError, "cannot read prompt list .*missing.txt"),
        ("list.yaml", b"a\n", ConfigError, "unknown ending '.yaml'"),
        ("list", b"a\n", ConfigError, "unknown ending ''"),
        ("empty.txt", b"", ConfigError, "has no prompts"),
        ("blank.txt", b"\n  \n", ConfigError, "has no prompts"),
        ("empty.jsonl", b"", ConfigError, "has no prompts"),
        ("empty.csv", b"", ConfigError, "has no prompts"),
        ("header.csv", b"id,prompt\n", ConfigError, "has no prompts"),
        ("latin.txt", "größe\n".encode("latin-1"), ConfigError, "not UTF-8"),
        ("twice.jsonl", b'{"id": 1, "prompt": "a"}\n\n{"id": "1", "prompt": "b"}\n', ConfigError, "line 3 .* line 1 "),
        ("auto.jsonl", b'{"id": "00001", "prompt": "a"}\n{"prompt": "b"}\n', ConfigError, "id '00001' of line 2"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ConfigError, "line 2: not JSON"),
        ("list.jsonl", b'["a"]\n', ConfigError, "line 1: expected an object, got list"),
        ("none.jsonl", b'{"prompt": "a"}\n{"text": "a"}\n', ConfigError, "line 2: 'prompt' is missing"),
        ("number.jsonl", b'{"prompt": 3}\n', ConfigError, "line 1: 'prompt' is missing, blank or no text"),
        ("blank.jsonl", b'{"prompt": " "}\n', ConfigError, "line 1: 'prompt' is missing, blank"),
        ("noid.jsonl", b'{"id": "", "prompt": "a"}\n', ConfigError, "line 1: 'id' must be"),
        ("true.jsonl", b'{"id": true, "prompt": "a"}\n', ConfigError, "line 1: 'id' must be"),
        ("up.jsonl", b'{"id": "../a", "prompt": "a"}\n', ConfigError, "line 1: 'id' must be"),
        ("slash.jsonl", b'{"id": "a/b", "prompt": "a"}\n', ConfigError, "line 1: 'id' must be"),
        ("column.csv", b"id,caption\n1,a\n", ConfigError, "no column 'prompt'"),
        ("short.csv", b"id,prompt\n1,a\n2\n", ConfigError, "line 3: 1 fields, but the header has 2"),
        ("long.csv", b"id,prompt\n1,a,b\n", ConfigError, "line 2: 3 fields"),
        ("same.csv", b"prompt,prompt\na,b\n", ConfigError, "line 1: a column name appears twice"),
        ("quote.csv", b'prompt\n"a\n', ConfigError, "not CSV"),
    ],
)
def test_unusable_lists(tmp_path: Path, file: str, content: bytes | None, kind: type[HeatKVError], text: str) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=text) as caught:
        load_prompts(path)
    assert caught.value.hint
    assert file in str(caught.value)


def test_directory_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(SetupError, match="cannot read"):
        load_prompts(tmp_path / "folder.txt")


def test_benchmark_needs_at_least_one_sample() -> None:
    with pytest.raises(ConfigError, match="samples_per_prompt is 0"):
        Benchmark("x", "1", "x.txt", samples_per_prompt=0)
    with pytest.raises(ConfigError, match="rounds is 0") as caught:
        Benchmark("x", "1", "x.txt", rounds=0)
    assert "benchmark.rounds=1" in caught.value.hint


def test_rounds_take_turns(tmp_path: Path) -> None:
    """Every prefix holds all prompts alike; ids differ; the digest is the file's, whatever the rounds."""
    file = tmp_path / "x.txt"
    file.write_text("a\nb\n")
    once, thrice = (Benchmark("x", "1", str(file), rounds=rounds).load() for rounds in (1, 3))
    assert [item.prompt for item in thrice.items] == ["a", "b", "b", "a", "a", "b"]
    assert [item.id for item in once.items] == ["00000", "00001"]
    assert [item.id for item in thrice.items[:4]] == ["00000-0000", "00001-0000", "00001-0001", "00000-0001"]
    assert once.sha256 == thrice.sha256


def test_classes_of_fashion_and_imagenet() -> None:
    """1,000 pictures of each class, in turn; calibration lists have other ids and so other seeds."""
    names = ("fashion", "fashion-calibration-a", "fashion-calibration-b")
    whole, *calibrations = (bundled(name).load() for name in names)
    assert len(whole) == 10_000 and [item.meta["class_index"] for item in whole.items[:12]] == [*"0123456789", *"12"]
    assert set(Counter(item.prompt for item in whole.items).values()) == {1000}
    for group in range(10):  # of a jackknife of 100 pictures
        assert len({item.prompt for item in whole.items[group:100:10]}) == 10
    prompts = [item.prompt for item in whole.items[:10]]
    assert tuple(prompts) == CLASSES
    ids = [item.id for found in (whole, *calibrations) for item in found.items]
    assert len(set(ids)) == len(ids)
    for found in calibrations:
        assert [(item.prompt, item.meta["class_index"]) for item in found.items] == list(
            zip(CLASSES, range(10), strict=True)
        )
    all_classes = [item.prompt for item in bundled("imagenet").load().items]
    a, b = (bundled(f"imagenet-calibration-{which}").load() for which in "ab")
    chosen = [[item.meta["class_index"] for item in found.items] for found in (a, b)]
    assert chosen == [list(range(0, 1000, 50)), list(range(25, 1000, 50))]
    assert all(item.prompt == all_classes[item.meta["class_index"]] for found in (a, b) for item in found.items)
