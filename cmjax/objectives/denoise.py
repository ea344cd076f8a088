"""Diffusion training: regression on the data, whose minimiser is E[x0 | x_t].

The process is variance exploding, x_t = x0 + t z, so t is the noise level sigma.
"""

import jax.numpy as jnp

from cmjax.augmentation import Augmentation
from cmjax.core import Array, Loss, LossOut, Model, Nets, Noisy, drop_labels
from cmjax.distances import squared_l2
from cmjax.objectives.paths import draw_noise, perturb_batch
from cmjax.precond import EDM
from cmjax.process import VE
from cmjax.times import Times
from cmjax.weightings import Weighting
from cmjax.weightings import edm as edm_weighting


def denoising_loss(
  f: Model, nets: Nets, noisy: Noisy, x0: Array, *, weighting: Weighting
) -> LossOut:
  """w(t) |D(x_t, t) - x0|^2, x0 f32[B, ...].

  With a learned weighting u of the denoiser's network, for x0 of D features, it is
  e^u(t) w(t) |D(x_t, t) - x0|^2 / D - u(t).

  Source: Karras et al. 2022 (EDM), eq. (2); Karras et al. 2024 (EDM2), eq. (21), where
    u has the other sign, and the loss, which is D times as large, changes Adam only
    through its epsilon.
  """
  x_t, t, cond, key = noisy
  y = f(nets.online, x_t, t, cond, key=key)
  loss = weighting(t, t) * squared_l2()(y, x0)
  u = f.log_weight(nets.online, t) if isinstance(f, EDM) else None
  if u is not None:
    loss = jnp.exp(u) * loss / (x0.size / len(x0)) - u
  return LossOut(loss, {'sigma': t})


def edm(
  f: Model,
  *,
  times: Times,
  sigma_data: float = 0.5,
  label_dropout: float = 0.0,
  augmentation: Augmentation | None = None,
) -> Loss:
  """Denoising score matching with the weighting of EDM.

  The weighting is learned in addition if the network of `precond.edm` has a
  `log_weight`, as in EDM2.

  Labels are dropped with probability `label_dropout`, as guidance requires. The labels
  of an `augmentation` follow those of the classes as columns of cond. For a model of
  `precond.trigflow` this is the TrigFlow diffusion loss, up to a factor sigma_data^2.

  Raises: ValueError unless sigma_data > 0 and 0 <= label_dropout < 1, or if
    label_dropout > 0 and there are no labels.

  Source: Karras et al. 2022 (EDM), table 1; the sum over pixels as in NVlabs/edm.
  """
  if not 0 <= label_dropout < 1:
    raise ValueError(f'needs label_dropout in [0, 1), got {label_dropout}')
  weighting = edm_weighting(sigma_data=sigma_data)

  def loss(nets, batch, step, keys):
    t = times(keys['time'], len(batch.x0))
    z = draw_noise(keys, batch)
    cond = drop_labels(batch.cond, keys['label'], label_dropout)
    x0 = batch.x0
    if augmentation is not None:
      x0, labels = augmentation(keys['augmentation'], x0)
      cond = labels if cond is None else jnp.concatenate([cond, labels], axis=1)
    noisy = perturb_batch(VE, batch._replace(x0=x0, cond=cond), z, t, keys)
    return denoising_loss(f, nets, noisy, x0, weighting=weighting)

  return loss
