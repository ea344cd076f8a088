"""Times cmjax against other implementations, in alternation on one machine.

Usage: launch/bench_peers.sh --ect=CHECKOUT --jcm=CHECKOUT [--out=runs/bench_peers]

locuslab/ect (PyTorch): an ECT training step, and one-step sampling.
openai/consistency_models_cifar10 (JAX; "jcm"): a CT training step.

A peer runs from the user's checkout, in a Python environment with its dependencies.
Each side is a process (launch/peers) that builds its model, warms up and waits; then
the sides are timed in alternation, cmjax first. Images are random: the time of a step
does not depend on them. A step of cmjax is all that `cmjax --mode=train` does between
two reports: the batch from host memory, the loss and its gradient, the check that both
are finite, the optimiser, the averages and the metrics.

This file imports only the standard library at the top, because it also runs in the
environment of a peer, which need not have the dependencies of cmjax.
"""

import argparse
from collections.abc import Callable
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
import types
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The name of a peer, and a file that every checkout of it has.
PEERS = {
  'ect': ('locuslab/ect', 'training/loss.py'),
  'jcm': ('openai/consistency_models_cifar10', 'jcm/losses.py'),
}
TASKS = {
  ('ect', 'train'): 'ECT training step',
  ('ect', 'sample'): 'one-step sampling',
  ('jcm', 'train'): 'CT training step',
}
LAYOUTS = ('eager', 'channels_last', 'compile', 'channels_last+compile')
WARM_CALLS = 6  # RAdam takes a shorter path in its first five steps
SIZES = {'small': (32, 32, 4), 'full': (128, 128, 4)}  # batch, channels, num_blocks


class CannotRunError(Exception):
  """A side cannot be run; the reason in one line."""


# Arithmetic and tables ------------------------------------------------------------


def variants(peer: str, precision: str, platform: str) -> list[str]:
  """All variants of a peer at a precision: dtype, memory layout, compiler.

  jcm supports only float32.
  """
  if peer == 'jcm':
    return ['pmap'] if precision == 'float32' else []
  if precision == 'float32':
    return list(LAYOUTS)
  dtypes = ['bfloat16'] if platform == 'cpu' else ['float16', 'bfloat16']
  return [f'{dtype}+{layout}' for dtype in dtypes for layout in LAYOUTS]


