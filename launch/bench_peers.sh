#!/usr/bin/env bash
# Times training steps and sampling against checkouts of other implementations, in
# alternation, and prints one table. Each peer needs a Python with its dependencies.
# Usage: launch/bench_peers.sh --ect=CHECKOUT --ect_python=PYTHON --jcm=CHECKOUT
#   (either may be left out; --size=full: the network of CIFAR-10; --help for the rest)
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
source launch/environment.sh
cd "$here"
exec python "$root/launch/bench_peers.py" "$@"
