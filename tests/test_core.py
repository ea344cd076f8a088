"""Random keys, dropped labels, and shape functions."""

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
  assert set(plain) == {'time', 'noise', 'dropout', 'label', 'augmentation'}
  assert bits(plain) == bits(traced) == bits(core.streams(jax.random.key(0), 5))


def test_labels_are_dropped_in_the_given_fraction_of_the_rows():
  n, fraction = 10_000, 0.3
  cond = jnp.tile(jnp.eye(4), (n // 4, 1))
  found = core.drop_labels(cond, jax.random.key(0), fraction)
  dropped = np.all(np.asarray(found) == 0, axis=1)
  np.testing.assert_array_equal(found[~dropped], cond[~dropped])  # whole rows or none
  # Binomial, 4.5 standard deviations; and no label more than another.
  assert abs(dropped.sum() - fraction * n) < 4.5 * np.sqrt(
    n * fraction * (1 - fraction)
  )
  each = dropped.reshape(-1, 4).sum(axis=0)
  assert np.all(np.abs(each - fraction * n / 4) < 4.5 * np.sqrt(n / 4 * fraction * 0.7))
  again = core.drop_labels(cond, jax.random.key(0), fraction)
  np.testing.assert_array_equal(found, again)


def test_no_label_is_dropped_for_fraction_zero():
  cond = jnp.eye(3)
  assert core.drop_labels(cond, jax.random.key(0), 0) is cond
  assert core.drop_labels(None, jax.random.key(0), 0.0) is None


def test_dropping_labels_needs_labels():
  with pytest.raises(ValueError, match=r'label_dropout=0\.1 needs labels'):
    core.drop_labels(None, jax.random.key(0), 0.1)


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
