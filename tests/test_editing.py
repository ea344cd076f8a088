"""Zero-shot edits: orthogonal maps, known values, and exact models of known data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import editing, inversion, oracles, samplers
from cmjax.metrics.frechet import frechet_distance
from cmjax.times import karras

MASK = np.zeros((8, 8))
MASK[2:, :5] = 1
EDITS = {
  'inpaint': (lambda: editing.inpaint(MASK), (8, 8, 3)),
  'colourise': (editing.colourise, (8, 4, 3)),
  'double': (lambda: editing.super_resolution(2, (4, 6, 3)), (4, 6, 3)),
  'quadruple': (lambda: editing.super_resolution(4, (8, 4, 2)), (8, 4, 2)),
  'eightfold': (lambda: editing.super_resolution(8, (8, 16, 1)), (8, 16, 1)),
  'threefold': (lambda: editing.super_resolution(3, (3, 9, 1)), (3, 9, 1)),
}
each_edit = pytest.mark.parametrize('name', EDITS)


def images(n, shape, seed=0, dtype=np.float64):
  return np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(dtype)


def keys_of(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def wild(params, x, sigma, cond, *, key=None):
  """A model with values far outside the range of images."""
  return 3 * jnp.tanh(x) + 2 * jnp.sin(5 * x[::-1])


# The maps ----------------------------------------------------------------------------


@each_edit
def test_a_map_is_orthogonal_and_has_its_inverse(name, x64):
  build, shape = EDITS[name]
  edit = build()
  size = int(np.prod(shape))
  transform, inverse = jax.jit(edit.transform), jax.jit(edit.inverse)
  every = transform(np.eye(size).reshape(size, *shape)).reshape(size, size)
  # 1e-12: 64 roundings of 1e-16 each, with room.
  np.testing.assert_allclose(every @ every.T, np.eye(size), atol=1e-12)
  x = images(2, shape)
  np.testing.assert_allclose(inverse(transform(x)), x, atol=1e-12)
  assert np.isin(edit.known, [0, 1]).all()
  assert 0 < np.mean(edit.known) < 1


def test_the_known_coordinates_are_grey_values_and_patch_means(x64):
  x = images(3, (4, 6, 3))
  weights = np.array([0.2989, 0.5870, 0.1140])
  found = editing.colourise().transform(x)[..., 0]
  expected = x @ weights / np.linalg.norm(weights)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  np.testing.assert_allclose(
    editing.grey(x), np.repeat((x @ weights / weights.sum())[..., None], 3, -1)
  )
  edit = editing.super_resolution(2, (4, 6, 3))
  means = x.reshape(3, 2, 2, 3, 2, 3).mean(axis=(2, 4))
  found = editing.merge(edit, x, jnp.zeros_like(x))
  expected = np.repeat(np.repeat(means, 2, axis=1), 2, axis=2)
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_another_basis_changes_no_image(x64):
  """The basis of the authors' code: QR of a unit matrix with another first column."""
  start = np.eye(3)
  start[:, 0] = editing.GREY
  basis, _ = np.linalg.qr(start)
  known = np.array([1.0, 0, 0]).reshape(1, 1, 1, 3)
  theirs = editing.Edit(lambda x: x @ basis, lambda a: a @ basis.T, jnp.asarray(known))
  y, x = (jnp.asarray(images(2, (4, 4, 3), seed)) for seed in (0, 1))
  np.testing.assert_allclose(
    editing.merge(editing.colourise(), y, x), editing.merge(theirs, y, x), atol=1e-12
  )


@pytest.mark.parametrize('factor', [0, 1, 3, 5, 2.0])
def test_a_factor_that_does_not_divide_the_image_is_refused(factor):
  with pytest.raises(ValueError, match='factor must'):
    editing.super_resolution(factor, (8, 12, 3))


# Algorithm 4 -------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['inpaint', 'colourise', 'quadruple', 'eightfold'])
def test_what_is_known_is_held_and_the_rest_of_y_is_not_used(name):
  build, shape = EDITS[name]
  edit, keys = build(), keys_of(3)
  y, other = (jnp.asarray(images(3, shape, s, np.float32)) for s in (0, 1))

  @jax.jit
  def run(y):
    return editing.edit_images(wild, None, y, edit, sigmas=(80.0, 2.0, 0.1), keys=keys)

  out = run(y=y)
  assert out.steps.shape == (3, 3, *shape)
  np.testing.assert_array_equal(out.x, out.steps[-1])
  for x in out.steps:
    # float32: sums of up to 64 terms of order 3, each rounded to 6e-8 of its value.
    assert np.max(editing.known_error(edit, y, x)) < 1e-5
  assert np.std(out.x - y) > 0.1
  same = run(y=editing.merge(edit, y, other))
  # Rounding of `merge` at most 1e-6, times the slope of `wild` at three evaluations.
  np.testing.assert_allclose(same.x, out.x, atol=1e-2)


