"""The weights and inputs of golden outputs, drawn from names instead of stored."""

import zlib

import numpy as np


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """f32 weights, from the name alone, that keep activations of order one."""
  draw = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith(('freqs', 'phases', 'Projection_0/W')):
    return (6 * draw.normal(size=shape)).astype(np.float32)
  if not shape:
    return np.float32(0.7)
  if len(shape) == 1:
    scale = 1.0 if name.endswith(('.weight', 'scale')) else 0.0
    return (scale + 0.1 * draw.normal(size=shape)).astype(np.float32)
  torch = '.' in name  # [out, in, ...]; flax has [..., in, out]
  fan_in = np.prod(shape[1:] if torch else shape[:-1])
  return (draw.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)


def inputs(size: int, channels: int, classes: int):
  """Noisy images f32[2, size, size, channels], noise levels, labels, one-hot labels."""
  draw = np.random.default_rng(size + classes)
  sigma = np.array([0.3, 7.0], np.float32)
  spread = np.sqrt(sigma**2 + 0.25)[:, None, None, None]
  x = (spread * draw.normal(size=(2, size, size, channels))).astype(np.float32)
  if not classes:
    return x, sigma, None, None
  labels = np.array([1, classes - 1])
  return x, sigma, labels, np.eye(classes, dtype=np.float32)[labels]
