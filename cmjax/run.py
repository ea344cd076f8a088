"""A config checked against its functions, data and devices, before any compute."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from cmjax import checkpoint, data, logs, pretrained, sharding
from cmjax import config as configs
from cmjax.core import (
  Loss,
  Model,
  Network,
  Params,
  Schedule,
  UserError,
  first_line,
)
from cmjax.samplers import Sampler


class Run(NamedTuple):
  """All that a config names, built."""

  config: configs.ConfigDict
  mesh: jax.sharding.Mesh
  source: data.Source
  network: Network
  f: Model
  loss: Loss
  tx: optax.GradientTransformation
  ema_rates: dict[str, Schedule]
  target_rate: Schedule | None
  samplers: dict[str, Sampler]
  schedules: dict[str, Schedule]  # every schedule of the config, by dotted path
  teacher: Params

  @property
  def total_steps(self) -> int:
    """Steps until `total_images` are seen."""
    return -(-self.config.total_images // self.config.batch_size)

  def meta(self) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
      'config': configs.to_json(self.config),
      'shape': list(self.source.shape),
      'classes': self.source.classes,
    }

  def abstract_params(self) -> Params:
    """Shapes and places of the parameters."""
    return pretrained.abstract_params(
      self.network, self.source.shape, self.source.classes, self.mesh
    )


class Opened(NamedTuple):
  """A trained run, ready to be sampled."""

  config: configs.ConfigDict
  mesh: jax.sharding.Mesh
  source: data.Source
  f: Model
  samplers: dict[str, Sampler]
  params: Params
  step: int


def reopen(workdir: str | Path, config: configs.ConfigDict | None = None) -> Opened:
  """The newest whole checkpoint of a run, by `config` or the run's own.

  Raises: UserError if there is no checkpoint, or it is of another network.
  """
  mesh = sharding.data_mesh()
  known = pretrained.load(workdir, config=config, mesh=mesh, say=logs.say)
  source = configs.build(known.config.data, 'config.data')
  _check_fits(workdir, known, source)
  samplers = configs.build_each(known.config.samplers, 'config.samplers')
  return Opened(known.config, mesh, source, known.f, samplers, known.params, known.step)


def _check_fits(
  path: str | Path, known: pretrained.Pretrained, source: data.Source
) -> None:
  theirs, ours = (known.shape, known.classes), (source.shape, source.classes)
  if theirs != ours:
    raise UserError(
      f'{path} was trained on examples of {theirs[0]} with {theirs[1]} classes, and '
      f'config.data has {ours[0]} with {ours[1]}'
    )


def prepare(config: configs.ConfigDict, mesh: jax.sharding.Mesh | None = None) -> Run:
  """Builds every part of a config, and reads its data and its teacher.

  Raises: UserError naming the key and the way out.
  """
  configs.checked(config)
  mesh = mesh or sharding.data_mesh()
  sharding.check_divisible(config.batch_size, mesh, 'config.batch_size')
  given = {'batch_size': config.batch_size, 'total_images': config.total_images}
  samplers = configs.build_each(config.samplers, 'config.samplers')
  tx = configs.build(config.optimizer, 'config.optimizer', **given)
  if config.grad_clip_norm > 0:
    tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
  ema_rates = configs.build_each(config.ema, 'config.ema', **given)
  if checkpoint.ONLINE in ema_rates:
    raise UserError(f'config.ema.{checkpoint.ONLINE}: is the name of the live weights')
  if config.sample_weights not in (checkpoint.ONLINE, *ema_rates):
    raise UserError(
      f'config.sample_weights: no weights {config.sample_weights!r}; there are '
      f'{", ".join([checkpoint.ONLINE, *ema_rates])}'
    )
  target_rate = None
  if configs.is_part(config.target_rate):
    target_rate = configs.build(config.target_rate, 'config.target_rate', **given)

  network, f = configs.build_model(config)
  source = configs.build(config.data, 'config.data')
  teacher, teaching = None, {}
  if config.teacher:
    if not configs.takes(config.objective, 'teacher'):
      raise UserError(
        f'config.teacher: {config.objective.fn} takes none; leave it empty'
      )
    known = pretrained.load(config.teacher, mesh=mesh, say=logs.say)
    _check_fits(config.teacher, known, source)
    teacher, teaching = known.params, {'teacher': known.f}
  loss = configs.build(config.objective, 'config.objective', f=f, **teaching, **given)
  try:
    pretrained.abstract_params(network, source.shape, source.classes, mesh)
  except ValueError as error:
    raise UserError(f'config.network: {first_line(error)}') from error
  return Run(
    config=config,
    mesh=mesh,
    source=source,
    network=network,
    f=f,
    loss=loss,
    tx=tx,
    ema_rates=ema_rates,
    target_rate=target_rate,
    samplers=samplers,
    schedules=configs.schedules(config, **given),
    teacher=teacher,
  )
