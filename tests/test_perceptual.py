"""LPIPS and Inception: against the reference code, and where that has no derivative."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from cmjax import distances
from cmjax.core import UserError
from cmjax.networks import inception, lpips, resizing
from cmjax.port import vision
from tests.conftest import ROOT

GOLDEN = ROOT / 'tests' / 'golden'


def drawn(name, shape):
  """The weights of the goldens: random, from a name and shape, so none are stored."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.startswith('lin') or name.endswith('running_var') or '.bn.weight' in name:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  scale = 0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def vgg16_tensors():
  shapes, last = {}, 3
  indices = iter((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
  for depth, channels in lpips.VGG16:
    for _ in range(depth):
      i = next(indices)
      shapes[f'features.{i}.weight'] = (channels, last, 3, 3)
      shapes[f'features.{i}.bias'] = (channels,)
      last = channels
  return {name: drawn(name, shape) for name, shape in shapes.items()}


def heads_tensors():
  names = {f'lin{i}.model.1.weight': c for i, (_, c) in enumerate(lpips.VGG16)}
  return {name: drawn(name, (1, c, 1, 1)) for name, c in names.items()}


def inception_tensors():
  leaves = {
    'kernel': 'conv.weight',
    'scale': 'bn.weight',
    'bias': 'bn.bias',
    'mean': 'bn.running_mean',
    'var': 'bn.running_var',
  }
  tensors = {'fc.weight': drawn('fc.weight', (1008, 2048))}
  like = jax.eval_shape(inception.init, jax.random.key(0))
  del like['fc']
  for path, leaf in jax.tree_util.tree_leaves_with_path(like):
    *layers, kind = (key.key for key in path)
    name = '.'.join([*(layer for layer in layers if layer != 'conv'), leaves[kind]])
    shape = leaf.shape if leaf.ndim == 1 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
    tensors[name] = drawn(name, shape)
  return tensors


@pytest.fixture(scope='module')
def params():
  return {
    'vgg16': vision.vgg16_params(vgg16_tensors()),
    'heads': vision.heads_params(heads_tensors()),
  }


@pytest.fixture
def narrow(monkeypatch):
  """Random parameters of a small network, with positive heads."""
  stages = ((1, 4), (1, 6), (2, 8), (1, 8), (1, 8))
  monkeypatch.setattr(lpips, 'VGG16', stages)
  rng = np.random.default_rng(0)

  def fill(leaf):
    scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim == 4 else 0.1
    return np.float32(scale * rng.standard_normal(leaf.shape))

  # Not `init` itself, whose trace for the full size jax remembers.
  like = jax.eval_shape(lambda key: lpips.init(key), jax.random.key(0))
  params = jax.tree.map(fill, like)
  return params | {'heads': jax.tree.map(np.abs, params['heads'])}


@pytest.fixture(scope='module')
def tensors():
  return inception_tensors()


@pytest.fixture(scope='module')
def inception_features(tensors):
  compiled = jax.jit(inception.inception, static_argnames='resize')
  weights = vision.inception_params(tensors)
  return lambda images, **how: compiled(weights, images, **how)


@pytest.fixture(scope='module')
def golden():
  return {
    name: dict(np.load(GOLDEN / f'{name}.npz')) for name in ('lpips', 'inception')
  }


def in_range(images, dtype=jnp.float32):
  return jnp.asarray(images / 127.5 - 1, dtype)


def noise(seed, shape=(1, 16, 16, 3)):
  return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


def relative(a, b):
  return np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))


# Against the reference ------------------------------------------------------------


@pytest.mark.parametrize('pooling', ['max', 'average'])
@pytest.mark.parametrize(
  ('case', 'resize'), [('even', 0), ('odd', 0), ('resized', 224)]
)
def test_lpips_is_that_of_the_reference(params, golden, case, resize, pooling):
  g = golden['lpips']
  measure = jax.jit(lpips.lpips(pooling=pooling, resize=resize).measure)
  found = measure(params, in_range(g[f'{case}.a']), in_range(g[f'{case}.b']))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, g[f'{case}.{pooling}'], rtol=1e-6)


def test_the_poolings_differ(golden):
  for case in ('even', 'odd', 'resized'):
    g = golden['lpips']
    assert np.all(np.abs(g[f'{case}.max'] / g[f'{case}.average'] - 1) > 0.01)


