"""Post-hoc averages against averages that were tracked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import ema, schedules
from cmjax.ema import Profile

STDS = (0.05, 0.10)
NUM_STEPS, EVERY = 600, 25


def trajectory(num_steps=NUM_STEPS):
  """A random walk f64[num_steps + 1, 40] that slows down, as weights in training."""
  steps = np.random.default_rng(0).normal(size=(num_steps + 1, 40))
  return np.cumsum(steps / np.sqrt(1 + np.arange(num_steps + 1))[:, None], axis=0)


def tracked(relative_std, theta):
  """The average after every step, as training tracks it: f64[num_steps + 1, 40]."""
  with jax.enable_x64(True):
    decay = np.asarray(
      schedules.power(relative_std=relative_std)(jnp.arange(len(theta) - 1)), float
    )
  average = [theta[0]]
  for k, row in enumerate(theta[1:]):
    average.append(average[-1] + (1 - decay[k]) * (row - average[-1]))
  return np.array(average)


def discrete(profile, num_steps):
  """The weight of the parameters after steps 1 to num_steps, in closed form."""
  edge = np.minimum(np.arange(num_steps + 1) / profile.step, 1.0)
  return np.diff(edge ** (schedules.power_gamma(profile.relative_std) + 1))


def stored(num_steps=NUM_STEPS, every=EVERY):
  return [Profile(s, k) for k in range(every, num_steps + 1, every) for s in STDS]


@pytest.mark.parametrize('relative_std', [0.05, 0.1, 0.2])
def test_a_tracked_average_has_the_profile_of_its_schedule(relative_std):
  theta = trajectory(100)
  expected = discrete(Profile(relative_std, 100), 100) @ theta[1:]
  # Decays are in float32: 1e-7 each.
  np.testing.assert_allclose(tracked(relative_std, theta)[100], expected, atol=1e-5)
  # Its relative standard deviation is that of its name, up to half a step of 1,000.
  k, weights = np.arange(1, 1001) - 0.5, discrete(Profile(relative_std, 1000), 1000)
  std = np.sqrt(weights @ k**2 - (weights @ k) ** 2) / 1000
  np.testing.assert_allclose(std, relative_std, rtol=1e-3)


def test_inner_products_are_the_integrals_of_the_profiles():
  profiles = [Profile(0.05, 400), Profile(0.1, 1000), Profile(0.25, 700)]
  edges = np.linspace(0, 1000, 100_001)
  t = (edges[1:] + edges[:-1]) / 2  # the midpoint rule

  def density(profile):
    gamma = schedules.power_gamma(profile.relative_std)
    inside = (gamma + 1) * (t / profile.step) ** gamma / profile.step
    return np.where(t < profile.step, inside, 0.0)

  rows = np.array([density(profile) for profile in profiles])
  exact = rows @ rows.T * (edges[1] - edges[0])
  found = ema.inner_products(profiles, profiles)
  np.testing.assert_allclose(found, exact, rtol=1e-5)  # by the midpoint rule
  assert np.isfinite(ema.inner_products([Profile(0.01, 10**9)], profiles)).all()


def test_a_profile_that_is_stored_is_used_alone():
  found = ema.reconstruct(stored(), Profile(0.1, 400))
  expected = [profile == Profile(0.1, 400) for profile in stored()]
  # Conditioning times rounding.
  np.testing.assert_allclose(found.weights, expected, atol=1e-6)
  assert found.error < 1e-6


@pytest.mark.parametrize(
  ('relative_std', 'limit'),
  # Least between the tracked widths, and rising outside, as in EDM2's figure.
  [
    (0.03, 0.02),
    (0.04, 0.005),
    (0.06, 5e-4),
    (0.075, 5e-4),
    (0.09, 5e-4),
    (0.15, 2e-3),
  ],
)
def test_reconstructed_averages_are_those_that_were_tracked(relative_std, limit):
  theta = trajectory()
  by_std = {s: tracked(s, theta) for s in STDS}
  target = Profile(relative_std, NUM_STEPS)
  found = ema.reconstruct(stored(), target)
  np.testing.assert_allclose(np.sum(found.weights), 1.0, rtol=1e-12)
  average = ema.combine(found.weights, (by_std[s][k] for s, k in stored()))
  exact = tracked(relative_std, theta)[NUM_STEPS]
  # Relative to what averaging changes.
  error = np.linalg.norm(average - exact) / np.linalg.norm(exact - theta[-1])
  assert error < limit
  # The error that is reported is that of the profile: of an average of white noise.
  rows = np.array([discrete(profile, NUM_STEPS) for profile in stored()])
  profile = discrete(target, NUM_STEPS)
  distance = np.linalg.norm(found.weights @ rows - profile) / np.linalg.norm(profile)
  np.testing.assert_allclose(found.error, distance, rtol=0.05, atol=1e-6)
  assert error < found.error + 1e-6


def test_no_other_weights_that_sum_to_one_are_closer():
  profiles, target = stored()[::5], Profile(0.07, NUM_STEPS)
  found = ema.reconstruct(profiles, target)
  square = ema.inner_products([target], [target])[0, 0]
  rng = np.random.default_rng(0)
  for _ in range(20):
    change = rng.normal(size=len(profiles))
    weights = found.weights + 1e-2 * (change - change.mean())
    distance = (
      square
      - 2 * weights @ ema.inner_products(profiles, [target])[:, 0]
      + weights @ ema.inner_products(profiles, profiles) @ weights
    )
    assert np.sqrt(distance / square) > found.error


def test_widths_beyond_what_is_stored_have_a_large_error():
  assert ema.reconstruct(stored(), Profile(0.01, NUM_STEPS)).error > 0.1
  # Nothing is stored of the last tenth of the steps.
  assert ema.reconstruct(stored(540), Profile(0.075, NUM_STEPS)).error > 0.3
  # Later snapshots than the target's are of no use, and do no harm.
  error = ema.reconstruct(stored(), Profile(0.075, 400)).error
  assert error < 0.01


def test_combine_streams_and_keeps_dtypes():
  alive = []

  def snapshots():
    for i in range(3):
      alive.append(i)
      yield {'a': np.full(2, 1.0 + i, np.float32), 'b': [jnp.full((1, 2), 10.0 * i)]}

  trees = snapshots()
  found = ema.combine([2.0, -1.5, 0.5], trees)
  np.testing.assert_array_equal(found['a'], np.float32([0.5, 0.5]))
  np.testing.assert_array_equal(found['b'][0], np.float32([[-5.0, -5.0]]))
  assert found['a'].dtype == found['b'][0].dtype == np.float32
  # In float64: in float32, 1 would be lost beside 1e8.
  big = [np.float32([1e8]), np.float32([1.0]), np.float32([1e8])]
  assert ema.combine([1.0, 1.0, -1.0], big) == 1.0


INVALID = {
  'wide': (
    lambda: ema.reconstruct(stored(), Profile(0.29, 10)),
    'relative_std must be',
  ),
  'zero': (lambda: ema.reconstruct(stored(), Profile(0.0, 10)), 'relative_std must be'),
  'nan': (lambda: ema.check_relative_std(np.nan), 'relative_std must be'),
  'step': (lambda: ema.reconstruct([Profile(0.1, 0)], Profile(0.1, 1)), 'step must be'),
  'nothing': (lambda: ema.reconstruct([], Profile(0.1, 1)), 'at least one'),
  'none': (lambda: ema.combine([], []), 'at least one'),
  'fewer': (lambda: ema.combine([1.0, 2.0], [np.ones(1)]), 'shorter'),
}


@pytest.mark.parametrize('name', INVALID)
def test_invalid_values_are_refused(name):
  call, match = INVALID[name]
  with pytest.raises(ValueError, match=match) as error:
    call()
  assert '\n' not in str(error.value)
