"""HACK's ablations on the bundled model beside the published ones (tables 4, 5 and 6 of arXiv 2504.09261).

    heatkv eval experiment=hack-ablations-tiny --out runs/hack-ablations
    python scripts/compare.py --out runs/hack-ablations --base hack --metrics kl,psnr_layout,psnr,shapes \
        --to results/tiny/hack-ablations-compared.csv
    python scripts/hack_tables.py results/tiny/hack-ablations.csv results/tiny/hack-ablations-compared.csv \
        --to results/tiny/hack-ablations.md

A difference is hack as it is minus the ablation, on the same images.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from heatkv_cli.results import read_csv, write_file
from runs import LOWER_IS_BETTER, Row, markdown, number, point, variant

METRICS = ("kl", "psnr_layout", "psnr", "shapes")
PUBLISHED = ("infinity-2b", "var-d30")

TABLES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "Budgets and rules": ("table 4", {
        "hack asymmetric=false patterns=false": ("one budget, one rule", "no-asymmetric,no-pattern"),
        "hack patterns=false": ("two budgets, one rule", "asymmetric-only"),
        "hack asymmetric=false": ("one budget, two rules", "pattern-only"),
        "hack": ("two budgets, two rules", "hack"),
    }),
    "Parts of the rules": ("table 5", {
        "hack merge=false": ("without merging", "contextual without merge"),
        "hack keep_initial=false": ("without initial tokens", ""),
        "hack keep_recent=false": ("without the recent scale", ""),
        "hack keep_initial=false keep_recent=false": (
            "without both", "structural without initial and recent scales"
        ),
        "hack swapped=true": ("rules swapped", "swapped"),
        "hack": ("as it is", "full"),
    }),
    "Queries that score": ("table 6", {
        "hack queries=random": ("random", "query subset: random"),
        "hack queries=init": ("first", "query subset: init"),
        "hack queries=recent": ("last", "query subset: recent"),
        "hack": ("uniform", "query subset: uniform"),
        "hack queries=full": ("all", "query subset: full"),
    }),
}  # fmt: skip
"""{title: (published table, {variant: (its name here, its note in published.csv)})}."""


def table(title: str, rows: list[Row], compared: list[Row], published: list[Row]) -> str:
    """One ablation: a line per level and variant."""
    source, variants = TABLES[title]
    printed = [r for r in published if "HACK" in r["source"] and r["table"] == source and r["model"] in PUBLISHED]
    names = list(dict.fromkeys((r["model"], r["metric"]) for r in printed))
    columns = ["rho", "", *METRICS, *(f"hack - this, {metric}" for metric in METRICS[:3])]
    columns += [f"published: {model}, {metric}" for model, metric in names]
    lines = []
    for level in dict.fromkeys(point(r) for r in rows if variant(r) == "hack"):
        rho = level.removeprefix("rho ")
        for name, (words, note) in variants.items():
            values = {m: [r for r in rows if (point(r), variant(r), r["metric"]) == (level, name, m)] for m in METRICS}
            paired = {r["metric"]: r for r in compared if (float(r["rho"]), r["other"]) == (float(rho), name)}
            cells = [_mean([r for r in values[m] if r["variant"] == ""]) for m in METRICS]
            cells += [number(paired[m]["difference"], paired[m]["low"], paired[m]["high"], "+") if m in paired else ""
                      for m in METRICS[:3]]  # fmt: skip
            found = {(r["model"], r["metric"]): r["value"] for r in printed
                     if r["note"] == note and float(r["level"]) == float(rho)}  # fmt: skip
            lines.append([rho, words, *cells, *(found.get(key, "") for key in names)])
    return f"## {title} ({source})\n\n{markdown(columns, lines)}"


def _mean(rows: list[Row]) -> str:
    """The value of one run; of several seeds, their mean and range."""
    values = [float(row["value"]) for row in rows]
    if len(values) < 2:
        return number(rows[0]["value"], rows[0]["low"], rows[0]["high"]) if rows else ""
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g} over {len(values)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("compared", type=Path)
    parser.add_argument("--published", type=Path, default=Path("results/paper/published.csv"))
    parser.add_argument("--to", type=Path, help="markdown file to write")
    a = parser.parse_args()
    rows, compared, published = (list[Row](read_csv(path)) for path in (a.results, a.compared, a.published))
    lower = " and ".join(name for name in METRICS if name in LOWER_IS_BETTER)
    parts = [f"# HACK's ablations on the bundled model\n\nLower is better for {lower}, higher for the others; "
             "published: fid lower, the others higher.\n"]  # fmt: skip
    parts += [table(title, rows, compared, published) for title in TABLES]
    commands = [*dict.fromkeys(r["command"] for r in (*rows, *compared))]
    commands.append(shlex.join(["python", "scripts/hack_tables.py", *sys.argv[1:]]))
    parts.append("Made by\n\n" + "".join(f"    {command}\n" for command in commands))
    if a.to:
        write_file(a.to, "\n".join(parts).encode())
    else:
        print("\n".join(parts), end="")


if __name__ == "__main__":
    main()
