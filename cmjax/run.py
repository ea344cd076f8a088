"""A config checked against its functions, data and devices, before any compute."""

from collections.abc import Iterable, Iterator
import contextlib
import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmjax import build, checkpoint, data, logs, pretrained, sharding, studies
from cmjax import config as configs
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
from cmjax.fields import Reference
from cmjax.samplers import Sampler, Samples


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
    return _total_steps(self.config)

  def meta(self) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
      'config': configs.to_json(self.config),
      'shape': list(self.source.shape),
      'classes': self.source.classes,
      'data': data.described(self.source),
    }

  def abstract_params(self) -> Params:
    """Shapes and places of the parameters."""
    return pretrained.abstract_params(
      self.network, self.source.shape, self.source.classes, self.mesh
    )


def _total_steps(config: configs.ConfigDict) -> int:
  return -(-config.total_images // config.batch_size)


def five_steps(total: int) -> list[int]:
  """The first step of a run, the last, and those at its quarters."""
  return sorted({0, total // 4, total // 2, 3 * total // 4, max(total - 1, 0)})


class Opened(NamedTuple):
  """Trained weights, ready to be sampled."""

  config: configs.ConfigDict
  mesh: jax.sharding.Mesh
  source: data.Source  # without examples where the weights came alone
  f: Model
  samplers: dict[str, Sampler]
  params: Params
  step: int
  path: str = ''  # the work directory, or the file of weights
  trust: Iterable[str] = ()


def reopen(
  path: str | Path,
  config: configs.ConfigDict | None = None,
  overrides: Iterable[tuple[str, str]] = (),
  trust: Iterable[str] = (),
  *,
  needs_data: bool = True,
) -> Opened:
  """The newest whole checkpoint of a run, or a file of weights, by a config.

  Weights whose config names no samplers get those of their kind of model. Without
  `needs_data`, a file of weights, and a run whose data cannot be read, are opened with
  `data.unseen`.

  Args:
    path: as for `pretrained.load`.
    config: the run's own if None.
    overrides: dotted keys of the config and the texts of their values.
    trust: packages whose functions a config that came with weights may name.
    needs_data: whether it is of use without its data.

  Raises: UserError if there are no weights, they are of another network, or data is
    needed and cannot be read.
  """
  mesh = sharding.data_mesh()
  known = pretrained.load(
    path, config=config, overrides=overrides, trust=trust, mesh=mesh, say=logs.say
  )
  own = known.config
  if 'data' in own:
    own = configs.checked(configs.completed(own))
  source = None
  if needs_data and 'data' not in own:
    raise UserError(
      f'{path} holds weights alone, and this needs data; give --config=NAME with data, '
      'such as edm:cifar10'
    )
  if needs_data or ('data' in own and Path(path).is_dir()):
    try:
      source = build.build(own.data, 'config.data', data.Source)
    except UserError as error:
      if needs_data:
        raise
      logs.say(f'goes on without the data: {error}')
    else:
      _check_fits(path, known, source)
  source = source or data.unseen(known.shape, known.classes, known.data)
  samplers = build.build_each(own.samplers, 'config.samplers', Sampler)
  rest = (known.f, samplers, known.params, known.step, str(path), trust)
  return Opened(own, mesh, source, *rest)


def reopen_for(
  path: str,
  name: str,
  overrides: Iterable[tuple[str, str]],
  trust: Iterable[str],
  *,
  needs_data: bool = True,
) -> Opened:
  """`reopen` by the flags of a command: --workdir, --config, --config.KEY, --trust."""
  if not path:
    raise UserError('give --workdir=DIR, the folder of the run')
  config = configs.load(name, trust) if name else None
  place = checkpoint.local(path)
  return reopen(place, config, overrides, trust, needs_data=needs_data)


def beside(opened: Opened) -> Path:
  """The folder for what is made of a run, or of a file of weights."""
  path = Path(opened.path)
  if path.parent.name == 'checkpoints':  # whose steps are deleted in time
    return path.parent.parent
  return path if path.is_dir() else path.with_name(f'{path.name}.results')


def facts(opened: Opened, **found: Any) -> dict[str, Any]:
  """What was found, and of what: data, step and the whole config, for JSON."""
  own = {'data': opened.source.name, 'step': opened.step}
  return own | found | {'config': opened.config.to_dict()}


def _check_fits(
  path: str | Path, known: pretrained.Pretrained, source: data.Source
) -> None:
  theirs, ours = (known.shape, known.classes), (source.shape, source.classes)
  if theirs != ours:
    raise UserError(
      f'{path} was trained on examples of {theirs[0]} with {theirs[1]} classes, and '
      f'config.data has {ours[0]} with {ours[1]}'
    )


def prepare(
  config: configs.ConfigDict,
  mesh: jax.sharding.Mesh | None = None,
  trust: Iterable[str] = (),
) -> Run:
  """Builds every part of a config, and reads its data and its teacher.

  `trust` names packages whose functions the config of a teacher may name.

  Raises: UserError naming the key and the way out.
  """
  configs.checked(config)
  mesh = mesh or build.build(config.mesh, 'config.mesh', jax.sharding.Mesh)
  parts = config.accumulate
  if config.batch_size % parts:
    raise UserError(
      f'config.accumulate: {parts} parts do not divide a batch of {config.batch_size}'
    )
  sharding.check_divisible(config.batch_size // parts, mesh, 'config.batch_size')
  given = {'batch_size': config.batch_size, 'total_images': config.total_images}
  samplers = build.build_each(config.samplers, 'config.samplers', Sampler)
  tx = build.build(
    config.optimizer, 'config.optimizer', optax.GradientTransformation, **given
  )
  if config.grad_clip_norm > 0:
    tx = optax.chain(optax.clip_by_global_norm(config.grad_clip_norm), tx)
  ema_rates = build.build_each(config.ema, 'config.ema', Schedule, **given)
  for name in {checkpoint.ONLINE, checkpoint.TARGET} & set(ema_rates):
    raise UserError(f'config.ema.{name}: the name is that of other weights')
  if config.sample_weights not in (checkpoint.ONLINE, *ema_rates):
    raise UserError(
      f'config.sample_weights: no weights {config.sample_weights!r}; there are '
      f'{", ".join([checkpoint.ONLINE, *ema_rates])}'
    )
  target_rate = None
  if build.is_part(config.target_rate):
    target_rate = build.build(
      config.target_rate, 'config.target_rate', Schedule, **given
    )
  schedules = build.schedules(config, **given)
  _check_schedules(config, schedules, ema_rates, target_rate)
  if config.init_from not in ('', configs.REQUIRED):
    pretrained.check_there(config.init_from, 'config.init_from')

  network, f = build.build_model(config)
  source = build.build(config.data, 'config.data', data.Source)
  data.check_batch(source, config.batch_size)
  loss, frozen, teacher = _objective(config, mesh, source, f, trust)
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
    schedules=schedules,
    frozen=frozen,
    teacher=teacher,
  )
  _try_abstractly(run)
  return run


def _objective(
  config: configs.ConfigDict,
  mesh: jax.sharding.Mesh,
  source: data.Source,
  f: Model,
  trust: Iterable[str],
) -> tuple[Loss, Frozen, Model | None]:
  """The objective, what it reads and never changes, and its teacher's model."""
  teacher, teaching = None, {}
  if config.teacher:
    if 'teacher' not in build.parameters(config.objective.fn, 'config.objective.fn'):
      raise UserError(
        f'config.teacher: {config.objective.fn} takes none; leave it empty'
      )
    if config.teacher == configs.REQUIRED:
      raise UserError('config.teacher: must be given, as in --config.teacher=VALUE')
    teacher = pretrained.load(config.teacher, trust=trust, mesh=mesh, say=logs.say)
    _check_fits(config.teacher, teacher, source)
    _check_guidance(config, teacher)
    teaching = {'teacher': teacher.f}
  reference = None
  if build.is_part(config.reference):
    reference = build.build(
      config.reference, 'config.reference', Reference, source=source
    )
    reference = sharding.place(reference, sharding.replicated(mesh))
  perceptual = None
  if build.is_part(config.perceptual):
    perceptual = build.build(config.perceptual, 'config.perceptual', Perceptual)
    perceptual = sharding.place(perceptual, sharding.replicated(mesh))
  given = {'batch_size': config.batch_size, 'total_images': config.total_images}
  loss = build.build(
    config.objective, 'config.objective', Loss, f=f, **teaching, **given
  )
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

  The target network is the checkpoint's; the objective is that of the next step, or of
  the last where the run is at its end.

  Raises: UserError if its teacher is no longer where it was, or the checkpoint has no
    target network although the config has a `target_rate`.
  """
  config, source, mesh = opened.config, opened.source, opened.mesh
  loss, frozen, teacher = _objective(config, mesh, source, opened.f, opened.trust)
  target = None
  if build.is_part(config.target_rate):
    try:
      target = checkpoint.read_weights(
        opened.path, opened.step, checkpoint.TARGET, opened.params
      )
    except UserError as error:
      raise UserError(
        f'config.target_rate: a study needs the target; {error}'
      ) from error
  everything = np.arange(len(source.examples))

  def in_dtype(dtype):
    other = copy.deepcopy(config)
    other.network.dtype = dtype
    return build.build_model(other)[1]

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
    step=min(opened.step, _total_steps(config) - 1),
  )


def _check_schedules(
  config: configs.ConfigDict,
  schedules: dict[str, Schedule],
  ema_rates: dict[str, Schedule],
  target_rate: Schedule | None,
) -> None:
  """Refuses learning rates and averages that cannot work, at five points of a run."""
  points = five_steps(_total_steps(config))
  rates = {
    name: schedule
    for name, schedule in schedules.items()
    if name.startswith('config.optimizer.')
  }
  decays = {f'config.ema.{name}': schedule for name, schedule in ema_rates.items()}
  targets = {} if target_rate is None else {'config.target_rate': target_rate}
  # A target network may stand still; an average that did would never leave its start.
  for group, (low, high), wanted in (
    (rates, (0.0, 1e30), 'finite and not negative'),
    (decays, (0.0, np.nextafter(1.0, 0.0)), 'in [0, 1)'),
    (targets, (0.0, 1.0), 'in [0, 1]'),
  ):
    for name, schedule in group.items():
      for step in points:
        with build.user_errors(name):
          value = float(schedule(jnp.int32(step)))
        if not low <= value <= high:
          raise UserError(f'{name}: must be {wanted}, and is {value:g} at step {step}')


def _drawn(sampler, f, shape, params, keys, cond):
  drawn = sampler(f, params, keys, cond, shape)
  if not isinstance(drawn, Samples):
    raise UserError(f'must return Samples, not a value of type {type(drawn).__name__}')
  return drawn.x


def _loss_of(loss, nets, batch, step, keys):
  out = loss(nets, batch, step, keys)
  if not isinstance(out, LossOut) or 't' not in out.aux:
    raise UserError(
      'must return LossOut(loss, aux) with f32[B] each, and t among aux; returned '
      f'a value of type {type(out).__name__}'
    )
  return out


def _try_abstractly(run: Run) -> None:
  """Traces what will be compiled later, so that what cannot work is an error now.

  Raises: UserError naming the part.
  """
  with _part('config.network'):
    params = run.abstract_params()
    inputs = pretrained.example_inputs(
      run.source.shape, run.source.classes, run.network.clocks
    )
    raw = jax.eval_shape(run.network.apply, params, *inputs)
    if getattr(raw, 'shape', None) != inputs[0].shape:
      got = getattr(raw, 'shape', f'a value of type {type(raw).__name__}')
      raise UserError(f'must return the shape of x, {inputs[0].shape}; returned {got}')
  target = params if run.target_rate else None
  nets = Nets(params, target, **run.frozen._asdict())
  batch = data.batch_at(run.source, 0, 0, run.config.batch_size)
  size = (len(batch.x0),)
  keys = jax.eval_shape(lambda: streams(jax.random.key(0), 0))
  with _part('config.objective'):
    trace = functools.partial(_loss_of, run.loss)
    out = jax.eval_shape(trace, nets, batch, jnp.int32(0), keys)
    for name, value in {'loss': out.loss, **out.aux}.items():
      if getattr(value, 'shape', None) != size:
        raise UserError(f'{name} must be f32[B], here of shape {size}; it is {value}')
  rows = run.mesh.size
  cond = None if batch.cond is None else np.zeros((rows, run.source.classes), 'f4')
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  for name, sampler in run.samplers.items():
    with _part(f'config.samplers.{name}'):
      draw = functools.partial(_drawn, sampler, run.f, run.source.shape)
      jax.eval_shape(draw, params, keys, cond)


@contextlib.contextmanager
def _part(where: str) -> Iterator[None]:
  """`build.user_errors`, which also says where an error of our own checks belongs."""
  try:
    with build.user_errors(where):
      yield
  except UserError as error:
    if str(error).startswith('config.'):
      raise
    raise UserError(f'{where}: {error}') from error
