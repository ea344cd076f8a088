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
code=0
srun --kill-on-bad-exit=1 cmjax --distributed "$@" || code=$?
# 75: another attempt may succeed. Above 128: a task was killed, which also happens to
# tasks that hang when another one ends. Both resume from the last checkpoint.
if [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-20}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