def test_an_error_in_what_is_known_is_measured(x64):
  edit = editing.inpaint(MASK)
  y = jnp.zeros((2, 8, 8, 3))
  x = y.at[0, 0, 0, 0].set(9.0).at[1, 3, 1, 2].set(-0.25)  # unknown, known
  np.testing.assert_allclose(editing.known_error(edit, y, x), [0, 0.25])


def gaussian_map(sigma_min):
  oracle = oracles.gaussian(np.array([0.3, -0.2]), 0.4)

  def f(params, x, sigma, cond, *, key=None):
    return oracles.consistency(oracle, x, sigma, sigma_end=sigma_min)

  return f


def test_with_nothing_known_it_is_multistep_sampling():
  edit = editing.Edit(lambda x: x, lambda x: x, jnp.zeros((1, 1)))
  sigmas, keys = (80.0, 5.0, 0.7), keys_of(4)
  f = gaussian_map(0.002)
  y = jnp.ones((4, 2))
  found = editing.edit_images(
    f, None, y, edit, sigmas=sigmas, keys=keys, sigma_min=0.002
  )
  sampler = samplers.multistep(sigmas=sigmas, sigma_min=0.002)
  expected = sampler(f, None, keys, None, (2,)).x
  np.testing.assert_allclose(found.x, expected, atol=1e-6)  # float32, order one


def test_an_image_does_not_depend_on_its_batch():
  edit, keys = editing.super_resolution(2, (4, 4, 1)), keys_of(5)
  y = jnp.asarray(images(5, (4, 4, 1), dtype=np.float32))

  def halves(params, x, sigma, cond, *, key=None):
    return jnp.sin(x)

  @jax.jit
  def run(y, keys):
    return editing.edit_images(halves, None, y, edit, sigmas=(9.0, 0.5), keys=keys).x

  rows = np.array([3, 1])
  # Two programs, fused differently: a few roundings of 6e-8 of noise up to 30.
  np.testing.assert_allclose(run(y[rows], keys[rows]), run(y, keys)[rows], atol=1e-5)


def test_stroke_is_two_steps_from_the_image(x64):
  f, keys = gaussian_map(0.002), keys_of(6)
  y = jnp.asarray(images(6, (2,)))
  x = y + 5.38 * samplers.normal(keys, 0, (2,))
  first = f(None, x, jnp.full(6, 5.38), None)
  x = first + (2.24**2 - 0.002**2) ** 0.5 * samplers.normal(keys, 1, (2,))
  expected = f(None, x, jnp.full(6, 2.24), None)
  found = editing.stroke(f, None, y, keys=keys, sigma_min=0.002)
  np.testing.assert_allclose(found.steps, [first, expected], atol=1e-12)


@pytest.mark.parametrize('run', [editing.edit_images, editing.stroke])
@pytest.mark.parametrize('sigmas', [(), (1.0, 2.0), (1.0, 0.002)])
def test_sigmas_that_do_not_descend_above_sigma_min_are_refused(run, sigmas):
  edit = (editing.inpaint(MASK),) if run is editing.edit_images else ()
  y = jnp.zeros((1, 8, 8, 1))
  with pytest.raises(ValueError, match='sigmas must'):
    run(wild, None, y, *edit, sigmas=sigmas, keys=keys_of(1), sigma_min=0.002)


def test_denoising_is_one_evaluation(x64):
  y = jnp.asarray(images(3, (2,)))
  found = editing.denoise(gaussian_map(0.0), None, y, sigma=0.3)
  mean = np.array([[0.3, -0.2]])
  np.testing.assert_allclose(found, mean + (y - mean) * 0.8, atol=1e-12)  # 0.4 / 0.5
  with pytest.raises(ValueError, match='sigma must be'):
    editing.denoise(gaussian_map(0.0), None, y, sigma=0.0)


MIXTURE = oracles.Mixture(
  weights=np.array([0.3, 0.45, 0.25]),
  means=np.array([[-0.5, -0.6], [0.1, 0.5], [0.6, -0.2]]),
  stds=np.array([0.15, 0.2, 0.1]),
)


def conditional(first, n, seed):
  """Exact draws f[n, 1] of the second coordinate of `MIXTURE`, given the first."""
  rng = np.random.default_rng(seed)
  stds, means = MIXTURE.stds, MIXTURE.means
  weights = MIXTURE.weights / stds
  weights *= np.exp(-((first - means[:, 0]) ** 2) / (2 * stds**2))
  k = rng.choice(3, n, p=weights / weights.sum())
  return (means[k, 1] + stds[k] * rng.normal(size=n))[:, None]


