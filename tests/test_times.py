"""Grids to the printed digits, draws of neighbours, and the mapping of ECT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from cmjax import schedules, times

GRIDS = {
  18: """80 57.586 40.7856 28.3746 19.3525 12.9101 8.4009 5.3152 3.2568 1.9233 1.0882
    .5853 .2964 .1395 .0599 .0229 .0075 .002""",
  40: """80 69.4509 60.1174 51.8803 44.6302 38.2665 32.6969 27.8371 23.6101 19.9456
    16.7799 14.055 11.7185 9.7232 8.0265 6.5901 5.38 4.3656 3.5197 2.8184 2.2404 1.7672
    1.3824 1.0717 .8229 .6254 .47 .3489 .2556 .1846 .1312 .0916 .0628 .0421 .0275 .0175
    .0108 .0064 .0037 .002""",
}


def neighbours(n):
  """The grid of n points in float64 from its formula, ascending in index."""
  top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
  return (top + np.arange(n) / (n - 1) * (bottom - top)) ** 7


# Karras grid -----------------------------------------------------------------------


@pytest.mark.parametrize('n', GRIDS)
def test_karras_grid_has_the_printed_values(n):
  printed = np.array(GRIDS[n].split(), float)
  assert len(printed) == n
  # Four decimals are printed.
  np.testing.assert_allclose(times.karras(n), printed, rtol=1e-12, atol=5.1e-5)


def test_karras_grid_descends_between_its_ends():
  grid = times.karras(7, sigma_min=0.01, sigma_max=3.0, rho=2.0)
  assert np.all(np.diff(grid) < 0)
  np.testing.assert_allclose(grid[jnp.array([0, -1])], [3.0, 0.01], rtol=2e-6)
  # With rho = 2 the roots are equally spaced.
  np.testing.assert_allclose(np.diff(np.sqrt(grid), n=2), np.zeros(5), atol=1e-6)


@pytest.mark.parametrize(
  ('t', 'slope'),
  [
    (0.002, 0.0496158),
    (0.01, 0.197123),
    (0.1, 1.41867),
    (0.5, 5.63634),
    (1, 10.2099),
    (5, 40.564),
    (80, 436.76),
  ],
)
def test_karras_density_is_the_derivative_by_index(t, slope, x64):
  top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
  index = jnp.asarray((t ** (1 / 7) - top) / (bottom - top), jnp.float64)

  def grid(index):  # with two points an index runs from 0 to 1
    return times.karras_at(index, 2, sigma_min=0.002, sigma_max=80.0, rho=7.0)

  level, rate = jax.jvp(grid, (index,), (jnp.ones_like(index),))
  np.testing.assert_allclose(level, t, rtol=1e-12)
  np.testing.assert_allclose(rate, -slope, rtol=5e-6)  # six digits are printed


@pytest.mark.parametrize('n', [2, 18])
def test_karras_pairs_draw_every_neighbour_equally_often(n):
  draws = 17_000
  pairs = times.karras_pairs(num_scales=schedules.constant(value=float(n)))
  t, r = jax.jit(pairs, static_argnums=1)(jax.random.key(0), draws, jnp.int32(0))
  grid = neighbours(n)
  index = np.argmin(np.abs(np.log(np.asarray(t)[:, None] / grid)), axis=1)
  np.testing.assert_allclose(t, grid[index], rtol=5e-6)  # float32, seventh power
  np.testing.assert_allclose(r, grid[index + 1], rtol=5e-6)
  counts = np.bincount(index, minlength=n - 1)
  assert len(counts) == n - 1
  mean = draws / (n - 1)
  assert np.all(np.abs(counts - mean) <= 4.5 * np.sqrt(mean))  # Poisson deviations


def test_karras_pairs_follow_the_num_scales_of_a_traced_step():
  num_scales = schedules.adaptive_num_scales(
    start=2, end=8, batch_size=1, total_images=10
  )
  pairs = jax.jit(times.karras_pairs(num_scales=num_scales), static_argnums=1)
  for step in (0, 4, 10):
    n = int(num_scales(step))
    t, r = pairs(jax.random.key(1), 500, jnp.int32(step))
    levels = np.unique(np.round(np.log(np.concatenate([t, r])), 4))
    # 500 draws miss one of at most 8 pairs with probability 1e-28.
    np.testing.assert_allclose(levels, np.log(neighbours(n))[::-1], atol=1e-4)


def test_karras_time_runs_through_the_grid_from_its_cleaner_end():
  ends = times.karras_time(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(ends, [0.002, 80.0], rtol=2e-6)  # float32, seventh power
  grid = dict(sigma_min=0.01, sigma_max=3.0, rho=2.0)
  u = jnp.linspace(1.0, 0.0, 18)
  found, expected = times.karras_time(u, **grid), times.karras(18, **grid)
  np.testing.assert_allclose(found, expected, rtol=2e-6)
  np.testing.assert_allclose(times.karras_time(u), neighbours(18), rtol=5e-6)


def test_karras_uniform_draws_karras_time_uniformly():
  n, grid = 20_000, dict(sigma_min=0.01, sigma_max=3.0, rho=2.0)
  t = times.karras_uniform(**grid)(jax.random.key(0), n)
  assert t.shape == (n,)
  u = (np.sqrt(t) - 0.1) / (np.sqrt(3.0) - 0.1)  # rho = 2
  # Kolmogorov-Smirnov: rho = 2.2 instead gives p < 1e-9.
  assert stats.kstest(u, stats.uniform.cdf).pvalue > 1e-3


# Lognormal bins of iCT -------------------------------------------------------------


@pytest.mark.parametrize('given', [{}, dict(mean=0.5, std=1.0)], ids=['ict', 'other'])
@pytest.mark.parametrize('n', [2, 11])
def test_lognormal_pairs_draw_their_bins_by_the_table_of_erf(n, given):
  draws = 20_000
  mean, std = given.values() or (-1.1, 2.0)
  num_scales = schedules.constant(value=float(n))
  pairs = times.lognormal_pairs(num_scales=num_scales, **given)
  t, r = jax.jit(pairs, static_argnums=1)(jax.random.key(0), draws, jnp.int32(0))
  grid = neighbours(n)
  index = np.argmin(np.abs(np.log(np.asarray(t)[:, None] / grid)), axis=1)
  np.testing.assert_allclose(t, grid[index], rtol=5e-6)  # float32, seventh power
  np.testing.assert_allclose(r, grid[index + 1], rtol=5e-6)
  assert np.all(r < t)
  table = -np.diff(special.erf((np.log(grid) - mean) / (np.sqrt(2) * std)))
  shares = table / table.sum()
  counts = np.bincount(index, minlength=n - 1)
  deviation = np.sqrt(draws * shares * (1 - shares))
  assert np.all(np.abs(counts - draws * shares) <= 4.5 * deviation + 1e-6)  # binomial


def test_lognormal_pairs_follow_the_num_scales_of_a_traced_step():
  num_scales = schedules.doubling_num_scales(
    start=10, end=1280, batch_size=1, total_images=800
  )
  pairs = jax.jit(times.lognormal_pairs(num_scales=num_scales), static_argnums=1)
  for step, n in ((0, 11), (300, 81), (799, 1281)):
    t, r = pairs(jax.random.key(1), 500, jnp.int32(step))
    u = (np.stack([t, r]) ** (1 / 7) - 0.002 ** (1 / 7)) / (
      80 ** (1 / 7) - 0.002 ** (1 / 7)
    )
    place = u * (n - 1)
    # Seventh roots of float32 numbers, times 1280.
    np.testing.assert_allclose(place, np.round(place), atol=2e-3)
    np.testing.assert_allclose(place[0] - place[1], np.ones(500), atol=2e-3)
    assert np.ptp(np.round(place[0])) > 0.5 * n  # spread over the grid


@pytest.mark.parametrize(('t', 'ratio'), [(0.01, 0.985), (1.0, 0.992), (80.0, 0.996)])
def test_the_last_grid_of_ict_is_as_fine_as_the_last_stage_of_ect(t, ratio):
  grid = neighbours(1281)
  at = np.argmin(np.abs(np.log(grid / t)))
  index = jnp.array([at, at + 1], float)
  found = times.karras_at(index, 1281, sigma_min=0.002, sigma_max=80.0, rho=7.0)
  # Three digits are printed, and t lies within half a step of a point of the grid.
  assert float(found[1] / found[0]) == pytest.approx(ratio, abs=6e-4)
  gap = schedules.relative_gap(q=256.0, stage_images=1, batch_size=1)(0)
  ect = float(times.neighbour(jnp.full(1, t), gap)[0]) / t
  assert 0.25 < (1 - ratio) / (1 - ect) < 4  # gaps of one order


# Lognormal and the mapping of ECT --------------------------------------------------


def test_lognormal_draws_have_the_given_mean_and_deviation():
  n = 20_000
  t = times.lognormal(mean=-1.1, std=2.0)(jax.random.key(0), n)
  assert t.shape == (n,)
  # Kolmogorov-Smirnov: a wrong mean or deviation by 0.1 gives p < 1e-9.
  assert stats.kstest(np.log(t), stats.norm(-1.1, 2.0).cdf).pvalue > 1e-3


# r / t by stage, as tabulated for k = 8, b = 1 from the released code.
ECT_TABLE = {
  (2.0, 1e-9): [0, 0, 0.375, 0.688, 0.844, 0.922, 0.961, 0.980],
  (2.0, 1.0): [0, 0.212, 0.606, 0.803, 0.902, 0.951, 0.975, 0.988],
  (2.0, 80.0): [0.500, 0.750, 0.875, 0.938, 0.969, 0.984, 0.992, 0.996],
  (4.0, 1e-9): [0, 0.688, 0.922, 0.980],
  (4.0, 1.0): [0.212, 0.803, 0.951, 0.988],
  (4.0, 80.0): [0.750, 0.938, 0.984, 0.996],
}


def ect_gap(q, stage):
  return schedules.relative_gap(q=q, stage_images=1, batch_size=1)(stage)


@pytest.mark.parametrize(('q', 't'), ECT_TABLE)
def test_ratio_has_the_tabulated_values(q, t):
  at = jnp.full(1, t)
  found = [
    float(times.neighbour(at, ect_gap(q, stage))[0]) / t
    for stage in range(len(ECT_TABLE[q, t]))
  ]
  np.testing.assert_allclose(found, ECT_TABLE[q, t], atol=5.1e-4)  # three digits


@pytest.mark.parametrize(
  ('q', 'mean', 'std', 'shares'),
  [(2.0, -1.1, 2.0, [0.811, 0.585, 0, 0]), (4.0, -0.8, 1.6, [0.532, 0, 0, 0])],
)
def test_share_of_clean_targets_is_the_lognormal_cdf(q, mean, std, shares, x64):
  n = 20_000  # quantiles of t: the fraction is exact to 1 / n
  t = np.exp(mean + std * stats.norm.ppf((np.arange(n) + 0.5) / n))
  found = [
    np.mean(times.neighbour(jnp.asarray(t), ect_gap(q, stage)) == 0)
    for stage in range(len(shares))
  ]
  np.testing.assert_allclose(found, shares, atol=5e-4 + 1 / n)


@pytest.mark.parametrize('gap', [0.5, 0.1, 1 / 256])
def test_ratio_stays_between_zero_and_t(gap):
  t = jnp.asarray(np.geomspace(1e-4, 300, 200), jnp.float32)
  r = times.neighbour(t, jnp.float32(gap))
  assert np.all(r >= 0)
  assert np.all(r < t)
  assert np.all(np.diff(r) >= 0)


def test_ratio_without_shape_is_a_constant_quotient():
  t = jnp.array([0.01, 1.0, 80.0])
  found = times.neighbour(t, jnp.float32(0.25), k=0.0)
  np.testing.assert_allclose(found, 0.75 * np.asarray(t), rtol=1e-6)


def test_ect_pairs_map_their_own_times_at_the_gap_of_the_step():
  gap = schedules.relative_gap(q=2.0, stage_images=40, batch_size=4)
  source = times.lognormal(mean=-1.1, std=2.0)
  pairs = jax.jit(
    times.ect_pairs(times=source, relative_gap=gap, k=4.0), static_argnums=1
  )
  for step, relative_gap in ((0, 1 / 2), (10, 1 / 4), (39, 1 / 16)):
    t, r = pairs(jax.random.key(3), 64, jnp.int32(step))
    np.testing.assert_allclose(t, source(jax.random.key(3), 64), rtol=1e-6)
    shape = 1 + 4 / (1 + np.exp(np.asarray(t, float)))
    expected = np.maximum(t * (1 - shape * relative_gap), 0)
    np.testing.assert_allclose(r, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  'grid',
  [dict(sigma_min=0.0), dict(sigma_min=2.0, sigma_max=1.0), dict(rho=0.0)],
)
def test_invalid_grids_are_refused(grid):
  num_scales = schedules.constant(value=4.0)
  for build in (
    functools.partial(times.karras, 4),
    times.karras_uniform,
    functools.partial(times.karras_pairs, num_scales=num_scales),
    functools.partial(times.lognormal_pairs, num_scales=num_scales),
  ):
    with pytest.raises(ValueError, match=r'sigma_min|rho'):
      build(**grid)


# Two times of the linear process ---------------------------------------------------


@pytest.mark.parametrize('fraction', [0.0, 0.75, 1.0])
def test_two_times_are_ordered_and_equal_in_the_given_fraction_of_the_rows(fraction):
  n = 1000
  pairs = jax.jit(times.logit_normal_pairs(equal_fraction=fraction), static_argnums=1)
  t, r = pairs(jax.random.key(0), n, jnp.int32(0))
  assert (t.shape, r.shape) == ((n,), (n,))
  assert np.all((r >= 0) & (r <= t) & (t <= 1))
  equal = round(fraction * n)
  np.testing.assert_array_equal(r[:equal], t[:equal])
  assert np.all(r[equal:] < t[equal:])


def test_logit_normal_pairs_are_the_ordered_pairs_of_two_draws():
  n = 20_000
  pairs = times.logit_normal_pairs(mean=-0.4, std=1.5, equal_fraction=0.25)
  t, r = pairs(jax.random.key(0), n, jnp.int32(0))
  logit = np.log(t / (1 - t))
  normal = stats.norm(-0.4, 1.5).cdf
  # Kolmogorov-Smirnov: a wrong mean or deviation by 0.1 gives p < 1e-9. A maximum has
  # the square of the distribution; the rows where r = t take the greater one too.
  assert stats.kstest(logit, lambda x: normal(x) ** 2).pvalue > 1e-3
  below = np.asarray(r[n // 4 :])
  below = np.log(below / (1 - below))
  assert stats.kstest(below, lambda x: 1 - (1 - normal(x)) ** 2).pvalue > 1e-3


@pytest.mark.parametrize('num_steps', [2, 8, 128])
def test_dyadic_times_lie_on_the_grid_a_power_of_two_apart(num_steps):
  n = 5_000
  pairs = times.dyadic_pairs(num_steps=num_steps, flow_fraction=0.0)
  t, r = (np.asarray(v) for v in pairs(jax.random.key(0), n, jnp.int32(0)))
  for level in (t, r, (t + r) / 2):  # the point between is on the grid too
    np.testing.assert_array_equal(level * num_steps, np.round(level * num_steps))
  gap = t - r
  np.testing.assert_array_equal(r / gap, np.round(r / gap))
  expected = 2.0 ** -np.arange(num_steps.bit_length() - 1)
  assert set(gap) == set(expected)  # from 1 to 2 / num_steps
  counts = np.array([np.sum(gap == g) for g in expected])
  mean = n / len(expected)
  assert np.all(np.abs(counts - mean) <= 4.5 * np.sqrt(mean))  # Poisson deviations
  # Of the 714 draws of the finest gap each of its 64 starts gets 11.
  assert [len(np.unique(r[gap == g])) for g in expected] == list(1 / expected)


@pytest.mark.parametrize('fraction', [0.25, 1.0])
def test_dyadic_times_are_one_point_apart_in_the_given_fraction_of_the_rows(fraction):
  n = 4_000
  pairs = jax.jit(
    times.dyadic_pairs(num_steps=8, flow_fraction=fraction), static_argnums=1
  )
  t, r = (np.asarray(v) for v in pairs(jax.random.key(0), n, jnp.int32(0)))
  flows = round(fraction * n)
  assert np.all(t[:flows] - r[:flows] == 1 / 8)
  assert np.all(t[flows:] - r[flows:] > 1 / 8)
  counts = np.array([np.sum(t[:flows] == (i + 1) / 8) for i in range(8)])
  assert np.sum(counts) == flows
  assert np.all(np.abs(counts - flows / 8) <= 4.5 * np.sqrt(flows / 8))  # Poisson


@pytest.mark.parametrize('fraction', [-0.1, 1.1, np.nan])
def test_fractions_outside_the_unit_interval_are_refused(fraction):
  with pytest.raises(ValueError, match=f'equal_fraction must be .* got {fraction}'):
    times.logit_normal_pairs(equal_fraction=fraction)
  with pytest.raises(ValueError, match=f'flow_fraction must be .* got {fraction}'):
    times.dyadic_pairs(flow_fraction=fraction)


@pytest.mark.parametrize('num_steps', [0, 1, 3, 100, -4, 4.0, 2**17])
def test_grids_that_cannot_be_halved_are_refused(num_steps):
  with pytest.raises(ValueError, match=f'num_steps must be .* got {num_steps}'):
    times.dyadic_pairs(num_steps=num_steps)


# What pairs must keep --------------------------------------------------------------


def pairs_of(t, r):
  return lambda key, n, step: (jnp.full(n, t), jnp.full(n, r))


@pytest.mark.parametrize(
  ('t', 'r', 'equal', 'match'),
  [
    (0.5, -0.1, False, r'0 <= r < t, got r=-0\.1 for t=0\.5'),
    (0.5, -0.1, True, r'0 <= r <= t, got r=-0\.1 for t=0\.5'),
    (0.5, 0.5, False, r'r=0\.5 for t=0\.5'),
    (0.5, 0.6, True, r'r=0\.6 for t=0\.5'),
    (np.nan, 0.1, True, 't=nan'),
    (np.inf, 0.1, False, 't=inf'),
  ],
)
def test_pairs_out_of_order_are_refused_with_one_of_them(t, r, equal, match):
  with pytest.raises(ValueError, match=match):
    times.check_pairs(pairs_of(t, r), equal=equal)


def test_pairs_in_order_pass():
  times.check_pairs(pairs_of(0.5, 0.0))
  times.check_pairs(pairs_of(0.5, 0.5), equal=True)
  times.check_pairs(times.logit_normal_pairs(), equal=True)
  with pytest.raises(ValueError, match='0 <= r < t'):
    times.check_pairs(times.logit_normal_pairs())


def test_one_bad_pair_among_many_is_found():
  def pairs(key, n, step):
    t = jnp.linspace(1.0, 2.0, n)
    return t, jnp.where(jnp.arange(n) == 17, 3.0, 0.5)

  with pytest.raises(ValueError, match=r'r=3 for t=1\.27'):
    times.check_pairs(pairs)
