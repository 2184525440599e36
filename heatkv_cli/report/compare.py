"""Paired comparisons: one method minus the others, on the same images at the same point, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from heatkv_cli.errors import ConfigError, did_you_mean
from heatkv_cli.metrics.intervals import Interval, crossed_interval, paired_interval
from heatkv_cli.report.variants import PLACE

COLUMNS = (
    *("model", "benchmark", "budget", "rho", "metric", "base", "other", "seeds", "images", "pairs"),
    *("base_mean", "other_mean", "difference", "stderr", "low", "high", "better", "command"),
)
"""Columns of the CSV file."""

NUMBERS = ("rho", "difference", "low", "high")
"""Columns that readers of the CSV file need as numbers."""

LOWER_IS_BETTER = ("kl", "fid", "lpips")


def comparisons(
    runs: pd.DataFrame, scores: pd.DataFrame, base: str, against: Sequence[str] = (), metrics: Sequence[str] = ()
) -> pd.DataFrame:
    """Return one row per point, other variant and metric.

    Args:
        runs: named runs, one row each.
        scores: of their images.
        base: the variant that the others are subtracted from.
        against: the other variants; empty: every other one.
        metrics: names of metrics; empty: every one that has scores.

    Returns:
        The columns of `COLUMNS` without the command. A difference is base minus other. Where a variant ran with several
        seeds, seeds are resampled as well as prompts.

    Raises:
        ConfigError: no run is of a variant, or no image has a metric, that was named; or nothing can be compared.
    """
    _check("variant", [base, *against], list(dict.fromkeys(runs["given"])))
    known = list(dict.fromkeys(scores["metric"]))
    _check("metric", metrics, known)
    rows = list(_rows(runs, scores, base, against, metrics or known))
    if not rows:
        raise ConfigError(
            f"no other run can be compared with '{base}'",
            "two runs must share model, benchmark, seed, resolution, batch size and budget, and a metric of images",
        )
    return pd.DataFrame(rows, columns=list(COLUMNS[:-1]))


def _check(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no {kind} '{name}' in these results", did_you_mean(name, known))


def _rows(
    runs: pd.DataFrame, scores: pd.DataFrame, base: str, against: Sequence[str], metrics: Sequence[str]
) -> Iterator[dict[str, Any]]:
    wide = {metric: by_image(scores, metric) for metric in metrics}
    for _, here in runs.groupby(PLACE, sort=False, dropna=False):
        ids = {str(name): list(group) for name, group in here.groupby("given", sort=False)["run_id"]}
        about = {key: here[key].iloc[0] for key in ("model", "benchmark", "budget", "rho")}
        for other in (against or [name for name in ids if name != base]) if base in ids else ():
            for metric, images in wide.items():
                if {*ids[base], *ids.get(other, ["no run"])} <= set(images.index):
                    found = difference(images, ids[base], ids[other])
                    row = {**about, "metric": metric, "base": base, "other": other, **found}
                    yield {**row, "better": better(metric, found["low"], found["high"])}


def by_image(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the scores of one metric, indexed by `run_id`, with the columns `image_id`, `value` and `stratum`."""
    return scores[scores["metric"] == metric].set_index("run_id")[["image_id", "value", "stratum"]]


def difference(scores: pd.DataFrame, base: Sequence[str], other: Sequence[str]) -> dict[str, Any]:
    """Return base minus other over the images that all runs have, with a 95 % interval.

    Infinite values (PSNR of identical images) drop out. One run against one is paired over prompts, within the strata
    of the metric; with several runs on a side, seeds are resampled as well as prompts.

    Args:
        scores: of one metric, from `by_image`.
        base, other: ids of the runs of each side, one a seed; each has scores.

    Returns:
        The columns from `seeds` to `high`.
    """
    sides = [scores.loc[[run]].set_index("image_id")["value"].rename(run) for run in (*base, *other)]
    values = pd.concat(sides, axis=1).reindex(sides[0].index).dropna()
    mine, theirs = values[[*base]].to_numpy().T, values[[*other]].to_numpy().T
    with np.errstate(invalid="ignore"):
        pairs = (mine[:, None] - theirs[None]).reshape(-1, len(values))
    kept = np.isfinite(pairs).any(0)
    interval = Interval(math.nan, math.nan, math.nan, math.nan, 0)
    if kept.any() and len(pairs) > 1:
        interval = crossed_interval(np.where(np.isfinite(pairs), pairs, np.nan)[:, kept])
    elif kept.any():
        strata = scores.loc[[base[0]]].set_index("image_id")["stratum"].loc[values.index[kept]]
        interval = paired_interval(pairs[0][kept], np.zeros(int(kept.sum())), strata=list(strata))
    return {
        "seeds": len(pairs),
        "images": len(values),
        "pairs": interval.n,
        "base_mean": _finite_mean(mine),
        "other_mean": _finite_mean(theirs),
        "difference": interval.mean,
        "stderr": interval.stderr,
        "low": interval.low,
        "high": interval.high,
    }


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.inf


def better(metric: str, low: float, high: float) -> str:
    """Return whether base is better by the interval of base minus other: `yes`, `no`, `undecided`, '' without one."""
    if not math.isfinite(low):
        return ""
    worse, best = (-high, -low) if metric in LOWER_IS_BETTER else (low, high)
    return "yes" if worse > 0 else "no" if best < 0 else "undecided"
