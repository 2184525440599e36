"""Methods from outside: the two doors by which code comes in, and that nothing else is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from heatkv_cli.cli import run
from heatkv_cli.config import compose
from heatkv_cli.errors import ConfigError, ConfigErrors
from heatkv_cli.results import read_csv

MINE = '''"""Everything, under another name."""
from dataclasses import dataclass
from pathlib import Path

import beside
from heatkv_cli.methods import Method, Policy, Setting

Path("ran").touch()


@dataclass(frozen=True)
class Mine(Method):
    """Keep everything."""

    weight: float = 0.5

    def policy(self, setting: Setting) -> Policy:
        return Policy(setting.geometry.full_tokens)


@dataclass(frozen=True)
class Needy(Mine):
    other: int = beside.NUMBER


def call() -> None:
    Path("called").touch()
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "minemethod.py"
    path.write_text(MINE, encoding="utf-8")
    path.with_name("beside.py").write_text("NUMBER = 3\n", encoding="utf-8")
    before = list(sys.path)
    yield path
    for name in ("minemethod", "beside"):
        sys.modules.pop(name, None)
    sys.path[:] = before


def composed(*words: str) -> object:
    return compose(["budget=1", *words], command="generate").first.method


def test_a_file_and_its_parameters(mine: Path) -> None:
    method = composed(f"plugin={mine}", "method=minemethod:Mine", "method.weight=0.25")
    assert (method.name, method.params) == ("minemethod:Mine", {"weight": 0.25})  # type: ignore[attr-defined]
    assert composed(f"plugin={mine}", "method=minemethod:Needy").params["other"] == 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"method\.weight"):
        composed(f"plugin={mine}", "method=minemethod:Mine", "method.weight=heavy")


def test_an_installed_module(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(mine.parent)
    assert composed("method=minemethod:Mine").target == "minemethod.Mine"  # type: ignore[attr-defined]


def test_its_code_and_what_it_imports_are_in_the_hash(mine: Path) -> None:
    words = [f"plugin={mine}", "method=minemethod:Mine", "budget=1"]
    first = compose(words, command="generate").first.code_sha256
    mine.write_text(MINE + "# a comment\n", encoding="utf-8")
    assert compose(words, command="generate").first.code_sha256 == first
    mine.with_name("beside.py").write_text("NUMBER = 4\n", encoding="utf-8")
    assert compose(words, command="generate").first.code_sha256 != first


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os:system", "is no method"),
        ("minemethod:call", "is no method"),
        ("minemethod:Path", "is no method"),
        ("minemethod:Nine", "has no Nine"),
        ("nosuchmodule:Mine", "there is no module nosuchmodule"),
        ("mine method:Mine", "is not a module"),
        (":Mine", "is not a module"),
        ("minemethod:", "has no "),
    ],
)
def test_other_things_are_refused_without_a_call(mine: Path, name: str, said: str) -> None:
    with pytest.raises((ConfigError, ConfigErrors), match=said):
        composed(f"plugin={mine}", f"method='{name}'")
    assert not Path("called").exists()


@pytest.mark.parametrize("key", ["model", "benchmark", "metric", "runtime", "reference.order", "method._target_"])
def test_no_other_key_is_a_door(mine: Path, key: str) -> None:
    sys.path.append(str(mine.parent))
    with pytest.raises((ConfigError, ConfigErrors)):
        composed(f"{key}='minemethod:Mine'")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [("1 / 0\n", "broken.py", "ZeroDivisionError"), ("def\n", "broken.py", "SyntaxError"), ("", "json.py", "another")]
    + [("", "two words.py", "not a Python file"), ("", "text.txt", "not a Python file"), (None, "gone.py", "not a P")],
)
def test_bad_files(mine: Path, content: str | None, name: str, said: str) -> None:
    path = mine.with_name(name)
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises((ConfigError, ConfigErrors), match=said):
        composed(f"plugin='{path}'", "method=full")


def test_a_row_of_ones_own(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=minemethod:Mine", "budget=1", "metric=kl", "limit=1", "runtime.threads=1", "contact_sheet=0"]
    assert run(["eval", "--plugin", str(mine), *words, "--out", "out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    row = next(row for row in read_csv(Path("out/results.csv")) if row["method"] == "minemethod:Mine")
    assert float(row["value"]) == 0 and row["run_id"] == document["runs"][0]["run_id"]
