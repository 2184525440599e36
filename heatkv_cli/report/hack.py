"""HACK's ablations beside the published ones: tables 4, 5 and 6 of arXiv 2504.09261."""

from __future__ import annotations

import pandas as pd

from heatkv_cli.errors import ConfigError
from heatkv_cli.report.compare import LOWER_IS_BETTER
from heatkv_cli.report.published import published_rows
from heatkv_cli.report.tables import markdown, number, numbers
from heatkv_cli.report.variants import named
from heatkv_cli.results import EMPTY

METRICS = ("kl", "psnr_layout", "psnr", "shapes")
PAIRED = METRICS[:3]
MODELS = ("infinity-2b", "var-d30")
"""Models whose published figures stand beside ours."""

TABLES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "Budgets and rules": (
        "table 4",
        {
            "hack asymmetric=false patterns=false": ("one budget, one rule", "no-asymmetric,no-pattern"),
            "hack patterns=false": ("two budgets, one rule", "asymmetric-only"),
            "hack asymmetric=false": ("one budget, two rules", "pattern-only"),
            "hack": ("two budgets, two rules", "hack"),
        },
    ),
    "Parts of the rules": (
        "table 5",
        {
            "hack merge=false": ("without merging", "contextual without merge"),
            "hack keep_initial=false": ("without initial tokens", ""),
            "hack keep_recent=false": ("without the recent scale", ""),
            "hack keep_initial=false keep_recent=false": (
                "without both",
                "structural without initial and recent scales",
            ),
            "hack swapped=true": ("rules swapped", "swapped"),
            "hack": ("as it is", "full"),
        },
    ),
    "Queries that score": (
        "table 6",
        {
            "hack queries=random": ("random", "query subset: random"),
            "hack queries=init": ("first", "query subset: init"),
            "hack queries=recent": ("last", "query subset: recent"),
            "hack": ("uniform", "query subset: uniform"),
            "hack queries=full": ("all", "query subset: full"),
        },
    ),
}
"""{title: (published table, {variant: (its name here, its note in published.csv)})}."""


def page(table: pd.DataFrame, compared: pd.DataFrame) -> str:
    """Return the three tables as markdown, with a heading.

    Args:
        table: from `results.read`.
        compared: hack minus its ablations, from `heatkv report compare --base hack`.

    Raises:
        ConfigError: the results have no run of hack on the axis rho.
    """
    heads = named(table[(table["variant"] == "") & ~table["status"].isin(EMPTY) & table["rho"].notna()])
    if "hack" not in set(heads["given"]):
        raise ConfigError("these results have no run of hack at a rho", "heatkv eval experiment=hack-ablations-tiny")
    lower = " and ".join(name for name in METRICS if name in LOWER_IS_BETTER)
    head = (
        f"# HACK's ablations on the bundled model\n\nLower is better for {lower}, higher for the others; "
        "published: fid lower, the others higher.\n"
    )
    return "\n".join([head, *(_section(title, heads, compared) for title in TABLES)])


def _section(title: str, heads: pd.DataFrame, compared: pd.DataFrame) -> str:
    """One ablation: a line per level and variant."""
    source, variants = TABLES[title]
    levels = heads.loc[heads["given"] == "hack", "rho"].unique()
    lines = pd.MultiIndex.from_product([levels, variants])
    ours = heads.groupby(["rho", "given", "metric"])[["value", "low", "high"]].apply(_over_seeds).unstack()
    cells = compared.assign(cell=numbers(compared, "difference", sign="+"))
    paired = cells.pivot(index=["rho", "other"], columns="metric", values="cell")
    printed = _printed(source)
    notes = pd.MultiIndex.from_tuples([(level, variants[name][1]) for level, name in lines])
    names = [variants[name][0] for _, name in lines]
    columns = pd.concat(
        [
            pd.DataFrame({"rho": [f"{level:g}" for level, _ in lines], "": names}, index=lines),
            ours.reindex(index=lines, columns=list(METRICS)),
            paired.reindex(index=lines, columns=list(PAIRED)).add_prefix("hack - this, "),
            printed.reindex(notes).set_axis(lines).add_prefix("published: "),
        ],
        axis=1,
    ).fillna("")
    return f"## {title} ({source})\n\n{markdown(columns.columns, columns.to_numpy())}"


def _printed(source: str) -> pd.DataFrame:
    """The published figures of a table, as printed: a line per level and note, a column per model and metric."""
    rows = published_rows()
    rows = rows[rows["source"].str.contains("HACK") & (rows["table"] == source) & rows["model"].isin(MODELS)]
    rows = rows.assign(title=rows["model"] + ", " + rows["metric"])
    cells = rows.drop_duplicates(["level", "note", "title"], keep="last")
    return cells.pivot(index=["level", "note"], columns="title", values="printed")[list(rows["title"].unique())]


def _over_seeds(rows: pd.DataFrame) -> str:
    """The value of one run; of several seeds, their mean and range."""
    values = rows["value"]
    if len(rows) == 1:
        return number(*rows.iloc[0])
    return f"{values.mean():.3g} ({values.min():.3g} to {values.max():.3g} over {len(rows)} seeds)"
