"""load(path) -> a ready-to-call model: a run of ours, or a released checkpoint.

Released files are opened without PyTorch and without running anything in them.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import build, checkpoint, sharding
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
  data: dict[str, Any] | None = None  # as `data.described`; None: it is not known
  # Noise levels to sample between: those of every recipe and released file here.
  sigma_range: tuple[float, float] = SIGMA_RANGE

  @property
  def data_range(self) -> tuple[float, float] | None:
    """Where data lies: images in [-1, 1]; None for points."""
    return (-1.0, 1.0) if len(self.shape) == 3 else None

  def __repr__(self) -> str:
    """One line: the weights are counted, not shown."""
    size = sum(a.size for a in jax.tree.leaves(self.params))
    return (
      f'Pretrained({self.config.precond.fn} of {self.config.network.fn}, '
      f'shape={self.shape}, classes={self.classes}, step={self.step}, {size:,} '
      f'parameters, origin={self.origin!r})'
    )

  def meta(self) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    known = {
      'config': configs.to_json(self.config),
      'shape': list(self.shape),
      'classes': self.classes,
      'origin': self.origin,
    }
    return known | ({} if self.data is None else {'data': self.data})


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
  overrides: Iterable[tuple[str, str]] = (),
  weights: str = '',
  form: str = '',
  trust: Iterable[str] = (),
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> Pretrained:
  """Opens a run's newest whole checkpoint, the one named, or a released file.

  Of the config that comes with weights, only functions of cmjax that are networks or
  preconditionings are imported and called, and those of packages in `trust`.

  Args:
    path: a work directory, one of its `checkpoints/STEP`, or a file: a pickle of EDM,
      EDM2 or ECT, a `.pt` or JAX checkpoint of OpenAI, or safetensors of ours.
    config: builds the model from this config instead of the run's own; to weights
      alone, which bring their model, it adds data and samplers.
    overrides: dotted keys of that config, `network.remat`, and the texts of their
      values.
    weights: `online` or the name of an EMA; those the config samples from if empty.
    form: 'denoiser' or 'consistency' for a file of OpenAI's whose path has no word
      edm, cd or ct.
    trust: packages of your own whose functions the config of the weights may name.
    mesh: where to put the weights; all devices if None. Where the mesh is of devices
      that are not attached, they are shapes with their places.
    say: receives a line for each damaged checkpoint that is passed over, and for
      tensors that are not used.

  Raises: UserError if there is no checkpoint, no such weights, or another network; if
    a file is damaged, of an unknown kind, or wants code to be run.
  """
  path, mesh = checkpoint.local(path), mesh or sharding.data_mesh()
  if path.is_file():
    return _load_file(path, config, overrides, form, trust, mesh, say)
  if form:
    raise UserError(f'{path}: a folder says its own form; leave form={form!r} out')

  def read_step(step, meta):
    meta = write.checked_meta(meta, path)
    theirs = configs.from_json(meta['config'], str(path), trust)
    own = _edited(_with_model(config, theirs), overrides)
    network, f = build.build_model(own)
    shape = tuple(meta['shape'])
    like = abstract_params(network, shape, meta['classes'], mesh)
    name = weights or own.sample_weights
    params = like  # which is all that can be had on devices that are not attached
    if sharding.attached(mesh):
      params = checkpoint.read_weights(path, step, name, like)
    rest = (meta['classes'], meta['origin'], (), meta['data'])
    return Pretrained(f, params, own, step, shape, *rest)

  return checkpoint.newest(path, read_step, say)


def _edited(
  config: configs.ConfigDict, overrides: Iterable[tuple[str, str]]
) -> configs.ConfigDict:
  for key, text in overrides:
    configs.override(config, key, text)
  return config


def _with_model(
  config: configs.ConfigDict | None, theirs: configs.ConfigDict
) -> configs.ConfigDict:
  """The config, with the model of weights that have no more than that."""
  if 'data' in theirs:
    return config or theirs
  known = configs.ConfigDict(config or _sampling(theirs.precond.fn))
  for key in _MODEL_KEYS:
    known[key] = theirs[key]
  return known


_MODEL_KEYS = ('network', 'precond', 'objective', 'sample_weights')


def _sampling(precond: str) -> dict[str, Any]:
  """Samplers for weights alone, by the kind of model that they are of.

  Source: the deterministic sampler of EDM; 0.821 is the second noise level of iCT and
  ECT for CIFAR-10.
  """
  one_step = dict(fn='cmjax.samplers:one_step', sigma_max=80.0)
  samplers = {
    'edm': dict(heun=dict(fn='cmjax.samplers:ode', steps=18, solver='heun')),
    'two_time': dict(one_step=dict(fn='cmjax.samplers:flow_map', times=(80.0,))),
  }
  two_steps = dict(fn='cmjax.samplers:multistep', times=(80.0, 0.821), sigma_min=0.0)
  usual = dict(one_step=one_step, two_steps=two_steps)
  return dict(
    samplers=samplers.get(precond.partition(':')[2], usual),
    evaluation=dict(samples=10_000, batch_size=64, seed=1, pictured=64),
  )


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
  path: str | Path, form: str, trust: Iterable[str]
) -> tuple[names.Plan, configs.ConfigDict, int, dict[str, Any] | None]:
  """A plan of a file, its config, the step it names, and what it tells of its data."""
  file = read.read(path)
  if write.MARK in file.metadata:
    meta = write.read_meta(file.metadata, path)
    own = configs.from_json(meta['config'], str(path), trust)
    plan = names.own(file.content, meta, own.network.to_dict(), own.precond.to_dict())
    return plan, own, meta['step'], meta['data']
  plan = released.plan(file, path, form)
  return plan, _model_config(plan.network, plan.precond), 0, None


def _load_file(
  path: str | Path,
  config: configs.ConfigDict | None,
  overrides: Iterable[tuple[str, str]],
  form: str,
  trust: Iterable[str],
  mesh: jax.sharding.Mesh,
  say: Callable[[str], None],
) -> Pretrained:
  plan, theirs, step, known = _open_file(path, form, trust)
  own = _edited(_with_model(config, theirs), overrides)
  network, f = build.build_model(own)
  like = abstract_params(network, plan.shape, plan.classes, mesh)
  params, unread = _placed(plan, like, path, say)
  rest = (plan.classes, plan.origin, tuple(unread), known)
  return Pretrained(f, params, own, step, plan.shape, *rest)


def _placed(
  plan: names.Plan, like: Params, path: str | Path, say: Callable[[str], None]
) -> tuple[Params, list[str]]:
  """The parameters of a plan on their devices; tensors that are not used are named."""
  params, unread = names.assemble(plan, like, path)
  if unread:
    shown = ', '.join(map(names.shown, unread[:20]))
    more = f' and {len(unread) - 20} more' if len(unread) > 20 else ''
    say(f'{path}: tensors that are not used: {shown}{more}')
  return sharding.place(params, jax.tree.map(lambda a: a.sharding, like)), unread


def check_there(path: str | Path, where: str) -> None:
  """Raises UserError naming the key `where` unless `load` would find something."""
  path = checkpoint.local(path)
  named = path.parent.name == 'checkpoints' and path.name.isdigit() and path.is_dir()
  if not (path.is_file() or named or checkpoint.any_in(path)):
    raise UserError(
      f'{where}: {path}: no checkpoints there; is it the --workdir of a run?'
    )


def load_weights(
  path: str | Path, like: Params, say: Callable[[str], None] = print
) -> tuple[Params, configs.ConfigDict]:
  """The weights a run samples from, in the shapes and places of `like`; its config.

  The path may be a released file, as for `load`. A learned weighting that only `like`
  has starts at zero.

  Raises: UserError if there is no checkpoint, or it is of another network.
  """
  if Path(path).is_file():
    plan, own, *_ = _open_file(path, '', ())
    wanted = dict(like)
    if LOG_WEIGHT in like and not _has_log_weight(plan):
      del wanted[LOG_WEIGHT]
    known, _ = _placed(plan, wanted, path, say)
    return _with_zeros(known, like), own

  def read_step(step, meta):
    own = configs.from_json(meta['config'], str(path))
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
  source: str | Path,
  target: str | Path,
  *,
  form: str = '',
  trust: Iterable[str] = (),
  say: Callable[[str], None],
) -> Pretrained:
  """Writes what `load` opens as a checkpoint of ours, or as one safetensors file.

  Args:
    source: any path that `load` takes.
    target: a folder to be made, or a file that ends with `.safetensors`.
    form: as for `load`.
    trust: as for `load`.
    say: as for `load`.

  Raises: UserError if the source cannot be read, or the target is there already.
  """
  target = Path(target)
  if target.exists():
    raise UserError(f'{target} is there already; give another place')
  known = load(source, form=form, trust=trust, say=say)
  known.config.sample_weights = checkpoint.ONLINE  # the name of the only ones there
  meta = known.meta() | {'step': known.step}
  if target.suffix == '.safetensors':
    write.safetensors(target, jax.tree.map(np.asarray, known.params), meta)
  else:
    checkpoint.save_weights(target, known.step, known.params, meta)
  return known
