"""Model files: one rule of where they are, what is wrong with them, and fetching them from a hub of the test's own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.models import weights
from heatkv_cli.models.weights import WeightFile, damage, find_file, places
from heatkv_cli.pipeline import files
from heatkv_cli.planning.resolver import weight_file
from heatkv_cli.results import hub_cache, large_files

Capture = pytest.CaptureFixture[str]
FLAT = WeightFile("transformer", "net.pth", hub="owner/repo/net.pth")
FOLDER = WeightFile("text", "flan", hub="google/flan", parts=("config.json", "model.safetensors"))


@pytest.fixture(autouse=True)
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weights, and no cache but an empty one."""
    monkeypatch.delenv("HEATKV_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    yield
    large_files._digest.cache_clear()


def cached(repository: str, path: str, content: bytes = b"\x80x", revision: str = "main") -> Path:
    """Put a file into the hub's cache, as huggingface_hub lays it out."""
    root = hub_cache() / f"models--{repository.replace('/', '--')}"
    target = root / "snapshots" / "0123abcd" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text("0123abcd")
    return target


# ----------------------------------------------------------------------------------------------------- where they are


def test_the_named_folder_comes_before_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    in_cache = cached("owner/repo", "net.pth")
    assert find_file("m", FLAT, None) == find_file("m", FLAT, folder) == in_cache
    below = folder / "m" / "net.pth"
    below.parent.mkdir(parents=True)
    below.touch()
    assert find_file("m", FLAT, folder) == below
    (folder / "net.pth").touch()
    assert find_file("m", FLAT, folder) == folder / "net.pth"
    assert find_file("other", FLAT, None) == in_cache


def test_option_environment_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("option", "environment"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "infinity_2b_reg.pth").touch()
    cached("FoundationVision/Infinity", "infinity_2b_reg.pth")

    def found(*overrides: str) -> str:
        cfg = compose(["model=infinity-2b", "model.weights.verify=false", *overrides]).first
        return str(weight_file(cfg, cfg.model.weights.files[0]))

    assert "snapshots" in found()
    monkeypatch.setenv("HEATKV_WEIGHTS_DIR", str(tmp_path / "environment"))
    assert "environment" in found()
    assert "option" in found(f"weights={tmp_path / 'option'}")


def test_a_file_that_no_hub_has_is_looked_for_in_the_assets_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = WeightFile("model", "own.safetensors", source="a checkout")
    monkeypatch.setattr(weights, "asset", lambda name: tmp_path / "assets" / name)
    with pytest.raises(SetupError, match=r"own\.safetensors is missing; looked at") as caught:
        find_file("m", own, tmp_path)
    assert str(tmp_path / "assets" / "own.safetensors") in caught.value.message
    assert (
        caught.value.hint
        == "it comes from a checkout; put it into a folder named by --weights DIR or HEATKV_WEIGHTS_DIR"
    )
    (tmp_path / "assets").mkdir()
    for name in (own.name, FLAT.name):
        (tmp_path / "assets" / name).touch()
    assert find_file("m", own, tmp_path) == tmp_path / "assets" / own.name
    with pytest.raises(SetupError):
        find_file("m", FLAT, tmp_path)  # is on the hub
    (tmp_path / own.name).touch()
    assert find_file("m", own, tmp_path) == tmp_path / own.name


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HOME": "h"}, "h/hub"),
        ({"HF_HOME": "h", "HF_HUB_CACHE": "c"}, "c"),
        ({"XDG_CACHE_HOME": "x"}, "x/huggingface/hub"),
        ({"HF_HUB_CACHE": "~/c"}, "~/c"),
    ],
)
def test_the_cache_is_where_the_environment_says(environment: dict[str, str], folder: str) -> None:
    code = "from heatkv_cli.results import hub_cache; print(hub_cache())"
    hidden = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    rest = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "-c", code], env={**rest, **environment}, capture_output=True, text=True)
    assert done.stdout.strip() == os.path.expanduser(folder), done.stderr


def test_only_the_revision_that_is_named_is_found() -> None:
    there = cached("owner/repo", "folder/net.pth", revision="v1")
    file = WeightFile("r", "net.pth", hub="owner/repo/folder/net.pth", revision="v1")
    assert find_file("m", file, None) == there
    with pytest.raises(SetupError, match=r"models--owner--repo/snapshots/main/folder/net\.pth"):
        find_file("m", WeightFile("r", "net.pth", hub="owner/repo/folder/net.pth"), None)


def test_what_huggingface_hub_has_in_its_cache_is_found() -> None:
    there = cached("owner/repo", "folder/net.pth")
    found = huggingface_hub.hf_hub_download("owner/repo", "folder/net.pth", local_files_only=True)
    assert Path(found) == there == find_file("m", WeightFile("r", "net.pth", hub="owner/repo/folder/net.pth"), None)


