"""The command line: flags -> one of the modes, and mistakes in one line."""

import argparse
from collections.abc import Sequence
import difflib
import importlib
import os
from pathlib import Path
import platform
import sys
import traceback

import cmjax

MODES = {  # what each does, for --help
  'train': 'trains, or goes on with the run of --workdir',
  'sample': 'draws samples with every sampler: pictures and .npz files',
  'evaluate': 'draws more samples and measures them: a table',
  'study': 'looks at the weights by noise level: tables and pictures',
  'bench': 'times the training step, its parts and its data',
  'port': 'writes a checkpoint or a safetensors file of any weights that open',
  'compile': 'compiles the training step for the TPUs of --topology',
  'dry_run': 'builds everything and prints it, and trains nothing',
  'configs': 'lists the configs that ship',
}


_CACHE = str(Path.home() / '.cache' / 'cmjax' / platform.node())


class _FlagError(Exception):
  """A mistake in the flags themselves."""


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would print its usage and exit."""

  def error(self, message: str) -> None:
    raise _FlagError(message)


def command() -> None:
  """The console script: `main`, and then the end of the process."""
  code = main()
  try:
    sys.stdout.flush()
  except BrokenPipeError:  # whoever read the output has ended
    code = code or 1
  sys.stderr.flush()
  if code:
    os._exit(code)  # the usual way out waits for processes and disks that may be gone


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line, `sys.argv` by default, and returns its exit code.

  A user's mistake is one line on stderr and code 2. An error in a function of the
  user's keeps its traceback, from the first line of theirs.
  """
  flags = None
  try:
    flags = _parsed(sys.argv[1:] if argv is None else list(argv))
    mode = importlib.import_module(f'cmjax.modes.{flags.mode}')
    if flags.mode != 'configs':
      _start(flags)
    if _names_code(flags):
      from cmjax import config

      config.allow_imports_from(os.getcwd())
    return mode.run(flags) or 0
  except SystemExit as stop:  # of --help and --version
    if isinstance(stop.code, str):
      _say(stop.code)
      return 1
    return stop.code or 0
  except BrokenPipeError:
    return 1
  except KeyboardInterrupt:
    _say('stopped; a training goes on from its last checkpoint by the same command')
    return 130
  except _FlagError as error:
    _say(f'{error}; cmjax --help lists the flags')
    return 2
  except Exception as error:
    if flags is not None and flags.debug:
      traceback.print_exc()
    return _reported(error)


