"""The method of CONTRIBUTING.md works as printed."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError
from heatkv_cli.methods.base import Method, Setting

ROOT = Path(__file__).parents[2]
GEOMETRY = Geometry("small", 3, 4, 8, ScaleSchedule.squares((1, 2, 3, 4, 5)), 1)


def files_of_the_diff() -> dict[str, str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    parts = re.split(r"--- /dev/null\n\+\+\+ b/(\S+)\n", diff)[1:]
    return {
        name: "".join(line[1:] + "\n" for line in body.splitlines())
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture
def latest() -> Method:
    files = files_of_the_diff()
    config = yaml.safe_load(files["conf/method/latest.yaml"])
    module_name, class_name = config["_target_"].rsplit(".", 1)
    assert f"{module_name.replace('.', '/')}.py" in files
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module  # dataclasses look their module up
    exec(files[f"{module_name.replace('.', '/')}.py"], module.__dict__)
    method = getattr(module, class_name)()
    assert isinstance(method, Method)
    return method


def test_it_runs_within_its_budget(latest: Method) -> None:
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


def test_it_refuses_less(latest: Method) -> None:
    with pytest.raises(BudgetError, match="17/30"):
        latest.policy(Setting(GEOMETRY, Budget.parse("0.5"), 2))
