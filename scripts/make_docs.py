"""Text about methods that is made from conf/method/*.yaml and the docstrings of the classes they name.

The table of methods in README.md, and rule, parameters, source and deviations of each method in docs/methods.md.

python scripts/make_docs.py            # write them (make docs)
python scripts/make_docs.py --check    # fail where one is stale (make check)
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from heatkv_cli.config.groups import choices, conf_dir, read_yaml
from heatkv_cli.config.typed import load_target
from heatkv_cli.methods.base import Method

ROOT = Path(__file__).resolve().parents[1]
README, METHODS = ROOT / "README.md", ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- methods: made by `make docs` -->\n", "<!-- end of methods -->\n"
COLUMNS = ("method", "rule", "paper", "granularity", "calibration", "timing", "file")


def table() -> str:
    """Return one line per YAML file: the papers' methods by year, then the controls."""
    return _markdown(COLUMNS, [_line(name, content) for name, content in _files().items()])


def sections() -> str:
    """Return rule, parameters, source and deviations of each method, in the table's order."""
    return "\n".join(_section(name, content) for name, content in _files().items())


def _files() -> dict[str, dict[str, Any]]:
    files = {name: read_yaml("method", name) for name in choices("method")}
    order = sorted(files, key=lambda name: (not _arxiv(files[name]), name != "full", _arxiv(files[name]), name))
    return {name: files[name] for name in order}


def _arxiv(content: dict[str, Any]) -> str:
    """The number of the paper; it begins with year and month."""
    return str(content.get("paper", "")).removeprefix("arXiv ")


def _line(name: str, content: dict[str, Any]) -> list[str]:
    kind: type[Method] = load_target(content["_target_"])
    number = _arxiv(content)
    paper = f"[{number}](https://arxiv.org/abs/{number})" if number else "-"
    source = Path(str(inspect.getsourcefile(kind))).relative_to(ROOT / "heatkv_cli")
    module = str(source.parent if source.name == "__init__.py" else source)
    method = kind(**{field.name: content[field.name] for field in fields(kind) if field.name in content})
    needs = "yes" if method.calibrated else "no"
    return [f"`{name}`", str(content["note"]), paper, kind.granularity, needs, _timing(content), f"`{module}`"]


def _timing(content: dict[str, Any]) -> str:
    """When it chooses: before or after the attention of a scale, the default first."""
    default = content.get("timing")
    if default is None:
        return "-" if content.get("budgetless") else "after"
    return f"{default}, {'before' if default == 'after' else 'after'}"


def _section(name: str, content: dict[str, Any]) -> str:
    """What the docstring and the YAML file of a method say."""
    kind = load_target(content["_target_"])
    parts = [f"### {name}\n", f"{inspect.getdoc(kind).splitlines()[0]}\n"]
    for part in ("Rule", "Source", "Differs"):
        if text := said(kind, part):
            begin = text[:1] if text.startswith("arXiv") else text[:1].upper()
            parts.append(f"**{part}.** {begin}{text[1:]}\n")
    rows = list(_parameters(name, content))
    return "\n".join([*parts, *([_markdown(("parameter", "default", "meaning"), rows)] if rows else [])])


def _parameters(name: str, content: dict[str, Any]) -> Iterator[list[str]]:
    """The parameters of a method with the comments of its YAML file."""
    known = {field.name for field in fields(load_target(content["_target_"]))}
    text = (conf_dir() / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    for key, default, comment in re.findall(r"^(\w+): *(.*?) *(?:# *(.*))?$", text, re.MULTILINE):
        if key in known:
            yield [f"`{key}`", f"`{default}`", comment.replace("|", "\\|")]


def said(kind: type, part: str) -> str:
    """Return what stands after `Rule:`, `Source:`, `Differs:` in a docstring, on one line; empty for nothing."""
    found = re.search(rf"^{part}: (.*?)(?:\n\n|\n[A-Z]\w+:|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def differs(kind: type) -> str:
    """Return the deliberate deviations of a method; empty for none."""
    return said(kind, "Differs")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def updated(text: str, made: Callable[[], str] = table) -> str:
    """Return a page with a fresh text between its marks.

    Raises:
        ValueError: the two marks are not there, each once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN.strip()} and {END.strip()}, each once")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{made()}\n{END}{rest.partition(END)[2]}"


PAGES: dict[Path, Callable[[], str]] = {README: table, METHODS: sections}
"""Pages, and what stands between their marks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a page is stale")
    a = parser.parse_args()
    for page, made in PAGES.items():
        old = page.read_text(encoding="utf-8")
        new = updated(old, made)
        if a.check and new != old:
            sys.exit(f"error: the methods in {page.relative_to(ROOT)} are stale\nfix: make docs")
        if new != old:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
