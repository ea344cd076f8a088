#!/usr/bin/env bash
# Trains an EDM teacher and an ECT student on real digits, samples, evaluates, and prints
# the table, the pictures, and last the page that shows both runs, to open in a browser.
# Needs Python >= 3.11; three to five minutes on two cores.
# Usage: launch/quickstart.sh [FOLDER]   (default: runs/quickstart in the checkout)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/runs/quickstart}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
source launch/environment.sh
start=$SECONDS

cmjax --config=edm:digits --workdir="$out/teacher"
cmjax --config=ect:digits --workdir="$out/student" \
  --config.init_from="$out/teacher"
for model in teacher student; do
  cmjax --workdir="$out/$model" --mode=sample
  cmjax --workdir="$out/$model" --mode=evaluate
  cmjax --workdir="$out/$model" --mode=report
done

echo "Finished in $((SECONDS - start)) s after installation."
echo
for model in teacher student; do
  awk -v model="$model" '/^[|]/ {
    print "|", (++row == 1 ? "model" : row == 2 ? "---" : model), $0
    next
  }
  row { exit }  # only the first table, of all seeds' "$(ls -t "$out/$model"/evaluation_*.md | head -n 1)"
done | awk '!seen[$0]++'
echo
for model in teacher student; do
  ls -t "$out/$model"/samples/*/all.png | head -n 1
done
cmjax --mode=report "$out/teacher" "$out/student" --to="$out/report.html"
