"""The schedules of a config: finds them among its parts, and checks their values."""

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from cmjax.core import Array, Schedule, UserError
from cmjax.runtime.build import build, is_part, path_of
from cmjax.runtime.config_record import Config, ConfigDict
from cmjax.runtime.errors import user_errors
from cmjax.runtime.functions import is_schedule, parameters


def schedules_of(config: Config) -> dict[str, Schedule]:
  """Every schedule of a config, built, by dotted path: of cmjax, optax or the user.

  Searches the parts that depend on the step: the objective, the optimiser and the
  decays. A part is a schedule if the return annotation of its function says so or,
  without one, if the annotation of the parameter that receives it does.
  """
  given = given_by(config)
  schedules: dict[str, Schedule] = {}

  def add(part: ConfigDict, where: str, kind: Any) -> None:
    if is_schedule(path_of(part), f'{where}.fn', kind):
      schedules[where] = build(part, where, Schedule, **given)
    takes = parameters(path_of(part), f'{where}.fn')
    for key, value in part.items():
      if is_part(value):
        annotation = takes[key].annotation if key in takes else None
        add(value, f'{where}.{key}', annotation)

  add(config.objective, 'config.objective', None)
  add(config.optimizer, 'config.optimizer', None)
  decays = {f'config.ema.{name}': part for name, part in config.ema.items()}
  for where, part in {'config.target_decay': config.target_decay, **decays}.items():
    if is_part(part):
      add(part, where, Schedule)
  return schedules


def values_at(schedules: Mapping[str, Schedule], step: int) -> dict[str, float]:
  """The values of schedules at a step, without the `config.` of their names."""
  return {  # schedules take integers as well
    name.removeprefix('config.'): float(schedule(cast(Array, step)))
    for name, schedule in schedules.items()
  }


def given_by(config: Config) -> dict[str, int]:
  """The keywords that a config gives to the functions of its parts."""
  return {'batch_size': config.batch_size, 'total_images': config.total_images}


def five_steps(total: int) -> list[int]:
  """The first and the last step of a run, and those after each quarter of it."""
  return sorted({0, total // 4, total // 2, 3 * total // 4, max(total - 1, 0)})


def check_schedules(config: Config, schedules: Mapping[str, Schedule]) -> None:
  """Checks the learning rates and decays at five steps of a run.

  Raises: UserError naming one that is out of range, and the step.
  """
  rates = [name for name in schedules if name.startswith('config.optimizer.')]
  decays = [f'config.ema.{name}' for name in config.ema]
  targets = ['config.target_decay'] if is_part(config.target_decay) else []
  # A target network may be frozen; a frozen EMA would keep its initial weights.
  for names, low, high, interval in (
    (rates, 0.0, 1e30, 'finite and not negative'),
    (decays, 0.0, np.nextafter(1.0, 0.0), 'in [0, 1)'),
    (targets, 0.0, 1.0, 'in [0, 1]'),
  ):
    for name in names:
      for step in five_steps(config.total_steps):
        with user_errors(name):
          value = float(schedules[name](jnp.int32(step)))
        if not low <= value <= high:
          raise UserError(
            f'{name}: must be {interval}, and is {value:g} at step {step}'
          )
