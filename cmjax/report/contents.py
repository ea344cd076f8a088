"""What the work directory of a run holds: read as it is, damaged or not."""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from cmjax.core import UserError, first_line
from cmjax.report.metric_rows import Metrics, read_metrics
from cmjax.runtime import lock, paths, provenance, storage
from cmjax.runtime.config_record import ConfigDict, completed
from cmjax.runtime.renamed import renamed

MAX_JSON = 30_000_000  # bytes


class Document(NamedTuple):
  """An object of a JSON file."""

  path: Path  # within the work directory
  value: dict[str, Any]


class Contents(NamedTuple):
  """Everything of a run that a report shows."""

  folder: Path
  config: ConfigDict | None  # completed with defaults
  starts: list[dict[str, Any]]  # rows of `starts.jsonl`
  metrics: Metrics
  pictures: dict[str, dict[int, Path]]  # by sampler and step
  data_picture: Path | None
  samples: list[Path]  # sheets of --mode=sample, newest first, and
  edits: list[Path]  # of --mode=edit
  evaluations: list[Document]  # newest first
  searches: list[Document]
  studies: list[Document]  # newest first
  benches: list[Document]  # newest first
  saved: int | None  # step of the newest checkpoint
  ended: int | None  # step at which all hooks had run
  trained_by: str | None  # the process that trains in it now
  damaged: list[str]  # files that cannot be read, and why

  @property
  def total_steps(self) -> int | None:
    """Steps of the whole run."""
    config: Any = self.config
    try:
      return -(-int(config.total_images) // int(config.batch_size))
    except (ValueError, TypeError, AttributeError, ArithmeticError):
      return None

  @property
  def step(self) -> int:
    """The last step that is logged, or 0."""
    steps = [series.steps[-1] for series in self.metrics.series.values()]
    return int(max(steps, default=0))

  @property
  def error(self) -> str | None:
    """The error that ended the run, if one did."""
    last = self.starts[-1] if self.starts else {}
    error = last.get('error')
    return error if isinstance(error, str) else None


def check_run(folder: Path) -> None:
  """Raises UserError if a path is no folder of a run, or the run has not logged yet."""
  if not paths.is_dir(folder):
    what = 'is a file, not the folder of a run' if folder.exists() else 'does not exist'
    raise UserError(f'{folder}: {what}')
  if not any(map(paths.is_file, (folder / 'config.json', folder / 'metrics.jsonl'))):
    raise UserError(
      f'{folder}: holds no run, neither config.json nor metrics.jsonl; give the '
      '--workdir of a training command'
    )
  path = folder / 'metrics.jsonl'
  if not paths.is_file(path) or not paths.size(path):
    raise UserError(
      f'{folder}: the run has not logged yet; repeat this after its first '
      'config.every.log_steps steps'
    )


FILES = (  # of a work directory, that a report shows
  *('config.json', 'starts.jsonl', 'metrics.jsonl', '.ended', 'pictures/*.png'),
  *('samples/step_*/all*.png', 'edits/*_step_*/all.png', 'studies/step_*/*'),
  *('evaluation_*.json', 'searched/*.json', 'bench*.json'),
)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Contents]:
  """`read_contents`, of a bucket from a copy that lasts as long as the context."""
  with paths.fetched(folder, FILES) as local:
    contents = read_contents(local)
    if paths.remote(folder):
      steps = storage.steps_in(folder / storage.CHECKPOINTS)
      by = lock.trained_by(folder)
      contents = contents._replace(saved=max(steps, default=None), trained_by=by)
    yield contents


def read_contents(folder: Path) -> Contents:
  """Reads a work directory; whatever is missing or damaged is left out and named."""
  damaged: list[str] = []
  config = None
  for _, value in _documents([folder / 'config.json'], folder, damaged):
    try:
      config = completed(ConfigDict(_with_tuples(renamed(value)[0])))
    except Exception as error:  # of any kind, as the file may hold anything
      damaged.append(f'config.json: holds no config ({first_line(error)})')
  try:
    metrics = read_metrics(folder / 'metrics.jsonl')
  except OSError as error:
    metrics = Metrics({}, 0, 0)
    damaged.append(f'metrics.jsonl: cannot be read ({first_line(error)})')
  if metrics.num_damaged:
    damaged.append(f'metrics.jsonl: {metrics.num_damaged:,} rows cannot be read')

  def documents(pattern: str) -> list[Document]:
    return list(_documents(_newest_first(folder, pattern), folder, damaged))

  pictures: dict[str, dict[int, Path]] = {}
  for path in _newest_first(folder, 'pictures/*_*.png')[::-1]:
    if match := re.fullmatch(r'(.+)_(\d{8,18})', path.stem):
      pictures.setdefault(match[1], {})[int(match[2])] = path
  data_picture = folder / 'pictures' / 'data.png'
  steps = [int(p.name) for p in folder.glob('checkpoints/*') if p.name.isdecimal()]
  return Contents(
    folder=folder,
    config=config,
    starts=provenance.starts(folder),
    metrics=metrics,
    pictures=pictures,
    data_picture=data_picture if data_picture.is_file() else None,
    samples=_newest_first(folder, 'samples/step_*/all*.png'),
    edits=_newest_first(folder, 'edits/*_step_*/all.png'),
    evaluations=documents('evaluation_*.json'),
    searches=documents('searched/*.json')[::-1],
    studies=documents('studies/step_*/study.json'),
    benches=documents('bench*.json'),
    saved=max(steps, default=None),
    ended=provenance.caught_up(folder),
    trained_by=lock.trained_by(folder),
    damaged=damaged,
  )


def _newest_first(folder: Path, pattern: str) -> list[Path]:
  """The files of a pattern by the numbers in their names, the highest first."""

  def numbers(path: Path) -> tuple[list[int], str]:
    name = str(path.relative_to(folder).with_suffix(''))
    return [int(n) for n in re.findall(r'\d{1,18}', name)], name

  # A pipe or a device, in the run of a stranger, may have no end.
  files = (path for path in folder.glob(pattern) if path.is_file())
  return sorted(files, key=numbers, reverse=True)


def _documents(
  paths: list[Path], folder: Path, damaged: list[str]
) -> Iterator[Document]:
  for path in paths:
    name = path.relative_to(folder)
    try:
      if not path.is_file():
        raise ValueError('no such file')
      if path.stat().st_size > MAX_JSON:
        raise ValueError(f'more than {MAX_JSON:,} bytes')
      value = json.loads(path.read_text(encoding='utf-8'))
      if not isinstance(value, dict):
        raise ValueError('not an object with keys')
      yield Document(name, value)
    except (OSError, ValueError, RecursionError) as error:
      damaged.append(f'{name}: cannot be read ({first_line(error)})')


def _with_tuples(value: Any) -> Any:
  """JSON with tuples for lists, as in the configs that ship."""
  if isinstance(value, dict):
    return {key: _with_tuples(item) for key, item in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
