"""Wide markdown tables from the tidy CSVs of `heatkv eval`, for the README and for papers.

python scripts/make_tables.py results/tiny/controls.csv
python scripts/make_tables.py results/tiny/full-660.csv --variants shapes
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from heatkv_cli.results import read_csv

Row = dict[str, str]


def number(row: Row) -> str:
    """Value with its interval, to three significant digits."""
    value, low, high = (float(row[key] or "nan") for key in ("value", "low", "high"))
    if not math.isfinite(low):
        return f"{value:.3g}"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def label(row: Row) -> str:
    """Method, with whatever tells two rows of it apart."""
    seed = json.loads(row["method_args_json"] or "{}").get("order_seed")
    name = row["method"] + (f" (order {seed})" if seed is not None else "")
    return name + (f", {row['attention_backend']} attention" if row["attention_backend"] != "grouped" else "")


def wide(rows: list[Row]) -> list[list[str]]:
    """One line per run: method, budget, bytes, then the headline of each metric."""
    metrics = list(dict.fromkeys(r["metric"] for r in rows if not r["metric"].endswith("_share")))
    lines = [["method", "budget", "beta_alloc", *metrics, "ms/img"]]
    for run in dict.fromkeys(r["run_id"] for r in rows):
        mine = [r for r in rows if r["run_id"] == run]
        found = {r["metric"]: number(r) for r in reversed(mine) if r["value"]}  # the headline comes first
        cost = mine[0]
        numbers = [found.get(metric, "") for metric in metrics]
        seconds = f"{1000 * float(cost['seconds_per_image']):.0f}"
        lines.append([label(cost), cost["budget"], f"{float(cost['beta_alloc']):.4f}", *numbers, seconds])
    return lines


def by_variant(rows: list[Row], metric: str) -> list[list[str]]:
    """One line per run and variant of one metric."""
    return [["method", "budget", metric, "value", "n"]] + [
        [label(r), r["budget"], r["variant"] or "(all)", number(r), r["n"]] for r in rows if r["metric"] == metric
    ]


def main() -> None:
    """Print one table per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--variants", metavar="METRIC", help="break one metric down instead")
    a = parser.parse_args()
    for path in a.files:
        rows = read_csv(path)
        head, *body = by_variant(rows, a.variants) if a.variants else wide(rows)
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        print("\n".join(f"| {' | '.join(line)} |" for line in body))


if __name__ == "__main__":
    main()
