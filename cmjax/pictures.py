"""Pictures of samples, points and tables, and how a notebook shows them."""

from collections.abc import Mapping, Sequence
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from cmjax import checks
from cmjax.data.source import Source, as_uint8, as_x0, image_source

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def show(x: Any, *, data: Any = None, columns: int = 10) -> None:
  """Displays samples in a notebook; elsewhere, opens them with the system's viewer.

  Args:
    x: images f32[N, H, W, C] in [-1, 1] or u8[N, H, W, C], points f32[N, 2], or a
      picture u8[H, W, 3].
    data: points f32[M, 2] to draw below the points.
    columns: images per row.

  Raises: ValueError if x has another shape, or columns < 1.
  """
  image = _image(x, data, columns)
  if _in_notebook():
    from IPython.display import display

    display(image)
  else:
    image.show()


class Live:
  """A picture in a notebook that each call of `show` replaces, such as a loss curve.

  Outside a notebook, `show` does nothing.
  """

  def __init__(self):
    self._handle = None

  def show(self, x: Any, *, data: Any = None, columns: int = 10) -> None:
    """Displays what `pictures.show` takes, in place of what was displayed before."""
    if not _in_notebook():
      return
    from IPython.display import display

    image = _image(x, data, columns)
    if self._handle is None:
      self._handle = display(image, display_id=True)
    else:
      self._handle.update(image)


def _in_notebook() -> bool:
  """Whether Python runs in IPython, which need not be installed."""
  ipython = sys.modules.get('IPython')
  return ipython is not None and ipython.get_ipython() is not None


def _image(x: Any, data: Any, columns: int) -> Any:
  from PIL import Image  # slow to import

  checks.whole(1, columns=columns)
  x = np.asarray(x)
  if x.ndim == 4 and x.dtype == np.uint8:
    x = grid(x, columns)
  elif x.ndim == 4:
    x = samples(image_source('', x, None, 0, False), x, columns)
  elif x.ndim == 2 and x.shape[1] == 2:
    x = scatter(x, None if data is None else np.asarray(data))
  if x.dtype != np.uint8 or x.ndim != 3:
    raise ValueError(
      'shows images f32[N, H, W, C] or u8[N, H, W, C], points f32[N, 2] or a picture '
      f'u8[H, W, 3]; got {x.dtype}{list(x.shape)}'
    )
  return Image.fromarray(x)


def samples(source: Source, x: np.ndarray, columns: int = 20) -> np.ndarray:
  """A picture u8[H, W, 3] of samples f32[N, ...]: a grid, or points over the data."""
  if len(source.shape) == 1:
    return scatter(x[:, :2], as_x0(source, source.examples[:2000])[:, :2])
  return grid(as_uint8(source, x), columns)


def data(source: Source, num_examples: int, columns: int = 20) -> np.ndarray:
  """A picture u8[H, W, 3] of the first examples, as `samples` shows samples."""
  x = as_x0(source, source.examples[:num_examples])
  if len(source.shape) == 1:
    return scatter(x[:0, :2], x[:, :2])
  return grid(as_uint8(source, x), columns)


def grid(images: np.ndarray, columns: int, cell: int = 48) -> np.ndarray:
  """A grid u8[H', W', 3] of images u8[N, H, W, C], filled row by row.

  Shows the first three channels, or only the first if there are fewer. Images smaller
  than `cell` pixels are enlarged by an integer factor, without interpolation.
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


def scatter(points: np.ndarray, data: np.ndarray | None = None) -> np.ndarray:
  """A plot u8[H, W, 3] of points f32[N, 2], over data f32[M, 2] if there is any."""
  figure = _figure(4, 4)
  axes = figure.add_subplot()
  if data is not None:
    axes.plot(*data.T, '.', color='0.8', markersize=2, label='data')
  if len(points):
    axes.plot(*points.T, '.', color='C0', markersize=2, label='samples')
  axes.set_aspect('equal')
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, markerscale=5)
  return _rendered(figure)


def curves(
  rows: Sequence[Mapping[str, float]],
  x: str,
  ys: Sequence[str],
  *,
  log_x: bool = True,
  log_y: bool = True,
) -> np.ndarray:
  """A plot u8[H, W, 3] of columns `ys` of a table against column `x`.

  The axes are logarithmic if `log_x` and `log_y`; then values that are not positive
  leave gaps in the lines, unless no value is positive: the vertical axis is linear.
  """
  figure = _figure(6, 4)
  axes = figure.add_subplot()
  log_y = log_y and any(row[y] > 0 for row in rows for y in ys)
  for y in ys:
    shown = [row[y] if row[y] > 0 or not log_y else math.nan for row in rows]
    axes.plot([row[x] for row in rows], shown, '.-', label=y)
  if log_x:
    axes.set_xscale('log')
  if log_y:
    axes.set_yscale('log')
  axes.set_xlabel(x)
  axes.grid(alpha=0.3)
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=len(ys), frameon=False)
  return _rendered(figure)


def sheet(panels: Mapping[str, np.ndarray]) -> np.ndarray:
  """Pictures u8[H, W, 3] with titles, one below the other, as u8[H', W', 3]."""
  ratio = sum(image.shape[0] / image.shape[1] + 0.05 for image in panels.values())
  figure = _figure(8, 8 * ratio)
  rows = figure.subplots(len(panels), squeeze=False)[:, 0]
  for axes, (title, image) in zip(rows, panels.items()):
    axes.imshow(image, interpolation='nearest')
    axes.set_title(title, loc='left', fontsize=10)
    axes.set_axis_off()
  return _rendered(figure)


def _figure(width: float, height: float) -> 'Figure':
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), dpi=120, layout='constrained')


def _rendered(figure: 'Figure') -> np.ndarray:
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
