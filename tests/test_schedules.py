"""Schedules: end points, published values, and what EMA decays average."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import schedules
from cmjax.core import Schedule

PLAIN_AND_COMPILED = pytest.mark.parametrize(
  'compiled', [lambda f: f, jax.jit], ids=['plain', 'compiled']
)
F32 = dict(rtol=1e-6, atol=1e-7)  # a few operations in float32

EVERY = {
  'constant': schedules.constant(value=0.3),
  'cosine': schedules.cosine(peak=1.0, batch_size=8, total_images=80),
  'warmup': schedules.warmup(peak=1.0, batch_size=8, warmup_images=80),
  'inverse_root': schedules.inverse_root(peak=1.0, hold_images=16, batch_size=8),
  'half_life': schedules.half_life(
    half_life_images=80, batch_size=8, rampup_ratio=0.05
  ),
  'power': schedules.power(relative_std=0.1),
  'relative_gap': schedules.relative_gap(q=2.0, stage_images=80, batch_size=8),
  'adaptive_num_scales': schedules.adaptive_num_scales(
    start=2, end=10, batch_size=8, total_images=80
  ),
  'adaptive_decay': schedules.adaptive_decay(
    start_decay=0.9, start=2, end=10, batch_size=8, total_images=80
  ),
  'doubling_num_scales': schedules.doubling_num_scales(
    start=2, end=8, batch_size=8, total_images=80
  ),
  'halving_steps': schedules.halving_steps(start=8, stage_images=24, batch_size=8),
  'copy_at_stages': schedules.copy_at_stages(stage_images=24, batch_size=8),
  'stage_decay': schedules.stage_decay(peak=0.3, stage_images=24, batch_size=8),
}


def test_every_schedule_is_among_these():
  written = {
    name
    for name, value in vars(schedules).items()
    if getattr(value, '__annotations__', {}).get('return') is Schedule
  }
  assert written == set(EVERY)


@pytest.mark.parametrize('name', EVERY)
def test_schedule_maps_a_step_or_many_to_float32(name):
  schedule = EVERY[name]
  many = jax.jit(schedule)(jnp.arange(12))
  assert (many.shape, many.dtype) == ((12,), jnp.float32)
  for step in (0, 5, 11):
    one = schedule(jnp.int32(step))
    assert (one.shape, one.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(one, many[step], **F32)


# Learning rates --------------------------------------------------------------------


def test_inverse_root_holds_and_then_halves_each_time_the_images_are_fourfold():
  schedule = schedules.inverse_root(peak=0.2, hold_images=20, batch_size=10)
  rate = np.asarray(schedule(jnp.arange(33)))
  np.testing.assert_allclose(rate[[0, 2, 8, 32]], [0.2, 0.2, 0.1, 0.05], **F32)


def test_inverse_root_ramps_up_beside_its_decay():
  recipe = dict(peak=0.2, hold_images=20, batch_size=10)
  plain = schedules.inverse_root(**recipe)(jnp.arange(33))
  ramped = schedules.inverse_root(**recipe, rampup_images=80)(jnp.arange(33))
  fraction = np.minimum(np.arange(33) / 8, 1)
  np.testing.assert_allclose(ramped, fraction * np.asarray(plain), **F32)


def test_cosine_rises_to_the_peak_and_falls_to_zero_at_the_end():
  schedule = schedules.cosine(
    peak=0.2, batch_size=10, total_images=1000, warmup_images=200
  )
  rate = np.asarray(jax.jit(schedule)(jnp.arange(130)))
  np.testing.assert_allclose(rate[0], 0.2 / 20, **F32)  # not zero: a step is not lost
  np.testing.assert_allclose(rate[[19, 20]], 0.2, **F32)
  np.testing.assert_allclose(rate[60], 0.1, **F32)  # half way down
  np.testing.assert_allclose(rate[100:], 0.0, atol=1e-8)
  assert np.all(np.diff(rate[:20]) > 0)
  assert np.all(np.diff(rate[20:101]) < 0)


def test_cosine_without_warmup_starts_at_the_peak():
  schedule = schedules.cosine(peak=0.2, batch_size=10, total_images=1000)
  np.testing.assert_allclose(schedule(0), 0.2, **F32)


def test_warmup_is_linear_and_then_stays():
  schedule = schedules.warmup(peak=1e-3, batch_size=512, warmup_images=512 * 100)
  rate = schedule(jnp.array([0, 25, 50, 100, 101, 10_000]))
  np.testing.assert_allclose(rate, [0, 2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3], **F32)


# EMA rates -------------------------------------------------------------------------


@pytest.mark.parametrize('steps', [1, 10, 100])
def test_half_life_forgets_half_of_a_unit_step(steps):
  schedule = schedules.half_life(half_life_images=32 * steps, batch_size=32)
  average = 0.0
  for rate in np.asarray(schedule(jnp.arange(steps)), np.float64):
    average = rate * average + (1 - rate) * 1.0
  # One float32 rounding, 6e-8, a step.
  assert average == pytest.approx(0.5, abs=1e-7 * steps + 1e-7)


@pytest.mark.parametrize(
  ('half_life_images', 'batch_size', 'rate'),
  [(500_000, 512, 0.99929), (50_000_000, 4096, 0.99994322)],
)
def test_half_life_gives_the_published_rates(half_life_images, batch_size, rate):
  schedule = schedules.half_life(
    half_life_images=half_life_images, batch_size=batch_size
  )
  # To the digits printed.
  digits = len(str(rate)) - 2
  assert float(schedule(1000)) == pytest.approx(rate, abs=0.5 * 10**-digits + 6e-8)


def test_half_life_ramps_up_with_the_images_seen():
  ratio, batch, life = 0.05, 64, 64_000
  plain = schedules.half_life(half_life_images=life, batch_size=batch)
  ramped = schedules.half_life(
    half_life_images=life, batch_size=batch, rampup_ratio=ratio
  )
  assert ramped(0) == 0.0  # the first average is the first value
  early = np.array(
    [100, 2_000, 19_000]
  )  # the cap lies at life / ratio / batch = 20,000
  memory = ratio * early
  # One float32 rounding, 6e-8, a step of memory.
  halved = np.asarray(ramped(early), np.float64) ** memory
  np.testing.assert_allclose(halved, np.full(3, 0.5), atol=1e-7 * np.max(memory))
  assert np.all(ramped(early) < plain(0))
  late = np.array([20_000, 30_000])
  np.testing.assert_allclose(ramped(late), plain(late), **F32)


@pytest.mark.parametrize(
  ('relative_std', 'gamma'), [(0.05, 16.97), (0.10, 6.94), (0.01, 96.99)]
)
def test_power_gamma_is_that_of_edm2(relative_std, gamma):
  found = schedules.power_gamma(relative_std)
  assert found == pytest.approx(gamma, abs=0.005)  # two digits are printed
  # The standard deviation of the density (gamma + 1) s^gamma on [0, 1].
  variance = (found + 1) / ((found + 2) ** 2 * (found + 3))
  assert math.sqrt(variance) == pytest.approx(relative_std, rel=1e-9)


def test_power_gamma_vanishes_for_the_flat_profile():
  # The flat density on [0, 1] has variance 1 / 12; the root is found to about 1e-15.
  assert schedules.power_gamma(12**-0.5) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize('relative_std', [0.05, 0.1, 0.2])
def test_power_average_has_the_mean_and_width_of_its_profile(relative_std):
  steps = 1000
  rates = np.asarray(
    schedules.power(relative_std=relative_std)(jnp.arange(steps)), np.float64
  )
  first = second = 0.0
  for k, rate in enumerate(rates, start=1):  # averages of k and of k^2
    first = rate * first + (1 - rate) * k
    second = rate * second + (1 - rate) * k**2
  gamma = schedules.power_gamma(relative_std)
  # A step is wide by 1 / steps, and the average sees its end: half a step is bias.
  assert first / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / steps)
  width = math.sqrt(second - first**2) / steps
  assert width == pytest.approx(relative_std, abs=1 / steps)


@PLAIN_AND_COMPILED
@pytest.mark.parametrize('relative_std', [0.01, 0.05, 0.1])
def test_power_average_keeps_its_precision_late_in_a_run(relative_std, compiled):
  steps = np.concatenate([np.arange(327_000, 327_100), [1_048_575, 30_000_000]])
  found = compiled(schedules.power(relative_std=relative_std))(jnp.asarray(steps))
  exponent = schedules.power_gamma(relative_std) + 1
  exact = np.exp(exponent * np.log1p(-1 / (steps + 1)))
  # Half the spacing of float32 below 1 is 3e-8, which is what it measures; that of
  # (1 - 1/k)^(gamma + 1) in float32 is 2.1e-7 to 2.6e-6, up to 0.8 of 1 - decay.
  np.testing.assert_allclose(np.float64(found), exact, rtol=0, atol=1.2e-7)


def test_power_average_starts_as_the_first_value():
  assert schedules.power(relative_std=0.1)(0) == 0.0


# Curricula -------------------------------------------------------------------------


@PLAIN_AND_COMPILED
@pytest.mark.parametrize('q', [2.0, 4.0, 256.0])
@pytest.mark.parametrize('batch_size', [100, 128, 200])
def test_gap_is_q_to_the_minus_stage_plus_one(q, batch_size, compiled):
  schedule = compiled(
    schedules.relative_gap(q=q, stage_images=3_200_000, batch_size=batch_size)
  )
  length = 3_200_000 // batch_size
  for stage in range(8):
    within = stage * length + np.array([0, 1, length // 2, length - 1])
    within = schedule(jnp.asarray(within))
    # The released code's exponent: the first stage is 1, not plain diffusion.
    np.testing.assert_allclose(within, np.full(4, q ** -(stage + 1.0)), rtol=1e-6)


@PLAIN_AND_COMPILED
def test_smooth_gap_meets_the_stepped_one_where_stages_start(compiled):
  recipe = dict(q=2.0, stage_images=3_200_000, batch_size=128)
  stepped = compiled(schedules.relative_gap(**recipe))
  smooth = compiled(schedules.relative_gap(**recipe, smooth=True))
  starts = 25_000 * np.arange(8)
  np.testing.assert_allclose(smooth(starts), stepped(starts), rtol=1e-6)
  middle = smooth(starts + 12_500) / stepped(starts + 12_500)
  np.testing.assert_allclose(middle, np.full(8, 2**-0.5), rtol=1e-6)
  path = smooth(jnp.arange(0, 200_000, 1_000))
  assert np.all(np.diff(path) < 0)


def test_gaps_too_small_for_float32_are_refused_before_the_run():
  recipe = dict(q=2.0, stage_images=100, batch_size=10)
  last = schedules.relative_gap(**recipe, total_images=1_700)
  # Stage 17 of a run of 17 stages: 2^-18, where r = t (1 - 5 gap) still differs.
  gap = float(last(170))
  assert gap == 2.0**-18
  assert np.float32(1.0) * (1 - np.float32(gap)) < 1.0
  with pytest.raises(ValueError, match=r'2\.0\^-19, .*stage_images above 100'):
    schedules.relative_gap(**recipe, total_images=1_800)
  with pytest.raises(ValueError, match=r'256\.0\^-3'):
    schedules.relative_gap(
      q=256.0, stage_images=100, batch_size=10, smooth=True, total_images=200
    )


# Start rate, end scale, and by step: N(k) with the target's rate as the released code
# has it, which divides by N(k) - 1 where the paper divides by N(k).
CURRICULA = {
  'cifar10': (
    0.9,
    150,
    {
      0: (2, 0.81),
      1: (3, 0.9),
      100: (3, 0.9),
      8_000: (16, 0.98605),
      80_000: (48, 0.99553),
      400_000: (107, 0.99801),
      740_000: (146, 0.99855),
      800_000: (151, 0.99860),
      1_200_000: (151, 0.99860),  # past the end
    },
  ),
  'imagenet64': (
    0.95,
    200,
    {
      0: (2, 0.9025),
      8_000: (21, 0.99488),
      80_000: (64, 0.99837),
      400_000: (143, 0.99928),
      800_000: (201, 0.99949),
      1_200_000: (201, 0.99949),
    },
  ),
  'lsun': (
    0.95,
    150,
    {80_000: (48, 0.99782), 400_000: (107, 0.99903), 800_000: (151, 0.99932)},
  ),
}


@pytest.mark.parametrize('name', CURRICULA)
def test_adaptive_curriculum_has_the_published_values(name):
  start_decay, end, table = CURRICULA[name]
  run = dict(start=2, end=end, batch_size=512, total_images=512 * 800_000)
  steps = jnp.array(list(table))
  bins, released = np.array(list(table.values())).T
  np.testing.assert_array_equal(
    jax.jit(schedules.adaptive_num_scales(**run))(steps), bins
  )
  schedule = schedules.adaptive_decay(start_decay=start_decay, **run)
  rate = np.asarray(jax.jit(schedule)(steps), np.float64)
  # exp(s0 ln(mu0) / N(k)): the paper's, so that it starts at mu0. Float32.
  np.testing.assert_allclose(rate, start_decay ** (2 / bins), atol=2e-7)
  # Printed to five digits.
  schedule = schedules.adaptive_decay(start_decay=start_decay, as_released=True, **run)
  np.testing.assert_allclose(jax.jit(schedule)(steps), released, atol=6e-6)


def test_adaptive_num_scales_are_integers_and_never_fall():
  bins = np.asarray(
    jax.jit(
      schedules.adaptive_num_scales(
        start=2, end=150, batch_size=512, total_images=512_000
      )
    )(jnp.arange(1_100))
  )
  np.testing.assert_array_equal(bins, np.round(bins))
  assert np.all(np.diff(bins) >= 0)
  assert (bins[0], bins[-1]) == (2, 151)


@PLAIN_AND_COMPILED
@pytest.mark.parametrize('iterations', [400_000, 800_000])
def test_doubling_num_scales_are_those_of_ict_in_eight_equal_stages(
  iterations, compiled
):
  schedule = compiled(
    schedules.doubling_num_scales(batch_size=1024, total_images=1024 * iterations)
  )
  length = iterations // 8
  for stage, n in enumerate([11, 21, 41, 81, 161, 321, 641, 1281]):
    within = stage * length + np.array([0, 1, length // 2, length - 1])
    np.testing.assert_array_equal(schedule(within), np.full(4, n))
  past = schedule(np.array([iterations, 2 * iterations]))
  np.testing.assert_array_equal(past, [1281, 1281])


@pytest.mark.parametrize(('start', 'end'), [(10, 10), (3, 24), (1, 2)])
def test_doubling_bins_spend_as_long_at_each_number_up_to_the_end(start, end):
  schedule = schedules.doubling_num_scales(
    start=start, end=end, batch_size=7, total_images=7 * 1200
  )
  bins, steps = np.unique(schedule(jnp.arange(1_200)), return_counts=True)
  assert (bins[0], bins[-1]) == (start + 1, end + 1)
  np.testing.assert_array_equal(np.diff(bins), bins[:-1] - 1)
  np.testing.assert_array_equal(steps, np.full(len(bins), 1_200 / len(bins)))


# Stages of progressive distillation ------------------------------------------------


def test_steps_are_halved_at_each_stage_down_to_one():
  schedule = schedules.halving_steps(start=4096, stage_images=50_000 * 8, batch_size=8)
  steps = jnp.asarray(
    [50_000 * stage + within for stage in range(14) for within in (0, 49_999)]
  )
  expected = np.repeat([*(4096 // 2 ** np.arange(13)), 1], 2)
  np.testing.assert_array_equal(jax.jit(schedule)(steps), expected)


def test_steps_that_are_no_power_of_two_are_halved_downwards():
  schedule = schedules.halving_steps(start=18, stage_images=10, batch_size=1)
  stages = schedule(10 * jnp.arange(7))
  np.testing.assert_array_equal(stages, [18, 9, 4, 2, 1, 1, 1])


def test_the_target_is_copied_in_the_step_before_the_number_of_steps_falls():
  stages = dict(stage_images=100, batch_size=8)  # no whole number of steps
  every = jnp.arange(60)
  rate = np.asarray(jax.jit(schedules.copy_at_stages(**stages))(every))
  steps = np.asarray(schedules.halving_steps(start=1024, **stages)(every))
  assert set(rate) == {0.0, 1.0}
  np.testing.assert_array_equal(rate[:-1] == 0, np.diff(steps) < 0)
  np.testing.assert_array_equal(np.flatnonzero(rate == 0), [11, 23, 35, 47, 59])


def test_a_stage_starts_at_the_peak_and_falls_linearly_to_zero():
  schedule = schedules.stage_decay(peak=0.2, stage_images=100, batch_size=8)
  rate = np.asarray(jax.jit(schedule)(jnp.arange(36)))
  one = 0.2 * (1 - np.arange(12) / 12)
  np.testing.assert_allclose(rate, np.tile(one, 3), **F32)


@pytest.mark.parametrize(
  ('schedule', 'values'),
  [
    (schedules.halving_steps, dict(start=0, stage_images=10)),
    (schedules.halving_steps, dict(start=8, stage_images=9)),
    (schedules.copy_at_stages, dict(stage_images=9)),
    (schedules.stage_decay, dict(peak=0.1, stage_images=0)),
  ],
)
def test_stages_without_a_step_are_refused(schedule, values):
  with pytest.raises(ValueError, match=r'start must|stage_images'):
    schedule(**values, batch_size=10)


def test_more_stages_than_steps_are_refused():
  with pytest.raises(ValueError, match=r'8 stages do not fit in 7 steps'):
    schedules.doubling_num_scales(batch_size=10, total_images=79)
  schedules.doubling_num_scales(batch_size=10, total_images=80)


@pytest.mark.parametrize(
  ('schedule', 'values'),
  [
    (schedules.doubling_num_scales, dict(start=3, end=2, total_images=10)),
    (schedules.adaptive_num_scales, dict(start=3, end=2, total_images=10)),
  ],
)
def test_bins_that_end_before_they_start_are_refused(schedule, values):
  with pytest.raises(ValueError, match='needs start <= end'):
    schedule(**values, batch_size=1)


@pytest.mark.parametrize('relative_std', [0.0, 0.29, 0.4])
def test_power_profiles_that_do_not_exist_are_refused(relative_std):
  with pytest.raises(ValueError, match='relative_std'):
    schedules.power(relative_std=relative_std)
