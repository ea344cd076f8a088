"""Trackers: TensorBoard, Weights & Biases, MLflow, or a class of the user's own.

A tracker receives the rows and the pictures of a run beside `metrics.jsonl` and
`pictures/`, in the first process. Its library is imported when training starts.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import json
import logging
import os
from pathlib import Path
import re
import secrets
import time
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from cmjax.core import first_line
from cmjax.runtime import logs, paths

INIT_S = 20.0  # until W&B is considered unreachable at the start
FINISH_S = 60.0  # for W&B's last upload; what is missing stays on the disk


@runtime_checkable
class Tracker(Protocol):
  """Receives the metrics and the pictures of a run."""

  def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
    """Adds values by name: scalars, and pictures as u8[H, W, 3].

    A step may have several calls, and a run that resumes repeats the steps after its
    checkpoint.
    """
    ...

  def close(self) -> None:
    """Writes what is left."""
    ...


def tensorboard(*, workdir: Path) -> Tracker:
  """Events of TensorBoard, in `tensorboard/` of the work directory."""
  import tensorboardX

  # By default, two files created in the same second have the same name.
  suffix = f'.{time.time_ns()}'
  folder = str(workdir / 'tensorboard')
  return _TensorBoard(tensorboardX.SummaryWriter(folder, filename_suffix=suffix))


class _TensorBoard:
  def __init__(self, events: Any):
    self._events = events

  def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
    for name, value in values.items():
      if isinstance(value, np.ndarray):
        self._events.add_image(name, value, step, dataformats='HWC')
      else:
        self._events.add_scalar(name, value, step)

  def flush(self) -> None:
    self._events.flush()

  def close(self) -> None:
    self._events.close()


def wandb(
  *,
  project: str = 'cmjax',
  name: str = '',
  entity: str = '',
  mode: Literal['online', 'offline'] = 'online',
  workdir: Path,
  config: dict,
) -> Tracker:
  """A run of Weights & Biases, with its files in `wandb/` of the work directory.

  Args:
    project: its name.
    name: of the run; that of the work directory if empty.
    entity: user or team; the default of the login if empty.
    mode: `offline` writes files that `wandb sync` uploads.
    workdir: the work directory.
    config: the config of the run.

  Raises: ValueError if there is no login or no network; it never prompts for one.
  """
  environment = dict(
    WANDB_SILENT='true',
    WANDB_CACHE_DIR=str(workdir / 'wandb' / 'cache'),
    WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL='1',  # s; what a kill may lose
  )
  if mode == 'offline':
    environment['WANDB_ERROR_REPORTING'] = 'false'  # does not contact Sentry
  ids = _Ids(workdir / 'trackers' / 'wandb.json', f'{entity}/{project}')
  with _environment(environment):
    import wandb as library  # pyright: ignore[reportMissingImports]

    settings = library.Settings(
      console='off',
      silent=True,
      reinit='create_new',
      init_timeout=INIT_S,
      finish_timeout=FINISH_S,
    )
    start = functools.partial(
      library.init,
      project=project,
      name=name or workdir.resolve().name,
      entity=entity or None,
      mode=mode,
      dir=str(workdir),
      config=config,
      resume='allow' if mode == 'online' else None,
      settings=settings,
    )
    try:
      if mode == 'online' and not library.login(prompt=False, verify=False):
        raise ValueError('there is no login')
      try:
        run = start(id=ids.read() or ids.write(secrets.token_hex(4)))
      except library.Error as error:
        if 'previously created and deleted' not in str(error):
          raise
        logs.say(f'W&B: starts a new run: {first_line(error)}')
        run = start(id=ids.write(secrets.token_hex(4)))
    except Exception as error:  # wandb raises errors of many types
      raise ValueError(
        "W&B does not start; run `wandb login`, or give mode='offline' and upload "
        f'later with `wandb sync` ({first_line(error)})'
      ) from error
  # Rows of W&B have increasing numbers. Those of repeated steps would be refused, so
  # that the step is a value of its own, and the axis of all others.
  run.define_metric('step')
  run.define_metric('*', step_metric='step')
  return _WandB(run, library.Image)


class _WandB:
  def __init__(self, run: Any, as_image: Callable[[np.ndarray], Any]):
    self._run = run
    self._as_image = as_image

  def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
    row = {
      name: self._as_image(value) if isinstance(value, np.ndarray) else value
      for name, value in values.items()
    }
    row['step'] = step
    self._run.log(row, step=max(step, self._run.step), commit=True)

  def close(self) -> None:
    self._run.finish()


def mlflow(
  *,
  experiment: str = 'cmjax',
  name: str = '',
  tracking_uri: str = '',
  workdir: Path,
  config: dict,
) -> Tracker:
  """A run of MLflow.

  Args:
    experiment: its name; created if it does not exist.
    name: of the run; that of the work directory if empty.
    tracking_uri: a server or a store; files in `mlruns/` of the work directory if
      empty.
    workdir: the work directory.
    config: the config of the run, logged as parameters with dotted names.

  Raises: ValueError if the store cannot be used.
  """
  os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')
  os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')  # otherwise refused
  # A server that does not answer must not stop training for an hour.
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', '10')
  os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
  logging.getLogger('urllib3.connectionpool').setLevel(logging.ERROR)  # of retries
  from mlflow import entities, tracking  # pyright: ignore[reportMissingImports]

  uri = tracking_uri or (workdir / 'mlruns').resolve().as_uri()
  ids = _Ids(workdir / 'trackers' / 'mlflow.json', f'{tracking_uri} {experiment}')
  run_id = ids.read()
  try:
    client = tracking.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    if run_id:
      try:
        client.update_run(run_id, status='RUNNING')
      except Exception as error:
        logs.say(f'MLflow: starts a new run: {first_line(error)}')
        run_id = ''
    if not run_id:
      run = client.create_run(number, run_name=name or workdir.resolve().name)
      run_id = ids.write(run.info.run_id)
      params = [entities.Param(_plain(k), str(v)[:500]) for k, v in _flat(config)]
      for i in range(0, len(params), 100):  # the most in one call
        client.log_batch(run_id, params=params[i : i + 100])
  except Exception as error:  # of the store, the network or the disk
    raise ValueError(
      'MLflow does not start; without tracking_uri, it writes files into the work '
      f'directory ({first_line(error)})'
    ) from error
  return _MLflow(client, run_id, entities.Metric)


class _MLflow:
  def __init__(self, client: Any, run_id: str, metric: Callable[..., Any]):
    self._client = client
    self._run_id = run_id
    self._metric = metric

  def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
    now, metrics = int(time.time() * 1000), []
    for name, value in values.items():
      if isinstance(value, np.ndarray):
        self._client.log_image(self._run_id, value, key=_plain(name), step=step)
      else:
        metrics.append(self._metric(_plain(name), float(value), now, step))
    self._client.log_batch(self._run_id, metrics=metrics)

  def close(self) -> None:
    self._client.set_terminated(self._run_id)


def _plain(name: str) -> str:
  """The name, with the characters that MLflow takes."""
  return re.sub(r'[^\w/. -]', '_', name)


def _flat(config: Mapping[str, Any], where: str = '') -> Iterator[tuple[str, Any]]:
  """Dotted keys and values of a nested config."""
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{where}{key}.')
    else:
      yield f'{where}{key}', value


class _Ids(NamedTuple):
  """The id of a run of W&B or MLflow, by destination, kept in the work directory."""

  path: Path
  destination: str

  def _all(self) -> dict[str, str]:
    try:
      return dict(json.loads(self.path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError, RecursionError):
      return {}

  def read(self) -> str:
    """The id, or '' if there is none."""
    found = self._all().get(self.destination, '')
    return found if re.fullmatch(r'[0-9a-zA-Z_-]{1,64}', str(found)) else ''

  def write(self, run_id: str) -> str:
    """Stores an id, and returns it."""
    self.path.parent.mkdir(exist_ok=True)
    text = json.dumps(self._all() | {self.destination: run_id})
    paths.write_text(self.path, text)
    return run_id


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
  """Sets the environment variables that are not set."""
  new = {name: value for name, value in values.items() if name not in os.environ}
  os.environ.update(new)
  try:
    yield
  finally:
    for name in new:
      os.environ.pop(name, None)


class Library(NamedTuple):
  """What a tracker needs, and its key that says where the run is sent."""

  package: str
  distribution: str
  oldest: tuple[int, int]
  destination: str


LIBRARIES: dict[Callable[..., Tracker], Library] = {
  wandb: Library('wandb', 'wandb', (0, 30), 'entity'),
  mlflow: Library('mlflow', 'mlflow-skinny', (3, 13), 'tracking_uri'),
}
