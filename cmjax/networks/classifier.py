"""A small classifier of images, whose features serve where Inception does not apply."""

from typing import cast

import flax.linen as nn
import jax.numpy as jnp

from cmjax.core import Array, Key, Params

NUM_FEATURES = 128
MIN_SIZE = 8  # pixels: a side is halved twice


class _Classifier(nn.Module):
  """f32[B, H, W, C] in [-1, 1] -> pooled features and logits."""

  classes: int

  @nn.compact
  def __call__(self, x):
    for i, channels in enumerate((32, 64, NUM_FEATURES)):
      x = nn.Conv(channels, (3, 3), strides=1 if i == 0 else 2, name=f'conv_{i}')(x)
      x = nn.silu(nn.GroupNorm(num_groups=8, name=f'norm_{i}')(x))
    # A mean alone would not see where a stroke is.
    x = jnp.reshape(nn.avg_pool(x, (2, 2), (2, 2)), (len(x), -1))
    pool = nn.silu(nn.Dense(NUM_FEATURES, name='pool')(x))
    return {'pool': pool, 'logits': nn.Dense(self.classes, name='logits')(pool)}


def classifier(params: Params, images: Array) -> dict[str, Array]:
  """Images f32[B, H, W, C] in [0, 255] -> pool f32[B, 128] and logits f32[B, classes].

  `params` has the structure of `init`.
  """
  classes = params['logits']['bias'].shape[0]
  found = _Classifier(classes).apply({'params': params}, images / 127.5 - 1)
  return cast(dict[str, Array], found)


def init(key: Key, shape: tuple[int, int, int], classes: int) -> Params:
  """Random parameters for images of a shape [H, W, C], each side at least 8."""
  return _Classifier(classes).init(key, jnp.zeros((1, *shape)))['params']