def summary(batch: int, ours: list[float], theirs: list[float]) -> dict[str, float]:
  """Images per second, the ratio of the medians, and its range over the rounds.

  `ours` and `theirs` are seconds per call, one for each round.
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
  """One line per row; a ratio above one means that cmjax is faster."""
  head = ['', 'batch', 'cmjax', 'peer', 'variant of the peer', 'ratio', 'over rounds']
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
    f'Medians of {settings["rounds"]} rounds of about {settings["seconds"]:g} s per '
    'side, in alternation; a ratio above one means that cmjax is faster. Images are '
    f'random. {result["device"]}, {settings["threads"]} threads per side, '
    f'XLA_FLAGS={result["xla_flags"]!r}, load average {result["load"]:.2f} before; '
    f'{result["date"]}. {sides}.',
  ]
  for reason in result['not_run']:
    lines += ['', f'Not run: {reason}.']
  return '\n'.join(lines) + '\n'


# Sides ----------------------------------------------------------------------------


class Side:
  """One implementation in a process, which waits between measurements."""

  def __init__(self, task: dict[str, Any], python: str, log: Path):
    self._log = log
    environment = os.environ | {
      'OMP_NUM_THREADS': str(task['threads']),
      # Both sides share the memory of one device.
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
    self._stdin, self._stdout = self._process.stdin, self._process.stdout
    assert self._stdin  # a pipe, as is stdout
    assert self._stdout
    try:
      self.facts = self._answer()
    except BaseException:
      self.close()
      raise

  def seconds(self, function: str, calls: int) -> float:
    """The mean time of a number of calls of 'train' or 'sample'."""
    request = json.dumps({'function': function, 'calls': calls})
    with contextlib.suppress(BrokenPipeError):  # `_answer` then raises
      print(request, file=self._stdin, flush=True)
    return self._answer()['seconds'] / calls

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self._stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._stdout.close()

  def _answer(self) -> dict[str, Any]:
    line = self._stdout.readline()
    if not line:
      code = self._process.wait()
      raise CannotRunError(f'the process ended with exit code {code}; see {self._log}')
    answer = json.loads(line)
    if 'failed' in answer:
      raise CannotRunError(f'{answer["failed"]}; see {self._log}')
    return answer


def serve(task: dict[str, Any]) -> None:
  """Builds the side of a task, then answers each line of stdin with a measurement."""
  # Answers keep stdout; what a peer prints goes to stderr.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def answer(**values):
    print(json.dumps(values), file=answers, flush=True)

  try:
    if hasattr(os, 'sched_setaffinity'):  # the number of threads of JAX
      os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task['threads']])
    side = _module(task).build(task)
    functions = {name: side.pop(name) for name in ('train', 'sample') if name in side}
    per_call = {name: _warm_up(function) for name, function in functions.items()}
    answer(**side, per_call=per_call, python=platform.python_version())
    for line in sys.stdin:
      request = json.loads(line)
      start = time.perf_counter()
      functions[request['function']](request['calls'])
      answer(seconds=time.perf_counter() - start)
  except ModuleNotFoundError as error:
    answer(failed=f'{sys.executable} has no module {error.name!r}')
    raise
  except Exception as error:
    lines = str(error).strip().splitlines() or ['']
    answer(failed=f'{type(error).__name__}: {lines[0][:300]}')
    raise


def _module(task: dict[str, Any]) -> types.ModuleType:
  """The file of launch/peers, which imports from the checkout."""
  path = ROOT / 'launch' / 'peers' / f'{task["side"]}.py'
  spec = importlib.util.spec_from_file_location(f'bench_{task["side"]}', path)
  assert spec  # every .py file has one
  assert spec.loader
  module = importlib.util.module_from_spec(spec)
  sys.path[0] = task['checkout']
  spec.loader.exec_module(module)
  return module


def _warm_up(function: Callable[[int], None]) -> float:
  """Compiles a function, and returns the median time of its first calls after that."""
  function(1)
  times, first = [], time.perf_counter()
  while len(times) < 2 or (
    len(times) < WARM_CALLS and time.perf_counter() - first < 30
  ):
    start = time.perf_counter()
    function(1)
    times.append(time.perf_counter() - start)
  return statistics.median(times)


# Comparison -----------------------------------------------------------------------


def compare(peer: str, flags: argparse.Namespace, result: dict[str, Any]) -> None:
  """Times cmjax against every variant of one peer, and adds rows to the result.

  Raises: CannotRunError if no variant can be run.
  """
  num_rows = len(result['rows'])
  with tempfile.TemporaryDirectory() as folder:
    keys = ('batch', 'channels', 'num_blocks', 'threads', 'precision')
    task = {key: getattr(flags, key) for key in keys}
    task |= {'side': 'ours', 'peer': peer, 'folder': folder, 'checkout': str(ROOT)}
    say(f'{peer}: building and warming up cmjax')
    log = flags.out / f'{peer}_ours.log'
    with contextlib.closing(Side(task, sys.executable, log)) as ours:
      result['device'] = ours.facts['device'] or _processor()
      result['xla_flags'] = ours.facts['xla_flags']
      for variant in _chosen_variants(peer, flags, ours.facts['platform']):
        task |= {'side': peer, 'checkout': str(getattr(flags, peer))}
        task |= {'variant': variant, 'platform': ours.facts['platform']}
        try:
          _compare_variant(task, ours, flags, result)
        except CannotRunError as error:
          result['not_run'].append(f'{peer}, {variant}: {error}')
          say(f'not run: {result["not_run"][-1]}')
  if len(result['rows']) == num_rows:
    raise CannotRunError(f'no variant could be run; {result["not_run"][-1]}')


def _chosen_variants(peer: str, flags: argparse.Namespace, platform: str) -> list[str]:
  supported = variants(peer, flags.precision, platform)
  if not supported:
    raise CannotRunError(f'it does not support {flags.precision}')
  if flags.variant and flags.variant not in supported:
    raise CannotRunError(
      f'it has no variant {flags.variant!r}; it has {", ".join(supported)}'
    )
  return [flags.variant] if flags.variant else supported


def _compare_variant(
  task: dict[str, Any], ours: Side, flags: argparse.Namespace, result: dict[str, Any]
) -> None:
  """Times cmjax against one variant of a peer, and adds rows to the result."""
  peer, variant = task['peer'], task['variant']
  say(f'{peer}, {variant}: building and warming up')
  log = flags.out / f'{peer}_{variant.replace("+", "_")}.log'
  python = getattr(flags, f'{peer}_python')
  with contextlib.closing(Side(task, python, log)) as theirs:
    _check_same(ours.facts, theirs.facts)
    result['sides']['cmjax'] = ours.facts | {'revision': _revision(ROOT)}
    revision = _revision(getattr(flags, peer))
    result['sides'][PEERS[peer][0]] = theirs.facts | {'revision': revision}
    for name in theirs.facts['per_call']:
      row = {
        'what': TASKS[peer, name],
        'parameters': ours.facts['parameters'],
        'batch': flags.batch,
        'precision': flags.precision,
        'variant': variant,
      }
      row |= _alternate(name, ours, theirs, flags)
      result['rows'].append(row)
      say(f'{peer}, {variant}, {name}: ratio {row["ratio"]:.2f}')
      _write(result, flags.out)  # so that an interrupted run keeps its rows


def _check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
  for key in ('platform', 'parameters'):
    if ours[key] != theirs[key]:
      raise CannotRunError(f'{key} differ: ours {ours[key]}, theirs {theirs[key]}')


def _alternate(
  name: str, ours: Side, theirs: Side, flags: argparse.Namespace
) -> dict[str, Any]:
  """The summary of all rounds of one function, and their times."""
  times = {ours: [], theirs: []}
  for _ in range(flags.rounds):
    for side, seconds in times.items():
      calls = max(1, round(flags.seconds / side.facts['per_call'][name]))
      seconds.append(side.seconds(name, calls))
  rounds = {'ours_seconds': times[ours], 'theirs_seconds': times[theirs]}
  return summary(flags.batch, times[ours], times[theirs]) | rounds


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _cores() -> int:
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _revision(checkout: Path) -> str:
  """The commit of a git checkout."""
  command = ['git', '-C', str(checkout), 'rev-parse', '--short', 'HEAD']
  with contextlib.suppress(OSError):
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if not process.returncode:
      return process.stdout.strip()
  return '(no git)'


def say(text: str) -> None:
  """Prints progress to stderr; stdout is for the table."""
  print(text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise CannotRunError(f'{message}; launch/bench_peers.sh --help lists the flags')


def parsed(argv: list[str]) -> argparse.Namespace:
  """The flags of the command line, with defaults.

  Raises: CannotRunError if one is unknown or invalid.
  """
  parser = _Parser(description='Times cmjax against other implementations.')
  for peer, (name, _) in PEERS.items():
    parser.add_argument(f'--{peer}', type=Path, help=f'checkout of {name}')
    parser.add_argument(
      f'--{peer}_python', default=sys.executable, help='Python with its dependencies'
    )
  parser.add_argument('--out', default=Path('runs/bench_peers'), type=Path)
  parser.add_argument(
    '--size',
    default='small',
    choices=list(SIZES),
    help='small: batch 32, 32 channels, 4 blocks; full: 55.7 M parameters, batch 128',
  )
  parser.add_argument('--batch', type=int, help='images per step')
  parser.add_argument('--precision', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--variant', default='', help='only this variant, such as eager')
  parser.add_argument('--rounds', default=7, type=int)
  parser.add_argument('--seconds', default=4.0, type=float, help='per round and side')
  parser.add_argument(
    '--threads',
    default=_cores(),
    type=int,
    help='per side; default: the number of cores',
  )
  flags = parser.parse_args(argv)
  batch, flags.channels, flags.num_blocks = SIZES[flags.size]
  flags.batch = batch if flags.batch is None else flags.batch
  for key in ('batch', 'rounds', 'seconds', 'threads'):
    if getattr(flags, key) <= 0:
      raise CannotRunError(f'--{key}: must be positive, got {getattr(flags, key)}')
  if flags.threads > _cores():
    raise CannotRunError(
      f'--threads: this machine has {_cores()} cores, got {flags.threads}'
    )
  if not flags.ect and not flags.jcm:
    raise CannotRunError(
      'no peer to compare with; give --ect=CHECKOUT or --jcm=CHECKOUT'
    )
  for peer, (name, file) in PEERS.items():
    path = getattr(flags, peer)
    if path and not (path / file).is_file():
      raise CannotRunError(f'--{peer}: no {file} in {path}; give a checkout of {name}')
    if path:
      setattr(flags, peer, path.resolve())
  return flags


def _write(result: dict[str, Any], out: Path) -> Path:
  path = out / 'bench_peers.md'
  path.write_text(report(result), encoding='utf-8')
  path.with_suffix('.json').write_text(json.dumps(result, indent=2), encoding='utf-8')
  return path


def main(argv: list[str]) -> int:
  """Runs the command line; an error is one line on stderr, and exit code 2."""
  if argv and argv[0].startswith('--side='):
    serve(json.loads(argv[0].partition('=')[2]))
    return 0
  try:
    flags = parsed(argv)
  except CannotRunError as error:
    say(f'bench_peers: {error}')
    return 2
  flags.out.mkdir(parents=True, exist_ok=True)
  result = {
    'date': datetime.date.today().isoformat(),
    'load': os.getloadavg()[0],
    'xla_flags': '',  # of cmjax
    'settings': {key: getattr(flags, key) for key in ('rounds', 'seconds', 'threads')},
    'sides': {},
    'rows': [],
    'not_run': [],
  }
  code = 0
  for peer in PEERS:
    try:
      if getattr(flags, peer):
        compare(peer, flags, result)
    except CannotRunError as error:
      say(f'bench_peers: --{peer}: {error}')
      code = 2
  if result['rows']:
    print(f'{report(result)}\n{_write(result, flags.out)} and .json')
  return code


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
