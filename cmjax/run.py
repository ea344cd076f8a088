"""A config checked against its functions, data and devices, before any compute."""

import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmjax import checkpoint, data, logs, pretrained, sharding, studies
from cmjax import config as configs
from cmjax.core import (
  Frozen,
  Loss,
  Model,
  Nets,
  Network,
  Params,
  Schedule,
  UserError,
  first_line,
  streams,
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
  frozen: Frozen
  teacher: Model | None

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
  if 'data' not in known.config:
    raise UserError(
      f'{workdir} holds weights alone; give a --config=FILE with data and samplers'
    )
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
  mesh = mesh or configs.build(config.mesh, 'config.mesh')
  parts = config.accumulate
  if config.batch_size % parts:
    raise UserError(
      f'config.accumulate: {parts} parts do not divide a batch of {config.batch_size}'
    )
  sharding.check_divisible(config.batch_size // parts, mesh, 'config.batch_size')
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
  loss, frozen, teacher = _objective(config, mesh, source, f)
  run = Run(
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
    frozen=frozen,
    teacher=teacher,
  )
  _try_abstractly(run)
  return run


def _objective(
  config: configs.ConfigDict, mesh: jax.sharding.Mesh, source: data.Source, f: Model
) -> tuple[Loss, Frozen, Model | None]:
  """The objective, what it reads and never changes, and its teacher's model."""
  teacher, teaching = None, {}
  if config.teacher:
    if not configs.takes(config.objective, 'teacher'):
      raise UserError(
        f'config.teacher: {config.objective.fn} takes none; leave it empty'
      )
    if config.teacher == configs.REQUIRED:
      raise UserError('config.teacher: must be given, as in --config.teacher=VALUE')
    teacher = pretrained.load(config.teacher, mesh=mesh, say=logs.say)
    _check_fits(config.teacher, teacher, source)
    _check_guidance(config, teacher)
    teaching = {'teacher': teacher.f}
  reference = None
  if configs.is_part(config.reference):
    reference = configs.build(config.reference, 'config.reference', source=source)
    reference = sharding.place(reference, sharding.replicated(mesh))
  perceptual = None
  if configs.is_part(config.perceptual):
    perceptual = configs.build(config.perceptual, 'config.perceptual')
    perceptual = sharding.place(perceptual, sharding.replicated(mesh))
  given = {'batch_size': config.batch_size, 'total_images': config.total_images}
  loss = configs.build(config.objective, 'config.objective', f=f, **teaching, **given)
  frozen = Frozen(teacher and teacher.params, perceptual, reference)
  return loss, frozen, teacher and teacher.f


def _check_guidance(config: configs.ConfigDict, teacher: pretrained.Pretrained) -> None:
  guided = 'guidance' in config.objective and config.objective.guidance != 1
  objective = teacher.config.objective
  if guided and not ('label_dropout' in objective and objective.label_dropout > 0):
    raise UserError(
      f'config.objective.guidance: {config.teacher} never went without a label; train '
      'it with config.objective.label_dropout, such as 0.1'
    )


def subject_of(opened: Opened) -> studies.Subject:
  """A trained model with its data, its objective and its teacher, to be studied.

  Raises: UserError if its teacher is no longer where it was.
  """
  config, source, mesh = opened.config, opened.source, opened.mesh
  loss, frozen, teacher = _objective(config, mesh, source, opened.f)
  target = opened.params if configs.is_part(config.target_rate) else None
  everything = np.arange(len(source.examples))

  def in_dtype(dtype):
    other = copy.deepcopy(config)
    other.network.dtype = dtype
    return configs.build_model(other)[1]

  return studies.Subject(
    f=opened.f,
    nets=Nets(opened.params, target, **frozen._asdict()),
    x0=jnp.asarray(data.as_x0(source, source.examples)),
    cond=(
      None if source.labels is None else jnp.asarray(data.one_hot(source, everything))
    ),
    batch=lambda step: data.batch_at(source, config.seed, step, config.batch_size),
    loss=loss,
    teacher=teacher,
    in_dtype=in_dtype if 'dtype' in config.network else None,
  )


def _drawn(sampler, f, shape, params, keys, cond):
  return sampler(f, params, keys, cond, shape).x


def _try_abstractly(run: Run) -> None:
  """Traces what will be compiled later, so that what cannot work is told now.

  Raises: UserError naming the part.
  """
  try:
    params = run.abstract_params()
  except ValueError as error:
    raise UserError(f'config.network: {first_line(error)}') from error
  target = params if run.target_rate else None
  nets = Nets(params, target, **run.frozen._asdict())
  batch = data.batch_at(run.source, 0, 0, run.config.batch_size)
  keys = jax.eval_shape(lambda: streams(jax.random.key(0), 0))
  try:
    jax.eval_shape(run.loss, nets, batch, jnp.int32(0), keys)
  except ValueError as error:
    raise UserError(f'config.objective: {first_line(error)}') from error
  rows = run.mesh.size
  cond = None if batch.cond is None else np.zeros((rows, run.source.classes), 'f4')
  for name, sampler in run.samplers.items():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    try:
      draw = functools.partial(_drawn, sampler, run.f, run.source.shape)
      jax.eval_shape(draw, params, keys, cond)
    except ValueError as error:
      raise UserError(f'config.samplers.{name}: {first_line(error)}') from error
