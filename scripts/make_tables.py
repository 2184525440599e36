"""Wide markdown tables from the tidy CSVs of `heatkv eval`, for the README and for papers.

python scripts/make_tables.py results/tiny/controls.csv
python scripts/make_tables.py results/tiny/full-660.csv --variants shapes
python scripts/make_tables.py results/tiny/methods.csv --compared results/tiny/methods-compared.csv \
    --to results/tiny/methods.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from heatkv_cli.results import read_csv, write_file
from runs import SEEDS, Row, markdown, number, point, variant

BETAS = ("beta_live", "beta_alloc", "beta_work", "beta_meta")


def label(row: Row) -> str:
    """Variant, and the seed where there can be several."""
    args = json.loads(row["method_args_json"] or "{}")
    seeds = [f" #{args[key]}" for key in SEEDS if args.get(key)]
    back_end = f", {row['attention_backend']} attention" if row["attention_backend"] != "grouped" else ""
    return variant(row) + "".join(seeds) + back_end


def wide(rows: list[Row], compared: Iterable[Row] = ()) -> tuple[list[str], list[list[str]]]:
    """One line per run: bytes, the headline of each metric, the paired difference with the base, and time."""
    metrics = [name for name in dict.fromkeys(r["metric"] for r in rows) if not name.endswith("_share")]
    differences = {(r["rho"] or r["budget"], r["other"], r["metric"]): r for r in compared}
    against = list(dict.fromkeys((r["base"], r["metric"]) for r in differences.values()))
    columns = ["method", "budget", *BETAS, "attended", *metrics]
    columns += [f"{base} - this, {metric}" for base, metric in against] + ["ms/image", "policy"]
    lines = []
    for run in dict.fromkeys(r["run_id"] for r in rows):
        mine = [r for r in rows if r["run_id"] == run]
        first = mine[0]
        if first["status"] == "infeasible":
            reason = f"does not exist: {first['reason']}"
            lines.append([label(first), point(first), *[""] * 5, reason, *[""] * (len(columns) - 8)])
            continue
        found = {r["metric"]: r for r in reversed(mine) if r["value"]}  # the headline comes first
        cells = [number(*(found[m][k] for k in ("value", "low", "high"))) if m in found else "" for m in metrics]
        other = [differences.get((first["rho"] or first["budget"], variant(first), metric)) for _, metric in against]
        cells += [number(r["difference"], r["low"], r["high"], "+") if r else "" for r in other]
        time = f"{1000 * float(first['seconds_per_image']):.0f}"
        policy = f"{float(found['policy_share']['value']):.1%}" if "policy_share" in found else ""
        betas = [f"{float(first[name]):.4f}" for name in BETAS]
        lines.append(
            [label(first), point(first), *betas, f"{float(first['attended_ratio']):.3f}", *cells, time, policy]
        )
    return columns, lines


def by_variant(rows: list[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """One line per run and variant of one metric."""
    lines = [
        [label(r), point(r), r["variant"] or "(all)", number(r["value"], r["low"], r["high"]), r["n"]]
        for r in rows
        if r["metric"] == metric
    ]
    return ["method", "budget", metric, "value", "n"], lines


def main() -> None:
    """Print or write one table per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--variants", metavar="METRIC", help="break one metric down instead")
    parser.add_argument(
        "--compared", type=Path, help="what scripts/compare.py wrote: paired differences beside the rest"
    )
    parser.add_argument("--to", type=Path, help="markdown file to write")
    a = parser.parse_args()
    compared = read_csv(a.compared) if a.compared else ()
    parts = []
    for path in a.files:
        rows: list[Row] = list(read_csv(path))
        parts.append(markdown(*(by_variant(rows, a.variants) if a.variants else wide(rows, compared))))
        if a.to:
            commands = dict.fromkeys(row["command"] for row in (*rows, *compared))
            parts.append("Made by\n\n" + "".join(f"    {command}\n" for command in commands))
    if a.to:
        parts[-1] += f"    {shlex.join(['python', 'scripts/make_tables.py', *sys.argv[1:]])}\n"
        write_file(a.to, "\n".join(parts).encode())
    else:
        print("\n".join(parts), end="")


if __name__ == "__main__":
    main()
