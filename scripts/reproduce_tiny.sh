#!/usr/bin/env bash
# Makes results/tiny anew, but for the training logs: about 15 minutes on two CPU cores. Resumes where it was interrupted.
#   scripts/reproduce_tiny.sh [folder for the images, default runs/reproduce-tiny]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/reproduce-tiny}

heatkv eval experiment=demo --out "$out/demo"
heatkv eval experiment=tiny-controls --out "$out/controls"
heatkv eval method=full runtime.attention=masked --limit 200 contact_sheet=0 --out "$out/controls"
heatkv eval method=full metric=shapes --limit all contact_sheet=0 --out "$out/full"

cp "$out/demo/results.csv" results/tiny/demo.csv
cp "$out/demo/contact-sheet.png" results/tiny/demo.png
cp "$out/controls/results.csv" results/tiny/controls.csv
cp "$out/full/results.csv" results/tiny/full-660.csv
python scripts/compare.py --out "$out/controls" --to results/tiny/controls-compared.csv
