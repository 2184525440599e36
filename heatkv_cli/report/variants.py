"""Names of runs: a variant is a method with what it was given beside its defaults, a point is its place on an axis."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from heatkv_cli import results
from heatkv_cli.config.groups import choices, read_yaml
from heatkv_cli.errors import SetupError

SEEDS = ("order_seed", "query_seed")
"""Parameters that only say which of many equal draws was made: runs that differ in nothing else are one variant."""

CHOSEN = "chosen"
"""An entry beside the parameters: numbers that the method chose for itself."""

RETIRED: Mapping[str, Mapping[str, Any]] = {"scalekv": {"faithful": False}}
"""Defaults of parameters that a method no longer has, for rows that an earlier version wrote."""

PLACE = ["model", "benchmark", "seed", "resolution", "batch_size", "point"]
"""Columns that two runs must share to be compared image by image."""


@lru_cache(maxsize=64)
def _defaults(method: str) -> Mapping[str, Any]:
    known = read_yaml("method", method) if method in choices("method") else {}
    return {**RETIRED.get(method, {}), **known}


def variant(method: str, args: Mapping[str, Any], attention_backend: str = "grouped") -> str:
    """Return a method and what it was given beside its defaults, without seeds.

    >>> variant("hack", {"merge": False, "swapped": False, "query_seed": 3})
    'hack merge=false'
    """
    usual = _defaults(method)
    given = {key: value for key, value in args.items() if key not in (*SEEDS, CHOSEN) and usual.get(key) != value}
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return " ".join([method, *words, *([] if attention_backend in ("", "grouped") else [attention_backend])])


def point(budget: str, rho: float) -> str:
    """Return where on its axis a run stands.

    >>> point("0.1", float("nan")), point("", 0.7)
    ('0.1', 'rho 0.7')
    """
    return budget if math.isnan(rho) else f"rho {rho:g}"


def named(table: pd.DataFrame) -> pd.DataFrame:
    """Return results with the columns `given` (the variant) and `point`."""
    keys = zip(table["method"], table["method_args"], table["attention_backend"], strict=True)
    points = map(point, table["budget"], table["rho"])
    return table.assign(given=[variant(*key) for key in keys], point=list(points))


def load_runs(*outs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs and the scores of their images.

    Args:
        outs: folders that `heatkv eval` wrote to.

    Returns:
        The runs that have numbers, named, one row each in the order of `results.csv`; and the table of
        `results.scores`. A run that stands in several folders is taken from the first.

    Raises:
        SetupError: there are no such runs.
        ArtifactError: as `results.read` and `results.scores`.
    """
    every = [_load(out) for out in outs]
    runs, scores = (pd.concat(parts, ignore_index=True) for parts in zip(*every, strict=True))
    return runs.drop_duplicates("run_id"), scores.drop_duplicates(["run_id", "metric", "image_id"])


def _load(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    path, fix = out / "results.csv", f"heatkv eval experiment=methods-tiny --out {out}"
    if not path.is_file():
        raise SetupError(f"there is no {path}", fix)
    rows = named(results.read(path))
    runs = rows[rows["status"] == "ok"].drop_duplicates("run_id")
    if runs.empty:
        raise SetupError(f"{path} has no rows with a value", fix)
    return runs, results.scores(out)
