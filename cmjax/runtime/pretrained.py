"""Loads trained models from runs, and from released checkpoints of other code.

Released checkpoints are read without PyTorch, and no code in them is executed.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.core import LOG_WEIGHT, MAP_AUGMENT, Model, Network, Params, UserError
from cmjax.port import names, read, released, write
from cmjax.runtime import build, checkpoint, paths, sharding, snapshots
from cmjax.runtime.config_json import from_json, to_json
from cmjax.runtime.config_record import ConfigDict, completed
from cmjax.runtime.overrides import override

SIGMA_RANGE = (0.002, 80.0)  # of all configs and released checkpoints


class Pretrained(NamedTuple):
  """A model f(params, x, sigma, cond) with trained parameters."""

  f: Model
  params: Params
  config: ConfigDict  # of a released checkpoint: network and precond only
  step: int  # 0 for released checkpoints, which do not store it
  shape: tuple[int, ...]  # of one example
  classes: int  # 0: unconditional
  origin: str = 'cmjax'  # code that wrote the weights
  unread: tuple[str, ...] = ()  # tensors of the file that the model does not use
  data: dict[str, Any] | None = None  # from `data.source.metadata`; None: unknown
  sigma_range: tuple[float, float] = SIGMA_RANGE  # to sample between

  @property
  def data_range(self) -> tuple[float, float] | None:
    """The range of pixels, [-1, 1]; None for points."""
    return (-1.0, 1.0) if len(self.shape) == 3 else None

  @property
  def kind(self) -> str:
    """The functions of the model, such as `cmjax.precond:edm of cmjax.networks...`."""
    config: Any = self.config  # its parts have no static types
    return f'{config.precond.fn} of {config.network.fn}'

  def __repr__(self) -> str:
    """One line with the number of parameters."""
    size = sum(a.size for a in jax.tree.leaves(self.params))
    return (
      f'Pretrained({self.kind}, shape={self.shape}, classes={self.classes}, '
      f'step={self.step}, {size:,} parameters, origin={self.origin!r})'
    )

  def meta(self) -> dict[str, Any]:
    """The meta of a checkpoint with these weights."""
    meta = {
      'config': to_json(self.config),
      'shape': list(self.shape),
      'classes': self.classes,
      'origin': self.origin,
    }
    return meta | ({} if self.data is None else {'data': self.data})


def example_inputs(
  shape: tuple[int, ...], classes: int, num_times: int
) -> tuple[jax.ShapeDtypeStruct | None, ...]:
  """Abstract x, c_noise and cond of a batch of one, the inputs of `Network.init`."""
  struct = jax.ShapeDtypeStruct
  cond = struct((1, classes), jnp.float32) if classes else None
  c_noise = struct((1,) if num_times == 1 else (1, num_times), jnp.float32)
  return struct((1, *shape), jnp.float32), c_noise, cond


def abstract_params(
  network: Network, shape: tuple[int, ...], classes: int, mesh: jax.sharding.Mesh
) -> Params:
  """Shapes, dtypes and shardings of a network's parameters, without computing them."""
  inputs = example_inputs(shape, classes, network.num_times)
  return sharding.abstract(
    mesh, jax.eval_shape(network.init, jax.random.key(0), *inputs)
  )


