"""Two commands that write into the same folder at the same time: no row is lost, and none is double."""

from __future__ import annotations

import csv
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from campaign_world import OUT
from kept import rows
from sandbox import Outcome, Sandbox

TIMES = 10
PATIENCE = 300.0
COMMON = ("metric=kl,psnr,shapes", "--limit", "2", "runtime.batch_size=1", "contact_sheet=0", *OUT)
PAIRS = {
    "disjoint": (("method=streaming", "budget=0.2,0.1"), ("method=sinks", "budget=0.2,0.1")),
    "overlapping": (("method=streaming", "budget=0.2,0.1"), ("method=streaming,sinks", "budget=0.1,0.05")),
    "the same": (("method=streaming", "budget=0.2,0.1"),) * 2,
}
LOCKED = (3, 6)
"""Codes that the README gives: a folder that another process writes; a sweep of which some runs failed, by that."""

pytestmark = pytest.mark.slow


@pytest.fixture
def boxes(tmp_path: Path) -> Iterator[tuple[Sandbox, Sandbox]]:
    """Two sandboxes over one folder, each with a warm process of its own."""
    pair = Sandbox(tmp_path / "a"), Sandbox(tmp_path / "b")
    pair[1].place = pair[0].place
    try:
        for box in pair:
            box.root.mkdir()
            box.lay_out()
        pair[0].keep()
        yield pair
    finally:
        for box in pair:
            box.close()


def together(boxes: tuple[Sandbox, Sandbox], both: list[tuple[str, ...]], apart: float) -> list[Outcome]:
    """Start two commands, the second a moment later, and wait for both."""

    def run(i: int) -> Outcome:
        time.sleep(i * apart)
        return boxes[i].run(both[i], timeout=PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def doubles(out: Path) -> list[tuple[str, ...]]:
    """Keys of rows that are there more than once."""
    with (out / "results.csv").open(newline="", encoding="utf-8") as handle:
        keys = ((row["run_id"], row["metric"], row["variant"], row["asked"]) for row in csv.DictReader(handle))
        return [key for key, count in Counter(keys).items() if count > 1]


def alone(boxes: tuple[Sandbox, Sandbox], both: list[tuple[str, ...]]) -> list[str]:
    """The rows of two commands, one after the other."""
    boxes[0].lay_out()
    for argv in both:
        ended = boxes[0].run(argv, timeout=PATIENCE)
        assert ended.code == 0, ended.stderr
    return rows(boxes[0].place / "out")


@pytest.mark.parametrize("kind", PAIRS)
def test_two_evals(boxes: tuple[Sandbox, Sandbox], kind: str) -> None:
    """Whoever is told of a lock types the command again; what the other one made is there before that."""
    both, draw, wrong = [("eval", *words, *COMMON) for words in PAIRS[kind]], random.Random(kind), []
    own, expected = [set(alone(boxes, [argv])) for argv in both], alone(boxes, both)
    for turn in range(TIMES):
        boxes[0].lay_out()
        ends = together(boxes, both, draw.choice((0.0, draw.uniform(0.0, 1.0))))
        known = set(rows(boxes[0].place / "out"))
        for i, ended in enumerate(ends):
            if ended.code == 0 and (lost := own[i] - known):
                wrong.append(f"{turn}: lost of a command that was done: {sorted(lost)[:1]}")
            if ended.code in LOCKED and "is being written by process" in ended.stderr:
                ended = boxes[i].run(both[i], timeout=PATIENCE)
            if ended.code != 0:
                wrong.append(f"{turn}: exit code {ended.code}: {ended.stderr[-500:]}")
        found = rows(boxes[0].place / "out")
        if found != expected:
            lost, strange = (Counter(a) - Counter(b) for a, b in ((expected, found), (found, expected)))
            wrong.append(f"{turn}: lost {list(lost)[:2]}, strange {list(strange)[:2]}")
        wrong += [f"{turn}: double {key}" for key in doubles(boxes[0].place / "out")]
    assert not wrong, "\n".join(wrong)


def test_two_shards(boxes: tuple[Sandbox, Sandbox]) -> None:
    """Two halves at once, and then the whole: as many images and rows as one command makes."""
    words = ("method=streaming", "budget=0.2", "metric=kl,psnr,shapes", "--limit", "4", "runtime.batch_size=1", *OUT)
    argv = ("eval", "contact_sheet=0", *words)
    expected = alone(boxes, [argv])
    wrong = []
    for turn in range(TIMES):
        boxes[0].lay_out()
        for ended in together(boxes, [(*argv, "--shard", f"{i}/2") for i in range(2)], 0.0):
            if ended.code != 0:
                wrong.append(f"{turn}: exit code {ended.code}: {ended.stderr[-500:]}")
        whole = boxes[0].run(argv, timeout=PATIENCE)
        if whole.code != 0 or not set(expected) <= set(rows(boxes[0].place / "out")):
            lost = set(expected) - set(rows(boxes[0].place / "out"))
            wrong.append(f"{turn}: exit code {whole.code}, lost {sorted(lost)[:2]}: {whole.stderr[-300:]}")
        wrong += [f"{turn}: double {key}" for key in doubles(boxes[0].place / "out")]
    assert not wrong, "\n".join(wrong)
