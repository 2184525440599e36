"""Wide markdown tables: one line per run, bytes and metrics and paired differences side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from heatkv_cli.errors import ConfigError, did_you_mean
from heatkv_cli.report.variants import SEEDS, named, point
from heatkv_cli.results import EMPTY

BETAS = ("beta_live", "beta_alloc", "beta_work", "beta_meta")


def number(value: float, low: float = math.nan, high: float = math.nan, sign: str = "") -> str:
    """Return a value with its interval to three significant digits; '-' where it is not defined.

    >>> number(0.23456, 0.2, 0.3), number(math.nan), number(1.5, sign="+")
    ('0.235 [0.2, 0.3]', '-', '+1.5')
    """
    form = f"{sign}.3g"
    if math.isnan(value):
        return "-"
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")


def numbers(table: pd.DataFrame, value: str = "value", sign: str = "") -> list[str]:
    """Return the cells of the column `value` with the interval in `low` and `high`."""
    return [number(*row, sign=sign) for row in zip(table[value], table["low"], table["high"], strict=True)]


def markdown(columns: Iterable[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a markdown table."""
    head = list(columns)
    cells = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in cells)


def made_by(commands: Iterable[str]) -> str:
    """Return the end of a page: the commands behind its numbers, each once."""
    return "Made by\n\n" + "".join(f"    {command}\n" for command in dict.fromkeys(commands) if command)


def wide(table: pd.DataFrame, compared: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return one line per run, all cells as texts.

    Args:
        table: from `results.read`.
        compared: paired differences, from `heatkv report compare`; None for none.

    Returns:
        Method and point, the four betas, the share of tokens attended to, the headline of each metric, the differences
        to the base of `compared`, milliseconds an image, and the policy's share of the time. A metric that was skipped
        or failed says so; a run that cannot exist has its reason in place of numbers.
    """
    table = named(table)
    runs = table.drop_duplicates("run_id").set_index("run_id")
    rows = table.assign(cell=_cells(table), empty=table["status"].isin(EMPTY)).sort_values("empty", kind="stable")
    heads = rows[rows["status"] != "infeasible"].drop_duplicates(["run_id", "metric"])  # the headline comes first
    metrics = [name for name in table["metric"].unique() if not name.endswith("_share")]
    cells = heads.pivot(index="run_id", columns="metric", values="cell")
    shares = heads[heads["metric"] == "policy_share"].set_index("run_id")["value"].reindex(runs.index)
    lines = pd.concat(
        [
            pd.DataFrame({"method": [*map(_label, runs["given"], runs["method_args"])], "budget": runs["point"]}),
            *(_formatted(runs[name], "{:.4f}") for name in BETAS),
            _formatted(runs["attended_ratio"], "{:.3f}").rename("attended"),
            cells.reindex(index=runs.index, columns=metrics),
            _differences(runs, compared),
            _formatted(1000 * runs["seconds_per_image"], "{:.0f}").rename("ms/image"),
            _formatted(shares, "{:.1%}").rename("policy"),
        ],
        axis=1,
    ).fillna("")
    impossible = runs.index[runs["status"] == "infeasible"]
    lines.loc[impossible, metrics[:1]] = ("does not exist: " + runs.loc[impossible, ["reason"]]).to_numpy()
    return lines


def _label(given: str, args: Mapping[str, Any]) -> str:
    """Variant, and the seed where there can be several."""
    return given + "".join(f" #{args[key]}" for key in SEEDS if args.get(key))


def _cells(table: pd.DataFrame) -> pd.Series:
    """The value with its interval, or the status of a row without one."""
    return pd.Series(numbers(table), index=table.index).mask(table["status"].isin(EMPTY), table["status"])


def _formatted(values: pd.Series, form: str) -> pd.Series:
    return values.map(form.format, na_action="ignore").astype(object)


def _differences(runs: pd.DataFrame, compared: pd.DataFrame | None) -> pd.DataFrame:
    """A column per base and metric; a line per run, that of the same variant at the same point."""
    if compared is None or compared.empty:
        return pd.DataFrame(index=runs.index)
    titles = compared["base"] + " - this, " + compared["metric"]
    cells = compared.assign(
        title=titles,
        cell=numbers(compared, "difference", sign="+"),
        point=[*map(point, compared["budget"], compared["rho"])],
    )
    keys = ["model", "benchmark", "point", "other"]
    found = cells.drop_duplicates([*keys, "title"], keep="last").pivot(index=keys, columns="title", values="cell")
    places = runs[["model", "benchmark", "point", "given"]].apply(tuple, axis=1)
    return found.reindex(places)[list(titles.unique())].set_axis(runs.index)


def parts(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one line per run and variant of one metric: a task, a scale.

    Raises:
        ConfigError: no row has this metric.
    """
    rows = named(table)[table["metric"] == metric]
    if rows.empty:
        raise ConfigError(f"no row has the metric '{metric}'", did_you_mean(metric, list(table["metric"].unique())))
    return pd.DataFrame(
        {
            "method": [*map(_label, rows["given"], rows["method_args"])],
            "budget": rows["point"],
            metric: rows["variant"].replace("", "(all)"),
            "value": _cells(rows),
            "n": rows["n"].astype(object).fillna(""),
        }
    )