def test_the_gradient_of_lpips_is_that_of_the_reference(params, golden, x64):
  g = golden['lpips']  # in float64, as rounding moves kinks
  a, b = (in_range(g[f'resized.{side}'], jnp.float64) for side in 'ab')
  measure = lpips.lpips(resize=0).measure

  def value(a, b, params):
    return jnp.sum(measure(params, a, b))

  found = jax.jit(jax.grad(value))(a, b, params)
  assert found.dtype == jnp.float64
  assert relative(found, g['gradient']) < 1e-6


def images_of(case, g):
  """Of the large images a tile is stored."""
  if case == 'large':
    return np.tile(g['large.tile'], (1, 8, 7, 1))
  return g['small.images']


@pytest.mark.parametrize('case', ['small', 'large'])
def test_inception_is_that_of_the_reference(inception_features, golden, case):
  g = golden['inception']
  found = inception_features(images_of(case, g))
  for name, value in found._asdict().items():
    assert value.dtype == jnp.float32
    assert value.shape == g[f'{case}.{name}'].shape
    assert relative(value, g[f'{case}.{name}']) < 1e-5


def test_inception_resizes_as_its_own_graph(tensors, golden):
  # The reference has no scale in its normalisation.
  ones = {n: np.ones_like(x) for n, x in tensors.items() if n.endswith('bn.weight')}
  weights = vision.inception_params(tensors | ones)
  images = golden['inception']['small.images']
  compiled = jax.jit(inception.inception, static_argnames='resize')
  found = compiled(weights, images, resize='tensorflow1')
  for name, value in found._asdict().items():
    assert relative(value, golden['inception'][f'tensorflow1.{name}']) < 1e-5


def test_inception_keeps_images_apart_whatever_their_dtype(inception_features, golden):
  images = golden['inception']['small.images']
  two = inception_features(np.concatenate([255 - images, images]).astype(np.float32))
  for alone, both in zip(inception_features(images), two):
    assert relative(both[1:], np.asarray(alone)) < 1e-5
    assert relative(both[:1], np.asarray(alone)) > 0.01


def test_mean_pooling_does_not_count_what_lies_outside():
  ones = inception._mean_pool(jnp.ones((1, 5, 5, 1)))
  np.testing.assert_allclose(ones, 1.0, rtol=1e-6)


@pytest.mark.parametrize('size', [7, 30, 41])
def test_resize_is_that_of_jax(size):
  x = noise(0, (2, 13, 20, 3))
  expected = jax.image.resize(x, (2, size, size, 3), 'bilinear', antialias=False)
  found = resizing.bilinear(x, size)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_resize_of_tensorflow1():
  x = jnp.array([0.0, 1.0, 4.0])[None, :, None, None]
  found = resizing.bilinear(jnp.tile(x, (1, 1, 3, 1)), 6, half_pixel=False)
  np.testing.assert_allclose(found[0, :, 0, 0], [0, 0.5, 1, 2.5, 4, 4])


# Properties -----------------------------------------------------------------------


def test_lpips_is_zero_on_the_diagonal_symmetric_and_positive(narrow):
  a, b = noise(1, (2, 17, 19, 3)), noise(2, (2, 17, 19, 3))
  measure = jax.jit(lpips.lpips(resize=0).measure)
  np.testing.assert_allclose(measure(narrow, a, a), 0, atol=1e-11)
  forward, backward = measure(narrow, a, b), measure(narrow, b, a)
  np.testing.assert_allclose(forward, backward, rtol=1e-6)
  assert np.all(forward > 0)


def test_lpips_does_not_mix_images(narrow):
  a, b = noise(1, (3, 16, 16, 3)), noise(2, (3, 16, 16, 3))
  measure = jax.jit(lpips.lpips(resize=0).measure)
  before = measure(narrow, a, b)
  after = measure(narrow, a.at[1].set(0.3), b)
  np.testing.assert_allclose(before[::2], after[::2], rtol=1e-6)
  assert abs(before[1] - after[1]) > 1e-3


def test_lpips_resizes_only_smaller_images(narrow):
  a, b = noise(1, (1, 16, 40, 3)), noise(2, (1, 16, 40, 3))
  resized = jax.jit(lpips.lpips(resize=32).measure)(narrow, a, b)
  plain = jax.jit(lpips.lpips(resize=0).measure)
  expected = plain(narrow, *(resizing.bilinear(x, 32) for x in (a, b)))
  np.testing.assert_allclose(resized, expected, rtol=1e-6)
  unchanged = jax.jit(lpips.lpips(resize=16).measure)(narrow, a, b)
  np.testing.assert_allclose(unchanged, plain(narrow, a, b), rtol=1e-6)


