"""Samples by index, and metrics of the data itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, oracles, samplers
from cmjax.data.digits import digits
from cmjax.data.points import points
from cmjax.data.source import as_x0
from cmjax.metrics.drawn import Drawn
from cmjax.metrics.pixels import label_agreement, pixel_frechet
from cmjax.modes import evaluate
from cmjax.runtime import config_files, sharding
from cmjax.runtime.reopen import Opened
from tests.conftest import ROOT


def opened(source, f, mesh, batch_size=64, **named):
  config = config_files.read(ROOT / 'configs' / 'edm.py:digits')
  config.evaluation.batch_size = batch_size
  config.evaluation.num_samples = 50
  return Opened(config, mesh, source, f, named, None, 0)


def labelled(params, x, t, cond, *, key=None):
  """A model that paints the label into the first pixel, over the noise."""
  number = jnp.argmax(cond, axis=1).astype(x.dtype) / 100
  return (x / core.expand(t, x)).at[:, 0, 0, 0].set(number)


def test_a_sample_depends_on_its_index_and_the_seed_alone(one_device):
  source = digits()
  sampler = samplers.one_step()

  def draw(mesh, batch_size, num_samples, seed=3):
    subject = opened(source, labelled, mesh, batch_size)
    return evaluate.draw(subject, None, sampler, num_samples=num_samples, seed=seed)

  first = draw(one_device, 64, 40)
  for other in (draw(one_device, 7, 40), draw(sharding.data_mesh(), 16, 40)):
    np.testing.assert_allclose(other.x, first.x, atol=1e-6)  # fused differently
  np.testing.assert_allclose(draw(one_device, 64, 10).x, first.x[:10], atol=1e-6)
  assert not np.allclose(draw(one_device, 64, 40, seed=4).x, first.x)
  np.testing.assert_array_equal(first.labels, source.labels[:40])
  # The network is given the label that is reported.
  painted = np.rint(100 * first.x[:, 0, 0, 0]).astype(int)
  np.testing.assert_array_equal(painted, first.labels)


def test_samples_are_clipped_to_the_range_of_the_data(one_device):
  source = digits()

  def wild(params, x, t, cond, *, key=None):
    return jnp.sign(x) * 100

  subject = opened(source, wild, one_device)
  drawn = evaluate.draw(subject, None, samplers.one_step(), num_samples=8, seed=0)
  low, high = as_x0(source, np.array([0.0, 16.0]))
  np.testing.assert_allclose([drawn.x.min(), drawn.x.max()], [low, high], rtol=1e-6)


def test_the_table_counts_evaluations_of_every_sampler(one_device):
  source = digits()
  metrics = {'frechet': pixel_frechet(real=real(source))}
  named = {'few': samplers.multistep(sigmas=(80.0, 1.0)), 'many': samplers.ode()}
  rows = evaluate.table(opened(source, labelled, one_device, **named), None, metrics)
  assert [(row['sampler'], row['evaluations']) for row in rows] == [
    ('few', 2),
    ('many', 35),
  ]
  assert all(row['samples'] == 50 and row['pixel_frechet'] > 1 for row in rows)


def real(source):
  return as_x0(source, source.examples)


def drawn(x, labels):
  return Drawn(x, labels, 1)


def test_real_digits_are_close_to_themselves_and_noise_is_not():
  source = digits()
  x = real(source)
  metric = pixel_frechet(real=x)
  assert abs(metric(drawn(x, source.labels))['pixel_frechet']) < 1e-6
  # One half against all: all lies between two halves, which are 0.13 apart.
  order = np.random.default_rng(0).permutation(len(x))
  half = metric(drawn(x[order[::2]], None))['pixel_frechet']
  assert 0.01 < half < 0.113
  shifted = metric(drawn(x + 0.1, None))['pixel_frechet']
  np.testing.assert_allclose(shifted, 64 * 0.1**2, rtol=1e-3)  # |mean shift|^2


def test_pixel_frechet_does_not_depend_on_how_data_is_scaled():
  source = digits()
  other = source._replace(scale=source.scale / 2)
  x = real(source)[:900]
  values = [
    pixel_frechet(real=real(source))(drawn(x, None))['pixel_frechet'],
    pixel_frechet(real=real(other))(drawn(x / 2, None))['pixel_frechet'],
  ]
  np.testing.assert_allclose(*values, rtol=1e-4)


def test_label_agreement_is_high_on_real_digits_and_a_tenth_on_shuffled_labels():
  source = digits()
  x = real(source)
  metric = label_agreement(real=x, labels=source.labels)
  assert metric(drawn(x, source.labels))['label_agreement'] > 0.98
  shuffled = np.random.default_rng(0).permutation(source.labels)
  agreement = metric(drawn(x, shuffled))['label_agreement']
  assert abs(agreement - 0.1) < 0.03  # 4 standard deviations of 1,797 coins
  with pytest.raises(ValueError, match='needs labels'):
    label_agreement(real=x, labels=None)


def test_pictures_are_grids_of_images_and_scatters_of_points():
  source = digits()
  image = evaluate.picture(source, as_x0(source, source.examples[:40]))
  assert image.dtype == np.uint8
  assert image.shape[2] == 3
  assert image.shape[1] > image.shape[0] > 80  # two rows of twenty
  source = points(oracle=oracles.ring(), num_samples=100)
  assert evaluate.picture(source, source.examples).std() > 0


def test_metrics_that_do_not_fit_the_data_are_refused_with_their_name(one_device):
  source = digits(conditional=False)
  with pytest.raises(core.UserError, match=r'config\.metrics\.labels: .*needs labels'):
    evaluate.build_metrics(opened(source, labelled, one_device))


def test_a_batch_smaller_than_the_devices_is_padded(one_device):
  source = digits()
  subject = opened(source, labelled, sharding.data_mesh(), batch_size=3)
  x = evaluate.draw(subject, None, samplers.one_step(), num_samples=5, seed=0).x
  assert x.shape == (5, 8, 8, 1)
  assert len(jax.devices()) == 8
