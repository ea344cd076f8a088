"""The command line: flags -> one of the modes -> an exit code."""

import argparse
from collections.abc import Sequence
import importlib
import os
import sys
import traceback

from cmjax.runtime import errors
from cmjax.runtime.flags import CACHE, FlagError, names_code, parsed


def command() -> None:
  """The console script: `main`, then the end of the process."""
  code = main()
  try:
    sys.stdout.flush()
  except BrokenPipeError:  # the reader of the output has ended
    code = code or 1
  sys.stderr.flush()
  if code:
    os._exit(code)  # a normal exit waits for processes and disks that may be gone


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line, `sys.argv` by default, and returns its exit code.

  A user's mistake is one line on stderr and code 2. An error in the user's own code
  keeps its traceback, from the first line of that code.
  """
  flags = None
  try:
    flags = parsed(sys.argv[1:] if argv is None else list(argv))
    mode = importlib.import_module(f'cmjax.modes.{flags.mode}')
    if flags.mode not in ('configs', 'report'):  # which need no devices
      _start(flags)
    if names_code(flags):
      from cmjax.runtime import functions

      functions.allow_imports_from(os.getcwd())
    return mode.run(flags) or 0
  except SystemExit as stop:  # of --help, --version, or of a user's config
    if isinstance(stop.code, str):
      errors.say(stop.code)
      return 1
    return stop.code or 0
  except BrokenPipeError:
    return 1
  except KeyboardInterrupt:
    errors.say('interrupted; the same command continues a run from its last checkpoint')
    return 130
  except FlagError as error:
    errors.say(f'{error}; cmjax --help lists the flags')
    return 2
  except Exception as error:
    if flags is not None and flags.debug:
      traceback.print_exc()
    return errors.report(error)


def _start(flags: argparse.Namespace) -> None:
  """Sets the cache of compiled programs, and joins the other processes."""
  import jax

  from cmjax.core import UserError
  from cmjax.runtime import sharding

  if flags.compilation_cache is not None or not jax.config.jax_compilation_cache_dir:
    cache = CACHE if flags.compilation_cache is None else flags.compilation_cache
    jax.config.update('jax_compilation_cache_dir', cache or None)
  if flags.coordinator or flags.distributed:
    sharding.start(flags.coordinator, flags.processes, flags.process)
  elif flags.processes or flags.process >= 0:
    raise UserError('--processes and --process go with --coordinator=HOST:PORT')


if __name__ == '__main__':
  command()
