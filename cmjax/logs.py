"""Scalars, pictures, tables and progress: the only door for clu and TensorBoard."""

from collections.abc import Iterator, Mapping, Sequence
import json
import math
from pathlib import Path
import sys
import time
from typing import Any

from clu import parameter_overview
import jax
from matplotlib import figure as figures
from matplotlib.backends import backend_agg
import numpy as np
from PIL import Image
import tensorboardX
import tqdm


def say(text: str) -> None:
  """One line to the user, from the first process, above a progress bar if any."""
  if jax.process_index() != 0:
    return
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


class RunLog:
  """Scalars and pictures of one run; only `primary`, the first process, writes.

  Rows of `metrics.jsonl` after step `start`, and one cut by a kill, are dropped: those
  steps are made again. Others that cannot be read are dropped with a line to the user.
  """

  def __init__(self, workdir: str | Path, primary: bool, start: int):
    self._workdir = Path(workdir)
    self._primary = primary
    if primary:
      path = self._workdir / 'metrics.jsonl'
      _keep_rows_until(path, start)
      self._lines = path.open('a', encoding='utf-8')
      # Named to the nanosecond: a file of the same second would be overwritten.
      self._events = tensorboardX.SummaryWriter(
        str(self._workdir / 'tensorboard'), filename_suffix=f'.{time.time_ns()}'
      )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Appends to `metrics.jsonl` and to the TensorBoard events; NaN is null in JSON."""
    if not self._primary:
      return
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    print(json.dumps({'step': step} | row), file=self._lines, flush=True)
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def picture(self, step: int, name: str, image: np.ndarray) -> None:
    """uint8[H, W, 3] to `pictures/NAME_STEP.png` and to the TensorBoard events."""
    if not self._primary:
      return
    write_png(self._workdir / 'pictures' / f'{name}_{step:08d}.png', image)
    self._events.add_image(name, image, step, dataformats='HWC')

  def close(self) -> None:
    """Flushes both files."""
    if self._primary:
      self._lines.close()
      self._events.close()


def _keep_rows_until(path: Path, step: int) -> None:
  if not path.exists():
    return
  rows = [(line, _step_of(line)) for line in path.read_bytes().split(b'\n')]
  # What follows the last newline may have been cut by a kill, which is no damage.
  damaged = sum(at == math.inf and bool(line.strip()) for line, at in rows[:-1])
  if damaged:
    say(f'{path}: dropped {damaged} row(s) that cannot be read')
  new = path.with_suffix('.new')
  new.write_bytes(b''.join(line + b'\n' for line, at in rows if at <= step))
  new.replace(path)


def _step_of(line: bytes) -> float:
  """The step of a row of `metrics.jsonl`; infinity if the line is no such row."""
  try:
    step = json.loads(line.decode('utf-8'))['step']
  except (ValueError, TypeError, LookupError, RecursionError):
    return math.inf
  return step if type(step) is int else math.inf


class Progress:
  """A bar on a terminal; plain lines, one a report, anywhere else."""

  def __init__(self, start: int, total: int):
    self._total = total
    self._begun = time.monotonic(), start
    terminal = sys.stderr.isatty() and jax.process_index() == 0
    self._bar = (
      tqdm.tqdm(total=total, initial=start, unit='step', dynamic_ncols=True)
      if terminal
      else None
    )

  def restart(self, step: int) -> None:
    """Leaves all up to a step, such as compiling it, out of the time left."""
    self._begun = time.monotonic(), step
    if self._bar is not None:
      self._bar.unpause()

  def advance(self) -> None:
    """One more step was dispatched."""
    if self._bar is not None:
      self._bar.update()

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the newest numbers, and the time left where there is no bar."""
    text = ' '.join(f'{k}={v:.4g}' for k, v in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text)
      return
    seconds, steps = time.monotonic() - self._begun[0], step - self._begun[1]
    left = f'{(self._total - step) * seconds / steps:.0f}s' if steps else '?'
    say(f'step {step}/{self._total} {text} left={left}')

  def close(self) -> None:
    """Leaves the bar where it is."""
    if self._bar is not None:
      self._bar.close()


