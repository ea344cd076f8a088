#!/usr/bin/env bash
# Trains on a Cloud TPU slice that may be preempted: requests it as a queued resource,
# starts cmjax on all of its workers, prints the log, and after a preemption or a stall
# requests it again and runs the same command, which resumes from its --workdir.
# Usage: launch/tpu_pod.sh [--dry_run] run NAME ZONE TYPE CMJAX_ARGUMENTS...
#        launch/tpu_pod.sh [--dry_run] follow NAME ZONE
#        launch/tpu_pod.sh [--dry_run] stop NAME ZONE [--yes]     (deletes the TPU)
# TYPE is an accelerator type, such as v5litepod-16. Ctrl-C stops the log, not the run;
# the same `run` command prints it again, and restarts the run if necessary. Variables:
#   SPOT=0          on demand instead of spot
#   RUNTIME         version of the TPU software, by default that of TYPE
#   REPOSITORY, REVISION   what to run (this checkout's origin and commit, as pushed)
#   SETUP           commands for each worker, once per boot, such as a mount; what they
#                   export is in the environment of every start
#   PACKAGES        installed besides cmjax[gcs] ('jax[tpu]')
#   MAX_REQUESTS    how often the TPU is requested, in all (20)
#   POLL_S          seconds between checks (30)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
spot=${SPOT:-1} poll_s=${POLL_S:-30} max_requests=${MAX_REQUESTS:-20} requests=0
keep_alive='-o ServerAliveInterval=15 -o ServerAliveCountMax=4'  # ends with a dead host

say() {
  echo "tpu_pod: $*" >&2
}

refuse() {
  say "$*"
  exit 2
}

usage() {
  sed -n 's/^# Usage: //p; s/^#        //p' "$0" >&2
  exit 2
}

cloud() {  # gcloud compute tpus ARGUMENTS...
  if [ "$dry_run" ]; then
    printf '%q ' gcloud compute tpus "$@"
    echo
  else
    gcloud compute tpus "$@"
  fi
}

on() {  # WORKER COMMAND
  cloud tpu-vm ssh "$name" --zone="$zone" --worker="$1" --ssh-flag="$keep_alive" \
    --command="$2"
}

state() {  # of the queued resource; NONE if there is none, UNKNOWN without an answer
  local output
  if output=$(cloud queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)' 2>&1); then
    echo "${output##*$'\n'}"
  elif [[ $output == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "${output##*$'\n'}"
    echo UNKNOWN
  fi
}

request() {
  local more=()
  [ "$spot" = 0 ] || more=(--spot)
  requests=$((requests + 1))
  [ "$requests" -le "$max_requests" ] || refuse "gave up after $max_requests requests"
  cloud queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$runtime" "${more[@]}"
}

delete() {
  cloud queued-resources delete "$name" --zone="$zone" --force --quiet
}

await_tpu() {  # requests it if it does not exist; sets `ended` if it is deleted meanwhile
  local now before='' requested=''
  while now=$(state); do
    [ "$now" = "$before" ] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE)
        [ ! "$requested" ] || { ended=deleted && return; }
        request ;;
      FAILED | SUSPENDED)
        delete
        requested='' ;;
      DELETING) sleep "$poll_s" ;;
      *)
        requested=yes
        sleep "$poll_s" ;;
    esac
  done
}

start() {  # on all workers, unless the run exists; a worker keeps its files in ~/cmjax_run
  on all "set -e
mkdir -p cmjax_run
cat >cmjax_run/new <<'END'
venv/bin/cmjax --distributed $(printf '%q ' "$@")
END
if [ -e cmjax_run/pid ] && kill -0 \$(cat cmjax_run/pid) 2>/dev/null; then
  cmp -s cmjax_run/new cmjax_run/command && exit
  cat cmjax_run/command >&2
  echo cmjax_start=other
  exit 1
fi
rm -f cmjax_run/exit
boot=\$(cat /proc/sys/kernel/random/boot_id)
if [ \"\$(cat cmjax_run/set_up 2>/dev/null)\" != \"\$boot\" ]; then
  ${SETUP:-:}
  (umask 077 && export -p >cmjax_run/variables)
  echo \"\$boot\" >cmjax_run/set_up
fi
. cmjax_run/variables
[ -d cmjax ] || git clone --quiet $(printf %q "$repository") cmjax
git -C cmjax fetch --quiet
git -C cmjax checkout --quiet $(printf %q "$revision")
if [ ! -e uv/bin/uv ]; then
  python3 -m venv uv
  uv/bin/pip install --quiet uv
fi
[ -d venv ] || uv/bin/uv venv --quiet --python 3.12 venv
VIRTUAL_ENV=\$PWD/venv uv/bin/uv pip install --quiet --editable './cmjax[gcs]' \
  ${PACKAGES:-'jax[tpu]'}
mv cmjax_run/new cmjax_run/command
[ ! -e cmjax_run/log ] || mv cmjax_run/log cmjax_run/log.old
touch cmjax_run/log
setsid nohup bash -c 'bash cmjax_run/command >>cmjax_run/log 2>&1
echo \$? >cmjax_run/exit' </dev/null >/dev/null 2>&1 &
echo \$! >cmjax_run/pid"
}

launch() {  # cmjax on the TPU; 1: it does not start, and `ended` is set
  local try answer
  for try in 1 2 3; do
    if answer=$(start "$@"); then
      started=yes
      return
    fi
    [[ $answer != *cmjax_start=other* ]] || refuse "$name: the command above runs on it; \
end that first, or give another NAME"
    case $(state) in
      ACTIVE | UNKNOWN) ;;
      *) ended=preempted && return 1 ;;
    esac
    say "$name: cmjax does not start ($try of 3)"
    [ "$try" = 3 ] || sleep "$poll_s"
  done
  ended=failed  # such as a revision that was not pushed, which another TPU lacks, too
  [ ! "$started" ] || ended=stalled
  return 1
}

