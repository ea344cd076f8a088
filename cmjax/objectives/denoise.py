"""Diffusion training: regress the posterior mean E[x0 | x_t]."""

import jax

from cmjax.core import Array, Key, Loss, LossOut, Model, Nets, drop_labels
from cmjax.distances import Weighting, edm_weighting, squared_l2
from cmjax.process import VE, point
from cmjax.times import Times


def denoising(
  f: Model,
  nets: Nets,
  x0: Array,
  z: Array,
  t: Array,
  cond: Array | None,
  key: Key | None,
  *,
  weighting: Weighting,
) -> LossOut:
  """w(t) |D(x0 + t z, t) - x0|^2 at given draws: x0, z f32[B, ...], t f32[B].

  Source: Karras et al. 2022 (EDM), eq. (2).
  """
  y = f(nets.online, point(VE, x0, z, t), t, cond, key=key)
  return LossOut(weighting(t, t) * squared_l2()(y, x0), {'t': t})


def edm(
  f: Model, *, times: Times, sigma_data: float = 0.5, label_dropout: float = 0.0
) -> Loss:
  """Denoising score matching with the EDM weight.

  A share `label_dropout` of the labels is dropped, for a teacher that is to be guided.
  For a `precond.trigflow` it is the TrigFlow diffusion loss, up to sigma_data^2.

  Raises: ValueError for a share outside [0, 1), or above zero without labels; unless
    sigma_data > 0.

  Source: Karras et al. 2022 (EDM), table 1; the sum over pixels as in NVlabs/edm.
  """
  if not 0 <= label_dropout < 1:
    raise ValueError(f'needs label_dropout in [0, 1), got {label_dropout}')
  weighting = edm_weighting(sigma_data=sigma_data)

  def loss(nets, batch, step, keys):
    t = times(keys['time'], len(batch.x0))
    z = jax.random.normal(keys['noise'], batch.x0.shape)
    cond = drop_labels(batch.cond, keys['label'], label_dropout)
    return denoising(
      f, nets, batch.x0, z, t, cond, keys['dropout'], weighting=weighting
    )

  return loss