def test_a_whole_folder_comes_before_one_that_lacks_a_part(tmp_path: Path) -> None:
    (tmp_path / "flan").mkdir()
    assert find_file("m", FOLDER, tmp_path) == tmp_path / "flan"  # another format, perhaps: its loader knows
    for part in FOLDER.parts:
        complete = cached("google/flan", part).parent
    assert find_file("m", FOLDER, tmp_path) == complete


def test_a_missing_file_says_all_places_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        find_file("infinity-2b", FLAT, tmp_path)
    for place in places("infinity-2b", FLAT, tmp_path):
        assert str(place) in caught.value.message
    assert caught.value.message.count("net.pth") == 4
    assert "heatkv download infinity-2b" in caught.value.hint


def test_another_content_is_refused_unless_it_is_ones_own(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"mine")
    file = WeightFile("r", "net.pth", sha256="0" * 64, hub="owner/repo/net.pth")
    with pytest.raises(ArtifactError, match="is not the file the config names") as caught:
        find_file("m", file, tmp_path)
    assert "model.weights.verify=false" in caught.value.hint
    assert find_file("m", file, tmp_path, verify=False) == tmp_path / "net.pth"


# -------------------------------------------------------------------------------------------------- what is wrong with


def good_folder(path: Path) -> Path:
    path.mkdir()
    save_file({"a": torch.zeros(4)}, path / "shard.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    torch.save({"a": torch.zeros(4)}, path / "net.pth")
    (path / "old.pth").write_bytes(pickle.dumps({"a": 1}))
    return path


PARTS = ("shard.safetensors", "model.safetensors.index.json", "net.pth", "old.pth")


def test_whole_files_have_nothing_wrong(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "w")
    assert damage(WeightFile("r", "w", parts=PARTS), folder) == ""
    sha = weights.sha256_path(folder / "net.pth")
    assert (
        damage(
            WeightFile("r", "net.pth", sha256=sha, bytes=(folder / "net.pth").stat().st_size), folder / "net.pth", True
        )
        == ""
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("part", "harm", "words"),
    [
        ("shard.safetensors", cut, "its header says"),
        ("shard.safetensors", lambda path: path.write_bytes(b"abc"), "cut short"),
        ("shard.safetensors", lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"), "cannot be read"),
        ("net.pth", cut, "table of contents"),
        ("net.pth", lambda path: path.write_bytes(b"<html>"), "neither"),
        ("old.pth", lambda path: path.write_bytes(b""), "empty"),
        ("net.pth", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
        ("model.safetensors.index.json", cut, "not JSON"),
        ("model.safetensors.index.json", lambda path: path.write_text("{}"), "not an index"),
        ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": "b"}}'), "names b"),
        ("shard.safetensors", Path.unlink, "lacks shard.safetensors"),
    ],
)
def test_damage_is_named(tmp_path: Path, part: str, harm: Any, words: str) -> None:
    folder = good_folder(tmp_path / "w")
    harm(folder / part)
    assert words in damage(WeightFile("r", "w", parts=PARTS), folder)


def test_sizes_may_be_rounded_and_digests_are_deep(tmp_path: Path) -> None:
    path = good_folder(tmp_path / "w") / "old.pth"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(10_000 - size))
    assert damage(WeightFile("r", "old.pth", bytes=10_040), path) == ""
    assert "expected" in damage(WeightFile("r", "old.pth", bytes=11_000), path)
    wrong = WeightFile("r", "old.pth", sha256="0" * 64)
    assert (damage(wrong, path), damage(wrong, path, deep=True)) == ("", "sha256 differs")


# -------------------------------------------------------------------------------------------------------- the commands


def test_models_shows_every_file_with_its_licence(capsys: Capture) -> None:
    assert run(["models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    states = {(file["model"], file["role"]): file["state"] for file in document["files"]}
    assert states["tiny", "model"] == "present"
    assert states["tiny-160", "model"] == ("present" if weights.asset("tiny-160.safetensors").exists() else "missing")
    assert {state for (model, _), state in states.items() if not model.startswith("tiny")} == {"missing"}
    assert {file["licence"] for file in document["files"]} == {"MIT", "Apache-2.0"}
    assert all(file["urls"] and file["bytes"] for file in document["files"] if file["model"][:4] != "tiny")
    assert run(["models"]) == 0
    assert "infinity_8b_512x512_weights" in capsys.readouterr().out


def test_a_named_model_decides_the_exit_code(tmp_path: Path, capsys: Capture) -> None:
    assert run(["models", "tiny", "--deep"]) == 0
    assert run(["models", "infinity-2b"]) == 3
    assert "next: heatkv download infinity-2b" in capsys.readouterr().err
    (tmp_path / "infinity_vae_d32reg.pth").write_bytes(b"<html>")
    assert run(["models", "infinity-2b", "--weights", str(tmp_path), "--json"]) == 3
    (file,) = (f for f in json.loads(capsys.readouterr().out)["files"] if f["role"] == "tokenizer")
    assert (file["state"], file["problem"]) == (
        "corrupt",
        "infinity_vae_d32reg.pth: neither a torch file nor safetensors",
    )
    assert run(["models", "infinity-9b"]) == 2


class FakeHub:
    """The two functions of huggingface_hub that are used, over a dictionary."""

    def __init__(self, tree: dict[str, dict[str, bytes]]):
        self.tree, self.fetched, self.calls = tree, [], []  # type: ignore[var-annotated]

    def HfApi(self) -> FakeHub:  # noqa: N802
        return self

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        siblings = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in self.tree[repository].items()]
        return SimpleNamespace(sha="c0ffee" + "0" * 34, siblings=siblings)

    def hf_hub_download(self, repository: str, path: str, *, revision: str, force_download: bool, **where: Any) -> str:
        self.calls.append((repository, path, revision, force_download, where))
        if "cache_dir" in where:
            return str(cached(repository, path, self.tree[repository][path], revision))
        target = Path(where["local_dir"]) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.tree[repository][path])
        return str(target)


TREE = {"o/r": {"net/a.json": b"{}", "net/b.pth": b"\x80x", "huge.bin": b"x" * 99}, "g/flan": {"config.json": b"{}"}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub({name: dict(entries) for name, entries in TREE.items()})
    monkeypatch.setattr(files, "hub", lambda: fake)
    return fake


def config(*overrides: str) -> Any:
    plan = compose(["model=infinity-2b", *overrides], command="download").first
    chosen = (
        WeightFile("transformer", "net", hub="o/r/net", parts=("a.json", "b.pth"), licence="MIT"),
        WeightFile("text", "flan", hub="g/flan", parts=("config.json",), bytes=2, revision="v2"),
    )
    from dataclasses import replace

    return replace(plan, model=replace(plan.model, weights=replace(plan.model.weights, files=chosen)))


class Silent:
    """A console that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def table(self, *_: Any) -> None: ...


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_download_fetches_what_is_named_and_missing(hub: FakeHub, tmp_path: Path, place: str) -> None:
    cfg = config(*([f"weights={tmp_path / 'w'}"] if place == "folder" else []))
    ui: Any = Silent()
    report = files.download(cfg, ui)
    assert [call[1] for call in hub.calls] == ["net/a.json", "net/b.pth", "config.json"]  # not huge.bin
    assert [call[2] for call in hub.calls] == ["main", "main", "v2"]
    assert (report["bytes"], report["revisions"]["o/r"][:6]) == (6, "c0ffee")
    assert "6 B to " in ui.said[0]
    for file in cfg.model.weights.files:
        assert damage(file, weight_file(cfg, file), deep=True) == ""  # found by the one rule
    if place == "folder":
        assert (tmp_path / "w" / "flan" / "config.json").read_bytes() == b"{}"
    assert files.download(cfg, ui)["files"] == []
    assert len(hub.calls) == 3


def test_download_replaces_what_is_damaged(hub: FakeHub, tmp_path: Path) -> None:
    cfg = config(f"weights={tmp_path}")
    ui: Any = Silent()
    files.download(cfg, ui)
    (tmp_path / "net" / "b.pth").write_bytes(b"<html>")
    hub.calls.clear()
    files.download(cfg, ui)
    assert {(call[1], call[3]) for call in hub.calls} == {("net/a.json", True), ("net/b.pth", True)}
    hub.tree["o/r"]["net/b.pth"] = b"<html>"
    (tmp_path / "net" / "b.pth").unlink()
    with pytest.raises(SetupError, match=r"came damaged: b\.pth: neither"):
        files.download(cfg, ui)


def test_dry_run_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setattr(files, "hub", lambda: pytest.fail("the hub was asked"))
    assert run(["download", "infinity-2b", "--weights", str(tmp_path / "w"), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == 8_820_000_000 + 1_560_000_000 + 11_400_000_000
    assert not (tmp_path / "w").exists()


def test_no_connection_is_one_error_with_the_addresses(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(hub, "model_info", refuse)
    assert run(["download", "infinity-8b"]) == 3
    said = capsys.readouterr().err
    assert said.count("error: ") == said.count("fix: ") == 1
    assert "offline mode is enabled" in said
    url = "https://huggingface.co/FoundationVision/Infinity/resolve/main/infinity_8b_weights/"
    assert f"{url}model-00004-of-00004.safetensors -> infinity_8b_weights/model-00004-of-00004.safetensors" in said


def test_what_the_repository_lacks_is_said(hub: FakeHub, tmp_path: Path) -> None:
    del hub.tree["o/r"]["net/b.pth"]
    ui: Any = Silent()
    with pytest.raises(SetupError, match=r"has no net/b\.pth"):
        files.download(config(f"weights={tmp_path}"), ui)
    assert not hub.calls


def test_a_full_disk_is_told_before(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    ui: Any = Silent()
    with pytest.raises(SetupError, match="6 B do not fit"):
        files.download(config(f"weights={tmp_path}"), ui)
    assert not hub.calls
