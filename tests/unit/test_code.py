"""The digest of the code that makes images, and what counts as a changed checkout."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from heatkv_cli.results import code, meta

METHOD, MODEL = "heatkv_cli.methods.window.Window", "heatkv_cli.models.infinity.load.bundled"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package whose files are digested in place of ours."""
    copy = tmp_path / "root" / "heatkv_cli"
    shutil.copytree(code.PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", copy)
    monkeypatch.setattr(code, "_find", lambda target: copy.joinpath(*target.split(".")[1:-1]).with_suffix(".py"))
    return copy


def digest() -> str:
    code._meaning.cache_clear()
    return code.run_code_sha256(METHOD, MODEL)


@pytest.mark.parametrize(
    "file",
    ["methods/window.py", "methods/base.py", "methods/toolkit/caps.py", "core/cache.py", "models/infinity/rope.py"],
)
def test_an_edit_of_code_that_makes_images_is_seen(file: str, package: Path) -> None:
    before, path = digest(), package / file
    text = path.read_text(encoding="utf-8")
    path.write_text("# a remark\n" + text.replace('"""', '"""Other words. ', 1), encoding="utf-8")
    assert digest() == before, "comments and docstrings make no image"
    path.write_text(text + "\nNEW = 1\n", encoding="utf-8")
    assert digest() != before


@pytest.mark.parametrize("file", ["parts.py", "var/model.py", "infinity/checkpoint.py"])
def test_a_family_is_also_what_it_takes_from_the_room_of_models(file: str, package: Path) -> None:
    """VAR opens checkpoints with Infinity's code, and both share layers."""
    family, path = "heatkv_cli.models.var.load.load", package / "models" / file
    before = code.code_sha256(code.module_files(family))
    path.write_text(path.read_text(encoding="utf-8") + "\nNEW = 1\n", encoding="utf-8")
    assert code.code_sha256(code.module_files(family)) != before


@pytest.mark.parametrize(
    "file", ["models/var/model.py", "methods/snapkv.py", "metrics/pixels.py", "console.py", "pipeline/rows.py"]
)
def test_code_of_others_is_not(file: str, package: Path) -> None:
    before, path = digest(), package / file
    path.write_text(path.read_text(encoding="utf-8") + "\nNEW = 1\n", encoding="utf-8")
    assert digest() == before


def test_a_new_file_of_the_engine_is_seen(package: Path) -> None:
    before = digest()
    (package / "core" / "more.py").write_text("X = 1\n", encoding="utf-8")
    assert digest() != before


def test_an_untracked_method_makes_a_checkout_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "heatkv_cli" / "results").mkdir(parents=True)
    module = root / "heatkv_cli" / "results" / "meta.py"
    module.write_text("", encoding="utf-8")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    monkeypatch.setattr(meta, "__file__", str(module))
    assert meta._git()["git_dirty"] is False
    (root / "notes.txt").write_text("not code", encoding="utf-8")
    assert meta._git()["git_dirty"] is False
    (root / "heatkv_cli" / "methods").mkdir()
    (root / "heatkv_cli" / "methods" / "mine.py").write_text("X = 1\n", encoding="utf-8")
    assert meta._git()["git_dirty"] is True
