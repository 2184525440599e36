"""Do methods stand in the same order on the bundled model as in the papers?

    heatkv eval experiment=methods-tiny --out runs/methods
    heatkv eval experiment=hack-axis-tiny --out runs/hack-axis
    python scripts/published_order.py --out runs/methods --out runs/hack-axis --to results/tiny/published-order

Published figures are grouped by what can be compared: model, axis and level, metric, and the papers' conditions. Each
group of three or more methods gives an order; the same methods at the same level give one on tiny, by KL per bit and by
PSNR. Beside Kendall's tau-b stand all pairs whose order is reversed, and whether tiny decides them: the paired 95 %
interval over prompts leaves out 0. Writes a CSV and a markdown file, which differ in form alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heatkv_cli.results import encode_rows, read_csv, write_file
from runs import LOWER_IS_BETTER, Row, Run, better, by_variant, difference, load_runs, markdown, point

HIGHER_IS_BETTER = ("geneval", "hps_v21", "image_reward", "clip_score", "isc", "precision", "recall", "psnr", "shapes")
OURS = ("kl", "psnr")
COLUMNS = (
    *("model", "axis", "level", "published_metric", "metric", "methods", "tau", "same", "reversed", "decided"),
    *("published_order", "order_on_tiny", "reversed_decided", "reversed_undecided", "sources", "command"),
)

Group = dict[str, float]
"""{method: published value}."""


def groups(published: list[Row]) -> Iterator[tuple[dict[str, str], Group]]:
    """What can be compared in print: at least three methods under the same conditions; the full cache left out."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in published:
        if row["method"] != "full" and row["metric"] in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER) and not _ablation(row):
            key = (row["model"], row["axis"], row["level"], row["metric"], row["note"])
            found.setdefault(key, []).append(row)
    for (model, axis, level, metric, _), rows in found.items():
        values = {row["method"]: float(row["value"]) for row in rows}
        sources = "; ".join(dict.fromkeys(f"{row['source']}, {row['table']}" for row in rows))
        if len(values) >= 3:
            yield {"model": model, "axis": axis, "level": level, "published_metric": metric, "sources": sources}, values


def _ablation(row: Row) -> bool:
    """HACK's tables 4 to 6 compare it with parts of itself."""
    return "HACK" in row["source"] and row["table"] in ("table 4", "table 5", "table 6")


