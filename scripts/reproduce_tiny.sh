#!/usr/bin/env bash
# Makes results/tiny anew, but for the training logs. Resumes where it was interrupted. On two CPU cores the first part
# takes about 15 minutes, the tables of all methods (parts methods, hack) 1.5 hours, all metrics (the extra lite0) 5, and
# what policies cost (overhead, on a machine that does nothing else) 10.
#   scripts/reproduce_tiny.sh [folder for the images, default runs/reproduce-tiny] [parts, default all five]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/reproduce-tiny}
parts=${2:-controls methods hack metrics overhead}
to=results/tiny

# An experiment in two processes of one thread each, then its table: small models gain little from a second thread.
evaluate() { # experiment, folder
    heatkv calibrate "experiment=$1" --out "$2" --quiet >/dev/null
    for i in 0 1; do
        heatkv eval "experiment=$1" runtime.threads=1 --shard "$i/2" contact_sheet=0 --out "$2" --quiet >/dev/null &
        shards[i]=$!
    done
    wait "${shards[0]}"
    wait "${shards[1]}"
    heatkv eval "experiment=$1" --out "$2"
}

if [[ $parts == *controls* ]]; then
    heatkv eval experiment=demo --out "$out/demo"
    heatkv eval experiment=tiny-controls --out "$out/controls"
    heatkv eval method=full runtime.attention=masked --limit 200 contact_sheet=0 --out "$out/controls"
    heatkv eval method=full metric=shapes --limit all contact_sheet=0 --out "$out/full"
    cp "$out/demo/results.csv" $to/demo.csv
    cp "$out/demo/contact-sheet.png" $to/demo.png
    cp "$out/controls/results.csv" $to/controls.csv
    cp "$out/full/results.csv" $to/full-660.csv
    heatkv report compare --out "$out/controls" --metrics kl,psnr_layout,psnr --to $to/controls-compared.csv
fi

if [[ $parts == *methods* ]]; then
    evaluate methods-tiny "$out/methods"
    cp "$out/methods/results.csv" $to/methods.csv
    heatkv report compare --out "$out/methods" --metrics kl,psnr,shapes --to $to/methods-compared.csv
    heatkv report table $to/methods.csv --compared $to/methods-compared.csv --to $to/methods.md
fi

if [[ $parts == *hack* ]]; then
    evaluate hack-axis-tiny "$out/hack-axis"
    cp "$out/hack-axis/results.csv" $to/hack-axis.csv
    heatkv report compare --out "$out/hack-axis" --metrics kl,psnr_layout,psnr,shapes --to $to/hack-axis-compared.csv
    heatkv report table $to/hack-axis.csv --compared $to/hack-axis-compared.csv --to $to/hack-axis.md
    evaluate hack-ablations-tiny "$out/hack-ablations"
    cp "$out/hack-ablations/results.csv" $to/hack-ablations.csv
    heatkv report compare --out "$out/hack-ablations" --base hack --metrics kl,psnr_layout,psnr,shapes \
        --to $to/hack-ablations-compared.csv
    heatkv report hack $to/hack-ablations.csv $to/hack-ablations-compared.csv --to $to/hack-ablations.md
fi

if [[ $parts == *metrics* ]]; then
    heatkv eval experiment=tiny-metrics --out "$out/metrics"
    cp "$out/metrics/results.csv" $to/metrics.csv
fi

if [[ $parts == *overhead* ]]; then
    heatkv bench experiment=overhead-tiny --out "$out/overhead"
    mkdir -p results/bench
    grep -E '^run_id|,all,' "$out"/overhead/bench/*/bench.csv >results/bench/overhead-tiny.csv # not scale by scale
    cp "$out"/overhead/bench/*/bench.md results/bench/overhead-tiny.md
fi

if [[ -f $out/methods/results.csv && -f $out/hack-axis/results.csv ]]; then
    heatkv report published --out "$out/methods" --out "$out/hack-axis" --to $to/published-order
fi
