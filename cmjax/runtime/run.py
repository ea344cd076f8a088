"""A config checked against its functions, data and devices, before any compute."""

from collections.abc import Iterable
import functools
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from cmjax.core import (
  Frozen,
  Loss,
  LossOut,
  Model,
  Nets,
  Network,
  Params,
  Perceptual,
  Schedule,
  UserError,
  streams,
)
from cmjax.data.source import Source, check_batch, first_row, metadata
from cmjax.fields import Reference
from cmjax.runtime import checkpoint, logs, pretrained, sharding, snapshots, tracking
from cmjax.runtime.blank import blank_teacher
from cmjax.runtime.build import build, build_each, build_model, is_part, path_of
from cmjax.runtime.config_json import to_json
from cmjax.runtime.config_record import REQUIRED, Config, ConfigDict, checked
from cmjax.runtime.errors import part_errors
from cmjax.runtime.functions import parameters
from cmjax.runtime.sampler_check import check_sigmas, sigmas_of
from cmjax.runtime.schedules import check_schedules, given_by, schedules_of
from cmjax.samplers import Sampler


class Run(NamedTuple):
  """Everything that a config names, built."""

  config: Config
  mesh: Mesh
  source: Source
  network: Network
  f: Model
  loss: Loss
  tx: optax.GradientTransformation
  ema_decays: dict[str, Schedule]
  target_decay: Schedule | None
  samplers: dict[str, Sampler]
  schedules: dict[str, Schedule]  # every schedule of the config, by dotted path
  frozen: Frozen
  teacher: Model | None

  @property
  def total_steps(self) -> int:
    """Steps until `total_images` examples are seen."""
    return self.config.total_steps

  def meta(self) -> dict[str, Any]:
    """What a checkpoint holds besides its arrays."""
    return {
      'config': to_json(self.config),
      'shape': list(self.source.shape),
      'classes': self.source.classes,
      'data': metadata(self.source),
    }

  def facts(self) -> dict[str, Any]:
    """The data and the sizes of the run, for people."""
    return {
      'data': self.source.name,
      'examples': len(self.source.examples),
      'parameters': sum(a.size for a in jax.tree.leaves(self.abstract_params())),
    }

  def summary(self, start: int) -> str:
    """The facts, and what remains to be trained, in one line."""
    facts = self.facts()
    return (
      f'{facts["data"]}: {facts["examples"]:,} examples; '
      f'{facts["parameters"]:,} parameters; '
      f'{self.total_steps:,} steps of {self.config.batch_size} on {self.mesh.size} '
      f'{jax.devices()[0].platform} device(s); '
      + (f'resumes from step {start:,}' if start else 'starts')
    )

  def abstract_params(self) -> Params:
    """Shapes and shardings of the parameters."""
    return pretrained.abstract_params(
      self.network, self.source.shape, self.source.classes, self.mesh
    )


def check_fits(path: str | Path, model: pretrained.Pretrained, source: Source) -> None:
  """Raises UserError unless a model was trained on examples like those of a source."""
  theirs, ours = (model.shape, model.classes), (source.shape, source.classes)
  if theirs != ours:
    raise UserError(
      f'{path} was trained on examples of {theirs[0]} with {theirs[1]} classes, and '
      f'config.data has {ours[0]} with {ours[1]}'
    )


def prepare(
  config: Config | ConfigDict,
  mesh: Mesh | None = None,
  trust: Iterable[str] = (),
  blank: bool = False,
) -> Run:
  """Builds every part of a config, and reads its data and its teacher.

  Args:
    config: checked first if it is a ConfigDict.
    mesh: the device mesh; that of `config.mesh` if None.
    trust: packages whose functions the config of a teacher may name.
    blank: of a teacher that must be given and is not, use the shapes alone; such a run
      can be compiled but not trained.

  Raises: UserError naming the key that is wrong, and what it may be.
  """
  config = checked(config)
  if mesh is None:
    mesh = cast(Mesh, build(config.mesh, 'config.mesh', Mesh))
  num_parts, size = config.accumulate, config.batch_size
  if size % num_parts:
    raise UserError(
      f'config.accumulate: {num_parts} does not divide the batch size {size}'
    )
  sharding.check_divisible(size, mesh, 'config.batch_size', num_parts)
  tracking.check(config.trackers)
  given = given_by(config)
  samplers = build_each(config.samplers, 'config.samplers', Sampler)
  tx = build(
    config.optimizer, 'config.optimizer', optax.GradientTransformation, **given
  )
  if config.grad_clip_norm > 0:
    tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
  ema_decays = build_each(config.ema, 'config.ema', Schedule, **given)
  for name in {checkpoint.ONLINE, checkpoint.TARGET} & set(ema_decays):
    raise UserError(f'config.ema.{name}: the name is taken by other weights')
  if config.sample_weights not in (checkpoint.ONLINE, *ema_decays):
    raise UserError(
      f'config.sample_weights: no weights {config.sample_weights!r}; known: '
      f'{", ".join([checkpoint.ONLINE, *ema_decays])}'
    )
  if config.every.snapshot_steps and not snapshots.widths(config):
    raise UserError(
      'config.every.snapshot_steps: snapshots hold EMAs of cmjax.schedules:power, and '
      'there are none; add some to config.ema, as parts.power_emas(0.05, 0.1) does'
    )
  target_decay = None
  if is_part(config.target_decay):
    target_decay = build(config.target_decay, 'config.target_decay', Schedule, **given)
  schedules = schedules_of(config)
  check_schedules(config, schedules)
  if config.init_from not in ('', REQUIRED):
    checkpoint.check_there(config.init_from, 'config.init_from')

  network, f = build_model(config)
  source = build(config.data, 'config.data', Source)
  check_batch(source, config.batch_size)
  loss, frozen, teacher = build_objective(config, mesh, source, f, trust, blank)
  run = Run(
    config=config,
    mesh=mesh,
    source=source,
    network=network,
    f=f,
    loss=loss,
    tx=tx,
    ema_decays=ema_decays,
    target_decay=target_decay,
    samplers=samplers,
    schedules=schedules,
    frozen=frozen,
    teacher=teacher,
  )
  _try_abstractly(run)
  return run