codes() {  # WORKER SECONDS: exit codes, `running`, `preempted` or `gone`, in one line
  on "$1" "for i in \$(seq $2); do
  kill -0 \$(cat cmjax_run/pid) || break
  sleep 1
done
if tail -n 5 cmjax_run/log | grep -q '^preempted: '; then code=preempted
elif [ -e cmjax_run/exit ]; then code=\$(cat cmjax_run/exit)
elif kill -0 \$(cat cmjax_run/pid); then code=running
else code=gone; fi
echo cmjax_exit=\$code" 2>/dev/null | sed -n 's/^cmjax_exit=//p' | sort -u | tr '\n' ' '
}

follow() {  # sets `ended`: done, failed, stalled, preempted or deleted
  local all silent=0
  while :; do
    say 'follows worker 0; ctrl-C ends that, not the run'
    on 0 "tail --lines=20 --pid=\$(cat cmjax_run/pid) -F cmjax_run/log" || true
    case $(state) in
      ACTIVE | UNKNOWN) ;;
      DELETING | NONE) ended=deleted && return ;;  # by `stop`, in another terminal
      *) ended=preempted && return ;;
    esac
    case $(codes 0 0) in
      '0 ') ended='done' && return ;;
      'preempted ') ended=preempted && return ;;
      '') silent=$((silent + 1)) ;;
      'running ') silent=0 ;;
      *)  # the others end within a minute
        all=$(codes all 90)
        say "cmjax ended with $all"
        ended=failed
        # 75: another attempt may succeed; above 128: killed, as by jax if a host is
        # silent; gone: a worker has restarted.
        if [[ " $all" =~ \ (75|gone|12[89]|1[3-9][0-9])\  ]]; then
          ended=stalled
        fi
        return ;;
    esac
    [ "$silent" -lt 10 ] || { ended=stalled && return; }
    sleep "$poll_s"
  done
}

finish() {
  if [ "$ended" = deleted ]; then
    say "$name was deleted, and is not requested again"
  else
    say "$name: cmjax is $ended; launch/tpu_pod.sh stop $name $zone frees the TPU"
  fi
  [ "$ended" = 'done' ]
}

check_arguments() {
  local argument workdir=
  for argument in "$@"; do
    [[ $argument != --workdir=* ]] || workdir=${argument#--workdir=}
  done
  case $workdir in
    gs://* | /mnt/*) ;;
    *) refuse "--workdir=$workdir: must be gs://BUCKET/FOLDER, or below /mnt where SETUP \
mounts what all workers share; a folder of one worker is lost with it" ;;
  esac
  case $type in
    v4-*) runtime=${RUNTIME:-tpu-ubuntu2204-base} ;;
    v5litepod-*) runtime=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) runtime=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) runtime=${RUNTIME:-v2-alpha-tpuv6e} ;;
    *) runtime=${RUNTIME:-} ;;
  esac
  [ "$runtime" ] || refuse "$type: no known TPU type; set RUNTIME"
  repository=${REPOSITORY:-$(git -C "$root" remote get-url origin 2>/dev/null)} ||
    refuse "this checkout has no remote 'origin'; set REPOSITORY to what workers clone"
  revision=${REVISION:-$(git -C "$root" rev-parse HEAD)}
}

dry_run='' started=''
if [ "${1:-}" = --dry_run ]; then
  dry_run=yes
  shift
fi
[ $# -ge 3 ] || usage
verb=$1 name=$2 zone=$3
shift 3
trap 'say "the TPU and its run go on: launch/tpu_pod.sh follow $name $zone"; exit 130' INT
case $verb in
  run)
    [ $# -ge 2 ] || usage
    type=$1
    shift
    check_arguments "$@"
    if [ "$dry_run" ]; then
      request && start "$@" && on 0 'tail ... cmjax_run/log'
      exit
    fi
    while :; do
      ended=''
      await_tpu
      if [ -z "$ended" ] && launch "$@"; then follow; fi
      case $ended in
        stalled | preempted) say "$name: $ended; requests it again" ;;
        *) finish && exit || exit 1 ;;
      esac
      [ "$(state)" != ACTIVE ] || delete  # the other states are waited for
    done ;;
  follow)
    [ $# -eq 0 ] || usage
    [ "$dry_run" ] || { follow && finish; } ;;
  stop)
    [ "${1:---yes}" = --yes ] || usage
    if [ $# -eq 0 ] && [ ! "$dry_run" ]; then
      read -r -p "delete the TPU $name in $zone, and end what runs on it? [y/N] " answer
      [ "$answer" = y ] || exit 1
    fi
    delete ;;
  *) usage ;;
esac
