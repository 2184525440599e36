"""A command that is killed at any moment, or ended by Ctrl-C, and typed again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign_world import OUT
from kept import differences, kept, rows
from sandbox import Outcome, Sandbox, Stop

MOMENTS = 20
SEED = int(os.environ.get("HEATKV_CAMPAIGN_SEED", "0"))
PATIENCE = 300.0
"""Seconds for a command that nobody disturbs, on a busy machine."""

COMMANDS = {
    "generate": ("generate", "method=heatkv", "budget=0.2,0.1", "--limit", "3", "runtime.batch_size=1", *OUT),
    "eval": (
        *("eval", "method=full,streaming,snapkv", "budget=0.2,0.1", "metric=kl,psnr,shapes"),
        *("--limit", "2", "runtime.batch_size=1", "contact_sheet=2", *OUT),
    ),
}
LOCKS = (".lock", ".meta.lock", ".scores.jsonl.lock", ".results.csv.lock")
pytestmark = pytest.mark.slow


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox with nothing in it but a calibration and a schedule."""
    sandbox = Sandbox(tmp_path)
    try:
        sandbox.lay_out()
        made = sandbox.run(("build-schedule", "budget=0.1", *OUT), timeout=PATIENCE)
        assert made.code == 0, made.stderr
        sandbox.keep()
        yield sandbox
    finally:
        sandbox.close()


def undisturbed(box: Sandbox, argv: tuple[str, ...]) -> tuple[dict[str, Any], Outcome]:
    """What a command leaves, and how it ends, where nobody disturbs it."""
    box.lay_out()
    ended = box.run(argv, timeout=PATIENCE)
    assert ended.code == 0, ended.stderr
    return kept(box.place / "out", skip=LOCKS), ended


def moments(draw: random.Random, events: int, number: int) -> list[Stop]:
    """Moments over the whole of a command: on the point of a change to a file, or some time after one."""
    counts = sorted(draw.randint(1, events) for _ in range(MOMENTS))
    return [Stop(number, count, draw.choice((0.0, draw.uniform(0.0, 0.3)))) for count in counts]


def again(box: Sandbox, argv: tuple[str, ...], sound: dict[str, Any]) -> list[str]:
    """What is wrong after the same command was typed again."""
    ended = box.run(argv, timeout=PATIENCE)
    wrong = [] if ended.code == 0 else [f"exit code {ended.code}: {ended.stderr[-500:]}"]
    return wrong + differences(sound, kept(box.place / "out", skip=LOCKS))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_loses_and_leaves_nothing(box: Sandbox, name: str) -> None:
    argv = COMMANDS[name]
    sound, ended = undisturbed(box, argv)
    wrong = {}
    for stop in moments(random.Random(f"{SEED} {name}"), len(ended.events), signal.SIGKILL):
        box.lay_out()
        killed = box.run(argv, timeout=PATIENCE, stop=stop)
        assert killed.signal == signal.SIGKILL or stop.delay, killed  # after a delay it may have come to its end
        if found := again(box, argv, sound):
            wrong[str(stop)] = [str(killed.events[-2:]), *found]
    assert not wrong, "\n".join(f"{stop}: {found}" for stop, found in wrong.items())


def test_ctrl_c_while_it_works(box: Sandbox) -> None:
    """It says what is known so far, and what to type; the same command comes to the end."""
    argv = COMMANDS["eval"]
    sound, ended = undisturbed(box, argv)
    wrong = {}
    for stop in moments(random.Random(f"{SEED} SIGINT"), len(ended.events), signal.SIGINT):
        box.lay_out()
        stopped = box.run(argv, timeout=PATIENCE, stop=stop)
        found = [] if stopped.code == 0 and stop.delay else list(_interrupted(stopped, rows(box.place / "out")))
        if found := found + again(box, argv, sound):
            wrong[str(stop)] = [str(stopped.events[-2:]), *found]
    assert not wrong, "\n".join(f"{stop}: {found}" for stop, found in wrong.items())


def _interrupted(ended: Outcome, known: list[str]) -> Iterator[str]:
    if ended.code != 130:
        yield f"exit code {ended.code}, signal {ended.signal}: {ended.stderr[-500:]}"
    if "Traceback" in ended.stderr or "Exception ignored" in ended.stderr:
        yield f"a trace: {ended.stderr[-500:]}"
    if "warning: interrupted" not in ended.stderr:
        yield f"nothing was said: {ended.stderr[-500:]}"
    if known and "beta_alloc" not in ended.stdout:
        yield f"{len(known)} rows are known, and no table was printed"


def test_ctrl_c_from_the_first_moment(box: Sandbox) -> None:
    """In a process of its own, from 0.2 s of its work on: while libraries are imported, models loaded, images made."""
    draw, argv = random.Random(f"{SEED} start"), COMMANDS["eval"]
    sound, _ = undisturbed(box, argv)
    wrong: dict[float, list[str]] = {}
    box.lay_out()
    for moment in sorted([0.2, 0.3, *(draw.uniform(0.2, 8.0) for _ in range(10))]):
        process = _started(box, argv)
        while process.poll() is None and _worked(process.pid) < moment:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=PATIENCE)
        ended = Outcome(process.returncode, 0, said, told, 0.0, 0, ())
        if ended.code != 0 and (found := list(_interrupted(ended, []))):
            wrong[moment] = found
    if left := again(box, argv, sound):
        wrong[-1.0] = left
    assert not wrong, "\n".join(f"{moment:.3f} s: {found}" for moment, found in wrong.items())


def _started(box: Sandbox, argv: tuple[str, ...]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(box.place / "home")}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    words = [sys.executable, "-m", "heatkv_cli", *box.filled(argv)]
    folder = box.place / "files"
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=folder)


def _worked(pid: int) -> float:
    """Seconds that a process has had of a processor."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
