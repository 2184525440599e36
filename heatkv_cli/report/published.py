"""Do methods stand in the same order in our results as in print?

Published figures are grouped by what can be compared: model, axis and level, metric, and the papers' conditions. Each
group of three or more methods gives an order; the same methods at the same level give one in our results, by KL per bit
and by PSNR. Beside Kendall's tau-b stand all pairs whose order is reversed, and whether our results decide them: the
paired 95 % interval over prompts leaves out 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from heatkv_cli import results
from heatkv_cli.errors import ConfigError
from heatkv_cli.report.compare import LOWER_IS_BETTER, better, by_image, difference
from heatkv_cli.report.tables import markdown
from heatkv_cli.report.variants import PLACE

HIGHER_IS_BETTER = ("geneval", "hps_v21", "image_reward", "clip_score", "isc", "precision", "recall", "psnr", "shapes")
OURS = ("kl", "psnr")
GROUP = ["model", "axis", "level", "metric", "note"]
COLUMNS = (
    *("model", "axis", "level", "published_metric", "metric", "methods", "tau", "same", "reversed", "decided"),
    *("published_order", "order_on_tiny", "reversed_decided", "reversed_undecided", "sources", "command"),
)
"""Columns of the CSV file."""

COUNTS = ["same", "reversed", "decided"]


def published_rows() -> pd.DataFrame:
    """Return the figures that papers print: `value` and `level` as numbers, `printed` and `level_text` as printed."""
    path = Path(str(resources.files("heatkv_cli") / "assets" / "published.csv"))
    table = results.read_table(path, (), ("source", "table", "model", "method", "axis", "level", "metric", "value"))
    figures = table.rename(columns={"value": "printed", "level": "level_text"})
    return figures.assign(value=table["value"].astype(float), level=table["level"].astype(float))


def groups(figures: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield what can be compared in print: the rows of three or more methods under the same conditions.

    The full cache is left out, and HACK's tables 4 to 6, which compare it with parts of itself.
    """
    known = figures["metric"].isin([*LOWER_IS_BETTER, *HIGHER_IS_BETTER])
    kept = figures[known & (figures["method"] != "full") & ~ablation(figures)]
    for _, rows in kept.groupby(GROUP, sort=False):
        if rows["method"].nunique() >= 3:
            yield rows


def ablation(figures: pd.DataFrame) -> pd.Series:
    """Return which rows are of HACK's tables 4 to 6."""
    return figures["source"].str.contains("HACK") & figures["table"].isin(["table 4", "table 5", "table 6"])


