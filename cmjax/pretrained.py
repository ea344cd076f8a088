"""load(path) -> a ready-to-call model: a run of ours, or a released checkpoint.

Released files are opened without PyTorch and without running anything in them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checkpoint, sharding
from cmjax import config as configs
from cmjax.core import LOG_WEIGHT, Model, Network, Params, UserError
from cmjax.port import names, read, released, write

SIGMA_RANGE = (0.002, 80.0)


class Pretrained(NamedTuple):
  """A model f(params, x, t, cond) with the weights it was trained to."""

  f: Model
  params: Params
  config: configs.ConfigDict  # of released files: network and precond alone
  step: int  # 0 for released files, which do not say it
  shape: tuple[int, ...]  # of one example
  classes: int  # 0: unconditional
  origin: str = 'cmjax'  # whose format the weights came in
  unread: tuple[str, ...] = ()  # tensors of the file that the model does not use
  # Noise levels to sample between: those of every recipe and released file here.
  sigma_range: tuple[float, float] = SIGMA_RANGE

  @property
  def data_range(self) -> tuple[float, float] | None:
    """Where data lies: images in [-1, 1]; None for points."""
    return (-1.0, 1.0) if len(self.shape) == 3 else None

  def meta(self) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
      'config': configs.to_json(self.config),
      'shape': list(self.shape),
      'classes': self.classes,
      'origin': self.origin,
    }


def example_inputs(
  shape: tuple[int, ...], classes: int, clocks: int
) -> tuple[jax.ShapeDtypeStruct | None, ...]:
  """Abstract x, c_noise and cond of a batch of one, as `Network.init` takes them."""
  struct = jax.ShapeDtypeStruct
  cond = struct((1, classes), jnp.float32) if classes else None
  c_noise = struct((1,) if clocks == 1 else (1, clocks), jnp.float32)
  return struct((1, *shape), jnp.float32), c_noise, cond


def abstract_params(
  network: Network, shape: tuple[int, ...], classes: int, mesh: jax.sharding.Mesh
) -> Params:
  """Shapes, dtypes and places of a network's parameters, without computing any."""
  inputs = example_inputs(shape, classes, network.clocks)
  return sharding.abstract(
    mesh, jax.eval_shape(network.init, jax.random.key(0), *inputs)
  )


