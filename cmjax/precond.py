"""Preconditioning: from a raw network F to a denoiser D or a consistency function f.

Every model is called on the variance-exploding (VE) process, x = x0 + sigma z, whatever
process it was trained on, so that all samplers, teachers and oracles work with all
models. Computations are in float32 outside the network, in its own dtype inside.
"""

import dataclasses

import jax.numpy as jnp

from cmjax import checks
from cmjax.core import Array, Key, Model, Network, Params, expand
from cmjax.process import LINEAR, VE, Process, change_process
from cmjax.process import trigflow as trigflow_process


# Not NamedTuples: these have no weak references, which compilation needs.
@dataclasses.dataclass(frozen=True)
class EDM:
  """D(x, sigma) of `edm`, which keeps its network for a learned weighting."""

  network: Network
  sigma_data: float

  def __call__(self, params, x, sigma, cond, /, *, key=None) -> Array:
    """D f32[B, ...] at x f32[B, ...] and sigma f32[B] > 0."""
    s, sigma_data = expand(sigma, x), self.sigma_data
    norm = jnp.sqrt(s**2 + sigma_data**2)  # 1 / c_in
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / norm
    c_noise = jnp.log(sigma) / 4
    raw = self.network.apply(params, x / norm, c_noise, cond, key=key)
    return c_skip * x + c_out * raw.astype(x.dtype)

  def log_weight(self, params: Params, sigma: Array) -> Array | None:
    """The learned log-weighting of the loss f32[B]; None if the network has none."""
    if self.network.log_weight is None:
      return None
    return self.network.log_weight(params, jnp.log(sigma) / 4)


def edm(network: Network, *, sigma_data: float = 0.5) -> Model:
  """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), EDM's denoiser.

  x and D f32[B, ...], sigma > 0 f32[B]:

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)
    c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    c_in = 1 / sqrt(sigma^2 + sigma_data^2)
    c_noise = ln(sigma) / 4

  Raises: ValueError unless sigma_data > 0 and the network has one time.

  Source: Karras et al. 2022 (EDM), table 1.
  """
  _check_num_times(network, 1)
  checks.positive(sigma_data=sigma_data)
  return EDM(network, sigma_data)


def consistency(
  network: Network, *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Model:
  """f(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with f(x, sigma_min) = x.

  x and f f32[B, ...], sigma > 0 f32[B]. c_in and c_noise are those of `edm`, and

    c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)
    c_out = (sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2)

  With sigma_min = 0 this is `edm`. locuslab/ect has 0 in training, 0.003 in sampling.

  Raises: ValueError unless sigma_data > 0, sigma_min >= 0 and the network has one time.

  Source: Song et al. 2023, appendix C.
  """
  _check_num_times(network, 1)
  checks.positive(sigma_data=sigma_data)
  checks.not_negative(sigma_min=sigma_min)

  def model(params, x, sigma, cond, *, key=None) -> Array:
    s = expand(sigma, x)
    norm = jnp.sqrt(s**2 + sigma_data**2)  # 1 / c_in
    c_skip = sigma_data**2 / ((s - sigma_min) ** 2 + sigma_data**2)
    c_out = (s - sigma_min) * sigma_data / norm
    c_noise = jnp.log(sigma) / 4
    raw = network.apply(params, x / norm, c_noise, cond, key=key)
    return c_skip * x + c_out * raw.astype(x.dtype)

  return model


@dataclasses.dataclass(frozen=True)
class TrigFlow:
  """f(x, t) = cos t x - sin t sigma_data F(x / sigma_data, t), with f(x, 0) = x.

  t is the angle of the TrigFlow process; calls take x and sigma of the VE process.

  Source: Lu & Song 2024 (sCM), eq. (4).
  """

  network: Network
  sigma_data: float

  @property
  def process(self) -> Process:
    """The TrigFlow process of the network, t in [0, pi / 2]."""
    return trigflow_process(self.sigma_data)

  def raw(
    self, params: Params, x: Array, t: Array, cond: Array | None, *, key: Key | None
  ) -> Array:
    """F f32[B, ...] at x_t / sigma_data f32[B, ...] and angles t f32[B]."""
    return self.network.apply(params, x, t, cond, key=key).astype(x.dtype)

  def __call__(self, params, x, sigma, cond, /, *, key=None) -> Array:
    """f f32[B, ...] at x f32[B, ...] of the VE process and sigma f32[B]."""
    x, t = change_process(VE, self.process, x, sigma)
    v = self.sigma_data * self.raw(params, x / self.sigma_data, t, cond, key=key)
    return expand(jnp.cos(t), x) * x - expand(jnp.sin(t), x) * v


def trigflow(network: Network, *, sigma_data: float = 0.5) -> Model:
  """A `TrigFlow` model: both a denoiser and a consistency function.

  Raises: ValueError unless sigma_data > 0 and the network has one time.

  Source: Lu & Song 2024 (sCM), section 3.1, with c_noise(t) = t.
  """
  _check_num_times(network, 1)
  checks.positive(sigma_data=sigma_data)
  return TrigFlow(network, sigma_data)


@dataclasses.dataclass(frozen=True)
class TwoTime:
  """The flow map from t to r of the linear process, x - (t - r) u(x, t, r).

  Calls take x and sigma of the VE process.

  Source: Geng et al. 2025 (MeanFlow), eq. (12).
  """

  network: Network

  def average_velocity(
    self,
    params: Params,
    x: Array,
    t: Array,
    r: Array,
    cond: Array | None,
    *,
    key: Key | None = None,
  ) -> Array:
    """u f32[B, ...] at x f32[B, ...] and r <= t, both f32[B], of the linear process."""
    c_noise = jnp.stack([t, t - r], axis=1)
    return self.network.apply(params, x, c_noise, cond, key=key).astype(x.dtype)

  def move(
    self,
    params: Params,
    x: Array,
    sigma: Array,
    sigma_end: Array,
    cond: Array | None,
    *,
    key: Key | None = None,
  ) -> Array:
    """x at sigma -> x at sigma_end on the VE process: f32[B, ...], sigmas f32[B]."""
    x, t = change_process(VE, LINEAR, x, sigma)
    r = LINEAR.time_of(sigma_end)
    x_r = x - expand(t - r, x) * self.average_velocity(params, x, t, r, cond, key=key)
    return change_process(LINEAR, VE, x_r, r)[0]

  def __call__(self, params, x, sigma, cond, /, *, key=None) -> Array:
    """f f32[B, ...] at x f32[B, ...] of the VE process and sigma f32[B]."""
    return self.move(params, x, sigma, jnp.zeros_like(sigma), cond, key=key)


def two_time(network: Network) -> Model:
  """A `TwoTime` model, whose network is called with t and t - r.

  Raises: ValueError unless the network has two times.

  Source: Geng et al. 2025 (MeanFlow), section 4.3.
  """
  _check_num_times(network, 2)
  return TwoTime(network)


def _check_num_times(network: Network, num_times: int) -> None:
  if network.num_times != num_times:
    raise ValueError(
      f'needs a network with num_times={num_times}, got num_times={network.num_times}'
    )
