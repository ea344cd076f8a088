"""Error reports: one line for a mistake in a command, a traceback for one in code.

jax is imported only where it is needed, so that `cmjax --help` starts quickly.
"""

from collections.abc import Iterator
import contextlib
import sys
import traceback
from types import TracebackType

# Packages that raise on behalf of their caller.
_LIBRARIES = {
  *('cmjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'numpy', 'ml_collections'),
  *('tqdm', 'tensorboardX', 'tensorboard', 'clu', 'absl', 'safetensors', 'msgpack'),
  *('tensorstore', 'array_record', 'google', 'xxhash', 'grain', 'cloudpickle'),
  *('gcsfs', 'fsspec', 'aiohttp', 'aiohappyeyeballs', 'requests', 'decorator'),
  *('tensorflow_datasets', 'etils', 'sklearn', 'scipy', 'joblib', 'PIL', 'matplotlib'),
  *sys.stdlib_module_names,
}

RETRY = 75  # exit code EX_TEMPFAIL of sysexits.h: a launcher may repeat the command
# Of gRPC: another process or a device is gone, and another attempt may succeed.
_TRANSIENT = 'UNAVAILABLE', 'ABORTED', 'DEADLINE_EXCEEDED'


@contextlib.contextmanager
def user_errors(where: str) -> Iterator[None]:
  """Turns a ValueError, TypeError or similar error of cmjax into a one-line UserError.

  An error raised in the user's own code keeps its traceback, with a note that names the
  part of the config.
  """
  from cmjax.core import UserError, first_line

  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if frame_of_user(error):
      error.add_note(f'raised in {where}')
      raise
    if isinstance(error, ValueError | TypeError | ArithmeticError | MemoryError):
      raise UserError(f'{where}: {first_line(error)}') from error
    raise


@contextlib.contextmanager
def part_errors(where: str) -> Iterator[None]:
  """`user_errors`, which also adds the place to a UserError raised within it."""
  from cmjax.core import UserError

  try:
    with user_errors(where):
      yield
  except UserError as error:
    if str(error).startswith('config.'):
      raise
    raise type(error)(f'{where}: {error}') from error


def frame_of_user(error: BaseException) -> TracebackType | None:
  """The traceback from its first frame outside cmjax and its libraries."""
  trace = error.__traceback__
  while trace is not None:
    module = trace.tb_frame.f_globals
    spec = module.get('__spec__')  # its name is right even if `__name__` is __main__
    name = spec.name if spec else module.get('__name__', '')
    if name.partition('.')[0] not in _LIBRARIES:
      return trace
    trace = trace.tb_next
  return None


def report(error: Exception) -> int:
  """Prints an error, in one line if it is the user's mistake; returns the exit code."""
  import jax

  from cmjax.core import RetryError, UserError, first_line
  from cmjax.runtime import paths

  trace = frame_of_user(error)
  diverged = isinstance(error, FloatingPointError) and trace is None
  if isinstance(error, UserError) or diverged:
    say(str(error))
    return RETRY if isinstance(error, RetryError) else 2
  if trace is not None or isinstance(error, SyntaxError):
    traceback.print_exception(error.with_traceback(trace))
    say('the error above was raised in code outside cmjax')
    return 1
  if (why := paths.reason(error)) and type(error).__module__ != 'builtins':
    say(f'object storage: {why}; the same command continues a run')
    return RETRY
  if isinstance(error, OSError):
    say(f'{error.filename or "system"}: {error.strerror or first_line(error)}')
    return 2
  if isinstance(error, MemoryError):
    say(
      f'out of memory ({first_line(error)}); use a smaller batch or network, or fewer '
      'samples'
    )
    return 1
  if isinstance(error, jax.errors.JaxRuntimeError):
    say(f'{first_line(error)}; {advice(str(error), jax.process_count())}')
    return RETRY if str(error).startswith(_TRANSIENT) else 1
  traceback.print_exception(error)
  say('the error above is a bug in cmjax; please report it with the command')
  return 1


def advice(error: str, num_processes: int = 1) -> str:
  """What to try after an error of a device."""
  if 'RESOURCE_EXHAUSTED' in error:
    return (
      'raise config.accumulate, set config.network.remat=True, or shard the state: '
      'config.mesh.fsdp=True'
    )
  if num_processes > 1:
    return 'another process or a device has failed; the same command continues the run'
  return 'a device failed'


def say(text: str) -> None:
  """Prints one line on stderr, with the index of the process if there are several."""
  jax = sys.modules.get('jax')
  process = ''
  # `process_count` alone would start a backend.
  if jax and jax.distributed.is_initialized() and jax.process_count() > 1:
    process = f'process {jax.process_index()}: '
  sys.stdout.flush()
  print(f'cmjax: {process}{text}', file=sys.stderr, flush=True)
