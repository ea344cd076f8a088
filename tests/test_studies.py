"""Studies of models whose answers are known."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import core, oracles, precond
from cmjax.core import expand
from cmjax.networks import mlp
import cmjax.studies
from cmjax.studies.discrete_limit import discrete_limit
from cmjax.studies.gradient_noise import gradient_noise
from cmjax.studies.jvp_precision import jvp_precision
from cmjax.studies.likelihood import likelihood
from cmjax.studies.map_error import map_error
from cmjax.studies.study import Study, Subject
from cmjax.studies.tangents import normalised_bias, tangents

STD = 0.4
GAUSSIAN = oracles.gaussian(np.zeros(2), STD)
FEW = jnp.asarray([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6], [0.2, 0.3]])


def constant_along_the_ode_of(oracle, steps=256):
  return lambda params, x, t, cond, *, key=None: oracles.consistency(
    oracle, x, t, 0.002, steps
  )


def still(params, x, t, cond, *, key=None):
  return x


def subject(f, x0=FEW, **more):
  return Subject(f, core.Nets(more.pop('params', None)), x0, None, **more)


def column(study, name):
  return np.array([row[name] for row in study.rows])


def test_the_exact_map_has_no_error_and_a_wrong_one_its_own():
  def off(params, x, t, cond, *, key=None):
    return constant_along_the_ode_of(GAUSSIAN)(params, x, t, cond) + 0.1

  for f, error in ((constant_along_the_ode_of(GAUSSIAN), 0.0), (off, 0.1)):
    study = map_error(subject(f), oracle=GAUSSIAN, num_sigmas=3, num_samples=64)
    np.testing.assert_allclose(column(study, 'rms_error'), error, atol=1e-5)
  # A map of N(0, std^2) has about that spread around its mean.
  np.testing.assert_allclose(column(study, 'rms_error_of_mean'), STD, rtol=0.2)


def test_the_map_of_the_data_has_no_defect_but_its_estimates_scatter():
  f = constant_along_the_ode_of(oracles.points(np.asarray(FEW)))
  study = tangents(
    subject(f),
    sigma_min=0.05,
    sigma_max=2.0,
    num_sigmas=4,
    num_samples=16,
    num_draws=16,
    subset_size=4,
  )
  assert np.max(column(study, 'defect')) < 1e-3  # float32 through 256 steps of RK4
  assert np.max(column(study, 'stable')) < 1e-3  # the subset is all there is
  assert 'teacher' not in study.ys


def test_the_scatter_of_a_gaussian_has_its_closed_form():
  x0 = STD * jax.random.normal(jax.random.key(0), (20_000, 2))
  f = constant_along_the_ode_of(GAUSSIAN)

  def teacher(params, x, t, cond, *, key=None):
    return oracles.denoiser(GAUSSIAN, x, t)

  study = tangents(
    subject(f, x0, teacher=teacher),
    sigma_min=0.2,
    sigma_max=2.0,
    num_sigmas=3,
    num_samples=64,
    num_draws=32,
    subset_size=100,
  )
  t = column(study, 'sigma')
  exact = t * STD * np.sqrt(STD**2 + 0.002**2) / (STD**2 + t**2)
  # 64 x 32 x 2 draws: two per cent, and as much from the finite data.
  np.testing.assert_allclose(column(study, 'conditional'), exact, rtol=0.06)
  assert np.all(column(study, 'stable') < 0.5 * exact)
  assert np.all(column(study, 'teacher') < 0.1 * exact)  # the data's mean is not its


def test_normalised_tangents_of_one_example_have_its_direction():
  study = normalised_bias(
    subject(still, FEW[:1]), num_sigmas=3, num_samples=8, num_draws=8, c=0.0
  )
  np.testing.assert_allclose(column(study, 'length'), 1.0, rtol=1e-4)  # float32
  np.testing.assert_allclose(column(study, 'cosine'), 1.0, rtol=1e-4)


def test_normalised_tangents_are_biased_where_the_posterior_is_skewed():
  lopsided = jnp.asarray([[0.0, 0.0]] * 9 + [[1.0, 0.0]])
  f = constant_along_the_ode_of(oracles.points(np.asarray(lopsided)))
  study = normalised_bias(
    subject(f, lopsided),
    sigma_min=5.0,
    sigma_max=5.0,
    num_sigmas=1,
    num_samples=8,
    num_draws=512,
  )
  # Nine short steps one way and one long one back: the unit vectors' mean is 0.8.
  np.testing.assert_allclose(column(study, 'length'), 0.8, atol=0.1)


def test_gradient_noise_separates_signal_and_noise():
  def loss(nets, batch, step, keys):
    t = jnp.where(jnp.arange(len(batch.x0)) % 2 == 0, 0.01, 10.0)
    signal = jnp.where(t < 1, 3.0, 0.0)
    noise = batch.x0[:, 0]
    return core.LossOut((signal + noise) * nets.online[0], {'sigma': t})

  study = gradient_noise(
    subject(
      still,
      params=jnp.ones(1),
      loss=loss,
      batch=lambda step: core.Batch(jnp.full((8, 2), (-1.0) ** step), None),
    ),
    num_bins=4,
    num_batches=64,
  )
  assert len(study.rows) == 2
  np.testing.assert_allclose(column(study, 'fraction'), 0.5)
  np.testing.assert_allclose(column(study, 'noise'), 0.5, rtol=0.02)  # half the batch
  np.testing.assert_allclose(column(study, 'signal'), [1.5, 0.0], atol=1e-2)
  np.testing.assert_allclose(column(study, 'sigma'), [0.01, 10.0], rtol=1e-3)


def a_loss_of(value):
  """A loss whose gradient is value(step, key), the same for every batch."""

  def loss(nets, batch, step, keys):
    t = jnp.ones(len(batch.x0))
    return core.LossOut(t * value(nets, step, keys) * nets.online[0], {'sigma': t})

  return loss


def test_gradient_noise_is_of_the_step_that_was_trained_and_its_target():
  drawn = []

  def batch(step):
    drawn.append(step)
    return core.Batch(jnp.zeros((8, 2)), None)

  about = subject(
    still,
    params=jnp.ones(1),
    loss=a_loss_of(lambda nets, step, keys: step * nets.target[0]),
    batch=batch,
    step=700,
  )
  about = about._replace(nets=about.nets._replace(target=jnp.full(1, 3.0)))
  study = gradient_noise(about, num_bins=1, num_batches=3)
  np.testing.assert_allclose(column(study, 'signal'), 2100.0, rtol=1e-6)  # float32
  np.testing.assert_allclose(column(study, 'noise'), 0.0, atol=1e-3)
  assert drawn == [700, 701, 702]


def test_batches_of_gradient_noise_have_random_numbers_of_their_own():
  about = subject(
    still,
    params=jnp.ones(1),
    loss=a_loss_of(lambda nets, step, keys: jax.random.normal(keys['noise'])),
    batch=lambda step: core.Batch(jnp.zeros((8, 2)), None),
  )
  study = gradient_noise(about, num_bins=1, num_batches=64)
  # The deviation of a normal from 64 draws: 9 per cent.
  np.testing.assert_allclose(column(study, 'noise'), 1.0, rtol=0.35)


def test_one_batch_has_no_noise_to_measure():
  with pytest.raises(ValueError, match=r'num_batches must be .*\[2, '):
    gradient_noise(subject(still), num_batches=1)


@pytest.fixture(scope='module')
def network():
  """A small smooth model in any dtype, and weights for it."""

  def small(dtype):
    return mlp.mlp(width=16, num_blocks=1, embedding=8, noise_scale=4.0, dtype=dtype)

  def build(dtype):
    return precond.edm(small(dtype))

  net = small('float32')
  inputs = jnp.zeros((1, 2)), jnp.zeros(1), None
  shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: jnp.asarray(0.3 * draw.normal(size=a.shape), jnp.float32), shapes
  )
  return build, params


def test_the_jvp_is_exact_and_differences_are_not(network):
  build, params = network
  study = jvp_precision(
    subject(build('float32'), params=params, in_dtype=build), widths=(1e-2, 1e-4)
  )
  wide, narrow = column(study, 'float32')
  jvp = study.rows[0]['float32_jvp']
  assert jvp < 1e-5 < min(wide, narrow)  # rounding only, against h^2 and rounding / h
  assert jvp < study.rows[0]['bfloat16_jvp'] < 0.3
  np.testing.assert_array_equal(column(study, 'float32_jvp'), [jvp, jvp])


def test_discrete_gradients_go_to_their_limits(network):
  build, params = network
  study = discrete_limit(
    subject(build('float32'), params=params), num_scales=(64, 256, 1024), num_samples=16
  )
  for name in ('squared_l2', 'l2'):
    first, second, third = column(study, name)
    # First order, the next term of the error being as large at the first N.
    assert 2.5 < first / second < 6
    assert 3.2 < second / third < 5


def test_a_subject_without_what_a_study_needs_is_refused():
  with pytest.raises(ValueError, match='an objective'):
    gradient_noise(subject(still))
  with pytest.raises(ValueError, match='dtype'):
    jvp_precision(subject(still))


def test_every_study_explains_its_columns_in_their_order(network):
  build, params = network
  about = subject(
    build('float32'),
    params=params,
    in_dtype=build,
    loss=lambda nets, batch, step, keys: core.LossOut(
      batch.x0[:, 0] * jax.tree.leaves(nets.online)[0][0], {'sigma': jnp.ones(8)}
    ),
    batch=lambda step: core.Batch(jnp.full((8, 2), 1.0 * step), None),
  )
  few = dict(num_samples=4)
  levels = few | dict(num_sigmas=2)
  found = {
    'map_error': map_error(about, oracle=GAUSSIAN, **levels),
    'tangents': tangents(about, num_draws=2, **levels),
    'normalised_bias': normalised_bias(about, num_draws=2, **levels),
    'gradient_noise': gradient_noise(about, num_batches=2),
    'jvp_precision': jvp_precision(about, **few),
    'discrete_limit': discrete_limit(about, num_scales=(4, 8), **few),
    'likelihood': likelihood(about, num_steps=(2, 4), **few),
  }
  written = {
    name
    for module in pkgutil.iter_modules(cmjax.studies.__path__)
    for name, value in vars(
      importlib.import_module(f'cmjax.studies.{module.name}')
    ).items()
    if getattr(value, '__annotations__', {}).get('return') is Study
  }
  assert written - {'study'} == set(found)
  for name, study in found.items():
    assert {study.x, *study.ys} <= set(study.columns), name
    for row in study.rows:
      assert list(row) == list(study.columns), name
  assert [row['N'] for row in found['discrete_limit'].rows] == [4, 8]
  assert all(isinstance(row['N'], int) for row in found['discrete_limit'].rows)


def test_points_and_images_of_as_many_features_are_the_same():
  def shrink(params, x, t, cond, *, key=None):
    return x / expand(1 + t**2, x)

  flat = tangents(
    subject(shrink), num_sigmas=2, num_samples=8, num_draws=8, subset_size=2
  )
  shaped = jnp.reshape(FEW, (4, 1, 2, 1))
  image = tangents(
    subject(shrink, shaped), num_sigmas=2, num_samples=8, num_draws=8, subset_size=2
  )
  np.testing.assert_allclose(
    column(flat, 'conditional'), column(image, 'conditional'), rtol=1e-4
  )
