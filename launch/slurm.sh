#!/usr/bin/env bash
# One process per node, over all of its GPUs; jax.distributed takes addresses from Slurm.
# Usage: sbatch --nodes=4 launch/slurm.sh CMJAX_ARGUMENTS...   (in the checkout, with its
# .venv and 'jax[cuda13]' in it, on a file system that all nodes share)
#SBATCH --job-name=cmjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
if [ $# -lt 1 ]; then
  echo 'usage: sbatch [--nodes=N] launch/slurm.sh CMJAX_ARGUMENTS...' >&2
  exit 2
fi
source .venv/bin/activate
# Slurm sends SIGTERM two minutes before the end, to the tasks only: they save and exit 0.
# A task that fails ends the others.
exec srun --kill-on-bad-exit=1 cmjax --distributed "$@"
