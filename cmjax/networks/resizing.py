"""Bilinear resizing of the images that feature networks take."""

import jax.numpy as jnp
import numpy as np

from cmjax.core import Array


def bilinear(x: Array, size: int, *, half_pixel: bool = True) -> Array:
  """f32[B, H, W, C] -> f32[B, size, size, C], without antialiasing.

  Pixel i is centred at i + 1/2 with `half_pixel`, else at i, as in TensorFlow 1.
  """
  # Not `jax.image`, which has float32 weights, off by up to 1e-5 at these sizes, and
  # gives zeros instead of the edge pixels under TensorFlow 1's alignment.
  rows, columns = (
    jnp.asarray(_weights(input_size, size, half_pixel), x.dtype)
    for input_size in x.shape[1:3]
  )
  return jnp.einsum('yh,xw,bhwc->byxc', rows, columns, x, precision='highest')


def _weights(input_size: int, output_size: int, half_pixel: bool) -> np.ndarray:
  offset = half_pixel / 2
  positions = (np.arange(output_size) + offset) * input_size / output_size - offset
  positions = np.clip(positions, 0, input_size - 1)
  distances = np.abs(positions[:, None] - np.arange(input_size)[None, :])
  return np.maximum(1 - distances, 0)
