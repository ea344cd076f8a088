"""Preconditioning: from a raw network F to a denoiser D or a consistency function f.

Every model is called on the variance-exploding process, x = x0 + t z, whatever process
it was trained on: so all samplers, teachers and oracles fit all models. Everything here
is float32; the network computes in its own dtype inside.
"""

from typing import NamedTuple

import jax.numpy as jnp

from cmjax import checks
from cmjax import process as processes
from cmjax.core import Array, Key, Model, Network, Params, expand


def edm(network: Network, *, sigma_data: float = 0.5) -> Model:
  """D(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4): x and D f32[B, ...], t > 0 f32[B].

  Raises: ValueError unless sigma_data > 0, or for a network of more than one clock.

  Source: Karras et al. 2022 (EDM), table 1.
  """
  return consistency(network, sigma_data=sigma_data, sigma_min=0.0)


def consistency(
  network: Network, *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Model:
  """f(x, t) with f(x, sigma_min) = x exactly: x and f f32[B, ...], t > 0 f32[B].

  Raises: ValueError unless sigma_data > 0 and sigma_min >= 0, or for a network of more
    than one clock.

  Source: Song et al. 2023, appendix C: c_skip and c_out of EDM moved by sigma_min,
  except for the root in c_out. With sigma_min = 0 it is EDM's denoiser. locuslab/ect
  trains with 0 and samples with 0.003.
  """
  _check_clocks(network, 1)
  checks.positive(sigma_data=sigma_data)
  checks.not_negative(sigma_min=sigma_min)

  def model(params, x, t, cond, *, key=None) -> Array:
    t = expand(t, x)
    norm = jnp.sqrt(t**2 + sigma_data**2)
    c_skip = sigma_data**2 / ((t - sigma_min) ** 2 + sigma_data**2)
    c_out = (t - sigma_min) * sigma_data / norm
    c_noise = jnp.log(jnp.reshape(t, (-1,))) / 4
    raw = network.apply(params, x / norm, c_noise, cond, key=key)
    return c_skip * x + c_out * raw.astype(x.dtype)

  return model


class TrigFlow(NamedTuple):
  """f(x, t) = cos t x - sin t sigma_data F(x / sigma_data, t), with f(x, 0) = x.

  Source: Lu & Song 2024 (sCM), eq. (4).
  """

  network: Network
  sigma_data: float

  @property
  def process(self) -> processes.Process:
    """The process of the network's own clock, an angle in [0, pi / 2]."""
    return processes.trigflow(self.sigma_data)

  def raw(
    self, params: Params, x: Array, t: Array, cond: Array | None, *, key: Key | None
  ) -> Array:
    """F f32[B, ...] at x f32[B, ...] already divided by sigma_data, angles t f32[B]."""
    return self.network.apply(params, x, t, cond, key=key).astype(x.dtype)

  def __call__(self, params, x, t, cond, *, key=None) -> Array:
    """f f32[B, ...] at x f32[B, ...] of the VE process at noise levels t f32[B]."""
    x, t = processes.change_clock(processes.VE, self.process, x, t)
    v = self.sigma_data * self.raw(params, x / self.sigma_data, t, cond, key=key)
    return expand(jnp.cos(t), x) * x - expand(jnp.sin(t), x) * v


def trigflow(network: Network, *, sigma_data: float = 0.5) -> Model:
  """A `TrigFlow` model: denoiser and consistency function in one form.

  Raises: ValueError unless sigma_data > 0, or for a network of more than one clock.

  Source: Lu & Song 2024 (sCM), section 3.1, with c_noise(t) = t.
  """
  _check_clocks(network, 1)
  checks.positive(sigma_data=sigma_data)
  return TrigFlow(network, sigma_data)


class TwoTime(NamedTuple):
  """The flow map from t to r of the linear process, x - (t - r) u(x, t, r).

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
    """u f32[B, ...] at x f32[B, ...] and t, r f32[B] of the linear process, r <= t."""
    clocks = jnp.stack([t, t - r], axis=1)
    return self.network.apply(params, x, clocks, cond, key=key).astype(x.dtype)

  def move(
    self,
    params: Params,
    x: Array,
    t: Array,
    s: Array,
    cond: Array | None,
    *,
    key: Key | None = None,
  ) -> Array:
    """x f32[B, ...] of the VE process at t f32[B] -> the same path at s f32[B]."""
    x, t = processes.change_clock(processes.VE, processes.LINEAR, x, t)
    s = processes.LINEAR.time_of(s)
    moved = x - expand(t - s, x) * self.average_velocity(params, x, t, s, cond, key=key)
    return processes.change_clock(processes.LINEAR, processes.VE, moved, s)[0]

  def __call__(self, params, x, t, cond, *, key=None) -> Array:
    """f f32[B, ...] at x f32[B, ...] of the VE process at noise levels t f32[B]."""
    return self.move(params, x, t, jnp.zeros_like(t), cond, key=key)


def two_time(network: Network) -> Model:
  """A `TwoTime` model. Raises: ValueError unless the network has two clocks.

  Source: Geng et al. 2025 (MeanFlow), whose network is given t and t - r.
  """
  _check_clocks(network, 2)
  return TwoTime(network)


def _check_clocks(network: Network, clocks: int) -> None:
  if network.clocks != clocks:
    raise ValueError(
      f'needs a network of {clocks} time(s), got {network.clocks}; '
      f'set config.network.clocks={clocks}'
    )
