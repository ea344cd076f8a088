#!/usr/bin/env bash
# Runs cmjax as several processes on one machine, each with several fake CPU devices: a
# small pod. If one process fails, the others are stopped.
# Usage: launch/local_pod.sh PROCESSES DEVICES CMJAX_ARGUMENTS...
set -euo pipefail
if [ $# -lt 3 ]; then
  echo 'usage: launch/local_pod.sh PROCESSES DEVICES CMJAX_ARGUMENTS...' >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
command -v cmjax >/dev/null || source "$(dirname "$0")/environment.sh"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' HUP INT TERM
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true; wait' EXIT
for ((i = 0; i < processes; i++)); do
  cmjax "$@" --coordinator="localhost:$port" \
    --processes="$processes" --process="$i" &
  pids+=($!)
done

code=0
for ((left = processes; left > 0; left--)); do
  ended=
  wait -n -p ended || code=$?
  while [ -z "${ended:-}" ] && [ "$code" -gt 128 ]; do  # a signal to this script
    code=0
    wait -n -p ended || code=$?
  done
  if [ "$code" -ne 0 ]; then
    for i in "${!pids[@]}"; do
      if [ "${pids[$i]}" = "$ended" ]; then
        echo "local_pod: process $i ended with code $code; stopping the others" >&2
      elif [[ $(ps -o stat= -p "${pids[$i]}" || true) = T* ]]; then
        echo "local_pod: process $i is stopped by a signal and does not answer" >&2
      fi
    done
    sleep 2  # for their last output
    exit "$code"
  fi
done
