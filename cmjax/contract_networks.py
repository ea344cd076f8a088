"""Contracts of networks."""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.contract_parts import (
  CLASSES,
  ContractError,
  all_zero,
  compiled,
  contract,
  difference,
  rows_that_differ,
  same,
  some_params,
)
from cmjax.core import LOG_WEIGHT, Array, Network, Params, first_line


class NetworkCase(NamedTuple):
  """A network to check: how to make it, and one with dropout 0.5, compiled."""

  make: Callable[..., Network]
  keywords: frozenset[str]  # that `make` takes
  shape: tuple[int, ...]  # of an example
  uniform_at_first: bool
  apply: Callable[..., Array]
  params: Params
  inputs: tuple[Array, Array, Array]  # x, c_noise, cond


def network_case(
  make: Callable[..., Network],
  shape: tuple[int, ...],
  *,
  uniform_at_first: bool = True,
  **settings: Any,
) -> NetworkCase:
  """The case of `check_network`."""
  keywords = frozenset(inspect.signature(make).parameters)
  make = functools.partial(make, **settings)
  network = make(dropout=0.5)
  inputs = _inputs(network, shape)
  made = compiled(network.apply), some_params(network, *inputs), inputs
  return NetworkCase(make, keywords, shape, uniform_at_first, *made)


