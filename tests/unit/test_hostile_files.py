"""Files of the program's own that are no files, or no text: told at once, never waited for."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

from heatkv_cli.cli import run
from heatkv_cli.config import conf_dir
from heatkv_cli.config.groups import load_yaml
from heatkv_cli.errors import ArtifactError, ConfigError, SetupError
from heatkv_cli.models.weights import WeightFile, find_file
from heatkv_cli.results import load_json
from heatkv_cli.results.files import locked, sha256_file


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_json_is_utf_8(codec: str) -> None:
    with pytest.raises(ValueError, match=r"decode|Expecting"):
        load_json('{"a": "é"}'.encode(codec))
    assert load_json('{"a": "é"}'.encode()) == {"a": "é"}


BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"7\n", "not a mapping"),
        (b"[1, 2]\n", "not a mapping"),
        (b"", "not a mapping"),
        (b"a: caf\xe9\n", "codec"),
        (b"a: [1, 2\n", "expected"),
        (b"a:\n\tb: 1\n", "cannot start any token"),
        (b"!!python/object/apply:os.system [ls]\n", "constructor"),
        (BOMB.encode(), "alias"),
        (b"a: 1\nb: 2\na: 3\n", "a twice"),
        (b"a: {b: 1, b: 2}\n", "b twice"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "yaml"),
    ],
)
def test_yaml_that_is_no_plain_mapping(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_yaml(path)
    assert str(path) in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("target", ["/dev/full", "/dev/zero", "/proc/self/mem", "/nonexistent"])
def test_yaml_that_is_no_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "x.yaml").symlink_to(target)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_yaml(tmp_path / "x.yaml")


def test_every_yaml_of_ours_is_plain() -> None:
    paths = sorted(conf_dir().rglob("*.yaml"))
    assert len(paths) > 40
    assert all(load_yaml(path) for path in paths)


@pytest.mark.parametrize("way", ["pipe", "/dev/full", "/dev/zero", "itself", "file"])
def test_a_lock_is_a_file_of_our_own(tmp_path: Path, way: str) -> None:
    """A link may lead to a file of somebody else's, which a lock would empty."""
    lock, other = tmp_path / ".lock", tmp_path / "other"
    other.write_text("precious")
    if way == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to({"itself": ".lock", "file": "other"}.get(way, way))
    with pytest.raises(SetupError, match=r"cannot write .*\.lock"), locked(lock):
        pass
    assert other.read_text() == "precious"


def test_a_lock_that_held_garbage(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(bytes(range(256)) * 100)
    with locked(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_file_that_breaks_while_it_is_read_is_named() -> None:
    with pytest.raises(OSError, match="error") as error:
        sha256_file(Path("/proc/self/mem"))
    assert error.value.filename == "/proc/self/mem"


@pytest.mark.parametrize("target", ["/dev/full", "/dev/zero", "pipe"])
def test_weights_that_are_no_file(tmp_path: Path, target: str) -> None:
    if target == "pipe":
        os.mkfifo(tmp_path / "w.pth")
    else:
        (tmp_path / "w.pth").symlink_to(target)
    file = WeightFile(role="model", name="w.pth", source="somewhere")
    with pytest.raises(ArtifactError, match="neither a file nor a folder"):
        find_file("m", file, tmp_path, verify=False)


def test_an_output_that_is_a_link_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    assert run(["eval", "method=full", "--dry-run", "--out", str(tmp_path / "out")]) == 3
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"), [(("eval", "budget=7"), 2), (("evl",), 2), (("generate", "--nosuch"), 2), (("ls", "nosuch"), 2)]
)
def test_an_error_whose_document_finds_no_room(
    words: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error keeps its own code; that stdout is full is told beside it."""
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full:  # closing it fails too
        monkeypatch.setattr(sys, "stdout", full)
        ended = run([*words, "--json"])
    monkeypatch.undo()
    assert ended == code
    said = capsys.readouterr().err
    assert "error: cannot write to stdout" in said
    assert said.count("error: ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "--budget", "0.1", "--budget", "0.2"), "--budget is given twice"),
        (("score", "--images", "a", "--images", "b"), "--images is given twice"),
        (("eval", "seed=" + "[" * 3000 + "]" * 3000), "cannot read the override"),
        (("eval", "seed=" + "{a:" * 1000 + "1" + "}" * 1000), "cannot read the override"),
        (("generate", f"seed={2**63}"), f"seed is {2**63}"),
        (("eval", "--plugin", ""), "plugin is ''"),
        (("eval", "--plugin", "-1"), "plugin is -1"),
        (("eval", "--plugin", "x" * 5000), "plugin: cannot look at"),
    ],
)
def test_words_that_nobody_can_mean(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(list(words)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error: ") == 1
