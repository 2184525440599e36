"""What the table makers share: rows of `results.csv` and their names, scores of images, intervals, markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from heatkv_cli.config.groups import read_yaml
from heatkv_cli.metrics.intervals import Interval, crossed_interval, paired_interval
from heatkv_cli.pipeline.rows import SCORE_FIELDS
from heatkv_cli.results import parse_lines, read_csv

Row = Mapping[str, str]
SEEDS = ("order_seed", "query_seed")
"""Parameters that only say which of many equal draws was made: runs that differ in nothing else are one variant."""

CHOSEN = "chosen"
"""Beside the parameters: numbers that the method chose for itself."""

LOWER_IS_BETTER = ("kl", "fid", "lpips")


@lru_cache(maxsize=64)
def _defaults(method: str) -> dict[str, Any]:
    return read_yaml("method", method)


def variant(row: Row) -> str:
    """Method and whatever it was given beside its defaults, `hack merge=false`; seeds left out."""
    args = json.loads(row["method_args_json"] or "{}")
    own = {
        key: value
        for key, value in args.items()
        if key not in (*SEEDS, CHOSEN) and _defaults(row["method"]).get(key) != value
    }
    words = [row["method"], *(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in own.items())]
    return " ".join(words) + (f" {row['attention_backend']}" if row["attention_backend"] != "grouped" else "")


def point(row: Row) -> str:
    """Where on its axis a run stands: `0.1`, or `rho 0.7`."""
    return f"rho {float(row['rho']):g}" if row["rho"] else row["budget"]


@dataclass(frozen=True)
class Run:
    """One run of a results file: its first row, and the scores of its images, {metric: {image: (value, stratum)}}."""

    row: Row
    scores: dict[str, dict[str, tuple[float, str]]]

    @property
    def place(self) -> tuple[str, ...]:
        """What two runs must share to be compared image by image."""
        keys = ("model", "benchmark", "seed", "resolution", "batch_size")
        return (*(self.row[key] for key in keys), point(self.row))


def load_runs(out: Path) -> list[Run]:
    """The runs of `out`/results.csv, in its order; those that could not exist have no scores and are left out.

    Raises:
        FileNotFoundError: there are none.
    """
    rows = {row["run_id"]: row for row in read_csv(out / "results.csv") if row["status"] == "ok"}
    if not rows:
        raise FileNotFoundError(f"{out}/results.csv has no rows: run `heatkv eval ... --out {out}` first")
    return [Run(row, _scores(out / "images" / run_id)) for run_id, row in rows.items()]


def _scores(folder: Path) -> dict[str, dict[str, tuple[float, str]]]:
    found: dict[str, dict[str, tuple[float, str]]] = {}
    path = folder / "scores.jsonl"
    for row in parse_lines(path, path.read_bytes(), SCORE_FIELDS) if path.exists() else ():
        found.setdefault(row["metric"], {})[row["image_id"]] = (float(row["value"]), row["stratum"])
    return found


def by_variant(runs: Iterable[Run]) -> dict[tuple[str, ...], dict[str, list[Run]]]:
    """{place: {variant: its runs, one a seed}}."""
    found: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.place, {}).setdefault(variant(run.row), []).append(run)
    return found


def difference(metric: str, base: Sequence[Run], other: Sequence[Run]) -> tuple[Interval, dict[str, float]] | None:
    """Base minus other over the images that all have, with a 95 % interval; None where a run lacks the metric.

    Infinite values (PSNR of identical images) drop out. One run against one: paired over prompts, within the strata of
    the metric. Several seeds on a side: seeds are resampled as well as prompts.
    """
    if any(metric not in run.scores for run in (*base, *other)):
        return None
    images = [i for i in base[0].scores[metric] if all(i in run.scores[metric] for run in (*base, *other))]
    mine, theirs = (np.array([[run.scores[metric][i][0] for i in images] for run in side]) for side in (base, other))
    with np.errstate(invalid="ignore"):
        pairs = (mine[:, None] - theirs[None]).reshape(len(base) * len(other), len(images))
    keep = np.isfinite(pairs).any(0)
    means = {
        "images": len(images), "seeds": len(pairs),
        "base_mean": _finite_mean(mine), "other_mean": _finite_mean(theirs),
    }  # fmt: skip
    if not keep.any():
        return Interval(math.nan, math.nan, math.nan, math.nan, 0), means
    if len(pairs) > 1:
        return crossed_interval(np.where(np.isfinite(pairs), pairs, np.nan)[:, keep]), means
    strata = [base[0].scores[metric][image][1] for image, kept in zip(images, keep, strict=True) if kept]
    return paired_interval(pairs[0][keep], np.zeros(int(keep.sum())), strata=strata), means


def _finite_mean(values: np.ndarray[Any, Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.inf


def better(metric: str, interval: Interval) -> str:
    """Whether base is better by an interval of base minus other: `yes`, `no`, `undecided`, '' without an interval."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    low, high = sorted((sign * interval.low, sign * interval.high))
    if not math.isfinite(low):
        return ""
    return "yes" if low > 0 else "no" if high < 0 else "undecided"


def number(value: str | float, low: str | float = "", high: str | float = "", sign: str = "") -> str:
    """A value with its interval, to three significant digits; '' for none, '-' where it is not defined."""
    if value in ("", None):
        return ""
    form = f"{sign}.3g"
    if math.isnan(float(value)):
        return "-"
    text = f"{float(value):{form}}"
    if low in ("", None) or not math.isfinite(float(low)):
        return text
    return f"{text} [{float(low):{form}}, {float(high):{form}}]"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    cells = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in cells)
