"""Key streams and the two shape helpers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core


def bits(keys):
  return {name: tuple(np.asarray(jax.random.key_data(k))) for name, k in keys.items()}


def test_streams_differ_by_name_step_and_root():
  seen = [
    value
    for seed, step in itertools.product(range(3), range(4))
    for value in bits(core.streams(jax.random.key(seed), step)).values()
  ]
  assert len(set(seen)) == len(seen) == 3 * 4 * len(core.STREAMS)


def test_streams_are_equal_for_equal_step_traced_or_not():
  plain = core.streams(jax.random.key(0), 5)
  traced = jax.jit(core.streams)(jax.random.key(0), jnp.int32(5))
  assert set(plain) == {'time', 'noise', 'dropout', 'label'}
  assert bits(plain) == bits(traced) == bits(core.streams(jax.random.key(0), 5))


@pytest.mark.parametrize('shape', [(3,), (3, 2), (3, 4, 4, 1)])
def test_expand_gives_every_example_its_own_number(shape):
  t, x = jnp.arange(3.0), jnp.ones(shape)
  out = core.expand(t, x)
  assert out.shape == (3,) + (1,) * (len(shape) - 1)
  for i, row in enumerate(np.asarray(out * x)):
    np.testing.assert_array_equal(row, np.full(shape[1:], i))


@pytest.mark.parametrize('shape', [(3,), (3, 2), (3, 4, 5, 2)])
def test_sum_features_sums_all_but_the_first_axis(shape):
  x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  # Sums of small integers are exact in float32.
  np.testing.assert_array_equal(
    core.sum_features(jnp.asarray(x)), x.reshape(3, -1).sum(1)
  )
