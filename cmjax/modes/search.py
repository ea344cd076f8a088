"""`--mode=search`: the noise levels, or a number, of a sampler that measure best."""

import argparse
from collections.abc import Callable
import math
from typing import Any, NamedTuple

from cmjax import evaluation, pictures
from cmjax.core import UserError, unused
from cmjax.data_features import data_features
from cmjax.runtime import build, logs, results
from cmjax.runtime.config_record import ConfigDict
from cmjax.runtime.errors import part_errors
from cmjax.runtime.pretrained import SIGMA_RANGE
from cmjax.runtime.reopen import (
  SEARCHED,
  Opened,
  beside,
  check_sampled,
  facts,
  for_sampling,
  reopen_for,
)
from cmjax.runtime.sampler_check import check_sigmas
from cmjax.samplers import Sampler
from cmjax.search import golden_section, greedy_times

WIDTH = 'sample_relative_std'  # of a post-hoc EMA: the one key of no sampler
TOLERANCE = 0.02  # of a noise level, and of a number over a wide range; relative


class Found(NamedTuple):
  """The best value of a key, and all that was tried."""

  name: str  # under which it is stored
  best: Any  # of the key
  value: float  # of the metric
  curve: list[tuple[float, float]]  # (last sigma, or number; metric)


def run(flags: argparse.Namespace) -> None:
  """Searches, and stores each result with its whole curve beside the weights."""
  if flags.samplers:
    raise UserError(
      '--samplers: is not for --mode=search; give --config.search.sampler=NAME'
    )

  def weights(*overrides: tuple[str, str]) -> Opened:
    every = (*flags.overrides, *overrides)
    return for_sampling(reopen_for(flags.workdir, flags.config, every, flags.trust))

  trials = Trials(weights(), weights)
  found = _search(trials)
  folder, rows = beside(trials.opened) / SEARCHED, []
  for name, best, value, curve in found:
    path = unused(folder / name, '.json', taken=tuple(trials.opened.config.samplers))
    axis = trials.key.rpartition('.')[2].replace('sigmas', 'last_sigma')
    points = [{axis: x, trials.metric: y} for x, y in curve]
    result = {'key': trials.key, 'best': best, trials.metric: value, 'curve': points}
    sampler = trials.part(best).to_dict()
    results.write_json(path, facts(trials.opened, sampler=sampler, searched=result))
    plot = pictures.curves(points, axis, [trials.metric])
    results.write_png(path.with_suffix('.png'), plot)
    table = [{key: shown(number) for key, number in row.items()} for row in points]
    results.write_text(path.with_suffix('.md'), logs.markdown_table(table))
    cells = {trials.key: shown(best), trials.metric: shown(value)}
    rows.append({'name': path.stem} | cells)
  logs.say(f'\n{logs.markdown_table(rows)}\n\n{folder}: each with .json, .md and .png')
  if trials.key == WIDTH:
    logs.say(f'use it as --config.{WIDTH}={found[-1].best:.4g}')
  else:
    names = ','.join(row['name'] for row in rows)
    guide = trials.opened.config.guide
    guided = f' --config.guide={guide}' if guide else ''
    logs.say(f'use them as --mode=sample or evaluate --samplers={names}{guided}')


