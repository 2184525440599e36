"""A thousand wrong command lines and more: each is refused in good form, or ends as a sound one does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import campaign, sample
from campaign_world import make_world
from case import Case
from sandbox import Sandbox
from verdict import Judge

SEED = int(os.environ.get("HEATKV_CAMPAIGN_SEED", "0"))
"""Another one draws other values, bits and places."""


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[Judge]:
    """A judge with a world of its own."""
    sandbox = Sandbox(tmp_path)
    try:
        make_world(sandbox)
        yield Judge(sandbox)
    finally:
        sandbox.close()


def check(judge: Judge, cases: list[Case]) -> None:
    """Every case holds; all that do not are told together."""
    wrong = {str(case): found for case in cases if (found := judge.judge(case))}
    lines = [f"{case}\n    " + "\n    ".join(found) for case, found in wrong.items()]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(lines)


def test_there_are_a_thousand_and_no_two_alike() -> None:
    cases = campaign(SEED)
    assert len({str(case) for case in cases}) >= 1000
    assert cases == campaign(SEED)
    assert {case.argv[0] for case in cases} >= {
        *("calibrate", "build-schedule", "generate", "eval", "bench", "score", "ls", "doctor", "models", "download")
    }


def test_a_sample(judge: Judge) -> None:
    check(judge, sample(campaign(0), 150, seed=0))


@pytest.mark.slow
def test_all(judge: Judge) -> None:
    check(judge, campaign(SEED))
