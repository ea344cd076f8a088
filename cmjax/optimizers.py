"""Optimisers that optax does not have, as optax transformations."""

import jax
import jax.numpy as jnp
import optax


def unit_weights(
  *, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`optimizer`, and after each update every weight back at unit magnitude.

  For `networks.edm2`: a parameter is a weight if it is called `weight`; each of its
  output channels, on the last axis, is divided by its root mean square.

  Source: Karras et al. 2024 (EDM2), eq. (66), forced weight normalisation.
  Differs: after the update, not before the next evaluation, so that a network is a pure
    function; the first weights are normalised by the first update.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('unit_weights needs the parameters: tx.update(..., params)')
    updates, state = optimizer.update(updates, state, params)

    def back(path, p, u):
      return _unit(p + u) - p if path[-1].key == 'weight' else u

    return jax.tree.map_with_path(back, params, updates), state

  return optax.GradientTransformation(optimizer.init, update)


def _unit(weight):
  axis = tuple(range(weight.ndim - 1))
  return weight / (1e-4 + jnp.sqrt(jnp.mean(weight**2, axis=axis, keepdims=True)))