def load(
  path: str | Path,
  *,
  config: configs.ConfigDict | None = None,
  weights: str = '',
  form: str = '',
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> Pretrained:
  """Opens a run's newest whole checkpoint, the one named, or a released file.

  Args:
    path: a work directory, one of its `checkpoints/STEP`, or a file: a pickle of EDM,
      EDM2 or ECT, a `.pt` or JAX checkpoint of OpenAI, or safetensors of ours.
    config: builds the model from this config instead of the run's own; to weights
      alone, which bring their model, it adds data and samplers.
    weights: `online` or the name of an EMA; those the config samples from if empty.
    form: 'denoiser' or 'consistency' for a file of OpenAI's whose path has no word
      edm, cd or ct.
    mesh: where to put the weights; all devices if None. Where the mesh is of devices
      that are not attached, they are shapes with their places.
    say: told of damaged checkpoints that are passed over, and of tensors not used.

  Raises: UserError if there is no checkpoint, no such weights, or another network; if
    a file is damaged, of an unknown kind, or wants code to be run.
  """
  mesh = mesh or sharding.data_mesh()
  if Path(path).is_file():
    return _load_file(path, config, form, mesh, say)
  if form:
    raise UserError(f'{path}: a folder says its own form; leave form={form!r} out')

  def read_step(step, meta):
    own = _with_model(config, configs.from_json(meta['config']))
    network, f = configs.build_model(own)
    shape = tuple(meta['shape'])
    like = abstract_params(network, shape, meta['classes'], mesh)
    name = weights or own.sample_weights
    params = like  # which is all that can be had on devices that are not attached
    if sharding.attached(mesh):
      params = checkpoint.read_weights(path, step, name, like)
    origin = meta.get('origin', 'cmjax')
    return Pretrained(f, params, own, step, shape, meta['classes'], origin)

  return checkpoint.newest(path, read_step, say)


def _with_model(
  config: configs.ConfigDict | None, theirs: configs.ConfigDict
) -> configs.ConfigDict:
  """The config, with the model of weights that have no more than that."""
  if config is None or 'data' in theirs:
    return config or theirs
  known = configs.ConfigDict(config)
  for key in theirs:
    known[key] = theirs[key]
  return known


def _model_config(
  network: dict[str, Any], precond: dict[str, Any]
) -> configs.ConfigDict:
  return configs.ConfigDict(
    {
      'network': network,
      'precond': precond,
      'objective': {},
      'sample_weights': checkpoint.ONLINE,
    }
  )


def _open_file(
  path: str | Path, form: str
) -> tuple[names.Plan, configs.ConfigDict, int]:
  """A plan of a file, its config, and the step it says it is of."""
  file = read.read(path)
  if write.MARK in file.metadata:
    meta = write.read_meta(file.metadata, path)
    own = configs.from_json(meta['config'])
    plan = names.own(file.content, meta, own.network.to_dict(), own.precond.to_dict())
    return plan, own, meta['step']
  plan = released.plan(file, path, form)
  return plan, _model_config(plan.network, plan.precond), 0


def _load_file(
  path: str | Path,
  config: configs.ConfigDict | None,
  form: str,
  mesh: jax.sharding.Mesh,
  say: Callable[[str], None],
) -> Pretrained:
  plan, theirs, step = _open_file(path, form)
  own = _with_model(config, theirs)
  network, f = configs.build_model(own)
  like = abstract_params(network, plan.shape, plan.classes, mesh)
  params, unread = _placed(plan, like, path, say)
  return Pretrained(
    f, params, own, step, plan.shape, plan.classes, plan.origin, tuple(unread)
  )


def _placed(
  plan: names.Plan, like: Params, path: str | Path, say: Callable[[str], None]
) -> tuple[Params, list[str]]:
  """The parameters of a plan on their devices; tensors that are not used are said."""
  params, unread = names.assemble(plan, like, path)
  if unread:
    say(f'{path}: not used here: {", ".join(unread)}')
  return sharding.place(params, jax.tree.map(lambda a: a.sharding, like)), unread


def load_weights(
  path: str | Path, like: Params, say: Callable[[str], None] = print
) -> tuple[Params, configs.ConfigDict]:
  """The weights a run samples from, in the shapes and places of `like`; its config.

  The path may be a released file, as for `load`. A learned weighting that only `like`
  has starts at zero.

  Raises: UserError if there is no checkpoint, or it is of another network.
  """
  if Path(path).is_file():
    plan, own, _ = _open_file(path, '')
    wanted = dict(like)
    if LOG_WEIGHT in like and not _has_log_weight(plan):
      del wanted[LOG_WEIGHT]
    known, _ = _placed(plan, wanted, path, say)
    return _with_zeros(known, like), own

  def read_step(step, meta):
    own = configs.from_json(meta['config'])
    known = checkpoint.read_weights(path, step, own.sample_weights, like, LOG_WEIGHT)
    return _with_zeros(known, like), own

  return checkpoint.newest(path, read_step, say)


def _has_log_weight(plan: names.Plan) -> bool:
  return bool(plan.network.get('log_weight', False))


def _with_zeros(known: Params, like: Params) -> Params:
  fresh = {name: like[name] for name in like if name not in known}
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), fresh)
  return known | sharding.place(zeros, jax.tree.map(lambda a: a.sharding, fresh))


def convert(
  source: str | Path, target: str | Path, *, form: str = '', say: Callable[[str], None]
) -> Pretrained:
  """Writes what `load` opens as a checkpoint of ours, or as one safetensors file.

  Args:
    source: any path that `load` takes.
    target: a folder to be made, or a file that ends with `.safetensors`.
    form: as for `load`.
    say: as for `load`.

  Raises: UserError if the source cannot be read, or the target is there already.
  """
  target = Path(target)
  if target.exists():
    raise UserError(f'{target} is there already; give another place')
  known = load(source, form=form, say=say)
  known.config.sample_weights = checkpoint.ONLINE  # the name of the only ones there
  meta = known.meta() | {'step': known.step}
  if target.suffix == '.safetensors':
    write.safetensors(target, jax.tree.map(np.asarray, known.params), meta)
  else:
    checkpoint.save_weights(target, known.step, known.params, meta)
  return known
