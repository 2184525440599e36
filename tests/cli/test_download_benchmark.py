"""`heatkv download benchmark=NAME` from a hub of the test's own: what is asked for comes, where the YAML looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.pipeline import files

Capture = pytest.CaptureFixture[str]
Call = Callable[..., dict[str, Any]]
STYLES = ("anime", "concept-art", "paintings", "photo")
CONF = Path(__file__).resolve().parents[2] / "conf" / "benchmark"


class FakeHub:
    """The two functions of huggingface_hub that are used for datasets, over a dictionary."""

    def __init__(self) -> None:
        prompts = {f"benchmark/{style}.json": [f"{style} {i}" for i in range(800)] for style in STYLES}
        meta = {f"id{i}": {"prompt": f"p {i}", "category": "food"} for i in range(30_000)}
        self.tree: dict[str, dict[str, bytes]] = {
            "zhwang/HPDv2": {name: json.dumps(content).encode() for name, content in prompts.items()},
            "playgroundai/MJHQ-30K": {"meta_data.json": json.dumps(meta).encode(), "mjhq30k_imgs.zip": b"PK"},
        }
        self.fetched: list[tuple[str, str]] = []

    def HfApi(self) -> FakeHub:  # noqa: N802
        return self

    def dataset_info(self, dataset: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        siblings = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in self.tree[dataset].items()]
        return SimpleNamespace(sha=revision or "c0ffee" + "0" * 34, siblings=siblings)

    def hf_hub_download(self, dataset: str, path: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        assert repo_type == "dataset" and revision
        self.fetched.append((path, revision))
        target = Path(local_dir) / path  # as the package does: the repository's folders below local_dir
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.tree[dataset][path])
        return str(target)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(files, "hub", lambda: fake)
    monkeypatch.setenv("HEATKV_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_folder_of_prompts(hub: FakeHub, tmp_path: Path, call: Call) -> None:
    report = call("download", "benchmark=hpsv2")
    data = tmp_path / "data" / "hpsv2"
    assert sorted(path.name for path in data.iterdir()) == sorted(f"{style}.json" for style in STYLES)
    assert report["bytes"] == sum(map(len, hub.tree["zhwang/HPDv2"].values()))
    revision = "b9517430f34b1080d4f741118d2a440155a165cd"
    assert report["revisions"] == {"zhwang/HPDv2": revision} and {r for _, r in hub.fetched} == {revision}
    (data / "photo.json").unlink()
    (data / "anime.json").write_text(json.dumps([f"mine {i}" for i in range(800)]))
    call("download", "benchmark=hpsv2")
    assert [path for path, _ in hub.fetched[4:]] == ["benchmark/photo.json"]  # only what is missing
    assert "mine 0" in (data / "anime.json").read_text()  # what is there is never replaced
    assert call("download", "benchmark=hpsv2")["files"] == [] and len(hub.fetched) == 5


def test_prompts_and_images(hub: FakeHub, tmp_path: Path, call: Call, capsys: Capture) -> None:
    call("download", "benchmark=mjhq30k")
    assert [path for path, _ in hub.fetched] == ["meta_data.json"]
    assert run(["download", "benchmark=mjhq30k", "--images"]) == 0
    table, said = capsys.readouterr()
    folder = tmp_path / "data" / "mjhq30k"
    assert f"unzip -q {folder}/mjhq30k_imgs.zip -d {folder}/mjhq30k_imgs" in said
    assert "none stated" in table and "resolve/main/mjhq30k_imgs.zip" in table
    assert (folder / "mjhq30k_imgs.zip").read_bytes() == b"PK"
    assert call("download", "benchmark=mjhq30k", "--images")["files"] == []


def test_what_came_is_read(hub: FakeHub, call: Call) -> None:
    hub.tree["zhwang/HPDv2"]["benchmark/photo.json"] = b'["one"]'
    (error,) = call("download", "benchmark=hpsv2", code=3)["errors"]
    assert "has 2401 prompts, expected 3200" in error["error"]


def test_what_the_repository_lacks_is_said_before(hub: FakeHub, call: Call) -> None:
    del hub.tree["zhwang/HPDv2"]["benchmark/photo.json"]
    (error,) = call("download", "benchmark=hpsv2", code=3)["errors"]
    assert "has no benchmark/photo.json" in error["error"] and not hub.fetched


def test_dry_run_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Call) -> None:
    monkeypatch.setattr(files, "hub", lambda: pytest.fail("the hub was asked"))
    monkeypatch.setenv("HEATKV_DATA", str(tmp_path / "data"))
    assert call("download", "benchmark=hpsv2", "--dry-run")["bytes"] == 274_547
    assert call("download", "benchmark=mjhq30k", "--images", "--dry-run")["bytes"] == 3_608_820_000
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("failing", ["dataset_info", "hf_hub_download"])
def test_no_connection_is_one_error_with_the_addresses(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: Capture, failing: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(hub, failing, refuse)
    assert run(["download", "benchmark=mjhq30k"]) == 3
    said = capsys.readouterr().err
    assert said.count("error: ") == said.count("fix: ") == 1 and "offline mode is enabled" in said
    url = "https://huggingface.co/datasets/playgroundai/MJHQ-30K/resolve/main/meta_data.json"
    assert f"{url} -> " in said and "unset HF_HUB_OFFLINE" in said


def not_on_hub() -> list[str]:
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    return sorted(name for name, content in found.items() if content.get("source") and not content.get("hub"))


@pytest.mark.parametrize("name", not_on_hub())
def test_what_is_not_on_the_hub_says_where_it_is(hub: FakeHub, name: str, tmp_path: Path, call: Call) -> None:
    (error,) = call("download", f"benchmark={name}", code=3)["errors"]
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert "is not on the hub" in error["error"] and content["source"] in error["error"]
    assert str(tmp_path / "data" / content["file"]) in error["fix"]


def test_bundled_prompts_need_nothing(hub: FakeHub, call: Call) -> None:
    assert call("download", "benchmark=shapes")["files"] == []
    (error,) = call("download", "benchmark=shapes", "--images", code=2)["errors"]
    assert "has no images on the hub" in error["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["benchmark=hpsv"], "did you mean 'hpsv2'"),
        (["metric=fid"], "available: model, benchmark"),
        (["benchmark=hpsv2", "--weights", "w"], "HEATKV_DATA"),
        (["tiny", "--images"], "benchmark=NAME"),
    ],
)
def test_what_cannot_be_meant(hub: FakeHub, arguments: list[str], words: str, call: Call) -> None:
    (error,) = call("download", *arguments, code=2)["errors"]
    assert words in error["fix"]


def test_a_missing_list_says_the_command_and_addresses_are_no_part_of_a_run(hub: FakeHub, capsys: Capture) -> None:
    assert run(["generate", "benchmark=hpsv2"]) == 3
    assert "heatkv download benchmark=hpsv2, or get it from" in capsys.readouterr().err
    assert "hub" not in compose(["benchmark=hpsv2"]).first.benchmark.identity()["params"]