def _parsed(argv: list[str]) -> argparse.Namespace:
  """The flags, with those of `--config.KEY=VALUE` as pairs in `overrides`."""
  plain, overrides = [], []
  words = iter(argv)
  for word in words:
    if word.startswith('--config.'):
      key, attached, value = word.removeprefix('--config.').partition('=')
      overrides.append((key, value if attached else next(words, '')))
    else:
      plain.append(word)
  parser = _parser()
  flags, rest = parser.parse_known_args(plain)
  for word in rest:
    if not word.startswith('-'):
      raise _FlagError(f'unexpected {word!r}; flags look like --workdir=DIR')
    name = word.partition('=')[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(name, known, n=1)
    meant = f', did you mean {close[0]}?' if close else ''
    raise _FlagError(f'unknown flag {name}{meant}')
  flags.trust = tuple(filter(None, flags.trust.split(',')))
  # A function before the keys that it takes.
  flags.overrides = sorted(overrides, key=lambda pair: not pair[0].endswith('.fn'))
  return flags


def _parser() -> argparse.ArgumentParser:
  modes = '\n'.join(f'  {mode:10}{text}' for mode, text in MODES.items())
  parser = _Parser(
    prog='cmjax',
    allow_abbrev=False,
    usage='cmjax --config=NAME --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]',
    epilog=f'modes:\n{modes}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def text(name, metavar, help):
    parser.add_argument(f'--{name}', default='', metavar=metavar, help=help)

  def number(name, kind, default, help):
    parser.add_argument(f'--{name}', type=kind, default=default, metavar='N', help=help)

  add = parser.add_argument
  add('--version', action='version', version=f'cmjax {cmjax.__version__}')
  text('config', 'NAME', 'ect:digits, FILE.py:ARGUMENT or RUN/config.json')
  text('workdir', 'DIR', 'the folder of the run, or a file of weights to sample')
  add('--mode', default='train', choices=MODES, metavar='MODE', help='train by default')
  add('--debug', action='store_true', help='print the whole traceback of every error')
  text('trust', 'A,B', 'packages whose functions the config of weights may name')
  text('labels', '0,3,7', 'with --mode=sample: the classes to draw')
  text('from', 'PATH', 'with --mode=port: a run, a checkpoint or a released file')
  text('to', 'PATH', 'with --mode=port: a folder, or FILE.safetensors')
  text('form', 'FORM', "of OpenAI's files: denoiser or consistency")
  add('--distributed', action='store_true', help='one process of a TPU pod, GKE, Slurm')
  text('coordinator', 'HOST:PORT', 'of process 0, where there is no cluster')
  number('processes', int, 0, 'with --coordinator: how many')
  number('process', int, -1, 'with --coordinator: which, from 0')
  cache = f'folder of compiled programs, {_CACHE} by default; empty: none'
  add('--compilation_cache', metavar='DIR', help=cache)
  text('topology', 'CHIPS', 'with --mode=compile: the TPUs, as v5e:16x16')
  text('blank', 'SIZE,CHANNELS,CLASSES', 'with --mode=compile: instead of config.data')
  number('effort', int, -1, 'with --mode=compile: -1 least, 0 as a run, 1 most')
  return parser


def _names_code(flags: argparse.Namespace) -> bool:
  """Whether the command itself names functions that may be the user's own."""
  in_file = flags.config.partition(':')[0].endswith('.py')
  by_flag = any(key.endswith('.fn') for key, _ in flags.overrides)
  return in_file or by_flag or bool(flags.trust)


def _start(flags: argparse.Namespace) -> None:
  """Joins the other processes, and finds what earlier ones compiled."""
  import jax

  from cmjax import sharding
  from cmjax.core import UserError

  if flags.compilation_cache is not None or not jax.config.jax_compilation_cache_dir:
    cache = _CACHE if flags.compilation_cache is None else flags.compilation_cache
    jax.config.update('jax_compilation_cache_dir', cache or None)
  if flags.coordinator or flags.distributed:
    sharding.start(flags.coordinator, flags.processes, flags.process)
  elif flags.processes or flags.process >= 0:
    raise UserError('--processes and --process go with --coordinator=HOST:PORT')


def _reported(error: Exception) -> int:
  """Prints an error as its kind deserves, and returns the exit code."""
  import jax  # imported by whatever raised

  from cmjax import build
  from cmjax.core import UserError, first_line

  theirs = build.frame_of_user(error)
  diverged = isinstance(error, FloatingPointError) and theirs is None
  if isinstance(error, UserError) or diverged:
    _say(str(error))
    return 2
  if theirs is not None or isinstance(error, SyntaxError):
    traceback.print_exception(error.with_traceback(theirs))
    _say('the error above was raised in code that is not of cmjax')
    return 1
  if isinstance(error, OSError):
    _say(f'{error.filename or "system"}: {error.strerror or first_line(error)}')
    return 2
  if isinstance(error, MemoryError):
    _say(f'out of memory ({first_line(error)}); ask for less at a time')
    return 1
  if isinstance(error, jax.errors.JaxRuntimeError):
    _say(f'{first_line(error)}; {_way_out(str(error))}')
    return 1
  traceback.print_exception(error)
  _say('the error above is a fault of cmjax; please report it with the command')
  return 1


def _way_out(error: str) -> str:
  import jax

  if 'RESOURCE_EXHAUSTED' in error:
    return (
      'raise config.accumulate, set config.network.remat=True, or split the state: '
      'config.mesh.fsdp=True'
    )
  if jax.process_count() > 1:
    return 'another process or a device is gone; the same command goes on'
  return 'a device failed'


def _say(text: str) -> None:
  """One line on stderr, which in a pod names the process."""
  jax = sys.modules.get('jax')
  many = jax is not None and _joined(jax)
  process = f'process {jax.process_index()}: ' if many else ''
  sys.stdout.flush()
  print(f'cmjax: {process}{text}', file=sys.stderr, flush=True)


def _joined(jax) -> bool:
  """Whether this is one process of several; asks no backend that has not started."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


if __name__ == '__main__':
  command()