class Trials:
  """Measures a sampler with one key set to the values that a search tries."""

  def __init__(self, opened: Opened, weights: Callable[..., Opened]):
    """`weights` opens the same weights with further overrides of the config.

    Raises: UserError if the config has no such sampler, key or metric, the range is
      empty or not that of the model, or the samples would be those of an evaluation.
    """
    settings, evaluated = opened.config.search, opened.config.evaluation
    if 0 <= settings.seed - evaluated.seed < evaluated.num_seeds:
      raise UserError(
        f'config.search.seed: {settings.seed} is also a seed of config.evaluation; a '
        'search needs other samples'
      )
    self.opened, self._weights = opened, weights
    self.key, self.metric = settings.key, settings.metric
    self.name, first = _sampler_with(self.key, opened)
    self.of_times = self.key.rpartition('.')[2] == 'sigmas'
    self.low, self.high = settings.low, settings.high
    if self.of_times:
      self.low, self.high = self.low or SIGMA_RANGE[0], self.high or float(first[0])
      with part_errors('config.search'):
        check_sigmas((self.low, self.high), opened.f, opened.config.objective)
    closest = (1 + TOLERANCE) * self.low if self.of_times else self.low
    if closest >= self.high:
      raise UserError(
        f'config.search: low and high must be the range of {self.key}, got '
        f'{self.low:g} and {self.high:g}'
      )
    self._metrics = evaluation.build_metrics(opened, 'search')
    if not self._metrics:
      raise UserError('config.metrics: a search needs at least one')
    self._features = data_features(opened, self._metrics)
    self._count = 0

  def part(self, value: Any) -> ConfigDict:
    """The part of the sampler with its key set."""
    samplers: Any = self.opened.config.samplers
    part: Any = ConfigDict(samplers[self.name].to_dict())
    if self.key != WIDTH:
      *parents, last = self.key.split('.')
      inner = _inner(part, parents)
      with inner.ignore_type():  # a whole number may become a float
        inner[last] = value
    return part

  def __call__(self, value: Any) -> float:
    """The metric for one value of the key, negative if it is to be maximised.

    Raises: UserError if the sampler does not take the value, the model was not trained
      at its noise levels, or no metric has the name that is searched for.
    """
    settings, opened = self.opened.config.search, self.opened
    if self.key == WIDTH:
      opened = self._weights((WIDTH, repr(value)))
    where = f'config.samplers.{self.name}'
    sampler = build.build(self.part(value), where, Sampler)
    check_sampled(opened._replace(samplers={self.name: sampler}))
    values = evaluation.measure(
      opened,
      opened.params,
      sampler,
      self._metrics,
      self._features,
      seed=settings.seed,
      num_samples=settings.num_samples,
    ).values
    self.metric = self.metric or next(iter(values))
    if self.metric not in values:
      known = ', '.join(values)
      raise UserError(f'config.search.metric: no {self.metric!r}; known: {known}')
    self._count += 1
    measured = values[self.metric]
    logs.say(f'{self._count}. {self.key} {shown(value)}: {self.metric} {measured:.4g}')
    return -measured if settings.maximise else measured


def _search(trials: Trials) -> list[Found]:
  """For noise levels one result per number of steps, otherwise a single one."""
  settings = trials.opened.config.search
  low, high, most = trials.low, trials.high, settings.max_evaluations
  sign = -1 if settings.maximise else 1
  if trials.of_times:
    times = greedy_times(
      trials,
      settings.num_steps,
      high,
      low,
      tolerance=TOLERANCE,
      max_evaluations=most,
    )
    every = [Found(f'best_{len(t.sigmas)}', *t) for t in times[1:]]
  else:
    log = low > 0 and high / low > 10  # the tolerance is then relative
    tolerance = TOLERANCE if log else (high - low) / 100
    result = golden_section(
      trials, low, high, tolerance=tolerance, max_evaluations=most, log=log
    )
    every = [Found(f'best_{trials.key.replace(".", "_")}', *result)]
  every = [found for found in every if math.isfinite(found.value)]
  if not every:
    raise UserError(
      f'config.search: {trials.key} between {low:g} and {high:g}: no value of '
      f'{trials.metric} is finite; nothing is stored'
    )
  return [
    Found(name, best, sign * value, [(x, sign * y) for x, y in curve])
    for name, best, value, curve in every
  ]


def _sampler_with(key: str, opened: Opened) -> tuple[str, Any]:
  """The name of the sampler that has the key, and the value of its key."""
  samplers: Any = opened.config.samplers
  chosen = opened.config.search.sampler
  names = [name for name in samplers if chosen in ('', name)]
  *parents, last = key.split('.')
  for name in names:
    inner = _inner(samplers[name], parents)
    if key == WIDTH:
      return name, None
    if last in inner:
      value = inner[last]
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      if last != 'sigmas' and not is_number:
        raise UserError(f'config.search.key: {key} of {name} is not a number')
      return name, value
  what = f'{", ".join(names)}: no key {key!r}' if names else f'no sampler {chosen!r}'
  raise UserError(f'config.search: {what}; add one to config.samplers')


def _inner(part: Any, parents: list[str]) -> Any:
  for parent in parents:
    part = part.get(parent) if isinstance(part, ConfigDict) else None
  return part if isinstance(part, ConfigDict) else ConfigDict()


def shown(value: Any) -> str:
  """A number, or several, to four digits."""
  if isinstance(value, tuple):
    return f'({", ".join(map(shown, value))})'
  return f'{value:.4g}'
