"""launch/tpu_pod.sh against a fake gcloud, whose worker is a folder of this machine."""

import contextlib
import os
import re
import signal
import subprocess

import pytest

from tests.conftest import ROOT

# Records every command line, and plays states; ssh runs in the folder `worker`.
GCLOUD = r"""#!/bin/bash
printf '%s|' "${@:3}" | sed 's/|--command=.*/|/; s/$/\n/' | head -n 1 >>"$PLAY/calls"
for argument; do
  case $argument in --command=*) command=${argument#--command=} ;; esac
done
case "$3 $4" in
  'queued-resources describe')
    read -r state <"$PLAY/states"
    [ "$(wc -l <"$PLAY/states")" = 1 ] || sed -i 1d "$PLAY/states"
    echo "a warning" >&2
    if [ "$state" = NONE ]; then
      echo 'ERROR: (gcloud.compute) NOT_FOUND: no such resource' >&2
      exit 1
    fi
    echo "$state" ;;
  'queued-resources create')
    mkdir "$PLAY/worker"
    printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$PLAY/states" ;;
  'queued-resources delete')
    [ ! -e "$PLAY/long" ] || kill "$(cat "$PLAY/long")"
    rm -r "$PLAY/worker"
    echo NONE >"$PLAY/states" ;;
  'tpu-vm ssh') cd "$PLAY/worker" && HOME=$PWD exec bash -c "$command" ;;
esac
"""
GIT = r"""#!/bin/sh
echo "git $*" >>"$PLAY/installed"
if [ -e "$PLAY/fails" ]; then
  . "$PLAY/fails"
  exit 1
fi
[ "$1" != clone ] || mkdir "$4"
"""
# Those of the worker, which would wait for seconds.
TAIL = '#!/bin/sh\nexec /usr/bin/tail --sleep-interval=0.02 "$@"\n'
SLEEP = '#!/bin/sh\nexec /bin/sleep 0.02\n'
PYTHON = r"""#!/bin/bash
mkdir -p uv/bin
printf '#!/bin/sh\n' >uv/bin/pip
cat >uv/bin/uv <<'END'
#!/bin/sh
echo "uv $*" >>"$PLAY/installed"
mkdir -p venv/bin
ln -sf "$PLAY/bin/cmjax" venv/bin/
END
chmod +x uv/bin/*
"""
# Plays one line of `codes` per start: an exit code, or the name of an event.
CMJAX = r"""#!/bin/bash
read -r code <"$PLAY/codes"
sed -i 1d "$PLAY/codes"
printf '%s|' "$@" >>"$PLAY/arguments"
echo "step 1 of a run that ends with $code${NOTE:+, $NOTE}"
case $code in
  deleted) echo DELETING >"$PLAY/states"; exit 1 ;;
  suspended) printf '%s\n' SUSPENDING SUSPENDED >"$PLAY/states"; exit 1 ;;
  preempted) echo 'preempted: saved step 5; repeat the command to resume' ;;
  gone) kill -9 $PPID $(ps -o ppid= $PPID) ;;
  long) echo $$ >"$PLAY/long"; exec /bin/sleep 1000 ;;
  *) exit "$code" ;;
esac
"""

NEW = """\
queued-resources|create|pod|--node-id=pod|--zone=z|--accelerator-type=v5litepod-16|\
--runtime-version=v2-alpha-tpuv5-lite|--spot|
tpu-vm|ssh|pod|--zone=z|--worker=all|--ssh-flag=KEEP|
tpu-vm|ssh|pod|--zone=z|--worker=0|--ssh-flag=KEEP|
tpu-vm|ssh|pod|--zone=z|--worker=0|--ssh-flag=KEEP|
"""
CODES_OF_ALL = 'tpu-vm|ssh|pod|--zone=z|--worker=all|--ssh-flag=KEEP|\n'
DELETE = 'queued-resources|delete|pod|--zone=z|--force|--quiet|\n'
RUN = ['pod', 'z', 'v5litepod-16', '--config=a b', '--workdir=gs://bucket/run']


