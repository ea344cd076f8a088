"""Optimisers that optax lacks, as optax gradient transformations."""

import jax
import jax.numpy as jnp
import optax


def unit_weights(
  *, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`optimizer` with EDM2's forced weight normalisation after each update.

  Every parameter named `weight` is divided by its root mean square over all axes but
  the last, the output channels.

  Source: Karras et al. 2024 (EDM2), eq. (66).
  Differs: EDM2 normalises in the forward pass of training; here it follows the update,
    so that networks are pure functions. Initial weights are normalised by the first
    update.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('unit_weights needs params: call update(updates, state, params)')
    updates, state = optimizer.update(updates, state, params)

    def normalise(path, p, u):
      return _unit(p + u) - p if path[-1].key == 'weight' else u

    return jax.tree.map_with_path(normalise, params, updates), state

  return optax.GradientTransformation(optimizer.init, update)


def _unit(weight):
  axis = tuple(range(weight.ndim - 1))
  return weight / (1e-4 + jnp.sqrt(jnp.mean(weight**2, axis=axis, keepdims=True)))