def test_lpips_is_a_perceptual_distance_of_degree_two(narrow):
  distance = lpips.lpips(resize=0)
  assert (distance.degree, distance.perceptual) == (2, True)
  a, b = noise(1), noise(2)

  def both(params, a, b):
    given = distance.bind(params)
    return given(a, b), distances.limit_cotangent(given, a, b)

  value, cotangent = jax.jit(both)(narrow, a, b)
  assert value > 0
  assert np.all(np.isfinite(cotangent))
  assert np.any(cotangent != 0)


@functools.partial(jax.jit, static_argnames='pooling')
def derivatives(params, a, b, v, pooling):
  """Value, gradient, jvp, jvp of gradient and gradient of jvp."""

  def value(a):
    return jnp.sum(lpips.lpips(pooling=pooling, resize=0).measure(params, a, b))

  def slope(a):
    return jax.jvp(value, (a,), (v,))[1]

  gradient, bent = jax.jvp(jax.grad(value), (a,), (v,))
  return value(a), gradient, slope(a), bent, jax.grad(slope)(a)


@pytest.mark.parametrize('pooling', ['max', 'average'])
def test_derivatives_of_lpips_are_central_differences(narrow, pooling, x64):
  a, b, v = (noise(i, (1, 17, 16, 3)).astype(jnp.float64) for i in range(3))
  h = 1e-7
  at, after, before = (
    derivatives(narrow, a + step * v, b, v, pooling) for step in (0, h, -h)
  )
  np.testing.assert_allclose(at[2], (after[0] - before[0]) / (2 * h), rtol=1e-6)
  for hessian_v in at[3:]:
    assert relative(hessian_v, (after[1] - before[1]) / (2 * h)) < 1e-6


def dead(params, kind):
  """Parameters under which features are zero: of all stages, or from the third on."""
  if kind == 'all':
    return params | {'vgg16': jax.tree.map(np.zeros_like, params['vgg16'])}
  trunk = params['vgg16']
  layer = trunk['conv3_2'] | {'bias': np.full(8, -1e3, np.float32)}
  return params | {'vgg16': trunk | {'conv3_2': layer}}


@pytest.mark.parametrize('kind', ['all', 'third'])
def test_every_derivative_is_finite_where_features_are_zero(narrow, kind):
  found = derivatives(dead(narrow, kind), noise(1), noise(2), noise(3), 'max')
  assert all(np.all(np.isfinite(x)) for x in found)
  assert (kind == 'all') == all(np.all(x == 0) for x in found)


@pytest.mark.parametrize('pooling', ['max', 'average'])
def test_every_derivative_is_finite_where_images_are_equal_or_flat(narrow, pooling):
  for a in (noise(1), jnp.full((1, 16, 16, 3), jnp.float32(0.5))):
    found = derivatives(narrow, a, a, noise(3), pooling)
    for x in found[:3]:
      np.testing.assert_allclose(x, 0, atol=1e-6)  # both sides round on their own
    for x in found[3:]:
      assert np.all(np.isfinite(x))
      assert np.any(np.abs(x) > 1e-4)


@pytest.mark.parametrize('size', [0.0, 1e-30, 1e-20, 3e-13, 1e-11, 1e-6, 1.0])
def test_normalisation_is_finite_to_second_order(size):
  x, v, w = (size * noise(1, (8,)), *(noise(i, (8,)) for i in (2, 3)))

  def value(x):
    return jnp.sum(w * (lpips._unit_norm(x) - w) ** 2)

  gradient, bent = jax.jvp(jax.grad(value), (x,), (v,))
  bent_too = jax.grad(lambda x: jax.jvp(value, (x,), (v,))[1])(x)
  for found in (gradient, bent, bent_too):
    assert np.all(np.isfinite(found))
  wide = np.asarray(x, np.float64)
  expected = wide / (np.linalg.norm(wide) + 1e-10)
  np.testing.assert_allclose(lpips._unit_norm(x), expected, atol=1e-5)


def test_initial_parameters_are_those_of_the_files(params):
  initial = jax.eval_shape(lpips.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)


