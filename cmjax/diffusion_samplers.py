"""Samplers of denoisers: they solve the probability-flow ODE, or an SDE, step by step.

All go from sigma_max to sigma_min on a Karras grid, and from there to 0 by one Euler
step. Models are on the VE process, on which x_t = x0 + sigma z.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks, solvers
from cmjax.fields import probability_flow
from cmjax.process import VE
from cmjax.samplers import Sampler, Samples, normal, prior
from cmjax.times import karras


def ode(
  *,
  num_steps: int = 18,
  solver: str = 'heun',
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Sampler:
  """EDM's deterministic sampler.

  `solver` is 'heun' (2 num_steps - 1 evaluations) or 'euler' (num_steps evaluations),
  which on the VE process is DDIM.

  Raises: ValueError for any other solver, or unless 2 <= num_steps <= 100,000,
    0 < sigma_min < sigma_max and rho > 0.

  Source: Karras et al. 2022 (EDM), algorithm 1.
  Differs: the state is float32; NVlabs/edm keeps float64.
  """
  grid = _grid(num_steps, sigma_min, sigma_max, rho)
  advance = solvers.by_name(solver)
  sigmas = np.repeat(grid, 2)[1:] if solver == 'heun' else grid

  def sampler(f, params, keys, cond, shape):
    flow = probability_flow(VE, lambda x, sigma: f(params, x, sigma, cond, key=None))

    def step(x, pair):
      sigma, next_sigma = (jnp.full(len(x), s) for s in pair)
      return advance(flow, x, sigma, next_sigma), None

    x = prior(sigma_max, keys, cond, shape)
    x, _ = jax.lax.scan(step, x, (grid[:-1], grid[1:]))
    last = jnp.full(len(x), grid[-1])
    x = solvers.euler(flow, x, last, jnp.zeros_like(last))
    return Samples(x, _floats(sigmas))

  return sampler


def stochastic(
  *,
  num_steps: int = 256,
  churn: float = 40.0,
  churn_min: float = 0.05,
  churn_max: float = 50.0,
  noise_scale: float = 1.003,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Sampler:
  """EDM's stochastic sampler: noise is added before each step of Heun's method.

  Where churn_min <= sigma <= churn_max, a step starts from sigma (1 + gamma) with
  gamma = min(churn / num_steps, sqrt(2) - 1), and the added noise is scaled by
  noise_scale. Without churn this is `ode`, to the bit. 2 num_steps - 1 evaluations.
  The defaults are those of EDM for ImageNet-64.

  Raises: ValueError unless 2 <= num_steps <= 100,000, churn >= 0,
    0 <= churn_min <= churn_max, noise_scale >= 0, 0 < sigma_min < sigma_max, rho > 0.

  Source: Karras et al. 2022 (EDM), algorithm 2, with S_churn, S_tmin, S_tmax, S_noise.
  Differs: the state is float32; NVlabs/edm keeps float64.
  """
  checks.not_negative(churn=churn, churn_min=churn_min, noise_scale=noise_scale)
  checks.finite(churn_max=churn_max)
  if churn_min > churn_max:
    raise ValueError(f'needs churn_min <= churn_max, got {churn_min=}, {churn_max=}')
  grid = _grid(num_steps, sigma_min, sigma_max, rho)
  gamma = min(churn / num_steps, 2**0.5 - 1)
  raised = grid * np.where((grid >= churn_min) & (grid <= churn_max), 1 + gamma, 1.0)
  spread = noise_scale * np.sqrt(raised**2 - grid**2)
  noisy = bool(spread.any())  # without, the program is that of `ode`
  sigmas = np.stack([raised, np.append(grid[1:], 0.0)], axis=1).ravel()[:-1]

  def sampler(f, params, keys, cond, shape):
    flow = probability_flow(VE, lambda x, sigma: f(params, x, sigma, cond, key=None))

    def noisier(x, i, spread):
      return x + spread * normal(keys, i + 1, shape) if noisy else x

    def step(x, values):
      i, spread, *pair = values
      sigma, next_sigma = (jnp.full(len(x), s) for s in pair)
      return solvers.heun(flow, noisier(x, i, spread), sigma, next_sigma), None

    x, steps = prior(sigma_max, keys, cond, shape), np.arange(num_steps)
    x, _ = jax.lax.scan(step, x, (steps[:-1], spread[:-1], raised[:-1], grid[1:]))
    last = jnp.full(len(x), raised[-1])
    x = solvers.euler(flow, noisier(x, steps[-1], spread[-1]), last, 0 * last)
    return Samples(x, _floats(sigmas))

  return sampler


def ddim(
  *,
  num_steps: int = 50,
  eta: float = 0.0,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Sampler:
  """DDIM between deterministic (eta = 0) and ancestral sampling (eta = 1).

  From sigma to sigma' the noise added has variance eta^2 sigma'^2 (1 - sigma'^2 /
  sigma^2). num_steps evaluations.

  Raises: ValueError unless 2 <= num_steps <= 100,000, 0 <= eta <= 1,
    0 < sigma_min < sigma_max and rho > 0.

  Source: Song et al. 2021 (DDIM), eqs. (12) and (16), on the VE process.
  """
  checks.fraction(eta=eta)
  grid = _grid(num_steps, sigma_min, sigma_max, rho)
  below = np.append(grid[1:], 0.0)
  added = eta * below * np.sqrt(1 - (below / grid) ** 2)
  kept = np.sqrt(below**2 - added**2) / grid

  def sampler(f, params, keys, cond, shape):
    def step(x, values):
      i, sigma, added, kept = values
      denoised = f(params, x, jnp.full(len(x), sigma), cond, key=None)
      x = denoised + kept * (x - denoised)
      return (x + added * normal(keys, i + 1, shape) if eta else x), None

    x = prior(sigma_max, keys, cond, shape)
    x, _ = jax.lax.scan(step, x, (np.arange(num_steps), grid, added, kept))
    return Samples(x, _floats(grid))

  return sampler


def dpm_solver(
  *,
  num_steps: int = 20,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Sampler:
  """DPM-Solver++(2M): second order with one evaluation per step.

  A step in lambda = -ln sigma extrapolates the denoiser linearly from its values at the
  last two steps; the first step is of first order. num_steps evaluations.

  Raises: ValueError unless 2 <= num_steps <= 100,000, 0 < sigma_min < sigma_max and
    rho > 0.

  Source: Lu et al. 2022 (DPM-Solver++), algorithm 2, with alpha = 1.
  """
  grid = _grid(num_steps, sigma_min, sigma_max, rho)
  step_sizes = -np.diff(np.log(grid))  # h in lambda
  slope = np.append(0.0, step_sizes[1:] / (2 * step_sizes[:-1]))  # 1 / 2 r
  kept = np.exp(-step_sizes)  # sigma' / sigma

  def sampler(f, params, keys, cond, shape):
    def denoise(x, sigma):
      return f(params, x, jnp.full(len(x), sigma), cond, key=None)

    def step(carry, values):
      x, previous = carry
      sigma, slope, kept = values
      denoised = denoise(x, sigma)
      extrapolated = denoised + slope * (denoised - previous)
      return (kept * x + (1 - kept) * extrapolated, denoised), None

    x = prior(sigma_max, keys, cond, shape)
    start = (x, jnp.zeros_like(x))
    (x, _), _ = jax.lax.scan(step, start, (grid[:-1], slope, kept))
    return Samples(denoise(x, grid[-1]), _floats(grid))

  return sampler


def _grid(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
  checks.whole(2, 100_000, num_steps=num_steps)
  return karras(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def _floats(sigmas: np.ndarray) -> tuple[float, ...]:
  return tuple(sigmas.tolist())