@pytest.fixture
def pod(tmp_path):
  """Starts the script; `calls()` are the commands it gave, without those for states."""
  (tmp_path / 'bin').mkdir()
  fakes = {'gcloud': GCLOUD, 'git': GIT, 'python3': PYTHON, 'cmjax': CMJAX}
  fakes |= {'tail': TAIL, 'sleep': SLEEP}
  for name, text in fakes.items():
    (tmp_path / 'bin' / name).write_text(text)
    (tmp_path / 'bin' / name).chmod(0o755)
  (tmp_path / 'states').write_text('NONE\n')
  environment = os.environ | {
    'PATH': f'{tmp_path}/bin:/usr/bin:/bin', 'PLAY': str(tmp_path), 'POLL_S': '0.05',
    'REPOSITORY': 'https://host/cmjax', 'REVISION': 'abc',
  }  # fmt: skip

  def start(*words, codes=(), **variables):
    if codes:
      (tmp_path / 'codes').write_text('\n'.join(map(str, codes)) + '\n')
    return subprocess.Popen(
      [ROOT / 'launch' / 'tpu_pod.sh', *words],
      env=environment | variables,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )

  def calls():
    lines = (tmp_path / 'calls').read_text().splitlines()
    keep_alive = '-o ServerAliveInterval=15 -o ServerAliveCountMax=4'
    lines = [line.replace(keep_alive, 'KEEP') for line in lines]
    return '\n'.join([n for n in lines if '|describe|' not in n]) + '\n'

  yield start, calls
  if (tmp_path / 'worker').exists() and (tmp_path / 'long').exists():  # a test failed
    with contextlib.suppress(ProcessLookupError):
      os.kill(int((tmp_path / 'long').read_text()), signal.SIGKILL)


def test_a_run_that_succeeds_is_requested_started_and_followed(pod, tmp_path):
  start, calls = pod
  run = start('run', *RUN, codes=[0])
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 0, text
  assert 'step 1 of a run that ends with 0' in text
  states = [f'pod is {s}' for s in ('NONE', 'WAITING_FOR_RESOURCES', 'ACTIVE')]
  assert [line for line in states if line in text] == states
  assert 'cmjax is done; launch/tpu_pod.sh stop pod z frees the TPU' in text
  assert calls() == NEW
  arguments = (tmp_path / 'arguments').read_text()
  assert arguments == '--distributed|--config=a b|--workdir=gs://bucket/run|'
  installed = (tmp_path / 'installed').read_text().splitlines()
  assert installed[0] == 'git clone --quiet https://host/cmjax cmjax'
  assert installed[2] == 'git -C cmjax checkout --quiet abc'
  # For a work directory in a bucket.
  assert installed[-1] == 'uv pip install --quiet --editable ./cmjax[gcs] jax[tpu]'


def test_a_run_that_is_interrupted_is_requested_and_started_again(pod):
  start, calls = pod
  # A stall; killed by jax, as another process is silent; a worker that restarts;
  # SIGTERM, which exits 0; a TPU that is taken away.
  codes = [75, 134, 'gone', 'preempted', 'suspended', 0]
  run = start('run', *RUN, codes=codes, SPOT='0')
  text, _ = run.communicate(timeout=100)
  assert run.returncode == 0, text
  new = NEW.replace('--spot|', '')
  lost = ''.join(new.splitlines(keepends=True)[:3])  # its exit code cannot be asked for
  stalled, preempted = new + CODES_OF_ALL + DELETE, new + DELETE
  assert calls() == 3 * stalled + preempted + lost + DELETE + new


def test_a_mistake_is_not_repeated_and_requests_are_bounded(pod):
  start, calls = pod
  run = start('run', *RUN, codes=[2])
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 1, text
  assert 'cmjax ended with 2' in text
  assert 'cmjax is failed' in text
  assert calls() == NEW + CODES_OF_ALL
  run = start('run', *RUN, codes=[75, 75, 75], MAX_REQUESTS='1')
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 2, text
  assert 'gave up after 1 requests' in text


def test_a_tpu_that_somebody_deletes_is_not_requested_again(pod):
  start, calls = pod
  run = start('run', *RUN, codes=['deleted'])
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 1, text
  assert 'pod was deleted, and is not requested again' in text
  assert calls().count('create') == 1
  assert 'delete|' not in calls()


def test_a_setup_that_fails_is_repeated_on_the_same_tpu(pod, tmp_path):
  start, calls = pod
  (tmp_path / 'fails').write_text('echo no such revision >&2')
  count = f"echo set_up >>{tmp_path}/setup; export NOTE='a note'"
  run = start('run', *RUN, SETUP=count)
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 1, text
  assert text.count('no such revision') == 3
  assert 'cmjax does not start (3 of 3)' in text
  assert calls().count('create') == 1
  assert 'delete|' not in calls()
  assert (tmp_path / 'setup').read_text() == 'set_up\n'  # a mount, which is still there
  (tmp_path / 'fails').unlink()
  run = start('run', *RUN, codes=[0], SETUP=count)
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 0
  assert 'ends with 0, a note' in text  # the variables of the first start
  assert (tmp_path / 'setup').read_text() == 'set_up\n'


