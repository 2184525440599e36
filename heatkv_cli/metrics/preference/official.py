"""Asks an official scoring package that lives in a Python of its own.

The packages image-reward and hpsv2 pin versions that break everything else, so they are never imported here. A worker
(``official_worker.py``, standard library and the one package) is started with the Python that has them; one line of
JSON goes in for a picture, one line comes back:

    worker: {"ready": "hpsv2", "protocol": 1, "versions": {"hpsv2x": "1.2.0", "torch": ...}}
    heatkv: {"id": 0, "prompt": "a cat", "image": "<PNG, base64>"}
    worker: {"id": 0, "score": 0.2876}      or {"id": 0, "error": "what happened"}

The end of its input ends the worker. Its last lines on stderr are shown when it dies.
"""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from heatkv_cli.errors import ArtifactError, SetupError
from heatkv_cli.metrics.scores import Pixels

PROTOCOL = 1
WORKER = Path(__file__).with_name("official_worker.py")


class OfficialScorer:
    """A running worker. Called with pictures and prompts it gives their scores.

    Args:
        package: ``hpsv2`` or ``image-reward``.
        python: path of the Python that has it.
        options: checkpoint and whatever else the worker tells the package.
        timeout: seconds to start (weights are read then), and for each picture.
        key: of the metric, for messages.
        worker: the script.

    Attributes:
        versions: versions of the packages that the worker uses.

    Raises:
        SetupError: it does not start, or speaks another protocol.
    """

    def __init__(
        self, package: str, python: str, options: Mapping[str, Any], timeout: float, key: str, worker: Path = WORKER
    ) -> None:
        self._package, self._python, self._timeout, self._key = package, python, timeout, key
        command = [os.path.expanduser(python), "-u", str(worker), package, json.dumps(dict(options))]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
            )
        except OSError as error:
            raise SetupError(
                f"cannot start {python} for the official {package}: {error.strerror or error}",
                f"{key}.python=/path/to/venv/bin/python, the interpreter that has the package",
            ) from error
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=20)
        threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()
        self._listener = threading.Thread(target=self._said.extend, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        self.close = weakref.finalize(self, _end, self._process)
        hello = self._answer("starting")
        versions = hello.get("versions")
        if (hello.get("ready"), hello.get("protocol")) != (package, PROTOCOL) or not isinstance(versions, dict):
            self.close()
            raise SetupError(f"the worker for {package} did not greet with protocol {PROTOCOL}: {hello}", "reinstall")
        self.versions: dict[str, str] = versions

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> list[float]:
        """Return scores as the package gives them.

        Raises:
            ArtifactError: the package failed on a picture.
            SetupError: the worker died or does not answer; it is ended.
        """
        return [self._ask(i, image, prompt) for i, (image, prompt) in enumerate(zip(images, prompts, strict=True))]

    def _ask(self, number: int, image: Pixels, prompt: str) -> float:
        request = {"id": number, "prompt": prompt, "image": base64.b64encode(_png(image)).decode("ascii")}
        stdin = self._process.stdin
        try:
            if stdin is None or stdin.closed:
                raise BrokenPipeError
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._dead("before it was asked") from None
        answer = self._answer(f"scoring {prompt[:60]!r}")
        if answer.get("id") != number:
            self.close()
            raise SetupError(f"the official {self._package} answered out of turn: {answer}", "run the command again")
        if "error" in answer:
            raise ArtifactError(f"official {self._package}, prompt {prompt[:60]!r}: {answer['error']}")
        score = answer.get("score")
        if not isinstance(score, (int, float)) or isinstance(score, bool):
            self.close()
            raise SetupError(f"the official {self._package} answered without a score: {answer}", "run it again")
        return float(score)

    def _answer(self, doing: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            raise SetupError(
                f"the official {self._package} did not answer in {self._timeout:g} s while {doing}{self._stderr()}",
                f"wait longer: {self._key}.timeout={max(1, round(10 * self._timeout))}; or {self._key}.backend=native",
            ) from None
        if line is None:
            raise self._dead(f"while {doing}")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.close()
            raise SetupError(f"the official {self._package} answered no JSON object: {line[:200]!r}", "run it again")
        if "fatal" in answer:
            self.close()
            raise SetupError(
                f"the official {self._package} cannot run in {self._python}: {answer['fatal']}",
                f"install it there as the README says, or use {self._key}.backend=native",
            )
        return answer

    def _dead(self, when: str) -> SetupError:
        self.close()
        return SetupError(
            f"the official {self._package} ended {when} (exit code {self._process.returncode}){self._stderr()}",
            f"run the command again, or use {self._key}.backend=native",
        )

    def _stderr(self) -> str:
        self._listener.join(timeout=1)  # lets the last words arrive
        return f"; it said: {''.join(list(self._said)[-5:]).strip()}" if self._said else ""


def _pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    """Hand on lines until the stream ends."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """End a worker: its input first, since it leaves by itself then."""
    try:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


def _png(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