def orders(figures: pd.DataFrame, runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per published order and metric of `OURS`.

    Args:
        figures: from `published_rows`.
        runs: named runs, one row each. At each point a method counts once, however it was given: on HACK's axis methods
            run with timing=before.
        scores: of their images.

    Raises:
        ConfigError: no published order has three methods in common with the runs at its level.
    """
    ours = {metric: by_image(scores, metric) for metric in OURS}
    at = {}
    for _, here in runs.groupby(PLACE, sort=False, dropna=False):
        single = here.drop_duplicates("given")
        at[here["point"].iloc[0]] = dict(zip(single["method"], single["run_id"], strict=True))
    rows = []
    for group in groups(figures):
        first = group.iloc[0]
        level = f"{first['level']:g}" if first["axis"] == "budget" else f"rho {first['level']:g}"
        about = {
            "model": first["model"],
            "axis": first["axis"],
            "level": first["level_text"],
            "published_metric": first["metric"],
            "sources": "; ".join((group["source"] + ", " + group["table"]).unique()),
        }
        for metric in OURS:
            found = _agreement(group, at.get(level, {}), metric, ours[metric])
            rows += [{**about, **found}] if found else []
    if not rows:
        raise ConfigError(
            "no published order has three methods of these runs at its level",
            "heatkv eval experiment=methods-tiny, or experiment=hack-axis-tiny",
        )
    return pd.DataFrame(rows, columns=list(COLUMNS[:-1]))


def _agreement(group: pd.DataFrame, ids: dict[str, str], metric: str, scores: pd.DataFrame) -> dict[str, Any] | None:
    """How one published order stands to ours by `metric`; None with fewer than three methods."""
    printed = group.drop_duplicates("method", keep="last").set_index("method")["value"]
    printed = printed[[name for name in printed.index if ids.get(name) in scores.index]]
    if len(printed) < 3:
        return None
    found = pd.Series({name: _mean(scores.loc[[ids[name]]]) for name in printed.index})
    print_good = -printed if group.iloc[0]["metric"] in LOWER_IS_BETTER else printed
    our_good = -found if metric in LOWER_IS_BETTER else found
    best_first = print_good.sort_values(ascending=False, kind="stable")
    pairs = [(x, y) for x, y in itertools.combinations(best_first.index, 2) if print_good[x] != print_good[y]]
    same = sum(our_good[x] > our_good[y] for x, y in pairs)
    swapped = {f"{y} > {x}": difference(scores, [ids[y]], [ids[x]]) for x, y in pairs if our_good[x] < our_good[y]}
    decided = [pair for pair, found in swapped.items() if better(metric, found["low"], found["high"]) == "yes"]
    return {
        "metric": metric,
        "methods": len(printed),
        "tau": print_good.corr(our_good, method="kendall"),
        "same": same,
        "reversed": len(swapped),
        "decided": len(decided),
        "published_order": _order(print_good, printed),
        "order_on_tiny": _order(our_good, found),
        "reversed_decided": "; ".join(decided),
        "reversed_undecided": "; ".join(pair for pair in swapped if pair not in decided),
    }


def _mean(scores: pd.DataFrame) -> float:
    """Of the finite values; over strata first where the metric has them; infinite where none is finite."""
    finite = scores[scores["value"].abs() < math.inf]
    return float(finite.groupby("stratum")["value"].mean().mean()) if len(finite) else math.inf


def _order(goodness: pd.Series, shown: pd.Series) -> str:
    best_first = goodness.sort_values(ascending=False, kind="stable").index
    return " > ".join(f"{name} {shown[name]:.3g}" for name in best_first)


def page(rows: pd.DataFrame) -> str:
    """Return orders as markdown: a summary by level, the pairs that are reversed, every comparison."""
    same, wrong, decided = rows[COUNTS].sum()
    head = (
        f"# The order of methods on tiny and in print\n\n{len(rows)} comparisons: of {same + wrong} pairs that both "
        f"sides tell apart, {same} stand in the published order and {wrong} in the reversed one, {decided} of these "
        "beyond the paired 95 % interval over prompts. Best first; `a > b` among the reversed pairs: a is better on "
        "tiny, b in print.\n"
    )
    titles = rows["model"] + ", " + rows["axis"] + " " + rows["level"] + ", " + rows["published_metric"]
    levels = rows.assign(at=rows["axis"] + " " + rows["level"]).groupby(["at", "metric"])
    summary = levels.agg(n=("tau", "size"), tau=("tau", "mean"), **{name: (name, "sum") for name in COUNTS})
    pairs = rows["reversed_decided"].str.split("; ").explode()
    worst = pairs[pairs != ""].value_counts().rename_axis("pair").reset_index(name="n")
    worst = worst.sort_values(["n", "pair"], ascending=[False, True])
    texts = ["published_order", "order_on_tiny", "reversed_decided", "reversed_undecided"]
    every = rows.assign(at=titles)[["at", "metric", "tau", "same", "reversed", *texts]].replace("", "-")
    return "\n".join(
        [
            head,
            _table(summary.reset_index(), "level", "on tiny by", "comparisons", "mean tau-b", *COUNTS),
            "Reversed and decided, by pair:\n",
            _table(worst, "better on tiny, worse in print", "comparisons"),
            "Every comparison:\n",
            _table(
                *(every, "published", "on tiny by", "tau-b", "same", "reversed", "published order", "order on tiny"),
                *("reversed, decided", "reversed, undecided"),
            ),
        ]
    )


def _table(rows: pd.DataFrame, *columns: str) -> str:
    shown = rows.assign(tau=rows["tau"].map("{:+.2f}".format)) if "tau" in rows else rows
    return markdown(columns, shown.to_numpy())
