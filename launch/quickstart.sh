#!/usr/bin/env bash
# Trains an EDM teacher and an ECT student on real digits, samples, evaluates, and prints
# the table and the pictures. Needs Python >= 3.11; about five minutes on two cores.
# Usage: launch/quickstart.sh [FOLDER]   (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
out=${1:-runs/quickstart}
begun=$SECONDS

cmjax --config=configs/edm_digits.py --workdir="$out/teacher"
cmjax --config=configs/ect_digits.py --workdir="$out/student" \
  --config.init_from="$out/teacher"
for model in teacher student; do
  cmjax --workdir="$out/$model" --mode=sample
  cmjax --workdir="$out/$model" --mode=evaluate
done

echo "Finished in $((SECONDS - begun)) s after installation."
echo
awk '/^[|]/ && !seen[$0]++' "$out"/teacher/evaluation_*.md "$out"/student/evaluation_*.md
echo
ls "$out"/teacher/samples/*/all.png "$out"/student/samples/*/all.png
