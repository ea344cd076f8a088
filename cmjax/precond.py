"""Preconditioning: from a raw network F to a denoiser D or a consistency function f.

Everything here is float32; the network computes in its own dtype inside.
"""

import jax.numpy as jnp

from cmjax.core import Array, Model, Network, expand


def edm(network: Network, *, sigma_data: float = 0.5) -> Model:
  """D(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4): x and D f32[B, ...], t > 0 f32[B].

  Source: Karras et al. 2022 (EDM), table 1.
  """
  return consistency(network, sigma_data=sigma_data, sigma_min=0.0)


def consistency(
  network: Network, *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Model:
  """f(x, t) with f(x, sigma_min) = x exactly: x and f f32[B, ...], t > 0 f32[B].

  Source: Song et al. 2023, appendix C: c_skip and c_out of EDM moved by sigma_min,
  except for the root in c_out. With sigma_min = 0 it is EDM's denoiser. locuslab/ect
  trains with 0 and samples with 0.003.
  """

  def model(params, x, t, cond, *, key=None) -> Array:
    t = expand(t, x)
    norm = jnp.sqrt(t**2 + sigma_data**2)
    c_skip = sigma_data**2 / ((t - sigma_min) ** 2 + sigma_data**2)
    c_out = (t - sigma_min) * sigma_data / norm
    c_noise = jnp.log(jnp.reshape(t, (-1,))) / 4
    raw = network.apply(params, x / norm, c_noise, cond, key=key)
    return c_skip * x + c_out * raw.astype(x.dtype)

  return model