def tau_b(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Kendall's tau-b of two rankings of the same names; nan where one has nothing but ties."""
    pairs = [(_sign(a[x] - a[y]), _sign(b[x] - b[y])) for x, y in itertools.combinations(a, 2)]
    untied = [sum(pair[side] != 0 for pair in pairs) for side in (0, 1)]
    return sum(x * y for x, y in pairs) / math.sqrt(untied[0] * untied[1]) if all(untied) else math.nan


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def agreement(group: Group, metric: str, variants: Mapping[str, Run], ours: str) -> dict[str, Any] | None:
    """How one published order stands to the order on tiny by the metric `ours`; None with fewer than three methods."""
    names = [name for name in group if name in variants and ours in variants[name].scores]
    if len(names) < 3:
        return None
    value = {name: _mean(variants[name], ours) for name in names}
    printed = {name: -group[name] if metric in LOWER_IS_BETTER else group[name] for name in names}
    found = {name: -value[name] if ours in LOWER_IS_BETTER else value[name] for name in names}
    same, decided, undecided = 0, [], []
    for x, y in itertools.combinations(sorted(names, key=lambda name: -printed[name]), 2):
        if printed[x] == printed[y] or found[x] == found[y]:
            continue
        if found[x] > found[y]:
            same += 1
            continue
        compared = difference(ours, [variants[y]], [variants[x]])
        text = f"{y} > {x}"
        (decided if compared and better(ours, compared[0]) == "yes" else undecided).append(text)
    return {
        "metric": ours, "methods": len(names), "tau": tau_b(printed, found), "same": same,
        "reversed": len(decided) + len(undecided), "decided": len(decided),
        "published_order": _order(printed, group), "order_on_tiny": _order(found, value),
        "reversed_decided": "; ".join(decided), "reversed_undecided": "; ".join(undecided),
    }  # fmt: skip


def _mean(run: Run, metric: str) -> float:
    """Of the finite values; over strata first where the metric has them."""
    strata: dict[str, list[float]] = {}
    for value, stratum in run.scores[metric].values():
        if math.isfinite(value):
            strata.setdefault(stratum, []).append(value)
    return math.fsum(math.fsum(v) / len(v) for v in strata.values()) / len(strata) if strata else math.inf


def _order(goodness: Mapping[str, float], shown: Mapping[str, float]) -> str:
    names = sorted(goodness, key=lambda name: -goodness[name])
    return " > ".join(f"{name} {shown[name]:.3g}" for name in names)


def rows_of(published: list[Row], runs: list[Run]) -> Iterator[dict[str, Any]]:
    """One row per published order and metric on tiny."""
    places = {}
    for variants in by_variant(runs).values():
        # on HACK's axis methods run with timing=before: what counts here is the method
        single = {each[0].row["method"]: each[0] for each in variants.values()}
        places[point(next(iter(single.values())).row)] = single
    for about, group in groups(published):
        level = f"{float(about['level']):g}"
        variants = places.get(level if about["axis"] == "budget" else f"rho {level}", {})
        for ours in OURS:
            if found := agreement(group, about["published_metric"], variants, ours):
                yield {**about, **found}


def text(rows: list[dict[str, Any]]) -> str:
    """The same in words and a table."""
    columns = ["published", "on tiny by", "tau-b", "same", "reversed", "published order", "order on tiny"]
    columns += ["reversed, decided", "reversed, undecided"]
    lines = [
        [f"{r['model']}, {r['axis']} {r['level']}, {r['published_metric']}", r["metric"], f"{r['tau']:+.2f}",
         str(r["same"]), str(r["reversed"]), r["published_order"], r["order_on_tiny"],
         r["reversed_decided"] or "-", r["reversed_undecided"] or "-"]
        for r in rows
    ]  # fmt: skip
    same, wrong, decided = (sum(r[key] for r in rows) for key in ("same", "reversed", "decided"))
    head = (
        f"# The order of methods on tiny and in print\n\n{len(rows)} comparisons: of {same + wrong} pairs that both "
        f"sides tell apart, {same} stand in the published order and {wrong} in the reversed one, {decided} of these "
        "beyond the paired 95 % interval over prompts. Best first; `a > b` among the reversed pairs: a is better on "
        "tiny, b in print.\n"
    )
    levels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        levels.setdefault((r["axis"], r["level"], r["metric"]), []).append(r)
    summary = [
        [f"{axis} {level}", ours, str(len(found)), f"{_mean_tau(found):+.2f}", *_counts(found)]
        for (axis, level, ours), found in sorted(levels.items())
    ]
    columns_of_levels = ["level", "on tiny by", "comparisons", "mean tau-b", "same", "reversed", "decided"]
    pairs: dict[str, int] = {}
    for r in rows:
        for pair in filter(None, r["reversed_decided"].split("; ")):
            pairs[pair] = pairs.get(pair, 0) + 1
    worst = [[pair, str(count)] for pair, count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]
    swaps = f"Reversed and decided, by pair:\n\n{markdown(['better on tiny, worse in print', 'comparisons'], worst)}"
    every = f"Every comparison:\n\n{markdown(columns, lines)}"
    return "\n".join([head, markdown(columns_of_levels, summary), swaps, every])


def _mean_tau(rows: list[dict[str, Any]]) -> float:
    defined = [r["tau"] for r in rows if not math.isnan(r["tau"])]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    return [str(sum(r[key] for r in rows)) for key in ("same", "reversed", "decided")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, action="append", required=True, help="where `heatkv eval` wrote; repeat it")
    parser.add_argument("--published", type=Path, default=Path("results/paper/published.csv"))
    parser.add_argument("--to", type=Path, help="CSV and markdown file to write, without their endings")
    a = parser.parse_args()
    try:
        runs = [run for out in a.out for run in load_runs(out)]
    except FileNotFoundError as error:
        sys.exit(f"error: {error}\nfix: heatkv eval experiment=methods-tiny --out {a.out[0]}")
    rows = list(rows_of(list(read_csv(a.published)), runs))
    command = shlex.join(["python", "scripts/published_order.py", *sys.argv[1:]])
    if not a.to:
        print(text(rows), end="")
        return
    head = dict(zip(COLUMNS, COLUMNS, strict=True))
    write_file(a.to.with_suffix(".csv"), encode_rows([head, *({**row, "command": command} for row in rows)], COLUMNS))
    write_file(a.to.with_suffix(".md"), f"{text(rows)}\nMade by\n\n    {command}\n".encode())


if __name__ == "__main__":
    main()