def _inputs(network: Network, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
  x = jax.random.normal(jax.random.key(5), (4, *shape), dtype)
  n = network.num_times
  c_noise = jnp.linspace(-1.5, 1.1, 4 * n, dtype=dtype)
  c_noise = c_noise if n == 1 else jnp.reshape(c_noise, (4, n))
  return x, c_noise, jax.nn.one_hot(jnp.arange(4) % CLASSES, CLASSES, dtype=dtype)


@contract
def dropout_needs_a_key(case: NetworkCase) -> None:
  """Without a key F is a function of its inputs; with one, units are dropped."""
  plain, again = (case.apply(case.params, *case.inputs) for _ in range(2))
  if plain.shape != case.inputs[0].shape:
    raise ContractError(f'F has shape {plain.shape}; return that of x')
  if not same(plain, again):
    raise ContractError('two calls without a key differ; drop units only with a key')
  dropped, repeated, other = (
    case.apply(case.params, *case.inputs, key=jax.random.key(i)) for i in (1, 1, 2)
  )
  if not same(dropped, repeated):
    raise ContractError('two calls with the same key differ; draw all masks from it')
  if same(dropped, plain) or same(dropped, other):
    raise ContractError('dropout=0.5 with a key has no effect; draw masks from the key')


@contract
def inputs_are_used(case: NetworkCase) -> None:
  """F depends on x, c_noise and label of its own example, and of no other."""
  x, c_noise, cond = case.inputs
  plain = case.apply(case.params, x, c_noise, cond)
  for what, changed in {
    'x': (x.at[2].add(0.5), c_noise, cond),
    'noise level': (x, c_noise.at[2].add(0.5), cond),
    'label': (x, c_noise, cond.at[2].set(cond[1])),
  }.items():
    rows = rows_that_differ(plain, case.apply(case.params, *changed))
    if rows != [2]:
      raise ContractError(
        f'another {what} of example 2 changes F of the examples {rows}, not [2]; use '
        'each input, and compute nothing over the batch'
      )


@contract
def labels_are_required(case: NetworkCase) -> None:
  """A network that was initialised with labels raises ValueError without them."""
  text = 'no error'
  try:
    case.apply(case.params, *case.inputs[:2], None)
  except ValueError as error:
    text = first_line(error)
  if 'trained with labels' not in text:
    raise ContractError(
      f'cond=None gives: {text}; raise ValueError, saying "trained with labels"'
    )


@contract
def dtype_is_kept(case: NetworkCase) -> None:
  """dtype='bfloat16' computes and returns bfloat16; parameters stay float32."""
  half = case.make(dropout=0.5, dtype='bfloat16')
  kept = jax.eval_shape(half.init, jax.random.key(0), *case.inputs)
  dtypes = {str(p.dtype) for p in jax.tree.leaves((case.params, kept))}
  if dtypes != {'float32'}:
    raise ContractError(f'parameters are {", ".join(sorted(dtypes))}; keep float32')
  rough = compiled(half.apply)(case.params, *case.inputs)
  exact = case.apply(case.params, *case.inputs)
  if (rough.dtype, exact.dtype) != (jnp.bfloat16, jnp.float32):
    raise ContractError(
      f"F is {rough.dtype} with dtype='bfloat16' and {exact.dtype} without; return the "
      'dtype that is asked for'
    )
  error = jnp.linalg.norm(rough.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
  if not 1e-5 < error < 0.05:  # 8 bits, 4e-3, through a dozen layers
    raise ContractError(
      f'bfloat16 changes F by {float(error):.1e}, not 1e-5 to 0.05; compute layers in '
      'dtype, and embeddings of time in float32'
    )


@contract
def jvp_is_the_derivative(case: NetworkCase) -> None:
  """`jax.jvp` with dropout is the central difference, in float64.

  It is compiled, as some functions without a jvp fail only then. A `stop_gradient` in
  the network raises no error, but sets tangents to zero.
  """
  with jax.enable_x64(True):
    network = case.make(dropout=0.3, dtype='float64')
    x, c_noise, cond = _inputs(network, case.shape, jnp.float64)
    params = some_params(network, x, c_noise, cond, jnp.float64)
    direction = jax.random.normal(jax.random.key(6), x.shape, x.dtype)

    def along(h):
      key = jax.random.key(7)  # the same mask at every point
      return network.apply(params, x + h * direction, c_noise + h, cond, key=key)

    try:
      tangent = compiled(lambda: jax.jvp(along, (0.0,), (1.0,))[1])()
    except (TypeError, NotImplementedError) as error:
      raise ContractError(
        f'jax.jvp fails: {first_line(error)}; use jax.custom_jvp, not custom_vjp'
      ) from error
    h = 1e-5  # error h^2 f'''/6 ~ 1e-9, rounding 1e-16 / h ~ 1e-11
    value = compiled(along)
    expected = (value(h) - value(-h)) / (2 * h)
    error = float(jnp.max(jnp.abs(tangent - expected) - 1e-6 * jnp.abs(expected)))
    size = float(jnp.linalg.norm(tangent))
  if not (error <= 1e-8 and size > 1e-3):
    raise ContractError(
      f'jax.jvp, of norm {size:.1e}, differs by {error:.1e} from the central '
      'difference; remove stop_gradient, and compute in dtype'
    )


@contract
def two_times_differ(case: NetworkCase) -> None:
  """With num_times=2 each time has an effect of its own, on its example alone."""
  network = case.make(num_times=2)
  x, c_noise, cond = _inputs(network, case.shape)
  apply, params = compiled(network.apply), some_params(network, x, c_noise, cond)
  plain = apply(params, x, c_noise, cond)
  swapped = c_noise.at[2].set(c_noise[2, ::-1])
  changes = c_noise.at[2, 0].add(0.5), c_noise.at[2, 1].add(0.5), swapped
  others = [apply(params, x, changed, cond) for changed in changes]
  for i, other in enumerate(others):
    own = all(rows_that_differ(other, one) for one in others[:i])
    if plain.shape != x.shape or rows_that_differ(plain, other) != [2] or not own:
      what = ('another first time', 'another second time', 'swapping the times')[i]
      raise ContractError(
        f'{what} in example 2 does not change F there, and only there, in its own way; '
        'embed each time with parameters of its own'
      )


@contract
def log_weight_is_apart(case: NetworkCase) -> None:
  """log_weight=True adds a learned weighting, which shares no parameters with F."""
  network, plain = case.make(log_weight=True), case.make()
  if network.log_weight is None or plain.log_weight is not None:
    raise ContractError('Network.log_weight must be None exactly without log_weight')
  log_weight, inputs = network.log_weight, _inputs(network, case.shape)
  c_noise = inputs[1]
  fresh = compiled(lambda: network.init(jax.random.key(0), *inputs)[LOG_WEIGHT])()
  first = log_weight({LOG_WEIGHT: fresh}, c_noise)
  if bool(jnp.all(first == 0)) != case.uniform_at_first:
    raise ContractError(f'log w is {first} at first; zero exactly if uniform_at_first')
  params = some_params(network, *inputs)
  if (distinct := len(np.unique(log_weight(params, c_noise)))) != 4:
    raise ContractError(f'log w has {distinct} values at 4 noise levels; use c_noise')
  gradient = jax.grad(lambda p: jnp.sum(log_weight(p, c_noise)))(params)
  if all_zero(gradient.pop(LOG_WEIGHT)) or not all_zero(gradient):
    raise ContractError(f'log w must depend on the parameters {LOG_WEIGHT} alone')
  without = jax.eval_shape(plain.init, jax.random.key(0), *inputs)
  shape = jax.eval_shape(network.apply, params, *inputs).shape
  same_rest = jax.tree.structure(without) == jax.tree.structure(gradient)
  if not same_rest or shape != inputs[0].shape:
    raise ContractError('log_weight=True changes other parameters, or the shape of F')


@contract
def num_times_is_checked(case: NetworkCase) -> None:
  """num_times=0, and a learned weighting of two times, raise ValueError."""
  for given in (dict(num_times=0), dict(num_times=2, log_weight=True)):
    if not given.keys() <= case.keywords:
      continue
    text = 'no error'
    try:
      case.make(**given)
    except ValueError as error:
      text = first_line(error)
    if 'num_times' not in text or str(given['num_times']) not in text:
      raise ContractError(f'{given} gives: {text}; raise ValueError, with num_times')


@contract
def attentions_agree(case: NetworkCase) -> None:
  """Each attention_implementation, and remat, compute the same F, dF and gradients."""
  x, c_noise, cond = case.inputs
  make = functools.partial(
    case.make, channel_mult=(1,), attention_resolutions=case.shape[:1]
  )
  default = make()
  params = some_params(default, *case.inputs)

  def gradient_of_jvp(network):
    @compiled
    @jax.value_and_grad
    def loss(params):
      point = (x, c_noise), (jnp.ones_like(x), jnp.ones_like(c_noise))
      y, dy = jax.jvp(lambda x, c: network.apply(params, x, c, cond), *point)
      return jnp.mean(y**2) + jnp.mean(dy**2)

    return loss(params)

  expected = gradient_of_jvp(default)
  chunked = dict(attention_implementation='chunked', remat=True)
  for given in (chunked, dict(attention_implementation='fused')):
    other = make(**given)
    init = jax.eval_shape(other.init, jax.random.key(0), *case.inputs)
    if jax.tree.structure(init) != jax.tree.structure(params):
      raise ContractError(f'{given} changes the parameters')
    error = difference(gradient_of_jvp(other), expected)
    if not error <= 1:
      raise ContractError(
        f'with {given} the gradient differs by {error:.1e} times what rounding explains'
      )


# By the keywords that a network must have to be checked.
NETWORK = {
  dropout_needs_a_key: {'dropout'},
  inputs_are_used: set(),
  labels_are_required: set(),
  dtype_is_kept: {'dtype'},
  jvp_is_the_derivative: {'dtype'},
  two_times_differ: {'num_times'},
  log_weight_is_apart: {'log_weight'},
  num_times_is_checked: {'num_times'},
  attentions_agree: {'attention_implementation', 'remat'},
}


def check_network(
  make: Callable[..., Network],
  shape: tuple[int, ...],
  *,
  uniform_at_first: bool = True,
  **settings: Any,
) -> None:
  """Checks a network with dropout, labels and dtypes.

  Two times, a learned weighting and attention, if `make` has keywords for them.

  Args:
    make: the network, a function with keywords that include `dropout` and `dtype`.
    shape: of an example, such as (8, 8, 3).
    uniform_at_first: whether a learned weighting is 1 at initialisation.
    **settings: of a small network.

  Raises: ContractError naming the first property of `NETWORK` that does not hold.
  """
  case = network_case(make, shape, uniform_at_first=uniform_at_first, **settings)
  for check, needed in NETWORK.items():
    if needed <= case.keywords:
      check(case)
