"""Paired comparison of one method with another on the same images, from the scores `heatkv eval` left.

    heatkv eval experiment=tiny-controls
    python scripts/compare.py --base heatkv --against random,streaming,sinks --to results/tiny/controls-compared.csv

A difference is base minus other, image by image. Where the other method ran with several seeds (`random`), seeds are
resampled as well as prompts.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path

import numpy as np

from heatkv_cli.metrics.intervals import crossed_interval, paired_interval
from heatkv_cli.results import encode_rows, read_csv, write_file

COLUMNS = (
    *("model", "benchmark", "budget", "metric", "base", "other", "seeds", "images", "pairs"),
    *("base_mean", "other_mean", "difference", "stderr", "low", "high", "better", "command"),
)


def load_scores(folder: Path) -> dict[str, dict[str, float]]:
    """{metric: {image: value}} of a run."""
    scores: dict[str, dict[str, float]] = {}
    for row in read_csv(folder / "scores.csv"):
        scores.setdefault(row["metric"], {})[row["image_id"]] = float(row["value"])
    return scores


def compare(base: dict[str, float], others: list[dict[str, float]]) -> dict[str, object]:
    """Statistics of base minus other over the images that all have; infinite values (identical images) drop out."""
    images = [image for image in base if all(image in other for other in others)]
    mine = np.array([base[i] for i in images])
    theirs = np.array([[other[i] for i in images] for other in others])
    with np.errstate(invalid="ignore"):
        differences = np.where(np.isfinite(mine) & np.isfinite(theirs), mine - theirs, np.nan)
    keep = np.isfinite(differences).any(0)
    differences = differences[:, keep]
    if len(others) > 1:
        interval = crossed_interval(differences)
    else:
        interval = paired_interval(differences[0], np.zeros(differences.shape[1]))
    return {
        "seeds": len(others), "images": len(images), "pairs": interval.n,
        "base_mean": float(mine[np.isfinite(mine)].mean()), "other_mean": float(theirs[np.isfinite(theirs)].mean()),
        "difference": interval.mean, "stderr": interval.stderr, "low": interval.low, "high": interval.high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where `heatkv eval` wrote")
    parser.add_argument("--base", default="heatkv")
    parser.add_argument("--against", default="random,streaming,sinks")
    parser.add_argument("--metrics", default="kl,psnr_layout,psnr")
    parser.add_argument("--to", type=Path, help="CSV to write")
    a = parser.parse_args()
    runs = {row["run_id"]: row for row in read_csv(a.out / "results.csv")}
    if not runs:
        sys.exit(f"error: {a.out}/results.csv has no rows\nfix: heatkv eval experiment=tiny-controls --out {a.out}")
    command = shlex.join(["python", "scripts/compare.py", *sys.argv[1:]])
    rows = []
    for run_id, row in runs.items():
        if row["method"] != a.base:
            continue
        mine = load_scores(a.out / "images" / run_id)
        for other in a.against.split(","):
            same = [
                i
                for i, r in runs.items()
                if r["method"] == other
                and all(
                    r[key] == row[key] for key in ("model", "benchmark", "budget", "seed", "resolution", "batch_size")
                )
            ]
            if not same:
                continue
            theirs = [load_scores(a.out / "images" / i) for i in same]
            for metric in a.metrics.split(","):
                if metric not in mine or any(metric not in t for t in theirs):
                    continue
                result = compare(mine[metric], [t[metric] for t in theirs])
                sign = -1 if metric == "kl" else 1
                low, high = sorted((sign * float(result["low"]), sign * float(result["high"])))  # type: ignore[arg-type]
                better = "yes" if low > 0 else "no" if high < 0 else "undecided"
                rows.append(
                    {
                        "model": row["model"],
                        "benchmark": row["benchmark"],
                        "budget": row["budget"],
                        "metric": metric,
                        "base": a.base,
                        "other": other,
                        **result,
                        "better": better if math.isfinite(low) else "",
                        "command": command,
                    }
                )
    for r in rows:
        print(
            f"{r['budget']:>6} {r['metric']:12} {r['base']} - {r['other']:10} {r['difference']:+.5g} "
            f"[{r['low']:+.5g}, {r['high']:+.5g}]  seeds {r['seeds']} pairs {r['pairs']}  better: {r['better']}"
        )
    if a.to:
        write_file(a.to, encode_rows([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows], COLUMNS))


if __name__ == "__main__":
    main()
