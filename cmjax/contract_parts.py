"""The error of a contract, and what all contracts are checked with."""

from collections.abc import Callable
import functools
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import precond
from cmjax.core import LOG_WEIGHT, Array, Batch, Model, Network, Params, expand
from cmjax.fields import Reference

BATCH = 8
SHAPE = (4, 4, 1)  # of an example
CLASSES = 3
CENTRE = 0.25  # of data that is one point

Arguments = ParamSpec('Arguments')


class ContractError(AssertionError):
  """A property that does not hold, in one line: which, by how much, what to do."""


def contract(check: Callable[Arguments, None]) -> Callable[Arguments, None]:
  """Makes a function that raises ContractError a property: its name leads the error."""

  @functools.wraps(check)
  def property_(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
    try:
      check(*args, **kwargs)
    except ContractError as error:
      raise ContractError(f'{check.__name__}: {error}') from error.__cause__

  return property_


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jit`, optimised less on CPUs: a check is compiled once, and runs twice."""
  quick = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
  on_cpu = jax.default_backend() == 'cpu'
  return jax.jit(function, compiler_options=quick if on_cpu else {})


def same(a: Any, b: Any) -> bool:
  """Whether two arrays are equal bit for bit."""
  return np.array_equal(np.asarray(a), np.asarray(b))


def rows_that_differ(a: Array, b: Array) -> list[int]:
  """The indices of the rows in which two arrays differ."""
  return [i for i in range(len(a)) if not same(a[i], b[i])]


def all_zero(tree: Params) -> bool:
  """Whether every array of a tree is zero; integers have no gradient, and count."""
  leaves = (a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0)
  return not any(np.any(np.asarray(a)) for a in leaves)


def all_finite(tree: Params) -> bool:
  """Whether every number of a tree of arrays is finite."""
  return all(np.all(np.isfinite(a)) for a in jax.tree.leaves(tree))


def difference(a: Params, b: Params) -> float:
  """The largest difference of two trees, as a multiple of what rounding explains.

  That is 1e-3 of each number and 1e-4 of the largest of its array, for the same
  mathematics in float32 in another order of operations; where an array is zero, 1e-7 of
  the largest number of the tree.
  """
  largest = max(float(np.max(np.abs(v))) for v in jax.tree.leaves(b))

  def one(a, b):
    a, b = np.asarray(a), np.asarray(b)
    allowed = 1e-3 * np.abs(b) + 1e-4 * np.max(np.abs(b))
    return np.max(np.abs(a - b) / np.maximum(allowed, 1e-7 * largest + 1e-30))

  return max(float(v) for v in jax.tree.leaves(jax.tree.map(one, a, b)))


def some_params(
  network: Network, x: Array, c_noise: Array, cond: Array | None, dtype: Any = None
) -> Params:
  """Parameters of order one, so that nothing vanishes by an initial zero."""
  draw = np.random.default_rng(1)

  def some(path, a):
    spread = np.prod(a.shape[:-1]) ** -0.5 if a.ndim > 1 else 0.1
    around = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
    return jnp.asarray(around + spread * draw.normal(size=a.shape), dtype or a.dtype)

  shapes = jax.eval_shape(network.init, jax.random.key(0), x, c_noise, cond)
  return jax.tree.map_with_path(some, shapes)


def small_model(
  form: str = 'edm', labels: bool = True, dropout: float = 0.0, dtype: str = 'float32'
) -> tuple[Model, Params]:
  """A model of a network with one hidden layer, and parameters of order one.

  It is written out, since a network of flax takes longer to trace than a loss.

  Args:
    form: 'edm', 'trigflow' or 'two_time', the preconditioning.
    labels: whether it is conditional.
    dropout: rate of the hidden units, with a key.
    dtype: of the computation, except of the embedding of times.
  """
  num_times, size = 2 if form == 'two_time' else 1, int(np.prod(SHAPE))
  shapes = {'x': (size, 16), 'times': (num_times, 16), 'out': (16, size)}
  shapes |= {'label': (CLASSES, 16)} if labels else {}
  shapes |= {LOG_WEIGHT: (1,)} if form == 'trigflow' else {}
  draw = np.random.default_rng(1)
  params = {
    name: jnp.asarray(draw.normal(size=shape) * shape[0] ** -0.5, jnp.float32)
    for name, shape in shapes.items()
  }

  def apply(params, x, c_noise, cond, *, key=None):
    w = jax.tree.map(lambda a: a.astype(dtype), params)
    times = jnp.reshape(c_noise, (len(x), num_times))
    # A sine, which is NaN at c_noise = ln 0, as the embeddings of usual networks.
    h = jnp.sin(times @ params['times']).astype(dtype)
    h += jnp.reshape(x, (len(x), size)).astype(dtype) @ w['x']
    if labels:
      h += cond.astype(dtype) @ w['label']
    h = jnp.tanh(h)
    if key is not None and dropout > 0:
      key = jax.random.fold_in(key, 0)  # both points of a pair may have the same key
      h = jnp.where(jax.random.bernoulli(key, dropout, h.shape), 0, h / (1 - dropout))
    return jnp.reshape(h @ w['out'], x.shape)

  def log_weight(params, c_noise):
    return params[LOG_WEIGHT] * c_noise

  learned = log_weight if form == 'trigflow' else None
  network = Network(lambda *inputs: params, apply, num_times, learned)
  return getattr(precond, form)(network), params


def small_batch() -> Batch:
  """Eight examples with labels, inside [-1, 1]."""
  draw, index = np.random.default_rng(2), np.arange(BATCH)
  x0 = np.clip(0.5 * draw.normal(size=(BATCH, *SHAPE)), -1, 1)
  cond = np.eye(CLASSES, dtype=np.float32)[index % CLASSES]
  return Batch(jnp.asarray(x0, jnp.float32), jnp.asarray(cond), jnp.asarray(index))


def small_reference() -> Reference:
  """A reference set of twice as many examples as a batch, of the same classes."""
  index = np.arange(2 * BATCH)
  classes, slots = index % CLASSES, index // CLASSES
  examples = np.zeros((CLASSES, slots[-1] + 1, *SHAPE), np.float32)
  draw = np.random.default_rng(4)
  examples[classes, slots] = 0.5 * draw.normal(size=(2 * BATCH, *SHAPE))
  parts = examples, np.bincount(classes), slots, np.float32(0), np.float32(1)
  return Reference(*map(jnp.asarray, parts))


def exact_of_one_point(form: str) -> Model:
  """A model that is exact for data that is CENTRE alone, where its parameter is 1."""

  def off(params, x):
    return (params - 1.0) * x

  def angle(params, x, t, cond, *, key=None):
    t = expand(t, x)
    return (jnp.cos(t) * x - CENTRE / 0.5) / jnp.sin(t) + off(params, x)

  def velocity(params, x, c_noise, cond, *, key=None):
    return (x - CENTRE) / expand(c_noise[:, 0], x) + off(params, x)

  def data_itself(params, x, sigma, cond, *, key=None):
    return CENTRE + off(params, x)

  if form == 'trigflow':
    return precond.trigflow(Network(_no_params, angle))
  if form == 'two_time':
    return precond.two_time(Network(_no_params, velocity, num_times=2))
  return data_itself


def _no_params(*inputs):
  return None
