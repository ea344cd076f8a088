"""load(path) -> a ready-to-call model: a work directory of ours, or one checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import checkpoint, sharding
from cmjax import config as configs
from cmjax.core import LOG_WEIGHT, Model, Network, Params


class Pretrained(NamedTuple):
  """A model f(params, x, t, cond) with the weights it was trained to."""

  f: Model
  params: Params
  config: configs.ConfigDict
  step: int
  shape: tuple[int, ...]  # of one example
  classes: int  # 0: unconditional


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
  everywhere = sharding.replicated(mesh)
  inputs = example_inputs(shape, classes, network.clocks)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
    jax.eval_shape(network.init, jax.random.key(0), *inputs),
  )


def load(
  path: str | Path,
  *,
  config: configs.ConfigDict | None = None,
  weights: str = '',
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> Pretrained:
  """Opens a run's newest whole checkpoint, or the one named.

  Args:
    path: a work directory, or one of its `checkpoints/STEP`.
    config: builds the model from this config instead of the run's own.
    weights: `online` or the name of an EMA; those the config samples from if empty.
    mesh: where to put the weights; all devices if None.
    say: told of damaged checkpoints that are passed over.

  Raises: UserError if there is no checkpoint, no such weights, or another network.
  """

  def read(step, meta):
    own = config or configs.from_json(meta['config'])
    network, f = configs.build_model(own)
    shape = tuple(meta['shape'])
    like = abstract_params(
      network, shape, meta['classes'], mesh or sharding.data_mesh()
    )
    name = weights or own.sample_weights
    params = checkpoint.read_weights(path, step, name, like)
    return Pretrained(f, params, own, step, shape, meta['classes'])

  return checkpoint.newest(path, read, say)


def load_weights(
  path: str | Path, like: Params, say: Callable[[str], None] = print
) -> tuple[Params, configs.ConfigDict]:
  """The weights a run samples from, in the shapes and places of `like`; its config.

  A learned weighting that only `like` has starts at zero.

  Raises: UserError if there is no checkpoint, or it is of another network.
  """

  def read(step, meta):
    own = configs.from_json(meta['config'])
    known = checkpoint.read_weights(path, step, own.sample_weights, like, LOG_WEIGHT)
    fresh = {name: _zeros(like[name]) for name in like if name not in known}
    return known | fresh, own

  return checkpoint.newest(path, read, say)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.device_put(jnp.zeros(like.shape, like.dtype), like.sharding)
