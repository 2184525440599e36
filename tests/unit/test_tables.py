"""The README's table of methods, and what it says of the papers."""

from __future__ import annotations

import make_docs
from heatkv_cli.config import choices
from heatkv_cli.config.groups import read_yaml
from heatkv_cli.config.typed import load_target


def test_the_tables_in_the_readme_are_fresh() -> None:
    text = make_docs.README.read_text(encoding="utf-8")
    assert make_docs.updated(text) == text, "make docs"
    stale = text.replace("what a window of the current queries looks at", "something else")
    assert stale != text
    assert make_docs.updated(stale) == text


def test_every_paper_has_its_deviations() -> None:
    for name in choices("method"):
        content = read_yaml("method", name)
        if content.get("paper"):
            assert len(make_docs.differs(load_target(content["_target_"]))) > 20, f"{name}: a paper, but no `Differs:`"