# What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('how', 'says'),
  [({'pooling': 'mean'}, 'pooling .*max, average'), ({'resize': -1}, 'resize .*-1')],
)
def test_lpips_refuses(how, says):
  with pytest.raises(ValueError, match=says):
    lpips.lpips(**how)


@pytest.mark.parametrize(
  ('a', 'b', 'says'),
  [
    (jnp.zeros((1, 15, 32, 3)), jnp.zeros((1, 15, 32, 3)), '16 x 16'),
    (jnp.zeros((1, 16, 16, 1)), jnp.zeros((1, 16, 16, 1)), r'\[B, H, W, 3\]'),
    (jnp.zeros((2, 16, 16, 3)), jnp.zeros((1, 16, 16, 3)), r'\[B, H, W, 3\]'),
    (*2 * [jnp.zeros((1, 16, 16, 3), jnp.uint8)], r'\[-1, 1\]'),
  ],
)
def test_lpips_refuses_images(a, b, says):
  with pytest.raises(ValueError, match=says):
    lpips.lpips(resize=0).measure({}, a, b)


def test_inception_refuses():
  with pytest.raises(ValueError, match='half_pixel, tensorflow1'):
    inception.inception({}, jnp.zeros((1, 8, 8, 3)), resize='bilinear')
  with pytest.raises(ValueError, match=r'\[B, H, W, 3\]'):
    inception.inception({}, jnp.zeros((8, 8, 3)))


PORTS = {
  'vgg16': (vision.vgg16_params, 'features.17.bias'),
  'heads': (vision.heads_params, 'lin3.model.1.weight'),
  'inception': (vision.inception_params, 'Mixed_7b.branch3x3_2a.bn.running_var'),
}


@pytest.fixture(params=PORTS)
def ported(request, tensors):
  make = {'vgg16': vgg16_tensors, 'heads': heads_tensors, 'inception': lambda: tensors}
  return *PORTS[request.param], make[request.param]()


def test_a_missing_tensor_is_named(ported):
  port, name, tensors = ported
  with pytest.raises(UserError, match=f'missing.* {name}$'):
    port({n: x for n, x in tensors.items() if n != name})


def test_an_unknown_tensor_is_named(ported):
  port, _, tensors = ported
  with pytest.raises(UserError, match=r'unknown tensors: features\.99\.weight$'):
    port(tensors | {'features.99.weight': np.zeros(3)})


@pytest.mark.parametrize('shape', [(3,), (), (2, 3, 4)])
def test_a_tensor_of_another_shape_is_named(ported, shape):
  port, name, tensors = ported
  with pytest.raises(UserError, match=f'{name} has the shape'):
    port(tensors | {name: np.zeros(shape)})


def test_known_parts_are_left_unread(tensors):
  vision.vgg16_params(
    vgg16_tensors() | {'classifier.0.weight': np.zeros((4096, 25088))}
  )
  unread = ('fc.bias', 'AuxLogits.fc.bias', 'Mixed_6e.branch1x1.bn.num_batches_tracked')
  vision.inception_params(tensors | {name: np.zeros(()) for name in unread})


def test_an_absent_file_says_what_to_download(tmp_path):
  missing, trunk = str(tmp_path / 'missing'), str(tmp_path / 'trunk')
  with pytest.raises(UserError, match=r'vgg16-397923af\.pth from torchvision'):
    vision.load_lpips(missing, missing)
  with pytest.raises(UserError, match=r'pt_inception-2015-12-05-6726825d\.pth from'):
    vision.load_inception(missing)
  safetensors.save_file(vgg16_tensors(), trunk)
  with pytest.raises(UserError, match=r'vgg\.pth from the lpips package'):
    vision.load_lpips(trunk, missing)


def test_a_released_file_that_is_damaged_is_refused(tmp_path):
  for name in (vision.VGG16_FILE, vision.INCEPTION_FILE):
    (tmp_path / name).write_bytes(b'half of it')
  with pytest.raises(UserError, match='damaged'):
    vision.load_lpips(str(tmp_path / vision.VGG16_FILE), '')
  with pytest.raises(UserError, match='damaged'):
    vision.load_inception(str(tmp_path / vision.INCEPTION_FILE))


def test_files_are_loaded(tmp_path, params):
  trunk, heads = str(tmp_path / 'trunk'), str(tmp_path / 'heads')
  safetensors.save_file(vgg16_tensors(), trunk)
  safetensors.save_file(heads_tensors(), heads)
  loaded = vision.load_lpips(trunk, heads)
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
