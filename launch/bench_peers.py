"""Times our steps against other implementations, taking turns on one machine.

Usage: launch/bench_peers.sh --ect=CHECKOUT --jcm=CHECKOUT [--out=runs/bench_peers]

locuslab/ect (PyTorch): an ECT training step, and sampling in one step.
openai/consistency_models_cifar10 (JAX; "jcm"): a CT training step.

A peer runs from the user's checkout, in a Python that has what it needs. Every side is
a process of its own (launch/peers) that builds, warms up and waits; then they take
turns, ours first. Images are random: the time of a step does not depend on them. Our
step is all that `cmjax --mode=train` does between two reports: the batch from host
memory, the loss, its gradient, the check that both are finite, the optimiser, the
averages and the metrics.

Only the standard library is imported at the top: the interpreter of a peer, which runs
this file too, need not have anything of ours.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What a peer is called, and what makes a folder a checkout of it.
PEERS = {
  'ect': ('locuslab/ect', 'training/loss.py'),
  'jcm': ('openai/consistency_models_cifar10', 'jcm/losses.py'),
}
WHAT = {
  ('ect', 'train'): 'ECT training step',
  ('ect', 'sample'): 'one-step sampling',
  ('jcm', 'train'): 'CT training step',
}
LAYOUTS = ('eager', 'channels_last', 'compile', 'channels_last+compile')
WARM_CALLS = 6  # RAdam takes a shorter path in its first five steps
SIZES = {'small': (32, 32, 4), 'full': (128, 128, 4)}  # batch, channels, blocks


class CannotRunError(Exception):
  """What cannot be run, and why, in one line."""


# Arithmetic and tables ------------------------------------------------------------


def variants(peer: str, precision: str, platform: str) -> list[str]:
  """All ways of running a peer at a precision: how numbers are kept, memory, compiler.

  jcm computes in float32 alone, and is timed in that.
  """
  if peer == 'jcm':
    return ['pmap'] if precision == 'float32' else []
  if precision == 'float32':
    return list(LAYOUTS)
  kinds = ['bfloat16'] if platform == 'cpu' else ['float16', 'bfloat16']
  return [f'{kind}+{layout}' for kind in kinds for layout in LAYOUTS]


def summary(batch: int, ours: list[float], theirs: list[float]) -> dict[str, float]:
  """Images a second, the ratio of the medians, and its range over the rounds.

  `ours` and `theirs` are seconds a call, one number a round.
  """
  ratios = [b / a for a, b in zip(ours, theirs)]
  a, b = statistics.median(ours), statistics.median(theirs)
  return {
    'ours_images_per_s': batch / a,
    'theirs_images_per_s': batch / b,
    'ratio': b / a,
    'lowest_ratio': min(ratios),
    'highest_ratio': max(ratios),
  }


def markdown(rows: list[dict[str, Any]]) -> str:
  """One line a row; a ratio above one says that ours is faster."""
  head = ['', 'batch', 'ours', 'theirs', 'their variant', 'ratio', 'rounds']
  lines = [head, ['---'] * len(head)]
  for row in rows:
    lines.append(
      [
        f'{row["what"]}, {row["parameters"] / 1e6:.1f} M, {row["precision"]}',
        str(row['batch']),
        f'{row["ours_images_per_s"]:.4g} images/s',
        f'{row["theirs_images_per_s"]:.4g} images/s',
        row['variant'],
        f'{row["ratio"]:.2f}',
        f'{row["lowest_ratio"]:.2f} to {row["highest_ratio"]:.2f}',
      ]
    )
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def report(result: dict[str, Any]) -> str:
  """The whole result as Markdown."""
  settings = result['settings']
  sides = '; '.join(
    f'{name} {side["revision"]}: Python {side["python"]}, '
    + ', '.join(f'{key} {value}' for key, value in side['versions'].items())
    for name, side in result['sides'].items()
  )
  lines = [
    markdown(result['rows']),
    '',
    f'Medians of {settings["rounds"]} rounds of about {settings["seconds"]:g} s a '
    'side, taking turns; a ratio above one says that ours is faster. Images are '
    f'random. {result["device"]}, {settings["threads"]} threads a side, '
    f'XLA_FLAGS={result["xla_flags"]!r}, load average {result["load"]:.2f} before; '
    f'{result["date"]}. {sides}.',
  ]
  for lost in result['not_run']:
    lines += ['', f'Not run: {lost}.']
  return '\n'.join(lines) + '\n'


# Sides ----------------------------------------------------------------------------


class Side:
  """One implementation, in a process of its own, that runs only when asked."""

  def __init__(self, task: dict[str, Any], python: str, log: Path):
    self._log = log
    environment = os.environ | {
      'OMP_NUM_THREADS': str(task['threads']),
      # Two sides share the memory of one device.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
      'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0],
    }
    with log.open('w', encoding='utf-8') as file:
      try:
        self._process = subprocess.Popen(
          [python, str(Path(__file__).resolve()), f'--side={json.dumps(task)}'],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=file,
          text=True,
          env=environment,
        )
      except OSError as error:
        raise CannotRunError(f'cannot start {python} ({error.strerror})') from error
    try:
      self.facts = self._answer()
    except BaseException:
      self.close()
      raise

  def seconds(self, what: str, calls: int) -> float:
    """The time of a call, of so many."""
    with contextlib.suppress(BrokenPipeError):  # then there is no answer, which tells
      print(json.dumps({'what': what, 'calls': calls}), file=self._process.stdin)
      self._process.stdin.flush()
    return self._answer()['seconds'] / calls

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      raise CannotRunError(f'the process ended with exit code {code}; see {self._log}')
    answer = json.loads(line)
    if 'failed' in answer:
      raise CannotRunError(f'{answer["failed"]}; see {self._log}')
    return answer


def serve(task: dict[str, Any]) -> None:
  """Builds what the task names, then times it as often as a line on stdin asks."""
  # What a peer prints must not come between our answers.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def say(**answer):
    print(json.dumps(answer), file=answers, flush=True)

  try:
    if hasattr(os, 'sched_setaffinity'):  # JAX takes its threads from that
      os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task['threads']])
    side = _module(task).build(task)
    calls = {what: side.pop(what) for what in ('train', 'sample') if what in side}
    per_call = {what: _warm(call) for what, call in calls.items()}
    say(**side, per_call=per_call, python=platform.python_version())
    for line in sys.stdin:
      asked = json.loads(line)
      since = time.perf_counter()
      calls[asked['what']](asked['calls'])
      say(seconds=time.perf_counter() - since)
  except ModuleNotFoundError as error:
    say(failed=f'{sys.executable} has no module {error.name!r}')
    raise
  except Exception as error:
    lines = str(error).strip().splitlines() or ['']
    say(failed=f'{type(error).__name__}: {lines[0][:300]}')
    raise


def _module(task):
  """The file of launch/peers; what it imports is found in the checkout."""
  path = ROOT / 'launch' / 'peers' / f'{task["side"]}.py'
  spec = importlib.util.spec_from_file_location(f'bench_{task["side"]}', path)
  module = importlib.util.module_from_spec(spec)
  sys.path[0] = task['checkout']
  spec.loader.exec_module(module)
  return module


def _warm(call):
  """Compiles, and calls until times have settled; seconds a call."""
  call(1)
  times, begun = [], time.perf_counter()
  while len(times) < 2 or (
    len(times) < WARM_CALLS and time.perf_counter() - begun < 30
  ):
    since = time.perf_counter()
    call(1)
    times.append(time.perf_counter() - since)
  return statistics.median(times)


# Turns ----------------------------------------------------------------------------


def compare(peer: str, given: argparse.Namespace, result: dict[str, Any]) -> None:
  """Times ours against every variant of one peer; adds rows to the result.

  Raises: CannotRunError if no variant could be run.
  """
  python, rows = getattr(given, f'{peer}_python'), []
  with tempfile.TemporaryDirectory() as folder:
    task = {key: vars(given)[key] for key in ('batch', 'channels', 'blocks', 'threads')}
    task |= {'side': 'ours', 'peer': peer, 'folder': folder, 'checkout': str(ROOT)}
    task |= {'precision': given.precision}
    say(f'{peer}: ours builds and warms up')
    with contextlib.closing(
      Side(task, sys.executable, given.out / f'{peer}_ours.log')
    ) as ours:
      result['device'] = ours.facts['device'] or _processor()
      result['xla_flags'] = ours.facts['xla_flags']
      known = variants(peer, given.precision, ours.facts['platform'])
      if not known:
        raise CannotRunError(f'it has no {given.precision}')
      known = [variant for variant in known if given.variant in ('', variant)]
      if not known:
        raise CannotRunError(f'it has no variant {given.variant!r}')
      for variant in known:
        say(f'{peer}, {variant}: builds and warms up')
        task |= {'side': peer, 'checkout': str(getattr(given, peer))}
        task |= {'variant': variant, 'platform': ours.facts['platform']}
        log = given.out / f'{peer}_{variant.replace("+", "_")}.log'
        try:
          with contextlib.closing(Side(task, python, log)) as theirs:
            _check_same(ours.facts, theirs.facts)
            for name, side, at in (
              ('cmjax', ours, ROOT),
              (PEERS[peer][0], theirs, getattr(given, peer)),
            ):
              result['sides'][name] = side.facts | {'revision': _revision(at)}
            facts = {
              'parameters': ours.facts['parameters'],
              'batch': given.batch,
              'precision': given.precision,
              'variant': variant,
            }
            for name in theirs.facts['per_call']:
              row = {'what': WHAT[peer, name], **facts}
              row |= _turns(name, ours, theirs, given)
              rows.append(row)
              result['rows'].append(row)
              say(f'{peer}, {variant}, {name}: ratio {row["ratio"]:.2f}')
              _write(result, given.out)  # a run that is ended early has lost nothing
        except CannotRunError as error:
          result['not_run'].append(f'{peer}, {variant}: {error}')
          say(f'not run: {result["not_run"][-1]}')
  if not rows:
    raise CannotRunError(f'nothing of it could be run; {result["not_run"][-1]}')


def _check_same(ours, theirs):
  for key in ('platform', 'parameters'):
    if ours[key] != theirs[key]:
      raise CannotRunError(f'{key} differ: ours {ours[key]}, theirs {theirs[key]}')


def _turns(name, ours, theirs, given):
  took = {ours: [], theirs: []}
  for _ in range(given.rounds):
    for side, found in took.items():
      calls = max(1, round(given.seconds / side.facts['per_call'][name]))
      found.append(side.seconds(name, calls))
  rounds = {'ours_seconds': took[ours], 'theirs_seconds': took[theirs]}
  return summary(given.batch, *took.values()) | rounds


def _processor():
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _cores():
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _revision(checkout):
  """The commit of a checkout, where it is one."""
  command = ['git', '-C', str(checkout), 'rev-parse', '--short', 'HEAD']
  with contextlib.suppress(OSError):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
      return done.stdout.strip()
  return '(no git)'


def say(text: str) -> None:
  """Progress, apart from the table."""
  print(text, file=sys.stderr, flush=True)


class _Flags(argparse.ArgumentParser):
  def error(self, message):
    raise CannotRunError(f'{message}; launch/bench_peers.sh --help lists the flags')


def parsed(argv: list[str]) -> argparse.Namespace:
  """The flags, with their defaults filled in.

  Raises: CannotRunError for one that cannot be.
  """
  flags = _Flags(description=__doc__.splitlines()[0])
  for peer, (name, _) in PEERS.items():
    flags.add_argument(f'--{peer}', type=Path, help=f'checkout of {name}')
    flags.add_argument(
      f'--{peer}_python', default=sys.executable, help='Python that has what it needs'
    )
  flags.add_argument('--out', default=Path('runs/bench_peers'), type=Path)
  flags.add_argument(
    '--size',
    default='small',
    choices=list(SIZES),
    help='small: batch 32, 32 channels, 4 blocks; full: the 55.7 M of CIFAR-10',
  )
  flags.add_argument('--batch', type=int, help='images a step')
  flags.add_argument('--precision', default='float32', choices=['float32', 'bfloat16'])
  flags.add_argument('--variant', default='', help='one of them alone, such as eager')
  flags.add_argument('--rounds', default=7, type=int)
  flags.add_argument('--seconds', default=4.0, type=float, help='of a turn, about')
  flags.add_argument('--threads', default=_cores(), type=int, help='all cores')
  given = flags.parse_args(argv)
  batch, given.channels, given.blocks = SIZES[given.size]
  given.batch = batch if given.batch is None else given.batch
  for key in ('batch', 'rounds', 'seconds', 'threads'):
    if getattr(given, key) <= 0:
      raise CannotRunError(f'--{key}: must be positive, got {getattr(given, key)}')
  if given.threads > _cores():
    raise CannotRunError(f'--threads: there are {_cores()} cores, got {given.threads}')
  if not given.ect and not given.jcm:
    raise CannotRunError(
      'nothing to compare with; give --ect=CHECKOUT or --jcm=CHECKOUT'
    )
  for peer, (name, file) in PEERS.items():
    path = getattr(given, peer)
    if path and not (path / file).is_file():
      raise CannotRunError(f'--{peer}: no {file} in {path}; give a checkout of {name}')
    if path:
      setattr(given, peer, path.resolve())
  return given


def _write(result: dict[str, Any], out: Path) -> Path:
  path = out / 'bench_peers.md'
  path.write_text(report(result), encoding='utf-8')
  path.with_suffix('.json').write_text(json.dumps(result, indent=2), encoding='utf-8')
  return path


def main(argv: list[str]) -> int:
  """The command line; what cannot be done is one line on stderr, and exit code 2."""
  if argv and argv[0].startswith('--side='):
    serve(json.loads(argv[0].partition('=')[2]))
    return 0
  try:
    given = parsed(argv)
  except CannotRunError as error:
    say(f'bench_peers: {error}')
    return 2
  given.out.mkdir(parents=True, exist_ok=True)
  result = {
    'date': datetime.date.today().isoformat(),
    'load': os.getloadavg()[0],
    'xla_flags': '',  # of ours
    'settings': {key: getattr(given, key) for key in ('rounds', 'seconds', 'threads')},
    'sides': {},
    'rows': [],
    'not_run': [],
  }
  failed = 0
  for peer in PEERS:
    try:
      if getattr(given, peer):
        compare(peer, given, result)
    except CannotRunError as error:
      say(f'bench_peers: --{peer}: {error}')
      failed = 2
  if result['rows']:
    print(f'{report(result)}\n{_write(result, given.out)} and .json')
  return failed


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
