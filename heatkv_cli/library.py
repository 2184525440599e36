"""The library: what a notebook calls, and what the command line calls in its turn.

    import heatkv_cli as heatkv

    model = heatkv.load("tiny")
    made = model.generate(["a red circle on gray"], method="heatkv", budget=0.1, seed=0)
    made.images[0], made.costs["beta_alloc"]
    rows = heatkv.evaluate(model="tiny", method=["full", "heatkv"], budget=0.1, limit=16)   # a DataFrame

Keys are those of the command line (`runtime.threads=1` is `**{"runtime.threads": 1}`); a list is a sweep. Errors are
`HeatKVError` with a `message` and a `hint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from heatkv_cli.benchmarks.base import items_of
from heatkv_cli.config import Plan, compose
from heatkv_cli.config.sweep import PATH_KEYS, quote
from heatkv_cli.console import Console
from heatkv_cli.errors import ConfigError
from heatkv_cli.models.base import Trace
from heatkv_cli.pipeline.calibrate import calibrate_all
from heatkv_cli.pipeline.passes import Models, make_batch, memory_errors
from heatkv_cli.planning.job import Job, generators_of, images_of
from heatkv_cli.planning.preflight import preflight
from heatkv_cli.planning.resolver import Resolver
from heatkv_cli.results import ensure_writable

if TYPE_CHECKING:
    import pandas

STAGES = {
    "calibrate": "calibrate",
    "build-schedule": "build_schedule",
    "generate": "generate",
    "eval": "evaluate",
    "bench": "bench",
}
"""Commands that work on a plan, and the module of `pipeline` whose `run` does it."""


def run_stage(plan: Plan, ui: Console) -> dict[str, Any]:
    """Do what a command line asks for.

    Args:
        plan: what `compose` made of the command line.
        ui: where lines, tables and progress go.

    Returns:
        What was made and what it costs, as plain values.

    Raises:
        HeatKVError: what was asked for cannot be done.
    """
    run = import_module(f"heatkv_cli.pipeline.{STAGES[plan.command]}").run
    ensure_writable(plan.first.out)
    document: dict[str, Any] = run(plan, ui)
    return document


def calibrate(*overrides: str, **keys: Any) -> Path:
    """Measure what each head attends to; return the calibration's file. See `heatkv calibrate --help`."""
    return Path(_run("calibrate", overrides, keys)["path"])


def generate(*overrides: str, **keys: Any) -> list[Path]:
    """Make the images of runs; return the folder of each. See `heatkv generate --help`."""
    return [Path(run["path"]) for run in _run("generate", overrides, keys)["runs"]]


def evaluate(*overrides: str, **keys: Any) -> pandas.DataFrame:
    """Measure methods, making what is missing; return the rows of results.csv. See `heatkv eval --help`."""
    from heatkv_cli.results import read

    document = _run("eval", overrides, keys)
    rows = read(document["path"])
    return rows[rows["run_id"].isin([run["run_id"] for run in document["runs"]])].reset_index(drop=True)


def load(name: str = "tiny", **keys: Any) -> Model:
    """Return a model, its weights loaded.

    Args:
        name: as in `heatkv ls models`.
        **keys: keys of the command line, such as weights, out (calibrations are kept there), runtime.

    Raises:
        HeatKVError: there is no such model, or its files are missing or damaged.
    """
    return Model(_words((), {"model": name, **keys}))


class Model:
    """A loaded model. Made by `load`.

    Args:
        overrides: its command line.
    """

    def __init__(self, overrides: tuple[str, ...]):
        self._overrides, self._ui = overrides, Console(as_json=True, quiet=True)
        self._resolver, self._models = Resolver(), Models()
        self._models.get(self._job({"method": "full"}))

    def generate(
        self, prompts: Sequence[str], method: str = "full", budget: float | str = 1, seed: int = 0, **keys: Any
    ) -> Generated:
        """Make one image of each prompt, all in one batch, in memory. A calibration that is needed is made first.

        Args:
            prompts: texts; those of tiny are what its world of shapes has words for.
            method: as in `heatkv ls methods`.
            budget: share of the full cache that is kept.
            seed: of the run; every image derives its own.
            **keys: other keys of the command line: `**{"method.order": "random"}`.

        Raises:
            HeatKVError: a prompt the model has no words for, or a method that cannot meet the budget.
        """
        if isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts is {prompts!r}", 'a list of texts: ["a red circle on gray"]')
        given = {"method": method, "budget": budget, "seed": seed, **keys}
        if method == "full":
            del given["budget"]
        job, items = self._job(given), items_of(prompts)
        batch = images_of(job.cfg, items, 1)
        model = self._models.get(job)
        model.prepare(items, job.cfg.text_root)
        made = make_batch(job, model, batch, (), generators_of(batch))
        with memory_errors(len(batch)):
            pixels = model.decode(made.trace.latent).cpu().numpy()
        return Generated(list(pixels), dict(made.numbers), made.trace)

    def _job(self, keys: dict[str, Any]) -> Job:
        plan = compose((*self._overrides, *_words((), keys)), command="generate")
        plan = replace(plan, runs=tuple(replace(run, yes=True) for run in plan.runs))
        if len(plan.runs) > 1:
            raise ConfigError(f"these are {len(plan.runs)} runs", "one method at one budget at a time")
        ready = preflight(plan, self._resolver)
        ready.check(plan)
        calibrate_all(ready.calibrations, self._resolver, self._ui)
        return self._resolver.job(plan.first)


@dataclass(frozen=True)
class Generated:
    """Images and what they cost.

    Args:
        images: uint8 (height, width, 3) each.
        costs: bytes, attended tokens, and seconds an image, named as the columns of results.csv.
        trace: the codes, logits and latent of the batch.
    """

    images: list[NDArray[np.uint8]]
    costs: dict[str, float]
    trace: Trace


def _run(command: str, overrides: Sequence[str], keys: dict[str, Any]) -> dict[str, Any]:
    return run_stage(compose(_words(overrides, keys), command=command), Console(as_json=True, quiet=True))


def _words(overrides: Sequence[str], keys: dict[str, Any]) -> tuple[str, ...]:
    """Python values as a command line would say them."""
    return (*overrides, *(f"{key}={_spelled(key, value)}" for key, value in keys.items()))


def _spelled(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return ",".join(_spelled(key, item) for item in value)
    return quote(str(value)) if key in PATH_KEYS else str(value)