def test_samples_approach_the_conditional_distribution_on_finer_grids():
  """Algorithm 4 is approximate: measured against exact draws given one coordinate.

  Replacing the known coordinate after each step does not condition the noise of large
  sigma on it. The many steps at small sigma, x + sigma z and back along the ODE, are
  Langevin steps of size sigma^2 with the known coordinate held, which do reach the
  conditional distribution, but only as the grid gets finer.
  """
  n, first = 2000, 0.2
  y = jnp.full((n, 2), first)
  edit = editing.Edit(lambda x: x, lambda x: x, jnp.array([[1.0, 0.0]]))

  def f(params, x, sigma, cond, *, key=None):
    return oracles.consistency(MIXTURE, x, sigma, num_steps=16)

  exact = conditional(first, 100_000, 0)
  between_exact = frechet_distance(conditional(first, n, 1), exact)
  distances = []
  for num_steps in (2, 40, 160):
    sigmas = karras(num_steps)[:-1].tolist()  # at the last, sigma_min, f(x) = x
    run = jax.jit(
      functools.partial(
        editing.edit_images, f, None, edit=edit, sigmas=sigmas, sigma_min=0.002
      )
    )
    x = np.asarray(run(y=y, keys=keys_of(n)).x)
    np.testing.assert_array_equal(x[:, 0], y[:, 0])
    distances.append(frechet_distance(x[:, 1:], exact))
  print('exact', between_exact, 'edits', distances)
  # Measured 0.36, 0.13 and 0.022, each within 0.005 over seeds (1e-5 between exact
  # draws, whose variance is 0.04): at N = 40 still far from exact, and falling.
  assert between_exact < 1e-3
  assert distances[0] == pytest.approx(0.355, abs=0.05)
  assert 20 * between_exact < distances[1] < 0.5 * distances[0]
  assert distances[2] < 0.25 * distances[1]


# Noise of images ---------------------------------------------------------------------

MEAN, STD = np.array([[0.3, -0.2, 0.1]]), 0.4
GAUSSIAN = oracles.gaussian(MEAN[0], STD)


def denoiser(x, sigma):
  return oracles.denoiser(GAUSSIAN, x, sigma)


def exact_map(params, x, sigma, cond, *, key=None):
  return oracles.consistency(GAUSSIAN, x, sigma)


def scale(sigma):
  return np.sqrt(STD**2 + sigma**2)


def test_inversion_is_the_inverse_of_the_exact_map_to_second_order(x64):
  x = jnp.asarray(images(5, (3,)))
  exact = (MEAN + (x - MEAN) * scale(80.0) / scale(0.002)) / 80.0
  errors = []
  for num_steps in (40, 80):
    z = inversion.invert(denoiser, x, num_steps=num_steps)
    errors.append(float(np.max(np.abs(z - exact))))
  assert errors[0] < 0.04  # measured 0.029, of z up to 3
  assert 3 < errors[0] / errors[1] < 5.5  # second order: 4
  z = inversion.invert(denoiser, x, num_steps=320)
  again = inversion.generate(exact_map, None, z, sigma_max=80.0)
  # The error of z at 80 steps, 16 times smaller, back in units of x.
  np.testing.assert_allclose(again, x, atol=80 * errors[1] / 16)
  np.testing.assert_allclose(
    inversion.generate(exact_map, None, exact, sigma_max=80.0), x, atol=1e-12
  )


def test_the_ode_from_noise_undoes_the_inversion(x64):
  x = jnp.asarray(images(5, (3,)))
  z = inversion.invert(denoiser, x, num_steps=320)
  again = inversion.solve(denoiser, z, karras(320).tolist())
  np.testing.assert_allclose(again, x, atol=1e-3)
  with pytest.raises(ValueError, match='sigmas must descend'):
    inversion.solve(denoiser, z, (1.0, 2.0))


def test_slerp_keeps_its_ends_and_norms(x64):
  a, b = (jnp.asarray(np.random.default_rng(s).normal(size=(4, 8, 8))) for s in (0, 1))
  np.testing.assert_array_equal(inversion.slerp(a, b, 0.0), a)
  np.testing.assert_array_equal(inversion.slerp(a, b, 1.0), b)
  norms = np.linalg.norm(a, axis=(1, 2))
  b *= (norms / np.linalg.norm(b, axis=(1, 2)))[:, None, None]
  for alpha in (0.25, 0.5, 0.9):
    found = inversion.slerp(a, b, alpha)
    np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), norms, rtol=1e-12)
  angles = [
    jnp.arccos(jnp.sum(v * w, axis=(1, 2)) / norms**2)
    for v, w in ((a, inversion.slerp(a, b, 0.25)), (a, b))
  ]
  np.testing.assert_allclose(angles[0], 0.25 * angles[1], rtol=1e-10)
  np.testing.assert_allclose(inversion.slerp(a, a, 0.3), a, rtol=1e-12)


def test_interpolation_goes_from_one_image_to_the_other(x64):
  a, b = (jnp.asarray(np.random.default_rng(s).normal(size=(2, 3))) for s in (0, 1))

  def images_of(z, alpha):
    return inversion.generate(exact_map, None, z, sigma_max=80.0) + alpha

  found = inversion.interpolate(images_of, a, b, 5)
  assert found.shape == (5, 2, 3)
  np.testing.assert_allclose(found[0], images_of(a, 0.0), atol=1e-12)
  np.testing.assert_allclose(found[-1], images_of(b, 1.0), atol=1e-12)
  middle = images_of(inversion.slerp(a, b, 0.5), 0.5)
  np.testing.assert_allclose(found[2], middle, atol=1e-12)
  with pytest.raises(ValueError, match='num_images must be'):
    inversion.interpolate(images_of, a, b, 1)
