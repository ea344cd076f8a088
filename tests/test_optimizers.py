"""Optimisers that optax does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmjax import optimizers
from cmjax.networks import edm2
from cmjax.runtime import build
from cmjax.runtime.config_record import ConfigDict


@pytest.fixture(scope='module')
def trained():
  """Parameters of an EDM2 network before and after three steps of Adam."""
  net = edm2.edm2(
    channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=4,
  )
  x, c_noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.zeros(2)
  first = jax.jit(lambda: net.init(jax.random.key(1), x, c_noise, None))()
  tx = optimizers.unit_weights(optimizer=optax.adam(1e-2))

  @jax.jit
  def step(params, state):
    gradient = jax.grad(lambda p: jnp.mean((net.apply(p, x, c_noise, None) - x) ** 2))
    updates, state = tx.update(gradient(params), state, params)
    return optax.apply_updates(params, updates), state

  params, state = first, tx.init(first)
  for _ in range(3):
    params, state = step(params, state)
  return first, params


def magnitudes(params):
  """The root mean square of each output channel of each weight, by its path."""
  return {
    jax.tree_util.keystr(path): np.sqrt(np.mean(w**2, axis=tuple(range(w.ndim - 1))))
    for path, w in jax.tree.leaves_with_path(params)
    if path[-1].key == 'weight'
  }


def test_every_weight_has_unit_magnitude_after_an_update(trained):
  first, params = trained
  found = magnitudes(params)
  assert len(found) > 20
  for path, rms in found.items():
    np.testing.assert_allclose(rms, 1.0, atol=2e-4, err_msg=path)  # the floor, 1e-4
  assert any(np.any(np.abs(rms - 1) > 0.05) for rms in magnitudes(first).values())


def test_gains_are_left_to_the_optimiser(trained):
  first, params = trained
  assert first['out_gain'] == 0
  assert params['out_gain'] != 0
  np.testing.assert_array_equal(
    params['emb_fourier_freqs'], first['emb_fourier_freqs']
  )  # a constant of the network: its gradient is zero


def test_a_config_can_name_unit_weights():
  part = dict(
    fn='cmjax.optimizers:unit_weights',
    optimizer=dict(fn='optax:sgd', learning_rate=1.0),
  )
  tx = build.build(ConfigDict(part), 'config.optimizer')
  params = {'weight': jnp.full((4, 2), 3.0), 'bias': jnp.ones(2)}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  moved = optax.apply_updates(params, updates)
  np.testing.assert_allclose(moved['weight'], np.ones((4, 2)), atol=2e-4)
  np.testing.assert_array_equal(moved['bias'], params['bias'])


def test_unit_weights_needs_params():
  tx = optimizers.unit_weights(optimizer=optax.sgd(1.0))
  with pytest.raises(ValueError, match='needs params'):
    tx.update({'weight': jnp.ones((2, 2))}, tx.init({'weight': jnp.ones((2, 2))}))
