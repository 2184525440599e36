"""Paired comparison of one method with the others on the same images, from the scores `heatkv eval` left.

    heatkv eval experiment=tiny-controls
    python scripts/compare.py --base heatkv --to results/tiny/controls-compared.csv

A difference is base minus other at the same budget, image by image. Methods go by name and whatever they were given
beside their defaults (`hack merge=false`). Where one ran with several seeds (`random`), seeds are resampled as well as
prompts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heatkv_cli.results import encode_rows, write_file
from runs import Run, better, by_variant, difference, load_runs

COLUMNS = (
    *("model", "benchmark", "budget", "rho", "metric", "base", "other", "seeds", "images", "pairs"),
    *("base_mean", "other_mean", "difference", "stderr", "low", "high", "better", "command"),
)


def comparisons(runs: list[Run], base: str, against: list[str], metrics: list[str]) -> Iterator[dict[str, Any]]:
    """One row per budget, other method and metric; `against` empty: every other method."""
    for variants in by_variant(runs).values():
        if base not in variants:
            continue
        mine = variants[base]
        for other in against or [name for name in variants if name != base]:
            for metric in metrics:
                found = difference(metric, mine, variants[other]) if other in variants else None
                if found is None:
                    continue
                interval, means = found
                yield {
                    **{key: mine[0].row[key] for key in ("model", "benchmark", "budget", "rho")},
                    "metric": metric, "base": base, "other": other, **means, "pairs": interval.n,
                    "difference": interval.mean, "stderr": interval.stderr, "low": interval.low,
                    "high": interval.high, "better": better(metric, interval),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where `heatkv eval` wrote")
    parser.add_argument("--base", default="heatkv")
    parser.add_argument("--against", default="", help="comma list; every other method where it is empty")
    parser.add_argument("--metrics", default="kl,psnr_layout,psnr")
    parser.add_argument("--to", type=Path, help="CSV to write")
    a = parser.parse_args()
    try:
        runs = load_runs(a.out)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}\nfix: heatkv eval experiment=tiny-controls --out {a.out}")
    command = shlex.join(["python", "scripts/compare.py", *sys.argv[1:]])
    rows = list(comparisons(runs, a.base, [name for name in a.against.split(",") if name], a.metrics.split(",")))
    for r in rows:
        print(
            f"{r['budget'] or 'rho ' + r['rho']:>8} {r['metric']:12} {r['base']} - {r['other']:10} "
            f"{r['difference']:+.5g} [{r['low']:+.5g}, {r['high']:+.5g}]  seeds {r['seeds']} pairs {r['pairs']}  "
            f"better: {r['better']}"
        )
    if a.to:
        head = dict(zip(COLUMNS, COLUMNS, strict=True))
        write_file(a.to, encode_rows([head, *({**row, "command": command} for row in rows)], COLUMNS))


if __name__ == "__main__":
    main()