def counted(parts: Sequence[Any], size: int, what: str) -> Iterator[Any]:
  """The parts, each of `size` things, with a bar or a line every ten seconds."""
  total, terminal = len(parts) * size, sys.stderr.isatty()
  if terminal and jax.process_index() == 0:
    with tqdm.tqdm(total=total, unit=what, leave=False, dynamic_ncols=True) as bar:
      for part in parts:
        yield part
        bar.update(size)
    return
  begun = said = time.monotonic()
  for done, part in enumerate(parts):
    now = time.monotonic()
    if done and now - said > SILENCE_S:
      left, said = (now - begun) / done * (len(parts) - done), now
      say(f'{done * size}/{total} {what} left={left:.0f}s')
    yield part


SILENCE_S = 10.0  # after which what takes long says how far it is


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
  """Writes indented JSON, null for numbers it does not have; makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(_finite(facts), indent=2), encoding='utf-8')


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write_png(path: str | Path, image: np.ndarray) -> None:
  """Writes uint8[H, W, 3]; folders on the way are made."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def grid(images: np.ndarray, columns: int, cell: int = 48) -> np.ndarray:
  """uint8[N, H, W, C] -> uint8[H', W', 3], row by row: three channels, or the first.

  Small images are enlarged by a whole factor to about `cell` pixels, never smoothed.
  """
  factor = max(1, cell // images.shape[1])
  big = np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)
  big = big[..., :3] if big.shape[-1] >= 3 else np.repeat(big[..., :1], 3, axis=-1)
  missing = -len(big) % columns
  big = np.concatenate([big, np.full((missing, *big.shape[1:]), 255, np.uint8)])
  big = np.pad(big, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
  rows, (h, w) = len(big) // columns, big.shape[1:3]
  big = big.reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4)
  return big.reshape(rows * h, columns * w, 3)


def scatter(samples: np.ndarray, data: np.ndarray) -> np.ndarray:
  """Points f32[N, 2] over the data f32[M, 2] -> uint8[H, W, 3]."""
  figure = figures.Figure(figsize=(4, 4), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  axes.plot(*data.T, '.', color='0.8', markersize=2, label='data')
  axes.plot(*samples.T, '.', color='C0', markersize=2, label='samples')
  axes.set_aspect('equal')
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, markerscale=5)
  return _rendered(figure)


def curves(rows: list[dict[str, float]], x: str, ys: Sequence[str]) -> np.ndarray:
  """Columns of a table against one of them, both axes logarithmic -> uint8[H, W, 3].

  A value that is not above zero, which such an axis cannot show, is a gap in its line.
  """
  figure = figures.Figure(figsize=(6, 4), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  for y in ys:
    shown = [row[y] if row[y] > 0 else math.nan for row in rows]
    axes.plot([row[x] for row in rows], shown, '.-', label=y)
  axes.set_xscale('log')
  axes.set_yscale('log')
  axes.set_xlabel(x)
  axes.grid(alpha=0.3)
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=len(ys), frameon=False)
  return _rendered(figure)


def number(value: float) -> str:
  """A cell of a table: whole numbers in full, others to three significant digits."""
  whole = math.isfinite(value) and value == int(value) and abs(value) < 1e9
  return str(int(value)) if whole else f'{value:.3g}'


def sheet(panels: Mapping[str, np.ndarray]) -> np.ndarray:
  """Titled pictures uint8[H, W, 3], one below the other -> uint8[H', W', 3]."""
  ratio = sum(image.shape[0] / image.shape[1] + 0.05 for image in panels.values())
  figure = figures.Figure(figsize=(8, 8 * ratio), dpi=120, layout='constrained')
  rows = figure.subplots(len(panels), squeeze=False)[:, 0]
  for axes, (title, image) in zip(rows, panels.items()):
    axes.imshow(image, interpolation='nearest')
    axes.set_title(title, loc='left', fontsize=10)
    axes.set_axis_off()
  return _rendered(figure)


def _rendered(figure: figures.Figure) -> np.ndarray:
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def parameter_table(params: Any) -> str:
  """Every parameter with its shape and size, and the total."""
  return parameter_overview.get_parameter_overview(params, include_stats=False)


def markdown_table(rows: list[dict[str, Any]]) -> str:
  """Rows of equal keys as a Markdown table, floats to three decimals."""

  def cell(value):
    return f'{value:.3f}' if isinstance(value, float) else str(value)

  heads = list(rows[0])
  lines = [
    heads,
    ['---'] * len(heads),
    *([cell(row[h]) for h in heads] for row in rows),
  ]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
