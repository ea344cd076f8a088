"""Checks of one's own objective, network, preconditioning or sampler.

They are for a notebook or a test: each raises `ContractError`, with one line about the
first property that does not hold. The properties themselves are functions, too, in
`contract_objectives`, `contract_networks` and `contract_samplers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks, oracles
from cmjax.contract_networks import check_network
from cmjax.contract_objectives import (
  OBJECTIVE,
  STEP,
  extreme_times_are_finite,
  keys_of_step,
  objective_case,
)
from cmjax.contract_parts import (
  SHAPE,
  ContractError,
  all_finite,
  all_zero,
  compiled,
  contract,
  difference,
  small_batch,
  small_model,
)
from cmjax.contract_samplers import check_precond, check_sampler
from cmjax.core import Array, Batch, Loss, Model, Nets, expand, first_line, streams
from cmjax.distances import Distance

__all__ = [
  'ContractError',
  'check_minimiser',
  'check_network',
  'check_objective',
  'check_perceptual',
  'check_precond',
  'check_sampler',
  'gradient_at_exact',
]


def check_objective(
  make: Callable[..., Loss], *, form: str = 'edm', from_zero: bool = True
) -> None:
  """Checks an objective with a small network, labels and a reference set.

  `check_objective(lambda f, draws: mine(f, times=draws.times))` also checks it at
  extreme times; `draws` is a `contract_objectives.Draws`.

  Args:
    make: the objective, a function of a model `f`, and of `draws` if it names them.
    form: the preconditioning of the model: 'edm', 'trigflow' or 'two_time'.
    from_zero: whether it is defined for pairs of times with r = 0.

  Raises: ContractError naming the first property that does not hold.
  """
  case = objective_case(make, form=form, from_zero=from_zero)
  for check in OBJECTIVE:
    check(case)
  extreme_times_are_finite(case, 'bfloat16')


@contract
def check_perceptual(make: Callable[[Model, Distance], Loss]) -> None:
  """Checks an objective with a distance that has a network, as LPIPS.

  Args:
    make: the objective, a function of a model and a `Distance`.

  Raises: ContractError if gradients are not finite, the parameters of the distance are
    not those of `Nets.perceptual`, or None there is no ValueError.
  """
  f, params = small_model(labels=False)

  def measure(features, a, b):  # of a network with dead features
    def look(x):
      return jax.nn.relu(jnp.reshape(x, (len(x), -1)) @ features)

    return jnp.sum((look(a) - look(b)) ** 2, axis=1)

  loss = make(f, Distance(measure, degree=2, perceptual=True))
  batch = small_batch()._replace(cond=None)

  @compiled
  @jax.value_and_grad
  def mean(params, features):
    nets = Nets(params, jax.lax.stop_gradient(params), params, features)
    return jnp.mean(loss(nets, batch, jnp.int32(STEP), keys_of_step()).loss)

  features = jax.random.normal(jax.random.key(11), (int(np.prod(SHAPE)), 5))
  value, gradient = mean(params, features)
  if not np.isfinite(value) or not all_finite(gradient) or all_zero(gradient):
    raise ContractError('the gradient is not finite, or zero, with dead features')
  # Twice the features, four times their squared difference.
  twice = jax.tree.map(lambda g: g / 4, mean(params, 2.0 * features)[1])
  error = difference(twice, gradient)
  if not error <= 1:
    raise ContractError(
      'the gradient does not follow the parameters of the distance; use '
      'distance.bind(nets.perceptual)'
    )
  text = 'no error'
  try:
    jax.eval_shape(mean, params, None)
  except ValueError as error:
    text = first_line(error)
  if 'parameters of its network' not in text:
    raise ContractError(
      f'without parameters of the distance: {text}; use distance.bind(nets.perceptual)'
    )


class GradientAtExact(NamedTuple):
  """Norms of the mean gradient of an objective, over a few directions."""

  exact: float  # at the exact model; an estimate, so not below about `noise`
  noise: float  # the standard error of `exact`
  perturbed: float  # at a model that differs from it


def gradient_at_exact(
  make: Callable[[Model], Loss],
  oracle: oracles.Mixture,
  exact: Callable[[Array, Array], Array],
  *,
  size: float = 0.1,
  num_directions: int = 8,
  num_batches: int = 16,
  batch_size: int = 4096,
  step: int = 0,
) -> GradientAtExact:
  """The mean gradient of an objective at the exact model of a known distribution.

  It is that of theta in f(x, sigma) + sum_i theta_i phi_i(x, sigma), with the exact f
  and smooth random directions phi_i that vanish at sigma = 0; at theta = 0, where it is
  zero if the exact model is a stationary point of training, and at |theta| = size, for
  comparison. The target is the stop-gradient of the model.

  For the denoiser, EDM's loss has an expected gradient of zero (Vincent 2011). For the
  exact consistency map and the squared l2 distance, that of consistency training and
  distillation is zero in continuous time, and of the order of the gap t - r in discrete
  time. Other distances weight the noise of single examples, and have a bias that does
  not vanish with the gap.

  Args:
    make: the objective, a function of a model on the variance-exploding process.
    oracle: the distribution of the data.
    exact: (x f32[B, D], sigma f32[B]) -> f32[B, D], such as `oracles.denoiser`, or
      `oracles.consistency` ending at a small sigma, of `oracle`.
    size: of the perturbation, relative to the deviation of the data.
    num_directions: number of directions phi_i.
    num_batches: independent batches, for the mean and its standard error.
    batch_size: examples in each.
    step: at which the schedules of the objective are evaluated.

  Raises: ValueError unless size > 0, num_batches >= 2 and other counts are positive.

  Source: Song et al. 2023, theorem 2, for the gap; Song & Dhariwal 2023 (iCT), section
    3.2, on metrics.
  """
  checks.positive(size=size)
  checks.whole(1, num_directions=num_directions, batch_size=batch_size)
  checks.whole(2, num_batches=num_batches)
  dim = oracle.means.shape[1]
  mean = oracle.weights @ oracle.means
  spread = np.mean((oracle.means - mean) ** 2, axis=1) + oracle.stds**2
  std = float(np.sqrt(oracle.weights @ spread))
  draw = np.random.default_rng(0)
  rows, phases = (
    jnp.asarray(draw.normal(size=(num_directions, *shape)), jnp.float32)
    for shape in ((dim, dim), (dim,))
  )

  def f(params, x, sigma, cond, *, key=None):
    s = expand(sigma, x)
    norm = jnp.sqrt(s**2 + std**2)
    inner = jnp.einsum('bi,kij->kbj', x / norm, rows) + phases[:, None]
    return exact(x, sigma) + s * std / norm * jnp.einsum(
      'k,kbj->bj', params, jnp.cos(inner)
    )

  loss = make(f)
  off = jnp.full(num_directions, size / num_directions**0.5)

  def gradient(theta, key):
    data_key, loss_key = jax.random.split(key)
    batch = Batch(
      oracles.sample(oracle, data_key, batch_size), None, jnp.arange(batch_size)
    )

    def value(theta):
      nets = Nets(theta, None, jnp.zeros_like(theta))
      return jnp.mean(loss(nets, batch, jnp.int32(step), streams(loss_key, 0)).loss)

    return jax.grad(value)(theta)

  @jax.jit  # optimised, as it computes for seconds
  def gradients(keys):
    at_both = jnp.stack([jnp.zeros_like(off), off])  # with the same draws
    both = jax.vmap(gradient, in_axes=(0, None))
    return jax.lax.map(lambda key: both(at_both, key), keys)  # f32[num_batches, 2, K]

  both = gradients(jax.random.split(jax.random.key(0), num_batches))
  exact_norm, perturbed_norm = np.linalg.norm(np.mean(both, axis=0), axis=1)
  variance = np.var(both[:, 0], axis=0, ddof=1) / num_batches
  noise = float(np.sqrt(np.sum(variance)))
  return GradientAtExact(float(exact_norm), noise, float(perturbed_norm))


def check_minimiser(
  make: Callable[[Model], Loss],
  oracle: oracles.Mixture,
  exact: Callable[[Array, Array], Array],
  *,
  bias: float = 0.05,
  **settings: Any,
) -> GradientAtExact:
  """Checks that the exact model of a known distribution is stationary, up to a bias.

  Args:
    make: as for `gradient_at_exact`.
    oracle: the distribution of the data.
    exact: its denoiser or consistency map.
    bias: the largest allowed ratio of the gradients `exact` and `perturbed`.
    **settings: of `gradient_at_exact`.

  Raises: ContractError if the mean gradient at the exact model is larger, by three
    standard errors, or these are more than `bias` and one half of `perturbed`.
  """
  measured = gradient_at_exact(make, oracle, exact, **settings)
  allowed = bias * measured.perturbed
  at = f'the mean gradient is {measured.exact:.2g} +- {measured.noise:.2g} there'
  if not measured.exact <= allowed + 3 * measured.noise:
    raise ContractError(
      f'exact model: {at}, and {measured.perturbed:.2g} at the perturbed model; their '
      f'ratio must be at most {bias}: use a smaller gap, or correct the target'
    )
  if not 3 * measured.noise <= max(allowed, measured.perturbed / 2):
    raise ContractError(
      f'exact model: {at}, too uncertain to compare with {measured.perturbed:.2g}; '
      'raise num_batches'
    )
  return measured
