"""Plots as SVG for a page: in the colours of the text around them, without a script."""

from collections.abc import Sequence
import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

WIDTH, HEIGHT = 380, 230  # of the plots, in CSS pixels
# Readable on white and on black: a contrast of at least 3 with both.
COLOURS = (
  *('#3a7bd5', '#d9660f', '#2b9455', '#d64561'),
  *('#8a63d2', '#14919b', '#c4529a', '#8a7a1f'),
)
_TEXT = '#010203'  # replaced by the colour of the text
_DIGITS = re.compile(r'(\d\.\d\d)\d+')


class Line(NamedTuple):
  """Values y f64[N] at x f64[N], NaN where the line has a gap."""

  x: np.ndarray
  y: np.ndarray
  colour: str
  faint: bool = False
  dots: bool = False


def plot(
  lines: Sequence[Line],
  name: str,
  *,
  x_label: str = 'step',
  log_x: bool = False,
  log_y: bool = False,
  marks: Sequence[float] = (),
) -> str:
  """An SVG element with the lines, and ticks on the horizontal axis at `marks`.

  Values that are not positive leave gaps on a log axis. The same lines give the same
  text; `name` must differ between the plots of a page.
  """
  import matplotlib
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  settings: dict[Any, Any] = {
    'svg.fonttype': 'none',
    'svg.hashsalt': name,
    'text.parse_math': False,
    'text.usetex': False,
    'font.size': 10,
    'path.simplify': True,
  }
  with matplotlib.rc_context(settings):
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), frameon=False)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.13, 0.13, 0.855, 0.84))
    _draw(axes, lines, marks, log_y)
    _style(axes, x_label, (log_x, log_y))
    return _element(figure)


def _draw(
  axes: 'Axes', lines: Sequence[Line], marks: Sequence[float], log_y: bool
) -> None:
  for line in lines:
    y = np.where(line.y > 0, line.y, np.nan) if log_y else line.y
    axes.plot(
      line.x,
      y,
      color=line.colour,
      alpha=0.4 if line.faint else 1.0,
      linewidth=0.8 if line.faint else 1.5,
      marker='o' if line.dots or len(line.x) == 1 else None,
      markersize=3,
    )
  if len(marks):
    below = axes.get_xaxis_transform()
    axes.plot(marks, np.zeros(len(marks)), '|', color=COLOURS[3], transform=below)


def _style(axes: 'Axes', x_label: str, logs: tuple[bool, bool]) -> None:
  from matplotlib import ticker

  axes.patch.set_visible(False)
  for side, spine in axes.spines.items():
    spine.set_visible(side in ('left', 'bottom'))
    spine.set(color=_TEXT, alpha=0.35, linewidth=0.8)
  if logs[0]:
    axes.set_xscale('log')
  if logs[1]:
    axes.set_yscale('log')
  for axis, log in zip((axes.xaxis, axes.yaxis), logs):
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if log and low > 0 else 0
    if log and decades > 1:
      subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)
      axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=7))
    else:
      axis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axis.set_major_formatter(ticker.FuncFormatter(_number))
    axis.set_minor_locator(ticker.NullLocator())
  axes.tick_params(colors=_TEXT, length=3, width=0.6)
  axes.grid(axis='y', color=_TEXT, alpha=0.12, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.set_xlabel(x_label, color=_TEXT, loc='right', labelpad=1)


def _number(value: float, _: int = 0) -> str:
  """Text of a tick, such as 0.05, 20k or 1e-07."""
  if value == 0:
    return '0'
  for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if size <= abs(value) < 1e3 * size:
      return f'{value / size:.4g}{unit}'
  return f'{value:.4g}'


def _element(figure: 'Figure') -> str:
  """The figure as an element of a page: no header, no identifiers beyond its own."""
  buffer = io.StringIO()
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  for pattern, new in (
    (r'<metadata>.*?</metadata>', ''),
    (r'<style[^>]*>.*?</style>', ''),
    (r'<!--.*?-->', ''),
    (r'<svg [^>]*>', f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'),
    (r'<g id="[^"]*"', '<g'),
    (r' font-family: [^;"]*;?', ''),
    (r'font: ([\d.]+px) [^;"]*', r'font-size: \1'),
    (r'xlink:href', 'href'),
    (_TEXT, 'currentColor'),
    (r'\n\s*', '\n'),
  ):
    text = re.sub(pattern, new, text, flags=re.S)
  # Coordinates, which stand in tags alone, to a hundredth of a pixel.
  return re.sub(r'<[^>]*>', lambda tag: _DIGITS.sub(r'\1', tag[0]), text.strip())
