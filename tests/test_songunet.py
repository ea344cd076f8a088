"""The DDPM++ U-Net against the published architecture, by its parameter shapes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.networks import embeddings, songunet, unet


def shapes(net, resolution, classes=None):
  """Parameter shapes, by abstract evaluation."""
  x = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
  c_noise = jax.ShapeDtypeStruct((1,), jnp.float32)
  cond = None if classes is None else jax.ShapeDtypeStruct((1, classes), jnp.float32)
  return jax.eval_shape(net.init, jax.random.key(0), x, c_noise, cond)


def count(params):
  return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


@pytest.fixture(scope='module')
def cifar10():
  return shapes(songunet.songunet(), 32)


def test_cifar10_network_has_the_published_parameters(cifar10):
  assert count(cifar10) == 55_732_739
  assert len(jax.tree.leaves(cifar10)) == 416


def test_cifar10_network_has_the_published_blocks(cifar10):
  encoder = [
    'enc_32x32_conv',
    *(f'enc_32x32_block{i}' for i in range(4)),
    'enc_16x16_down',
    *(f'enc_16x16_block{i}' for i in range(4)),
    'enc_8x8_down',
    *(f'enc_8x8_block{i}' for i in range(4)),
  ]
  decoder = [
    'dec_8x8_in0',
    'dec_8x8_in1',
    *(f'dec_8x8_block{i}' for i in range(5)),
    'dec_16x16_up',
    *(f'dec_16x16_block{i}' for i in range(5)),
    'dec_32x32_up',
    *(f'dec_32x32_block{i}' for i in range(5)),
    'dec_32x32_aux_norm',
    'dec_32x32_aux_conv',
  ]
  assert set(cifar10) == {'map_layer0', 'map_layer1', *encoder, *decoder}
  attending = {name for name in cifar10 if 'qkv' in cifar10[name]}
  assert attending == {
    *(f'enc_16x16_block{i}' for i in range(4)),
    'dec_8x8_in0',
    'dec_16x16_block4',
  }
  kernels = {
    name: cifar10[name]['conv0']['kernel'].shape for name in cifar10 if 'block' in name
  }
  assert kernels['enc_32x32_block0'] == (3, 3, 128, 256)
  assert kernels['dec_32x32_block3'] == (3, 3, 512, 256)
  assert kernels['dec_32x32_block4'] == (3, 3, 384, 256)


def test_a_label_adds_its_embedding_and_nothing_else(cifar10):
  labelled = shapes(songunet.songunet(), 32, classes=10)
  assert count(labelled) - count(cifar10) == 1_408
  assert count(labelled.pop('map_label')) == 1_408  # 128 * 10 weights, 128 biases
  assert jax.tree.map(lambda p: p.shape, labelled) == jax.tree.map(
    lambda p: p.shape, cifar10
  )


def test_network_of_64_pixels_has_the_published_parameters():
  net = songunet.songunet(channel_mult=(1, 2, 2, 2))
  assert count(shapes(net, 64)) == 61_804_419


@pytest.mark.parametrize('size', [(31, 32), (32, 30), (33, 33)])
def test_sizes_that_cannot_be_halved_are_refused(size):
  net = songunet.songunet(channels=8)
  x = jnp.zeros((1, *size, 3))
  with pytest.raises(ValueError, match='multiples of 4'):
    jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), None)


@pytest.mark.parametrize('settings', [dict(channels=12), dict(channel_mult=())])
def test_invalid_widths_are_refused(settings):
  with pytest.raises(ValueError, match='^' + next(iter(settings))):
    songunet.songunet(**settings)


def test_initial_weights_have_their_published_scales():
  net = songunet.songunet(
    channels=32, channel_mult=(1,), num_blocks=1, attention_resolutions=()
  )
  scales = {'conv0': 1.0, 'conv1': 1e-5, 'qkv': 0.2**0.5, 'proj': 1e-5}

  @jax.jit
  def block_of(key):
    x = jnp.zeros((1, 4, 4, 3))
    block = net.init(key, x, jnp.zeros(1), None)['dec_4x4_in0']
    return {name: block[name] for name in scales}

  block = block_of(jax.random.key(0))
  for name, scale in scales.items():
    kernel = np.asarray(block[name]['kernel'])
    receptive = math.prod(kernel.shape[:-2])
    xavier = (6 / (receptive * sum(kernel.shape[-2:]))) ** 0.5  # uniform in +- this
    largest = np.max(np.abs(kernel)) / (scale * xavier)
    assert 0.98 < largest <= 1 + 1e-6  # the largest of a thousand uniform numbers
    assert np.all(np.asarray(block[name]['bias']) == 0)


def test_positional_embedding_is_sines_then_cosines_from_one_to_1e_4():
  c_noise = np.array([-1.55, 0.0, 1.09])
  frequencies = np.geomspace(1, 1e-4, 8)
  angles = c_noise[:, None] * frequencies[None]
  exact = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  found = embeddings.positional(jnp.asarray(c_noise, jnp.float32), 16)
  np.testing.assert_allclose(found, exact, atol=5e-7)  # float32


def test_positional_embedding_stays_above_bfloat16():
  c_noise = jnp.array([1.09], jnp.bfloat16)
  found = embeddings.positional(c_noise, 16)
  assert found.dtype == jnp.float32
  exact = embeddings.positional(c_noise.astype(jnp.float32), 16)
  np.testing.assert_array_equal(found, exact)


class Normed(nn.Module):
  """A group norm alone."""

  dtype: str

  @nn.compact
  def __call__(self, x):
    return unet.group_norm('norm', x, 1e-5, self.dtype)


@pytest.mark.parametrize('channels', [8, 96, 256])
def test_group_norm_is_flax_s_with_its_parameters(x64, channels):
  x = 3 + jax.random.normal(jax.random.key(0), (2, 4, 6, channels), jnp.float64)
  theirs = nn.GroupNorm(min(32, channels // 4), epsilon=1e-5, use_fast_variance=False)
  norm = Normed('float64')
  params = norm.init(jax.random.key(1), x)['params']
  shapes = jax.tree.map(jnp.shape, theirs.init(jax.random.key(1), x)['params'])
  assert jax.tree.map(jnp.shape, params) == {'norm': shapes}
  params = jax.tree.map(lambda p: p + jnp.sin(jnp.arange(1.0, 1 + p.size)), params)

  def value_and_cotangents(apply, params):
    y, pull = jax.vjp(apply, params, x)
    return y, *pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

  ours = value_and_cotangents(lambda p, x: norm.apply({'params': p}, x), params)
  expected = value_and_cotangents(
    lambda p, x: theirs.apply({'params': p['norm']}, x), params
  )
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    # Sums of at most 192 terms of order 1, in float64.
    np.testing.assert_allclose(a, b, atol=1e-10)


def test_group_norm_in_bfloat16_has_statistics_in_float32():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16)) + 100
  norm = Normed('bfloat16')
  params = norm.init(jax.random.key(1), x)
  fine = Normed('float32').apply(params, x)
  y = norm.apply(params, x)
  assert y.dtype == jnp.bfloat16
  assert np.abs(np.asarray(y, 'f4') - fine).max() < 2**-7  # half a unit at 2 to 4


def test_group_norm_refuses_channels_that_do_not_divide():
  with pytest.raises(ValueError, match='130 channels do not divide into 32 groups'):
    Normed('float32').init(jax.random.key(0), jnp.zeros((1, 2, 2, 130)))
