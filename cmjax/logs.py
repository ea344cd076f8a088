"""Scalars, pictures, tables and progress: the only door for clu and TensorBoard."""

from collections.abc import Mapping, Sequence
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
  steps are made again.
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
  whole = [r for r in path.read_text(encoding='utf-8').splitlines() if r.endswith('}')]
  new = path.with_suffix('.new')
  kept = [row + '\n' for row in whole if json.loads(row)['step'] <= step]
  new.write_text(''.join(kept), encoding='utf-8')
  new.replace(path)


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
    left = (self._total - step) * seconds / max(steps, 1)
    say(f'step {step}/{self._total} {text} left={left:.0f}s')

  def close(self) -> None:
    """Leaves the bar where it is."""
    if self._bar is not None:
      self._bar.close()


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
  """Columns of a table against one of them, both axes logarithmic -> uint8[H, W, 3]."""
  figure = figures.Figure(figsize=(6, 4), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  for y in ys:
    axes.plot([row[x] for row in rows], [row[y] for row in rows], '.-', label=y)
  axes.set_xscale('symlog' if any(row[x] == 0 for row in rows) else 'log')
  axes.set_yscale('log')
  axes.set_xlabel(x)
  axes.grid(alpha=0.3)
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=len(ys), frameon=False)
  return _rendered(figure)


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
