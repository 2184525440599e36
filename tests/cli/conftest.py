"""Commands as a program calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from heatkv_cli.cli import run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command with --json and return its document: `call("eval", ..., code=0)`."""

    def command(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert run([*arguments, "--json"]) == code, capsys.readouterr().err
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return command
