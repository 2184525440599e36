"""The table of methods in the README, from conf/method/*.yaml and the docstrings of the classes they name.

python scripts/make_docs.py            # write it (make docs)
python scripts/make_docs.py --check    # fail where it is stale (make check)
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from heatkv_cli.config.groups import choices, read_yaml
from heatkv_cli.config.typed import load_target
from heatkv_cli.methods.base import Method
from runs import markdown

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- methods: made by `make docs` -->\n", "<!-- end of methods -->\n"
COLUMNS = ("method", "rule", "paper", "granularity", "calibration", "timing", "file")


def table() -> str:
    """One line per YAML file, the papers' methods by year, then the controls; then what differs from the papers."""
    files = {name: read_yaml("method", name) for name in choices("method")}
    order = sorted(files, key=lambda name: (not _arxiv(files[name]), name != "full", _arxiv(files[name]), name))
    kinds = {load_target(files[name]["_target_"]): name for name in reversed(order)}
    deviations = "\n".join(f"- `{name}`: {differs(kind)}" for kind, name in reversed(kinds.items()) if differs(kind))
    return (
        f"{markdown(COLUMNS, [_line(name, files[name]) for name in order])}\n<details>\n"
        f"<summary>What differs from the papers</summary>\n\n{deviations}\n\n</details>\n"
    )


def _arxiv(content: dict[str, Any]) -> str:
    """The number of the paper; it begins with year and month."""
    return str(content.get("paper", "")).removeprefix("arXiv ")


def _line(name: str, content: dict[str, Any]) -> list[str]:
    kind: type[Method] = load_target(content["_target_"])
    number = _arxiv(content)
    paper = f"[{number}](https://arxiv.org/abs/{number})" if number else "-"
    source = Path(str(inspect.getsourcefile(kind))).relative_to(README.parent / "heatkv_cli")
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


def differs(kind: type) -> str:
    """What stands after `Differs:` in a docstring, on one line; empty for nothing."""
    found = re.search(r"^Differs: (.*?)(?:\n\n|\n[A-Z]\w+:|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.MULTILINE)
    return re.sub(r" \(specs/[^)]*\)", "", " ".join(found[1].split())) if found else ""


def updated(text: str) -> str:
    """The README with a fresh table.

    Raises:
        ValueError: the two marks are not there, each once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name} needs the lines {BEGIN.strip()} and {END.strip()}, each once")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the table is stale")
    a = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if a.check and new != old:
        sys.exit("error: the table of methods in README.md is stale\nfix: make docs")
    if new != old:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
