"""The method and the metric of CONTRIBUTING.md work as printed, and are short."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from heatkv_cli.config import build
from heatkv_cli.console import Console
from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.base import Method, Setting
from heatkv_cli.metrics.base import Metric, Sample
from heatkv_cli.pipeline.measure import Item, measure, metric_rows

ROOT = Path(__file__).parents[2]
GEOMETRY = Geometry("small", 3, 4, 8, ScaleSchedule.squares((1, 2, 3, 4, 5)), 1)
METHOD, METRIC = "conf/method/latest.yaml", "conf/metric/mad.yaml"
LONGEST = 25
"""Lines of a Python file that is an example."""


def files_of_the_diffs() -> dict[str, str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = [
        part
        for diff in re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
        for part in re.split(r"--- /dev/null\n\+\+\+ b/(\S+)\n", diff)[1:]
    ]
    return {
        name: "".join(line[1:] + "\n" for line in body.splitlines())
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


FILES = files_of_the_diffs()


def config_of(path: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The YAML of an example, with its Python file as an imported module."""
    config: dict[str, Any] = yaml.safe_load(FILES[path])
    name = config["_target_"].rpartition(".")[0]
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    exec(FILES[f"{name.replace('.', '/')}.py"], module.__dict__)
    return config


@pytest.fixture
def latest(monkeypatch: pytest.MonkeyPatch) -> Method:
    config = config_of(METHOD, monkeypatch)
    method: Method = build(config["_target_"], {}, Method)
    return method


@pytest.fixture
def mad(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return config_of(METRIC, monkeypatch)


def made(config: dict[str, Any], **changed: Any) -> Metric:
    params = {key: value for key, value in config.items() if key != "_target_"} | changed
    metric: Metric = build(config["_target_"], params, Metric, where="metric.mad")
    return metric


def test_the_examples_are_whole_and_short() -> None:
    python = [name for name in FILES if name.endswith(".py")]
    assert set(FILES) - set(python) == {METHOD, METRIC}
    assert len(python) == 2
    for name in python:
        assert len(FILES[name].splitlines()) <= LONGEST, name


@pytest.mark.parametrize("command", ["format --diff", "check --quiet"])
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_the_examples_pass_our_own_checks(name: str, command: str) -> None:
    line = [sys.executable, "-m", "ruff", *command.split(), "--stdin-filename", str(ROOT / name), "-"]
    found = subprocess.run(line, input=FILES[name], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_method_runs_within_its_budget(latest: Method) -> None:
    cache = KVCache(GEOMETRY, latest.policy(Setting(GEOMETRY, Budget.parse("0.6"), 2)), rows=2, cond_rows=1)
    for count in GEOMETRY.schedule.lengths:
        for layer in range(GEOMETRY.num_layers):
            q, k, v = torch.randn(3, 2, GEOMETRY.num_heads, count, GEOMETRY.head_dim)
            assert cache.attend(layer, q, k, v, 0.3).isfinite().all()
            assert cache.pool.used <= cache.pool.capacity
        cache.end_step()
    assert cache.pool.used == 0
    assert cache.ledger.ratios()["beta_alloc"] <= 0.6
    assert cache.pool.peak == cache.pool.capacity


def test_the_method_refuses_less(latest: Method) -> None:
    with pytest.raises(BudgetError, match="17/30"):
        latest.policy(Setting(GEOMETRY, Budget.parse("0.5"), 2))


def test_the_metric_measures(mad: dict[str, Any], tmp_path: Path) -> None:
    reference = np.zeros((2, 2, 3), np.uint8)
    image = reference.copy()
    image[0, 0] = (200, 10, 0)  # the first would wrap around in 8 bits: 0 - 200
    samples = [Sample("a", image=image, reference=reference), Sample("b", image=reference, reference=image)]
    items = [Item(s.prompt_id, s.prompt_id, lambda s=s: s) for s in samples]
    measured = measure(made(mad), items, tmp_path, Console(quiet=True))
    assert [score.value for score in measured.scores] == [210 / 12] * 2
    (row,) = metric_rows(made(mad), measured)
    assert (row["metric"], row["value"], row["n"], row["status"]) == ("mad", 210 / 12, 2, "ok")
    assert row["metric_settings"] == '{"least":1}'


def test_the_parameter_of_the_metric_counts_and_has_a_range(mad: dict[str, Any]) -> None:
    sample = Sample("a", image=np.full((1, 1, 3), 9, np.uint8), reference=np.zeros((1, 1, 3), np.uint8))
    assert made(mad, least=9).score(sample).value == 9
    assert made(mad, least=10).score(sample).value == 0
    assert made(mad, least=9).identity() != made(mad, least=10).identity()
    with pytest.raises(ConfigError, match="least"):
        made(mad, least=0)