def test_a_tpu_that_is_taken_away_during_the_start_is_requested_again(pod, tmp_path):
  start, calls = pod
  (tmp_path / 'fails').write_text('rm "$PLAY/fails"; echo SUSPENDED >"$PLAY/states"')
  run = start('run', *RUN, codes=[0])
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 0, text
  assert calls() == ''.join(NEW.splitlines(keepends=True)[:2]) + DELETE + NEW


def test_ctrl_c_leaves_the_run_which_a_second_call_follows(pod, tmp_path):
  start, calls = pod
  run = start('run', *RUN, codes=['long'])
  while 'step 1' not in run.stdout.readline():
    assert run.poll() is None
  os.killpg(run.pid, signal.SIGINT)
  text, _ = run.communicate(timeout=60)
  assert run.returncode == 130
  assert 'the TPU and its run go on: launch/tpu_pod.sh follow pod z' in text
  pid = (tmp_path / 'worker' / 'cmjax_run' / 'pid').read_text()
  again = start('run', *RUN)
  while 'step 1' not in again.stdout.readline():
    assert again.poll() is None
  os.killpg(again.pid, signal.SIGINT)
  again.communicate(timeout=60)
  assert (tmp_path / 'worker' / 'cmjax_run' / 'pid').read_text() == pid
  other = start('run', *RUN, '--config.seed=2')
  text, _ = other.communicate(timeout=60)
  assert other.returncode == 2
  assert 'venv/bin/cmjax --distributed --config=a\\ b --workdir=gs://bucket/run' in text
  assert 'end that first, or give another NAME' in text
  assert 'delete' not in calls()
  refused = start('stop', 'pod', 'z')
  refused.communicate('n\n', timeout=60)
  assert refused.returncode == 1
  assert 'delete' not in calls()
  assert start('stop', 'pod', 'z', '--yes').wait(60) == 0
  assert calls().endswith(DELETE)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['run', *RUN[:4], '--workdir=runs/a'], '--workdir=runs/a: must be gs://'),
    (['run', *RUN[:4]], '--workdir=: must be gs://'),
    (['run', 'pod', 'z', 'H100', *RUN[3:]], 'H100: no known TPU type; set RUNTIME'),
  ],
)
def test_what_would_lose_the_run_is_refused_in_one_line(words, message, pod, tmp_path):
  text, _ = (run := pod[0](*words)).communicate(timeout=60)
  assert run.returncode == 2
  assert text.startswith(f'tpu_pod: {message}')
  assert text.count('\n') == 1
  assert not (tmp_path / 'calls').exists()


def test_a_checkout_that_workers_cannot_clone_is_one_line(pod, tmp_path):
  (tmp_path / 'fails').write_text('echo error: no such remote >&2')
  text, _ = (run := pod[0]('run', *RUN, REPOSITORY='')).communicate(timeout=60)
  assert run.returncode == 2
  assert re.fullmatch(r"tpu_pod: this checkout has no remote 'origin'; set .*\n", text)


def test_a_dry_run_prints_the_commands_and_gives_none(pod, tmp_path):
  text, _ = (run := pod[0]('--dry_run', 'run', *RUN)).communicate(timeout=60)
  assert run.returncode == 0
  create, start, follow = text.splitlines()
  words = NEW.splitlines()[0].rstrip('|').split('|')
  assert create.split() == ['gcloud', 'compute', 'tpus', *words]
  assert start.startswith('gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all ')
  assert 'checkout --quiet abc' in start
  assert '--worker=0' in follow
  assert not (tmp_path / 'calls').exists()


def test_without_words_the_usage_is_printed(pod):
  text, _ = (run := pod[0]()).communicate(timeout=60)
  assert run.returncode == 2
  assert text.count('launch/tpu_pod.sh [--dry_run] ') == 3


SRUN = '#!/bin/sh\necho "srun $*"; exit $CODE\n'


@pytest.mark.parametrize(
  ('code', 'count', 'requeued'),
  [(75, 0, True), (137, 19, True), (75, 20, False), (0, 0, False), (2, 0, False)],
)
def test_slurm_requeues_a_job_that_hung(code, count, requeued, tmp_path):
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  (tmp_path / '.venv' / 'bin' / 'activate').touch()
  for name, text in {'srun': SRUN, 'scontrol': '#!/bin/sh\necho "$@"\n'}.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  variables = {
    'PATH': f'{tmp_path}:/usr/bin:/bin', 'CODE': str(code), 'SLURM_JOB_ID': '7',
    'SLURM_RESTART_COUNT': str(count),
  }  # fmt: skip
  done = subprocess.run(
    [ROOT / 'launch' / 'slurm.sh', '--workdir=a b'],
    cwd=tmp_path, env=variables, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == code
  lines = ['srun --kill-on-bad-exit=1 cmjax --distributed --workdir=a b']
  assert done.stdout.splitlines() == lines + requeued * ['requeue 7']
