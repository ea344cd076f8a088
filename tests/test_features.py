"""Measures in the features of a network: values, names, references and refusals."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from cmjax.core import UserError
from cmjax.data import digits
from cmjax.data.source import as_x0, image_source
from cmjax.metrics import features, kernel, manifold
from cmjax.metrics.feature_network import FeatureNetwork, quantised, value_name
from cmjax.metrics.features import MEASURES, distances
from cmjax.metrics.frechet import frechet_distance
from cmjax.metrics.inception_score import inception_score
from cmjax.metrics.metric import Metric
from cmjax.metrics.reference import Statistics
from cmjax.networks import classifier, inception
from cmjax.port import vision
from cmjax.runtime import build
from cmjax.runtime import classifier as fitting

LIMITS = (-1.0, 1.0)
SMALL = dict(num_subsets=5, subset_size=8, split_size=10)


def network(name='toy', outputs=('pool', 'spatial', 'logits'), **more):
  """Linear features of images [4, 4, 3]."""
  params = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)

  def apply(params, images):
    pool = jnp.reshape(images, (len(images), -1)) @ params / 255
    found = {'pool': pool, 'spatial': images[..., :2] / 255, 'logits': pool[:, :4]}
    return {key: found[key] for key in outputs}

  return FeatureNetwork(name, params, apply, (4, 4, 3), **more)


def images(n, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)


def batches(metric, stored, size=7):
  """Features of images u8[N, H, W, C], as the caller of a metric computes them."""
  x = as_x0(image_source('', stored, None, 0, False), stored)
  compiled = jax.jit(metric.features)
  return [
    {
      k: np.asarray(v)
      for k, v in compiled(metric.params, x[i : i + size], None).items()
    }
    for i in range(0, len(x), size)
  ]


def whole(parts, output='pool'):
  return np.concatenate([batch[output] for batch in parts])


# Quantisation ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ('rule', 'expected'),
  [
    ('round', lambda x: np.rint(127.5 * x + 127.5)),
    ('edm', lambda x: np.floor(127.5 * x + 128)),
    ('truncate', lambda x: np.floor(127.5 * (x + 1))),
    ('float', lambda x: 127.5 * x + 127.5),
  ],
)
def test_quantisation_is_its_formula(rule, expected):
  x = np.random.default_rng(0).uniform(-1.2, 1.2, 1000)
  found = np.asarray(quantised(jnp.asarray(x, jnp.float32), LIMITS, rule))
  exact = np.clip(expected(x), 0, 255)
  # None of the draws is within 1e-4 of a step; float32 is exact to 3e-5 at 255.
  np.testing.assert_allclose(found, exact, atol=5e-5 if rule == 'float' else 0)
  assert np.any(exact != np.clip(np.rint(127.5 * x + 127.5), 0, 255)) == (
    rule in ('truncate', 'float')
  )


@pytest.mark.parametrize('rule', ['round', 'edm', 'truncate'])
def test_data_that_was_uint8_is_restored(rule):
  stored = np.arange(256).astype(np.uint8)[:, None, None, None]
  x = as_x0(image_source('', stored, None, 0, False), stored)
  found = jax.jit(lambda x: quantised(x, LIMITS, rule))(x)
  np.testing.assert_array_equal(found, stored)


def test_limits_map_to_0_and_255_and_nan_stays():
  x = jnp.array([-0.4, 0.1, 0.6, 9.0, jnp.nan])
  found = quantised(x, (-0.4, 0.6), 'float')
  np.testing.assert_allclose(found, [0, 127.5, 255, 255, np.nan], atol=1e-4)


# Values ---------------------------------------------------------------------------


def test_values_are_those_of_each_measure_on_all_features():
  metric = distances(network=network(), measures=tuple(MEASURES), **SMALL)
  samples, data = batches(metric, images(30)), batches(metric, images(25, seed=1), 6)
  found = metric.values(samples, data)
  a, b = whole(samples), whole(data)
  kid = kernel.kernel_distance(a, b, num_subsets=5, subset_size=8)
  score = inception_score([whole(samples, 'logits')], split_size=10)
  spatial = frechet_distance(whole(samples, 'spatial'), whole(data, 'spatial'))
  expected = dict(
    toy_frechet=frechet_distance(a, b),
    toy_spatial_frechet=spatial,
    toy_kernel=kid[0],
    toy_kernel_std=kid[1],
    toy_score=score[0],
    toy_score_std=score[1],
    **{f'toy_{k}': v for k, v in manifold.precision_recall(a, b)._asdict().items()},
    **{f'toy_{k}': v for k, v in manifold.density_coverage(a, b)._asdict().items()},
  )
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert isinstance(found[name], float)
    # Merged moments differ by 1e-16, whose root matters where a covariance is singular.
    assert found[name] == pytest.approx(value, rel=1e-7)
  assert metric.values(samples, data) == found


def test_features_are_those_that_the_measures_need():
  parts = {
    ('frechet',): {'pool'},
    ('score', 'spatial_frechet'): {'logits', 'spatial'},
    ('precision_recall', 'kernel'): {'pool'},
  }
  for measures, outputs in parts.items():
    metric = distances(network=network(), measures=measures)
    assert batches(metric, images(2))[0].keys() == outputs


def test_only_inception_gives_an_fid():
  for name in ('inception', 'classifier'):
    metric = distances(network=network(name), measures=tuple(MEASURES), **SMALL)
    parts = batches(metric, images(20))
    names = set(metric.values(parts, parts))
    assert metric.conventions['features'] == name
    if name == 'inception':
      assert {'fid', 'sfid', 'kid', 'inception_score', 'precision'} < names
    else:
      assert all(key.startswith('classifier_') for key in names)
      assert not any('fid' in key or 'kid' in key for key in names)
  assert value_name('inception_v3', 'frechet') == 'inception_v3_frechet'


def test_covariance_rule_is_that_of_the_metric():
  a, b = images(6), images(9, seed=1)
  for rule in ('unbiased', 'biased'):
    metric = distances(network=network(), covariance=rule)
    samples, data = batches(metric, a), batches(metric, b)
    exact = frechet_distance(whole(samples), whole(data), covariance=rule)
    found = metric.values(samples, data)['toy_frechet']
    assert found == pytest.approx(exact, rel=1e-10)
    assert metric.conventions['covariance'] == rule


def test_moments_of_data_are_kept_for_the_same_batches_only():
  metric = distances(network=network())
  samples, data, other = (batches(metric, images(9, seed=i)) for i in range(3))
  first, second = metric.values(samples, data), metric.values(samples, other)
  assert first != second
  assert metric.values(samples, data) == first


def test_samples_that_are_not_finite_give_nan():
  metric = distances(network=network())
  data = batches(metric, images(9))
  bad = [{'pool': np.full((3, 5), np.nan)}, *data]
  assert np.isnan(metric.values(bad, data)['toy_frechet'])


@pytest.mark.parametrize(
  ('measures', 'expected'),
  [
    (('frechet',), 2),
    (('score',), 2),
    (('kernel', 'frechet'), 8),
    (('precision_recall',), 4),
    (('precision_recall', 'density_coverage'), 6),
  ],
)
def test_min_samples_is_that_of_the_most_demanding_measure(measures, expected):
  metric = distances(network=network(), measures=measures, **SMALL)
  assert metric.min_samples == expected
  enough = batches(metric, images(expected))
  metric.values(enough, enough)
  if expected > 2:
    fewer = batches(metric, images(expected - 1))
    with pytest.raises(ValueError, match=r'at least|as many'):
      metric.values(fewer, enough)


# References -----------------------------------------------------------------------


def statistics(size=5, spatial=None, stored=None):
  mean, cov = np.zeros(size), np.eye(size)
  pair = (np.zeros(spatial), np.eye(spatial)) if spatial else (None, None)
  return Statistics('file.npz', mean, cov, *pair, stored)


def test_statistics_take_the_place_of_the_data():
  metric = distances(
    network=network(),
    measures=('frechet', 'spatial_frechet', 'score'),
    reference=statistics(spatial=32),
  )
  assert not metric.needs_data
  assert metric.conventions['reference'] == 'file.npz'
  samples = batches(metric, images(40))
  found = metric.values(samples, ())
  pool = whole(samples)
  eigenvalues = np.linalg.eigvalsh(np.cov(pool.T))
  # Against N(0, 1): |mean|^2 + sum (sqrt(lambda) - 1)^2.
  exact = np.sum(pool.mean(0) ** 2) + np.sum((np.sqrt(eigenvalues) - 1) ** 2)
  assert found['toy_frechet'] == pytest.approx(exact, rel=1e-5)  # float32 mean


def test_data_is_needed_where_the_file_has_no_images():
  for measure in ('kernel', 'precision_recall', 'density_coverage'):
    metric = distances(
      network=network(), measures=('frechet', measure), reference=statistics()
    )
    assert metric.needs_data
  assert distances(network=network()).needs_data
  assert not distances(network=network(), measures=('score',)).needs_data


def test_images_of_a_reference_take_the_place_of_the_data():
  stored = images(90, seed=1)
  measures = ('precision_recall', 'density_coverage')
  metric = distances(
    network=network(), measures=measures, reference=statistics(stored=stored)
  )
  assert not metric.needs_data
  samples = batches(metric, images(30))
  found = metric.values(samples, ())
  plain = distances(network=network(), measures=measures)
  assert found == plain.values(samples, batches(plain, stored))


# Refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(measures=()), 'measures is empty; known: frechet'),
    (dict(measures=('fid',)), 'measures must be one of frechet'),
    (dict(measures=('score', 'score')), 'has one twice'),
    (dict(quantisation='floor'), 'quantisation must be one of round'),
    (dict(covariance='n'), 'covariance must be one of unbiased'),
    (dict(subset_size=1), 'subset_size must be'),
    (dict(num_subsets=0), 'num_subsets must be'),
    (dict(split_size=0), 'split_size must be'),
    (dict(num_neighbours=0), 'num_neighbours must be'),
    (dict(num_neighbours_density=0), 'num_neighbours_density must be'),
    (dict(reference=statistics(6)), 'has 6 features, and toy has 5 for frechet'),
    (
      dict(measures=('spatial_frechet',), reference=statistics()),
      'file.npz has no spatial statistics',
    ),
    (
      dict(measures=('spatial_frechet',), reference=statistics(spatial=7)),
      'has 7 features, and toy has 32 for spatial_frechet',
    ),
    (
      dict(reference=statistics(stored=np.zeros((2, 4, 4, 1), np.uint8))),
      'images with 1 channels, and toy takes 3',
    ),
    (
      dict(measures=('kernel',), reference=statistics(stored=images(999))),
      'file.npz has 999 images, and kernel need at least 1000',
    ),
  ],
)
def test_refused_in_one_line_before_compute(settings, message):
  with pytest.raises(ValueError, match=message):
    distances(network=network(), **settings)


@pytest.mark.parametrize('measure', ['score', 'spatial_frechet'])
def test_a_network_without_the_output_is_refused(measure):
  with pytest.raises(ValueError, match=f'{measure} needs .*, and toy has pool'):
    distances(network=network(outputs=('pool',)), measures=(measure,))


@pytest.mark.parametrize('shape', [(3, 2), (3, 4, 4, 1)])
def test_examples_that_are_not_its_images_are_refused(shape):
  metric = distances(network=network())
  with pytest.raises(ValueError, match=r'toy takes images \[B, H, W, 3\], got'):
    jax.eval_shape(metric.features, metric.params, jnp.zeros(shape), None)


# Inception ------------------------------------------------------------------------


@pytest.fixture
def abstract_inception(monkeypatch):
  like = jax.eval_shape(inception.init, jax.random.key(0))
  monkeypatch.setattr(vision, 'load_inception', lambda path: like)


def test_inception_has_the_sizes_of_the_released_statistics(abstract_inception):
  found = vision.inception_features(path='a/weights.pth', resize='tensorflow1')
  sizes = features._sizes(found, tuple(MEASURES))
  assert (sizes['frechet'], sizes['spatial_frechet'], sizes['score']) == (
    2048,
    2023,
    1008,
  )
  assert found.name == 'inception'
  assert found.conventions == {'weights': 'weights.pth', 'resize': 'tensorflow1'}
  with pytest.raises(ValueError, match='has 64 features, and inception has 2048'):
    distances(network=found, reference=statistics(64))


def test_missing_weights_and_unknown_resize_are_one_line(tmp_path):
  path = str(tmp_path / 'none.pth')
  with pytest.raises(UserError, match=r'no such file; download .*pytorch-fid'):
    vision.inception_features(path=path)
  with pytest.raises(ValueError, match='resize must be one of half_pixel'):
    vision.inception_features(path=path, resize='bicubic')


# Configs --------------------------------------------------------------------------


@pytest.fixture
def unfitted(tmp_path, monkeypatch):
  """Classifiers with random parameters, as fitting one compiles for seconds."""
  monkeypatch.setenv('CMJAX_CACHE_DIR', str(tmp_path))
  monkeypatch.setattr(fitting, '_fit', lambda source, *_: random_classifier(source))


def random_classifier(source):
  def init():
    return classifier.init(jax.random.key(0), source.shape, source.classes)

  draw = np.random.default_rng(0).normal
  return jax.tree.map(
    lambda like: np.float32(draw(size=like.shape) / 10), jax.eval_shape(init)
  )


def part(**settings):
  return ConfigDict(
    dict(
      fn='cmjax.metrics.features:distances',
      network=dict(fn='cmjax.runtime.classifier:classifier', num_steps=2),
      measures=('frechet', 'score'),
    )
    | settings
  )


def test_a_config_builds_the_metric_of_a_run(unfitted):
  source = digits.digits()
  metric = build.build(part(), 'config.metrics.m', Metric, source=source)
  x = as_x0(source, source.examples[:20])
  found = [
    {k: np.asarray(v) for k, v in metric.features(metric.params, x, None).items()}
  ]
  values = metric.values(found, found)
  assert values['classifier_frechet'] == pytest.approx(0, abs=1e-6)
  assert 1 <= values['classifier_score'] <= 10


def test_a_mistake_in_a_config_names_its_key(unfitted, tmp_path):
  source = digits.digits()
  path = str(tmp_path / 'file.npz')
  np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
  reading = dict(fn='cmjax.port.statistics:read', path=path)
  mistakes = [
    (part(reference=reading), source, 'config.metrics.m: .*has 64 features'),
    (
      part(measures=('spatial_frechet',)),
      source,
      'config.metrics.m: measures: spatial',
    ),
    (part(), digits.digits(conditional=False), 'config.metrics.m.network: .*labels'),
    (part(network=reading), source, 'config.metrics.m.network.fn: .*Statistics'),
  ]
  for config, data, message in mistakes:
    with pytest.raises(UserError, match=message):
      build.build(config, 'config.metrics.m', Metric, source=data)
