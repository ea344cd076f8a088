"""Contracts of preconditionings and samplers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmjax import guidance, precond
from cmjax.contract_parts import SHAPE, ContractError, contract, same, some_params
from cmjax.core import Array, Model, Network, Params
from cmjax.networks import mlp
from cmjax.samplers import Sampler

# Preconditionings ---------------------------------------------------------------------


class PrecondCase(NamedTuple):
  """A preconditioning to check."""

  make: Callable[[Network], Model]
  boundary: float = 0.0  # the sigma where f(x, sigma) = x
  num_times: int = 1

  def with_output(self, value: float) -> Callable[[float], tuple[Array, Array]]:
    """sigma -> (x, f(x, sigma)) of a network that returns `value`."""

    def apply(params, x, c_noise, cond, *, key=None):
      return value * jnp.ones_like(x)

    f = self.make(Network(lambda *inputs: None, apply, self.num_times))
    x = jax.random.normal(jax.random.key(8), (4, *SHAPE))
    return lambda sigma: (x, f(None, x, jnp.full(4, sigma), None))


@contract
def boundary_is_the_identity(case: PrecondCase) -> None:
  """f(x, sigma) = x at the boundary, bit for bit, and not away from it."""
  at = case.with_output(1e3)
  x, y = at(max(case.boundary, 1e-30))
  if not same(x, y):
    raise ContractError(
      f'|f(x, {case.boundary}) - x| is {float(jnp.max(jnp.abs(y - x))):.1e}; c_skip '
      'must be 1 and c_out 0 there'
    )
  away = float(jnp.min(jnp.abs(at(1.0)[1])))
  if away <= 100:
    raise ContractError(f'c_out is {away / 1e3:.1e} at sigma = 1; use the network')


@contract
def boundary_is_of_first_order(case: PrecondCase) -> None:
  """|f(x, sigma) - x| is proportional to the distance of sigma from the boundary."""
  with jax.enable_x64(True):
    at = case.with_output(1e3)
    pairs = (at(case.boundary + h) for h in (1e-4, 1e-5))
    far, near = (float(jnp.linalg.norm(y - x)) for x, y in pairs)
  # The next terms are of the relative size of sigma, at most 0.002 + 1e-4.
  if abs(far / max(near, 1e-30) / 10 - 1) > 5e-3:
    raise ContractError(
      f'ten times as far from the boundary, |f - x| is {far / max(near, 1e-30):.3g} '
      'times as large, not 10; c_out must have a simple zero there'
    )


@contract
def outside_is_float32(case: PrecondCase) -> None:
  """f is float32, also around a network in bfloat16."""
  n = case.num_times
  network = mlp.mlp(width=16, num_blocks=1, embedding=8, num_times=n, dtype='bfloat16')
  x, sigma = jnp.ones((2, *SHAPE)), jnp.ones(2)
  c_noise = sigma if n == 1 else jnp.ones((2, n))
  params = some_params(network, x, c_noise, None)
  dtype = case.make(network)(params, x, sigma, None).dtype
  if dtype != jnp.float32:
    raise ContractError(f'f is {dtype}; cast the output of the network to that of x')


PRECOND = (boundary_is_the_identity, boundary_is_of_first_order, outside_is_float32)


def check_precond(
  make: Callable[[Network], Model], *, boundary: float = 0.0, num_times: int = 1
) -> None:
  """Checks a preconditioning: its boundary condition, and its dtype.

  Args:
    make: the preconditioning, a function of a network.
    boundary: the noise level where f(x, sigma) = x.
    num_times: of its networks.

  Raises: ContractError naming the first property of `PRECOND` that does not hold.
  """
  for check in PRECOND:
    check(PrecondCase(make, boundary, num_times))


# Samplers -----------------------------------------------------------------------------


class SamplerCase(NamedTuple):
  """A sampler to check."""

  sampler: Sampler
  evaluations: int  # of the network, per sample
  num_times: int = 1
  conditional: bool = False
  guided: bool = False  # by a worse version of the model


@contract
def evaluations_are_counted(case: SamplerCase) -> None:
  """`Samples.evaluations` is how often the network is evaluated, without dropout."""
  rows, x, counted = _samples(case, slice(0, 4))
  if not len(rows) == counted == case.evaluations:
    raise ContractError(
      f'the network is evaluated {len(rows)} times, Samples.sigmas has {counted} noise '
      f'levels, and {case.evaluations} were expected; return one for each evaluation'
    )
  if x.shape != (4, 3):
    raise ContractError(f'x has shape {x.shape} for 4 samples of shape (3,)')


@contract
def samples_are_independent(case: SamplerCase) -> None:
  """A sample depends on its own key and label, not on the rest of the batch."""
  all_four, two = (_samples(case, rows)[1] for rows in (slice(0, 4), slice(1, 3)))
  # Not bit-equal: batches of other sizes may be rounded differently.
  error = float(jnp.max(jnp.abs(all_four[1:3] - two) - 1e-4 * jnp.abs(two)))
  if not error <= 1e-6:
    raise ContractError(
      f'samples 1 and 2 change by {error:.1e} without the others; draw the noise of '
      'each sample from its own key, as samplers.normal'
    )


def _samples(case: SamplerCase, rows: slice) -> tuple[list[int], Array, int]:
  """The batch size of each evaluation, x f32[B, 3], and the evaluations counted."""
  calls: list[int] = []

  def apply(params, x, c_noise, cond, *, key=None):
    calls.append(len(x))
    expected = (len(x), case.num_times) if case.num_times > 1 else (len(x),)
    if c_noise.shape != expected:
      raise ContractError(f'sigma has shape {c_noise.shape}, not {expected}')
    if key is not None:
      raise ContractError('a key reaches the network; sample without dropout')
    return params * x / (1 + jnp.reshape(c_noise, (len(x), -1))[:, :1] ** 2)

  wrap = precond.edm if case.num_times == 1 else precond.two_time
  f: Model = wrap(Network(lambda *inputs: None, apply, case.num_times))
  params: Params = 0.5
  if case.guided:
    f, params = guidance.WithGuide(f, f), guidance.GuidedParams(0.5, 0.4)
  keys = jax.random.split(jax.random.key(9), 4)
  cond = jnp.eye(4)[rows] if case.conditional else None
  with jax.disable_jit():  # so that a scan calls f as often as it runs
    out = case.sampler(f, params, keys[rows], cond, (3,))
  return calls, out.x, out.evaluations


SAMPLER = (evaluations_are_counted, samples_are_independent)


def check_sampler(
  sampler: Sampler,
  *,
  evaluations: int,
  num_times: int = 1,
  conditional: bool = False,
  guided: bool = False,
) -> None:
  """Checks a sampler: its count of evaluations, and that samples are independent.

  Args:
    sampler: the sampler.
    evaluations: of the network, per sample.
    num_times: 2 for a sampler of flow maps.
    conditional: whether it needs labels.
    guided: whether it needs a `guidance.WithGuide`.

  Raises: ContractError naming the first property of `SAMPLER` that does not hold.
  """
  case = SamplerCase(sampler, evaluations, num_times, conditional, guided)
  for check in SAMPLER:
    check(case)
