#!/usr/bin/env bash
# Runs cmjax on every host of an existing Cloud TPU slice (gcloud compute tpus tpu-vm
# create). The work directory must be shared by all hosts, such as a mounted bucket. The
# same command resumes after a preemption.
# Usage: launch/tpu_pod.sh NAME ZONE CMJAX_ARGUMENTS...
# REPOSITORY (default: this checkout's origin) and REVISION (its commit) select what to run.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo 'usage: launch/tpu_pod.sh NAME ZONE CMJAX_ARGUMENTS...' >&2
  exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."
repository=${REPOSITORY:-$(git remote get-url origin)}
revision=${REVISION:-$(git rev-parse HEAD)}
arguments=$(printf '%q ' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
set -e
[ -d cmjax ] || git clone --quiet $(printf %q "$repository") cmjax
cd cmjax
git fetch --quiet && git checkout --quiet $revision
[ -f .venv/bin/activate ] || python3 -m venv .venv
source .venv/bin/activate
pip install --quiet --editable . 'jax[tpu]'
cmjax --distributed $arguments"
