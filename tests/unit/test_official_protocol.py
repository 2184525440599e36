"""The line protocol with official packages: what is asked and answered, and every way a worker can fail."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatkv_cli.errors import ArtifactError, HeatKVError, SetupError
from heatkv_cli.metrics.preference.official import WORKER, OfficialScorer

HELLO = 'say({"ready": "hpsv2", "protocol": 1, "versions": {"hpsv2": "9"}})\n'
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def start(tmp_path: Path, body: str, timeout: float = 20) -> OfficialScorer:
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "def say(x): print(json.dumps(x), flush=True)\n"
        "def ask(): return json.loads(sys.stdin.readline())\n" + body
    )
    return OfficialScorer("hpsv2", sys.executable, {"checkpoint": "x.pt"}, timeout, "metric.hps_v21", script)


def test_one_line_in_one_line_out(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    scorer = start(
        tmp_path,
        HELLO + f"log = [sys.argv[1:]]\nfor line in sys.stdin:\n  log.append(json.loads(line))\n"
        f"  open({str(log)!r}, 'w').write(json.dumps(log))\n  say({{'id': log[-1]['id'], 'score': len(log) / 4}})\n",
    )
    assert scorer.versions == {"hpsv2": "9"}
    assert scorer([PICTURE, PICTURE + 1], ["a cat", "größe\n猫"]) == [0.5, 0.75]
    arguments, first, second = json.loads(log.read_text())
    assert (arguments[0], json.loads(arguments[1])) == ("hpsv2", {"checkpoint": "x.pt"})
    assert (first["id"], first["prompt"], second["prompt"]) == (0, "a cat", "größe\n猫")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(second["image"]))))
    assert (sent == PICTURE + 1).all()
    assert scorer([PICTURE], ["again"]) == [1.0]


def test_failure_on_one_picture_leaves_the_worker_running(tmp_path: Path) -> None:
    scorer = start(
        tmp_path, HELLO + "ask(); say({'id': 0, 'error': 'no such thing'})\nask(); say({'id': 0, 'score': 2})\n"
    )
    with pytest.raises(ArtifactError, match="official hpsv2, prompt 'a cat': no such thing"):
        scorer([PICTURE], ["a cat"])
    assert scorer([PICTURE], ["a cat"]) == [2.0]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("sys.exit('no torch here')", r"ended while starting \(exit code 1\); it said: no torch here"),
        ("say({'fatal': 'ImportError: clip'})", "cannot run in .*: ImportError: clip"),
        ("say({'ready': 'hpsv2', 'protocol': 2, 'versions': {}})", "did not greet with protocol 1"),
        ("print('hello', flush=True); ask()", "answered no JSON object: 'hello"),
        ("print('[1]', flush=True); ask()", "answered no JSON object"),
        (HELLO + "ask(); os._exit(9)", r"ended while scoring 'a cat' \(exit code 9\)"),
        (HELLO + "ask(); say({'id': 5, 'score': 1})", "answered out of turn"),
        (HELLO + "ask(); print('loading', file=sys.stderr, flush=True); time.sleep(60)", "did not answer in 1 s"),
    ],
)
def test_workers_that_fail(tmp_path: Path, body: str, text: str) -> None:
    def ask() -> None:
        start(tmp_path, body, 1 if "sleep" in body else 20)([PICTURE], ["a cat"])

    with pytest.raises(SetupError, match=text) as caught:
        ask()
    assert caught.value.hint


def test_dead_worker_is_told_every_time(tmp_path: Path) -> None:
    scorer = start(tmp_path, HELLO + "ask(); os._exit(3)")
    for _ in range(2):
        with pytest.raises(HeatKVError, match="exit code 3"):
            scorer([PICTURE], ["a cat"])


def test_worker_ends_with_its_scorer(tmp_path: Path) -> None:
    scorer = start(tmp_path, HELLO + "sys.stdin.read()")
    process = scorer._process
    scorer.close()
    assert process.poll() == 0


def test_no_such_python() -> None:
    with pytest.raises(SetupError, match="cannot start /nowhere/python for the official hpsv2"):
        OfficialScorer("hpsv2", "/nowhere/python", {}, 5, "metric.hps_v21")


def test_shipped_worker_says_what_is_missing() -> None:
    with pytest.raises(SetupError, match="ModuleNotFoundError: No module named 'ImageReward'") as caught:
        OfficialScorer(
            "image-reward", sys.executable, {"checkpoint": "x", "med_config": "y"}, 60, "metric.image_reward"
        )
    assert "README" in caught.value.hint


def test_shipped_worker_imports_the_standard_library_only() -> None:
    lines = [
        line.split()[1].split(".")[0] for line in WORKER.read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert set(lines) <= set(sys.stdlib_module_names)
    assert "heatkv_cli" not in WORKER.read_text()