def load(
  path: str | Path,
  *,
  config: ConfigDict | None = None,
  overrides: Iterable[tuple[str, str]] = (),
  weights: str = '',
  form: str = '',
  trust: Iterable[str] = (),
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> Pretrained:
  """Loads the newest intact checkpoint of a run, or a file.

  A config that is stored with the weights may only name networks and preconditionings
  of cmjax and of the packages in `trust`; no other function is imported or called.

  Args:
    path: a work directory, one of its `checkpoints/STEP` or `snapshots/STEP`, or a
      file: a pickle of EDM, EDM2 or ECT, a PyTorch or JAX checkpoint of OpenAI, or
      safetensors of cmjax.
    config: replaces the config of the run; if only the model is stored with the
      weights, it adds data and samplers.
    overrides: dotted keys of the config, such as `network.remat`, and the texts of
      their values.
    weights: `online` or the name of an EMA; if empty, the EMA of width
      `config.sample_relative_std`, or `config.sample_weights` if that is 0.
    form: 'denoiser' or 'consistency' for a checkpoint of OpenAI whose path does not
      contain edm, cd or ct as a word.
    trust: packages whose functions the config of the weights may name.
    mesh: the devices for the weights; all if None. On devices that are not attached,
      the parameters are abstract.
    say: receives one line per damaged checkpoint, and one for unused tensors.

  Raises: UserError if there is no checkpoint, or it has no such weights or those of
    another network; also if a file is damaged, of an unknown format, or contains code.
  """
  path, mesh = paths.path(path), mesh or sharding.data_mesh()

  def model(stored):
    merged = completed(_with_model(config, stored), with_parts=False)
    for key, text in overrides:
      override(merged, key, text)
    return merged, *build.build_model(merged)

  if paths.is_file(path):
    file = _open_file(path, form, trust)
    plan, (merged, network, f) = file.plan, model(file.config)
    like = abstract_params(network, plan.shape, plan.classes, mesh)
    params, unread = _placed(plan, like, path, say)
    rest = (plan.classes, plan.origin, tuple(unread), file.data)
    return Pretrained(f, params, merged, file.step, plan.shape, *rest)
  if form:
    raise UserError(f'form={form!r}: only for a checkpoint of OpenAI; {path} is a run')

  def read_step(step, meta):
    held, meta = snapshots.widths_in(meta, path), write.checked_meta(meta, path)
    merged, network, f = model(from_json(meta['config'], str(path), trust))
    shape = tuple(meta['shape'])
    params = like = abstract_params(network, shape, meta['classes'], mesh)
    if sharding.attached(mesh):
      chosen = snapshots.Chosen(merged, weights, held, like)
      params = snapshots.read(path, step, chosen, say)
    rest = (meta['classes'], meta['origin'], (), meta['data'])
    return Pretrained(f, params, merged, step, shape, *rest)

  return checkpoint.newest(path, read_step, say)


def _with_model(config: ConfigDict | None, stored: Any) -> ConfigDict:
  """`config` or, if None, `stored`; with the stored model if only that is stored."""
  if 'data' in stored:
    return config or stored
  merged = ConfigDict(config.to_dict() if config else _sampling(stored.precond.fn))
  for key in _MODEL_KEYS:
    if key in stored:
      merged[key] = stored[key]
  return merged


_MODEL_KEYS = ('network', 'precond', 'objective', 'sample_weights')


def _sampling(precond: str) -> dict[str, Any]:
  """Samplers for weights stored with only their model, by its preconditioning.

  Source: the deterministic sampler of EDM; 0.821 is the sigma of the second step of iCT
  and ECT on CIFAR-10.
  """
  one_step = dict(fn='cmjax.samplers:one_step', sigma_max=80.0)
  heun = dict(fn='cmjax.diffusion_samplers:ode', num_steps=18, solver='heun')
  samplers = {
    'edm': dict(heun=heun),
    'two_time': dict(one_step=dict(fn='cmjax.samplers:flow_map', sigmas=(80.0,))),
  }
  two_steps = dict(fn='cmjax.samplers:multistep', sigmas=(80.0, 0.821), sigma_min=0.0)
  usual = dict(one_step=one_step, two_steps=two_steps)
  return dict(
    samplers=samplers.get(precond.partition(':')[2], usual),
    evaluation=dict(batch_size=64, num_pictured=64),
  )


class _File(NamedTuple):
  plan: names.Plan
  config: ConfigDict
  step: int
  data: dict[str, Any] | None  # metadata of its data, if stored


def _open_file(path: str | Path, form: str, trust: Iterable[str]) -> _File:
  with paths.fetched_file(paths.path(path)) as local:
    file = read.read(local)
  if write.MARK in file.metadata:
    meta = write.read_meta(file.metadata, path)
    config: Any = from_json(meta['config'], str(path), trust)
    model = config.network.to_dict(), config.precond.to_dict()
    plan = names.native_plan(file.content, meta, *model)
    return _File(plan, config, meta['step'], meta['data'])
  plan = released.plan(file, path, form)
  parts = {'network': plan.network, 'precond': plan.precond, 'objective': {}}
  return _File(plan, ConfigDict(parts | {'sample_weights': checkpoint.ONLINE}), 0, None)


def _placed(
  plan: names.Plan, like: Params, path: str | Path, say: Callable[[str], None]
) -> tuple[Params, list[str]]:
  """The parameters of a plan on their devices, and the names of unused tensors."""
  params, unread = names.assemble(plan, like, path)
  if unread:
    listed = ', '.join(map(names.short_repr, unread[:20]))
    more = f' and {len(unread) - 20} more' if len(unread) > 20 else ''
    say(f'{path}: tensors that are not used: {listed}{more}')
  return sharding.place(params, jax.tree.map(lambda a: a.sharding, like)), unread


# Parameters that a model or its first weights may lack, by setting of the network.
_OPTIONAL = {LOG_WEIGHT: 'log_weight', MAP_AUGMENT: 'augment'}


def load_weights(
  path: str | Path, like: Params, say: Callable[[str], None] = print
) -> tuple[Params, ConfigDict]:
  """The weights that a run samples from, in the shapes of `like`, and its config.

  The path may be that of a file, as for `load`. The parameters of a learned weighting,
  or of labels of an augmentation, that only `like` has are set to zero; those that only
  the checkpoint has are left out, and reported.

  Raises: UserError if there is no checkpoint, or it is of another network.
  """
  if paths.is_file(paths.path(path)):
    file = _open_file(path, '', ())
    has, of = file.plan.network, _OPTIONAL
    stored = {k: v for k, v in like.items() if k not in of or has.get(of[k])}
    params, _ = _placed(file.plan, stored, path, say)
    return _with_zeros(params, like), file.config

  def read_step(step, meta):
    config: Any = from_json(meta['config'], str(path))
    for name, setting in _OPTIONAL.items():
      if name not in like and config.network.get(setting, 0):
        say(f'{path}: weights that are not used: {name}')
    held = snapshots.widths_in(meta, path)
    chosen = snapshots.Chosen(config, '', held, like, tuple(_OPTIONAL))
    params = snapshots.read(path, step, chosen, say)
    return _with_zeros(params, like), config

  return checkpoint.newest(path, read_step, say)


def _with_zeros(params: Params, like: Params) -> Params:
  missing = {name: like[name] for name in like if name not in params}
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), missing)
  return params | sharding.place(zeros, jax.tree.map(lambda a: a.sharding, missing))


def convert(
  source: str | Path,
  target: str | Path,
  *,
  form: str = '',
  trust: Iterable[str] = (),
  say: Callable[[str], None],
) -> Pretrained:
  """Loads weights, and writes them as a checkpoint or a safetensors file.

  Args:
    source: as `path` for `load`.
    target: a new folder, or a new file whose name ends with `.safetensors`.
    form: as for `load`.
    trust: as for `load`.
    say: as for `load`.

  Raises: UserError if the source cannot be read, or the target exists.
  """
  target = paths.path(target)
  if target.exists():
    raise UserError(f'{target}: exists; give another path')
  model = load(source, form=form, trust=trust, say=say)
  model.config.sample_weights = checkpoint.ONLINE  # the only weights that are written
  meta = model.meta() | {'step': model.step}
  if target.suffix == '.safetensors':
    with paths.written_file(target) as local:
      write.safetensors(local, jax.tree.map(np.asarray, model.params), meta)
  else:
    checkpoint.save_weights(target, model.step, model.params, meta)
  return model