def build_objective(
  config: Config,
  mesh: Mesh,
  source: Source,
  f: Model,
  trust: Iterable[str],
  blank: bool = False,
) -> tuple[Loss, Frozen, Model | None]:
  """The objective, its frozen parameters, and the model of its teacher.

  Raises: UserError if a teacher is given and the objective takes none, or the teacher
    does not fit the data.
  """
  teacher, given = None, given_by(config)
  if config.teacher:
    if 'teacher' not in parameters(path_of(config.objective), 'config.objective.fn'):
      raise UserError(
        f'config.teacher: {config.objective.fn} takes no teacher; leave it empty'
      )
    if config.teacher == REQUIRED and blank:
      teacher = blank_teacher(config, mesh, source)
    elif config.teacher == REQUIRED:
      raise UserError('config.teacher: must be given, as in --config.teacher=VALUE')
    else:
      teacher = pretrained.load(config.teacher, trust=trust, mesh=mesh, say=logs.say)
    check_fits(config.teacher, teacher, source)
    _check_guidance(config, teacher)
    given = given | {'teacher': teacher.f}
  reference = None
  if is_part(config.reference):
    reference = build(config.reference, 'config.reference', Reference, source=source)
    reference = sharding.place(reference, sharding.replicated(mesh))
  perceptual = None
  if is_part(config.perceptual):
    perceptual = build(config.perceptual, 'config.perceptual', Perceptual)
    perceptual = sharding.place(perceptual, sharding.replicated(mesh))
  loss = build(config.objective, 'config.objective', Loss, f=f, **given)
  frozen = Frozen(teacher and teacher.params, perceptual, reference)
  return loss, frozen, teacher and teacher.f


def _check_guidance(config: Config, teacher: pretrained.Pretrained) -> None:
  guided = 'guidance' in config.objective and config.objective.guidance != 1
  objective = teacher.config.to_dict()['objective']
  if guided and not objective.get('label_dropout', 0) > 0:
    raise UserError(
      f'config.objective.guidance: {config.teacher} was trained without label dropout; '
      'train it with config.objective.label_dropout, such as 0.1'
    )


def _loss_of(loss, nets, batch, step, keys):
  out = loss(nets, batch, step, keys)
  if not isinstance(out, LossOut) or 'sigma' not in out.aux:
    raise UserError(
      "must return LossOut(loss, aux) of f32[B] each, with aux['sigma']; returned a "
      f'value of type {type(out).__name__}'
    )
  return out


def _try_abstractly(run: Run) -> None:
  """Traces network, objective and samplers, so that errors come before any compute.

  Raises: UserError naming the part.
  """
  with part_errors('config.network'):
    params = run.abstract_params()
    inputs = pretrained.example_inputs(
      run.source.shape, run.source.classes, run.network.num_times
    )
    x, *rest = inputs
    assert x is not None  # only `cond` may be None
    raw = jax.eval_shape(run.network.apply, params, x, *rest)
    if getattr(raw, 'shape', None) != x.shape:
      got = getattr(raw, 'shape', f'a value of type {type(raw).__name__}')
      raise UserError(f'must return the shape of x, {x.shape}; returned {got}')
  target = params if run.target_decay else None
  nets = Nets(params, target, **run.frozen._asdict())
  size = (run.config.batch_size,)
  row = first_row(run.source, *size)
  batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(size + a.shape[1:], a.dtype), row)
  keys = jax.eval_shape(lambda: streams(jax.random.key(0), 0))
  with part_errors('config.objective'):
    trace = functools.partial(_loss_of, run.loss)
    out = jax.eval_shape(trace, nets, batch, jnp.int32(0), keys)
    for name, value in {'loss': out.loss, **out.aux}.items():
      if getattr(value, 'shape', None) != size:
        raise UserError(f'{name} must be f32[B] of shape {size}, and is {value}')
  shape = run.source.shape
  classes = 0 if batch.cond is None else run.source.classes
  for name, sampler in run.samplers.items():
    with part_errors(f'config.samplers.{name}'):
      sigmas = sigmas_of(sampler, run.f, params, shape, classes, run.mesh.size)
      check_sigmas(sigmas, run.f, run.config.objective)
