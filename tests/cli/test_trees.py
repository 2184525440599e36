"""`heatkv generate` lays images out as the scorers of GenEval and HPSv2 read them: tiny model, lists of two prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., dict[str, Any]]
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle on white"},
    {
        "tag": "counting",
        "include": [{"class": "square", "count": 2}],
        "exclude": [{"class": "square", "count": 3}],
        "prompt": "two blue squares on white",
    },
]
NEW = ["benchmark.count=null", "benchmark.sha256=null", "runtime.batch_size=2", "method=sinks", "budget=0.1"]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists in the benchmarks' own formats, and the options that all commands share."""
    monkeypatch.setenv("HEATKV_DATA", str(tmp_path / "data"))
    for name in ("geneval", "hpsv2"):
        (tmp_path / "data" / name).mkdir(parents=True)
    lines = "".join(json.dumps(line) + "\n" for line in GENEVAL)
    (tmp_path / "data" / "geneval" / "evaluation_metadata.jsonl").write_text(lines)
    for style in ("anime", "concept-art", "paintings", "photo"):
        prompts = ["a red circle on white", "a blue square on white"] if style == "anime" else []
        (tmp_path / "data" / "hpsv2" / f"{style}.json").write_text(json.dumps(prompts))
    return ["--limit", "all", "--out", str(tmp_path / "out")]


def generate(call: Call, *words: str, code: int = 0) -> dict[str, Any]:
    new = [word for word in NEW if "hpsv2" not in " ".join(words) or "sha256" not in word]
    return call("generate", *new, *words, code=code)


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_genevals_tree(words: list[str], call: Call) -> None:
    (report,) = generate(call, "benchmark=geneval", *words)["runs"]
    tree, made = Path(report["tree"]), Path(report["path"])
    numbered = [f"{i:05}/samples/{k:04}.png" for i in range(2) for k in range(4)]
    assert below(tree) == sorted(["00000/metadata.jsonl", "00001/metadata.jsonl", *numbered])
    for i, line in enumerate(GENEVAL):
        (found,) = (tree / f"{i:05}" / "metadata.jsonl").read_text().splitlines()
        assert json.loads(found) == line
    pairs = [(tree / f"{i:05}/samples/{k:04}.png", made / f"{i:05}-{k}.png") for i in range(2) for k in range(4)]
    assert all(theirs.samefile(ours) for theirs, ours in pairs)  # no second copy on the disk
    pairs[0][0].unlink()
    pairs[1][0].unlink()
    pairs[1][0].write_bytes(b"cut")
    generate(call, "benchmark=geneval", *words)
    assert all(theirs.read_bytes() == ours.read_bytes() for theirs, ours in pairs)


def test_genevals_tree_from_shards(words: list[str], call: Call) -> None:
    for shard in ("0/2", "1/2"):
        (report,) = generate(call, "benchmark=geneval", *words, "--shard", shard)["runs"]
    assert len(list(Path(report["tree"]).rglob("*.png"))) == 8


def test_hpsv2s_tree(words: list[str], call: Call) -> None:
    (report,) = generate(call, "benchmark=hpsv2", *words)["runs"]
    assert below(Path(report["tree"])) == ["anime/00000.jpg", "anime/00001.jpg"]
    made = Path(report["path"]) / "anime-00001.png"
    assert (Path(report["tree"]) / "anime" / "00001.jpg").samefile(made)


def test_copies_where_there_are_no_links(words: list[str], call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (report,) = generate(call, "benchmark=hpsv2", *words)["runs"]
    copy, made = Path(report["tree"]) / "anime" / "00000.jpg", Path(report["path"]) / "anime-00000.png"
    assert copy.read_bytes() == made.read_bytes() and not copy.samefile(made)


def test_a_list_that_does_not_fit_is_told_before_images(words: list[str], tmp_path: Path, call: Call) -> None:
    (tmp_path / "data" / "geneval" / "evaluation_metadata.jsonl").write_text('{"prompt": "a red circle on white"}\n')
    (error,) = generate(call, "benchmark=geneval", *words, code=2)["errors"]
    assert "not of GenEval's list" in error["error"]
    (error,) = generate(call, "benchmark=hpsv2", "benchmark.samples_per_prompt=2", *words, code=2)["errors"]
    assert "one image a prompt" in error["error"]
    assert not list(tmp_path.rglob("*.png"))


def test_other_benchmarks_have_no_tree(words: list[str], call: Call) -> None:
    assert "tree" not in call("generate", "--limit", "1", *words[2:])["runs"][0]
