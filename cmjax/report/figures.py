"""Curves and pictures of a report, as elements of its page."""

from collections.abc import Mapping, Sequence
import math
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from cmjax.report import embed, html, svg
from cmjax.report.html import Markup, element
from cmjax.report.metric_rows import Series, skipped_at, smoothed, thinned

POINTS = 3_000  # of all curves in one plot, about
MAX_MARKS = 150
MAX_PAGE = 2_900_000  # bytes


class Curve(NamedTuple):
  """A curve of a plot; `colour` is an index of `svg.COLOURS`, modulo their number."""

  label: str
  series: Series
  colour: int = 0
  faint: bool = False


def figure(
  title: str,
  curves: Sequence[Curve],
  *,
  place: str,
  note: str = '',
  x_label: str = 'step',
  log: tuple[bool, bool | None] = (False, None),
  marks: Sequence[float] = (),
) -> Markup:
  """A plot with its legend.

  Args:
    title: what is drawn, any text.
    curves: those without label are not in the legend.
    place: differs between the figures of a page with the same title.
    note: any text beside the title.
    x_label: a word of ours.
    log: whether the axes are logarithmic; None: if the values are positive, and the
      largest is more than twenty times the smallest.
    marks: positions that are marked on the horizontal axis.
  """
  values = np.concatenate([c.series.values for c in curves])
  values = values[np.isfinite(values)]
  log_y = log[1]
  if log_y is None:
    log_y = bool(len(values)) and 0 < values.min() < values.max() / 20
  log_y = bool(log_y) and bool((values > 0).any())
  log_x = log[0] and all((c.series.steps > 0).all() for c in curves)
  most = max(60, min(400, POINTS // len(curves)))
  lines = []
  for curve in curves:
    few = len(curve.series.steps) <= 40
    points = thinned(curve.series, most)
    colour = svg.COLOURS[curve.colour % len(svg.COLOURS)]
    lines.append(svg.Line(*points, colour, curve.faint, few and not curve.faint))
  marks = list(marks)[:: max(1, math.ceil(len(marks) / MAX_MARKS))]
  drawn = svg.plot(
    lines,
    f'{place}/{title}',
    x_label=x_label,
    log_x=log_x,
    log_y=log_y,
    marks=marks,
  )
  legend = [
    element('i', element('u', style=f'background:{line.colour}{fade}'), curve.label)
    for curve, line in zip(curves, lines)
    if curve.label
    for fade in [';opacity:.45' if curve.faint else '']
  ]
  if marks:
    mark = element('u', style=f'background:{svg.COLOURS[3]};width:3px;height:9px')
    legend.append(element('i', mark, 'skipped steps'))
  label = f'plot of {title}'
  drawn = drawn.replace('<svg ', f'<svg aria-label="{html.text(label)}" ', 1)
  caption = element('figcaption', element('b', title), element('i', note))
  legend = element('div', *legend, class_='legend')
  return element('figure', caption, legend, Markup(drawn))


def raw_and_smooth(
  name: str, series: Series, marks: Sequence[float], log: bool | None
) -> Markup:
  """The rows of a metric, and their running mean."""
  mean = smoothed(series)
  last = last_value(series)
  if mean is None:
    curves = [Curve('', series)]
  else:
    window = f'mean of {mean.num_rows:,} rows ({mean.num_steps:,.0f} steps)'
    curves = [Curve('raw', series, faint=True), Curve(window, mean.series)]
  note = '' if last is None else f'last {html.number(last)}'
  return figure(
    name, curves, place='training', note=note, log=(False, log), marks=marks
  )


def training_figures(series: Mapping[str, Series]) -> list[Markup]:
  """Loss, loss by quartile of sigma, schedules, speed, every other metric; in a grid.

  What is constant, or one plot too many, is named below the grid.
  """
  training = {k: s for k, s in series.items() if '/' not in k and has_values(s)}
  skipped = skipped_at(training).tolist()
  figures, constant = [], {}

  def add(name: str, log: bool | None = None, marks: Sequence[float] = ()) -> None:
    if name in training:
      figures.append(raw_and_smooth(name, training.pop(name), marks, log))

  positive = 'loss' in training and np.nanmin(training['loss'].values) > 0
  add('loss', bool(positive), skipped)
  quartiles = {k: training.pop(k) for k in sorted(training) if _is_quartile(k)}
  if quartiles:
    smooth = {name: smoothed(s) for name, s in quartiles.items()}
    curves = [
      Curve(name, mean.series if mean else quartiles[name], i)
      for i, (name, mean) in enumerate(smooth.items())
    ]
    positive = all(np.nanmin(s.values) > 0 for s in quartiles.values())
    mean = next(iter(smooth.values()))
    note = f'mean of {mean.num_rows:,} rows' if mean else ''
    title, log = 'loss by quartile of sigma', (False, bool(positive))
    drawn = figure(title, curves, place='training', note=note, log=log)
    figures.append(drawn)
  schedules = [name for name in training if '.' in name]
  for name in sorted(schedules, key=lambda name: not name.endswith('learning_rate')):
    values = training[name].values
    if np.nanmin(values) == np.nanmax(values):
      constant[name] = html.number(float(values[0]))
      del training[name]
    elif len(figures) < MAX_OTHERS:  # more of them are among the others, below
      log = False if name.endswith('learning_rate') else None
      s = training.pop(name)
      figures.append(figure(name, [Curve('', s)], place='schedule', log=(False, log)))
  add('images_per_s', False)
  add('data_wait', False)
  training.pop('skipped_steps', None)
  names = sorted(training, key=lambda name: not name.endswith('_norm'))
  for name in names[:MAX_OTHERS]:
    add(name)
  grid = element('div', *figures, class_='plots')
  parts = [grid]
  if constant:
    text = ', '.join(f'{name} {value}' for name, value in constant.items())
    parts.append(element('p', f'Constant: {text}.', class_='dim'))
  if len(names) > MAX_OTHERS:
    left = ', '.join(names[MAX_OTHERS:])
    parts.append(element('p', f'Not drawn: {left}.', class_='dim'))
  return parts


MAX_OTHERS = 16  # metrics of training that are drawn, besides those named above


def evaluation_figures(series: Mapping[str, Series]) -> list[Markup]:
  """The metrics of evaluations during training, SAMPLER/METRIC, by metric."""
  by_metric: dict[str, list[Curve]] = {}
  for key, values in series.items():
    sampler, slash, metric = key.partition('/')
    if slash and metric not in ('evaluations', 'samples') and has_values(values):
      curves = by_metric.setdefault(metric, [])
      curves.append(Curve(sampler, values, len(curves)))
  return [
    figure(metric, curves, place='evaluation')
    for metric, curves in list(by_metric.items())[:MAX_OTHERS]
  ]


def has_values(series: Series) -> bool:
  """Whether any value is finite."""
  return bool(np.isfinite(series.values).any())


def last_value(series: Series | None) -> float | None:
  """The last finite value, or None."""
  finite = [] if series is None else series.values[np.isfinite(series.values)]
  return float(finite[-1]) if len(finite) else None


def _is_quartile(name: str) -> bool:
  return re.fullmatch(r'loss_q\d', name) is not None


class Album:
  """The pictures of a page, which share the bytes that its text leaves."""

  def __init__(self):
    self._slots: list[tuple[Path, str]] = []

  def add(self, path: Path, caption: str, alt: str = '') -> Markup:
    """A figure, whose picture `fill` puts in."""
    self._slots.append((path, alt or caption))
    # The text of a file cannot contain the character 0 (`html.text`).
    slot = Markup(f'\x00{len(self._slots) - 1}\x00')
    return element('figure', element('figcaption', element('b', caption)), slot)

  def grid(
    self, pictures: Mapping[str, Path], prefix: str = '', *, large: bool = False
  ) -> Markup:
    """Pictures by caption, beside each other as far as there is room."""
    shapes = [embed.shape_of(path) or (1, 1) for path in pictures.values()]
    ratio = max((w / h for w, h in shapes), default=1)
    kind = 'pictures wide' if large or ratio > 1.8 else 'pictures small'
    figures = [
      self.add(path, caption, f'{prefix}{caption}')
      for caption, path in pictures.items()
    ]
    return element('div', *figures, class_=kind)

  def fill(self, body: Markup) -> Markup:
    """The body with the pictures in it, below `MAX_PAGE` bytes."""
    budget = max(0, MAX_PAGE - len(body.encode()) - 300 * len(self._slots))
    found = embed.embedded([path for path, _ in self._slots], budget)

    def picture(match: re.Match[str]) -> str:
      index = int(match[1])
      (path, alt), data = self._slots[index], found[index]
      if isinstance(data, str):
        return element('p', f'{path.name}: {data}', class_='dim')
      size = dict(width=data.width, height=data.height)
      return element('img', src=data.uri, alt=alt, **size)

    return Markup(re.sub('\x00(\\d+)\x00', picture, body))
