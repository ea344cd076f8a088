"""Fields: straight paths, the flow they average to, and its estimate from examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import fields, oracles, process
from cmjax.core import expand
from cmjax.data.points import points
from cmjax.data.reference import reference
from cmjax.data.source import Source, as_uint8, as_x0, one_hot

TRIGFLOW = process.trigflow(1.0)
MIXTURE = oracles.Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[0.7, 0.1], [-0.5, 0.4], [0.0, -0.6]]),
  np.array([0.3, 0.25, 0.4]),
)


def draws():
  rng = np.random.default_rng(0)
  x0, z, x = (jnp.asarray(v) for v in rng.normal(size=(3, 4, 2)))
  return x0, z, x, jnp.asarray([0.05, 0.3, 0.8, 1.5])


def test_conditional_is_the_noise_for_ve_wherever_x_is(x64):
  x0, z, x, t = draws()
  field = fields.conditional(process.VE, x0, z)
  np.testing.assert_array_equal(field(x, t), z)
  np.testing.assert_array_equal(field(x + 1, 2 * t), z)


def test_conditional_follows_its_own_path(x64):
  x0, z, x, t = draws()
  field = fields.conditional(TRIGFLOW, x0, z)
  rotated = expand(jnp.cos(t), z) * z - expand(jnp.sin(t), x0) * x0
  # The derivative of cos t x0 + sin t z, one rounding a term.
  np.testing.assert_allclose(field(x, t), rotated, rtol=1e-13, atol=1e-15)


def test_conditional_is_unbiased_for_the_flow_given_x(x64):
  data, _, x, t = draws()
  # By Bayes' rule on a finite data set, with no sampling: x at time t came from data i
  # with noise (x - data_i) / t and with probability proportional to its density.
  noise = (x[:, None] - data[None]) / t[:, None, None]
  log_density = -jnp.sum(noise**2, axis=2) / 2
  posterior = np.asarray(jax.nn.softmax(log_density, axis=1))
  own = jax.vmap(lambda x0, z: fields.conditional(process.VE, x0, z)(x, t), (1, 1), 1)
  mean = np.einsum('bi,bid->bd', posterior, own(jnp.tile(data, (4, 1, 1)), noise))
  flow = oracles.field(oracles.points(np.asarray(data)))(x, t)
  # At t = 0.05 the exponents reach 1e3, so that their rounding reaches 1e-12.
  np.testing.assert_allclose(mean, flow, rtol=1e-11, atol=1e-11)


def test_probability_flow_of_a_gaussian_has_its_closed_form(x64):
  _, _, x, t = draws()
  mean, std = np.array([0.3, -0.2]), 0.4
  oracle = oracles.gaussian(mean, std)
  flow = fields.probability_flow(
    process.VE, lambda x, t: oracles.denoiser(oracle, x, t)
  )
  exact = expand(t / (std**2 + t**2), x) * (x - mean[None])
  # The field divides a difference by t >= 0.05.
  np.testing.assert_allclose(flow(x, t), exact, rtol=1e-12, atol=1e-13)
  np.testing.assert_array_equal(oracles.field(oracle)(x, t), flow(x, t))


@pytest.mark.parametrize(
  'path', [process.LINEAR, process.trigflow(0.5)], ids=['linear', 'trigflow']
)
@pytest.mark.parametrize(
  'oracle', [oracles.gaussian(np.array([0.3, -0.2]), 0.4), MIXTURE], ids=['one', 'many']
)
def test_probability_flow_of_another_process_follows_the_exact_map(path, oracle, x64):
  _, _, x, t = draws()
  flow = fields.probability_flow(path, lambda x, t: oracles.denoiser(oracle, x, t))

  @jax.jit
  def carried(s):  # the exact path at noise level s, on the other process's clock
    moved = oracles.consistency(oracle, x, t, sigma_end=s, num_steps=256)
    return process.change_process(process.VE, path, moved, jnp.full(4, s))

  (x_s, at), (x_rate, clock_rate) = jax.jvp(carried, (0.7,), (1.0,))
  slope = x_rate / expand(clock_rate, x)
  assert np.min(np.linalg.norm(slope, axis=1)) > 0.01
  # The integrator's error for 256 steps; the map of one Gaussian is in closed form.
  np.testing.assert_allclose(flow(x_s, at), slope, rtol=1e-8, atol=1e-8)


# Teachers, and a model's own flow --------------------------------------------------


def labelled(calls):
  """A model that depends on the labels and records them."""

  def model(params, x, t, cond, *, key=None):
    assert key is None
    calls.append(cond)
    return params * x / (1 + expand(t, x)) + jnp.sum(cond, axis=1, keepdims=True)

  return model


def test_guidance_extrapolates_from_the_unconditional_denoiser(x64):
  _, _, x, t = draws()
  calls, cond = [], jnp.eye(4)
  teacher = labelled(calls)
  found = fields.teacher_denoiser(teacher, 2.0, cond, guidance=1.5)(x, t)
  assert len(calls) == 2
  assert sorted(float(jnp.sum(c)) for c in calls) == [0.0, 4.0]
  free = 2 * np.asarray(x) / (1 + np.asarray(t)[:, None])
  # D_u + 1.5 (D_u + 1 - D_u), a few roundings.
  np.testing.assert_allclose(found, free + 1.5, rtol=1e-13)
  none = fields.teacher_denoiser(teacher, 2.0, cond, guidance=0.0)(x, t)
  np.testing.assert_allclose(none, free, rtol=1e-13)


def test_guidance_of_one_is_the_teacher_to_the_bit_in_one_evaluation():
  _, _, x, t = draws()
  calls, cond = [], jnp.eye(4)
  teacher = labelled(calls)
  found = fields.teacher_denoiser(teacher, 2.0, cond, guidance=1.0)(x, t)
  assert len(calls) == 1
  np.testing.assert_array_equal(found, teacher(2.0, x, t, cond))
  # Written out, D_u + (D_c - D_u) differs by its roundings.
  plain, free = (fields.teacher_denoiser(teacher, 2.0, c) for c in (cond, 0 * cond))
  # Numbers up to 3 in float32.
  np.testing.assert_allclose(fields.guided(plain, free, 1.0)(x, t), found, atol=1e-6)


def test_guidance_without_labels_is_refused():
  with pytest.raises(ValueError, match=r'guidance=1\.5 needs labels'):
    fields.teacher_denoiser(labelled([]), 2.0, None, guidance=1.5)


def test_model_velocity_is_the_average_velocity_over_no_time():
  _, _, x, t = draws()
  seen = {}

  def average_velocity(params, x, t, r, cond, *, key=None):
    seen.update(params=params, t=t, r=r, cond=cond, key=key)
    return x * params

  found = fields.model_velocity(average_velocity, 3.0, 'cond', 'key')(x, t)
  np.testing.assert_array_equal(found, 3 * x)
  np.testing.assert_array_equal(seen.pop('t'), t)
  np.testing.assert_array_equal(seen.pop('r'), t)
  assert seen == dict(params=3.0, cond='cond', key='key')


# The stable target -----------------------------------------------------------------

SIZES = (11, 7, 5)  # examples of a class
SHAPE = (3, 2)


def stored_examples(conditional=True, kind='uint8', seed=0):
  """A source of random examples, classes mixed."""
  draw = np.random.default_rng(seed)
  labels = draw.permutation(np.repeat(np.arange(3), SIZES))
  examples = draw.integers(0, 256, (sum(SIZES), *SHAPE)).astype(np.uint8)
  offset, scale = 127.5, 1 / 127.5
  if kind == 'float32':
    examples = (examples.astype(np.float32) - offset) * np.float32(scale)
    offset, scale = 0.0, 1.0
  return Source(
    'noise',
    examples,
    labels if conditional else None,
    3 * conditional,
    -np.inf,
    np.inf,
    offset,
    scale,
    False,
  )


def noisy(source, index, t, seed=1):
  """x0 and x_t of some examples, one of them not as stored but mirrored."""
  x0 = np.asarray(as_x0(source, source.examples[index]), float)
  x0[0] = x0[0, ::-1]
  z = np.random.default_rng(seed).normal(size=x0.shape)
  return jnp.asarray(x0), jnp.asarray(x0 + t[:, None, None] * z)


def stable(source, x0, x, t, index, block_size=4, sigma_threshold=0.0, **keywords):
  kept = fields.Reference(*map(jnp.asarray, reference(source, **keywords)))
  index = np.asarray(index)
  cond = None if source.labels is None else jnp.asarray(one_hot(source, index))
  denoiser = fields.stable_denoiser(
    kept,
    x0,
    cond,
    jnp.asarray(index),
    sigma_threshold=sigma_threshold,
    block_size=block_size,
  )
  return np.asarray(jax.jit(denoiser)(x, jnp.asarray(t, x.dtype)))


def brute_force(source, x0, x, t, index, kept=None):
  """The softmax over each row's class, own x0 in the place of its stored copy."""
  everything = np.asarray(as_x0(source, source.examples), float)
  labels = np.zeros(len(everything)) if source.labels is None else source.labels
  kept = range(len(everything)) if kept is None else kept
  means = []
  for row, own, at, level in zip(np.asarray(x), np.asarray(x0), index, t):
    others = [i for i in kept if labels[i] == labels[at] and i != at]
    members = np.concatenate([own[None], everything[others]])
    logits = -np.sum((row - members) ** 2, axis=(1, 2)) / (2 * level**2)
    weights = np.exp(logits - logits.max())
    means.append(np.tensordot(weights / weights.sum(), members, 1))
  return np.array(means)


INDEX = np.array([0, 3, 8, 13, 17, 22, 5])
LEVELS = np.array([0.05, 0.2, 0.5, 1.0, 3.0, 30.0, 0.7])


@pytest.mark.parametrize('conditional', [False, True], ids=['all', 'by class'])
@pytest.mark.parametrize('block_size', [1, 4, 1000])
def test_stable_denoiser_is_the_softmax_over_the_class(conditional, block_size, x64):
  source = stored_examples(conditional, 'float32')
  x0, x = noisy(source, INDEX, LEVELS)
  exact = brute_force(source, x0, x, LEVELS, INDEX)
  found = stable(source, x0, x, LEVELS, INDEX, block_size)
  np.testing.assert_allclose(found, exact, atol=1e-12)  # exponents of 1e3, float64
  x0, x = x0.astype(jnp.float32), x.astype(jnp.float32)
  rough = stable(source, x0, x, LEVELS, INDEX, block_size)
  assert rough.dtype == np.float32
  # Measured 3e-7. Where two examples have a share the exponents are of order one.
  np.testing.assert_allclose(rough, exact, atol=3e-6)


def test_stable_denoiser_in_float32_holds_for_whole_images():
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (64, 3072)).astype(np.uint8)
  source = stored_examples(False)._replace(examples=images)
  index, t = np.arange(6), np.array([3.0, 5.0, 10.0, 20.0, 40.0, 80.0])
  x0 = as_x0(source, images[index])
  x = x0 + t[:, None].astype(np.float32) * draw.normal(size=x0.shape).astype('f4')
  members = as_x0(source, images).astype(float)
  offset = x.astype(float)[:, None] - members[None]
  logits = -np.sum(offset**2, axis=2) / (2 * t[:, None] ** 2)
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  exact = weights / weights.sum(axis=1, keepdims=True) @ members
  found = stable(source, jnp.asarray(x0), jnp.asarray(x), t, index, 16)
  assert np.max(np.abs(exact[3:] - x0[3:])) > 0.1  # more than one example has a share
  np.testing.assert_allclose(found, exact, atol=5e-6)  # measured 5e-7


def test_stored_floats_and_bytes_give_the_same(x64):
  found = []
  for kind in ('uint8', 'float32'):
    source = stored_examples(kind=kind)
    x0, x = noisy(stored_examples(), INDEX, LEVELS)
    found.append(stable(source, x0, x, LEVELS, INDEX))
  # The examples differ by how float32 rounds (byte - 127.5) / 127.5.
  np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_stable_denoiser_over_the_whole_set_is_its_exact_denoiser(x64):
  source = stored_examples(conditional=False, kind='float32')
  index = np.arange(sum(SIZES))
  t = np.geomspace(0.1, 100.0, len(index))
  points = jnp.asarray(source.examples.reshape(len(index), -1), float)
  z = np.random.default_rng(2).normal(size=points.shape)
  x = points + t[:, None] * z
  found = stable(
    source, jnp.reshape(points, (-1, *SHAPE)), jnp.reshape(x, (-1, *SHAPE)), t, index
  )
  exact = oracles.denoiser(oracles.points(np.asarray(points)), x, jnp.asarray(t))
  # Exponents of 1e3 in float64.
  np.testing.assert_allclose(found.reshape(exact.shape), exact, atol=1e-12)


def test_stable_denoiser_over_one_example_is_the_example_to_the_bit():
  source = stored_examples()._replace(labels=np.arange(sum(SIZES)), classes=sum(SIZES))
  x0, x = (v.astype(jnp.float32) for v in noisy(source, INDEX, LEVELS))
  found = stable(source, x0, x, LEVELS, INDEX)
  np.testing.assert_array_equal(found, x0)  # the mirrored one as it was mirrored


def test_the_own_example_counts_once_whether_stored_or_not(x64):
  source = stored_examples(conditional=False)
  kept = np.flatnonzero(reference(source, per_class=6, seed=3).slots >= 0)
  assert len(kept) == 6
  absent = np.setdiff1d(np.arange(sum(SIZES)), kept)
  for index in (kept, absent[:6]):
    t = np.full(6, 0.8)
    x0, x = noisy(source, index, t)
    found = stable(source, x0, x, t, index, per_class=6, seed=3)
    exact = brute_force(source, x0, x, t, index, kept)
    np.testing.assert_allclose(found, exact, atol=1e-7)  # as above
    twice = brute_force(source, x0, x, t, absent[:6], kept)  # or left in, if stored
    assert (np.max(np.abs(found - twice)) > 1e-3) == (index is kept)


@pytest.mark.parametrize('block_size', [4, 1000])
def test_no_weight_leaks_to_another_class(block_size):
  source = stored_examples()
  x0, x = (v.astype(jnp.float32) for v in noisy(source, INDEX, LEVELS))
  found = stable(source, x0, x, LEVELS, INDEX, block_size)
  label = source.labels[INDEX[2]]
  changed = source.examples.copy()  # as bytes x_t itself is the nearest there can be
  changed[source.labels != label] = as_uint8(
    source._replace(low=0.0, high=255.0), np.asarray(x[2])
  )
  again = stable(source._replace(examples=changed), x0, x, LEVELS, INDEX, block_size)
  same = source.labels[INDEX] == label
  assert 0 < np.sum(same) < len(INDEX)
  np.testing.assert_array_equal(found[same], again[same])
  assert not np.array_equal(found[~same], again[~same])


def test_at_and_below_the_threshold_it_is_the_own_example_to_the_bit():
  source = stored_examples()
  x0, x = (v.astype(jnp.float32) for v in noisy(source, INDEX, LEVELS))
  found = stable(source, x0, x, LEVELS, INDEX, sigma_threshold=0.5)
  below = LEVELS <= 0.5
  np.testing.assert_array_equal(found[below], np.asarray(x0)[below])
  above = stable(source, x0, x, LEVELS, INDEX)[~below]
  np.testing.assert_array_equal(found[~below], above)
  assert np.max(np.abs(above - np.asarray(x0)[~below])) > 0.1


def test_far_away_it_is_the_mean_of_the_class(x64):
  source = stored_examples()
  t = np.full(len(INDEX), 1e4)
  x0, x = noisy(source, INDEX, t)
  x0 = jnp.asarray(as_x0(source, source.examples[INDEX]), float)  # none mirrored
  found = stable(source, x0, x, t, INDEX)
  everything = np.asarray(as_x0(source, source.examples), float)
  means = np.array([everything[source.labels == k].mean(0) for k in range(3)])
  # Weights differ from equal ones by z (x_i - x_j) / t ~ 1e-4 of themselves.
  np.testing.assert_allclose(found, means[source.labels[INDEX]], atol=5e-4)


def test_the_target_varies_less_the_more_examples_it_averages_over(x64):
  draw = np.random.default_rng(0)
  mode = oracles.gaussian(np.zeros(2), 0.5)
  pool = oracles.sample(mode, jax.random.key(0), 4096)
  source = points(oracle=mode)._replace(examples=np.asarray(pool))
  n, level = 512, 1.0
  x0 = jnp.asarray(0.5 * draw.normal(size=(n, 2)))
  x = x0 + level * jnp.asarray(draw.normal(size=(n, 2)))
  t = np.full(n, level)
  exact = oracles.denoiser(mode, x, jnp.asarray(t))
  errors = [np.mean(np.sum((x0 - exact) ** 2, axis=1))]
  for size in (4, 32, 256, 1024):
    drawn = reference(source, per_class=size)
    outside = np.flatnonzero(drawn.slots < 0)[:n]  # none of the rows is stored
    found = stable(source, x0, x, t, outside, 1000, per_class=size)
    errors.append(np.mean(np.sum((found - exact) ** 2, axis=1)))
  # The own example alone has the posterior's variance; standard error 4 %.
  posterior = 2 * 0.5**2 * level**2 / (0.5**2 + level**2)
  np.testing.assert_allclose(errors[0], posterior, rtol=0.2)
  assert np.all(np.diff(errors) < 0)
  assert errors[-1] < 0.01 * errors[0]


@pytest.mark.parametrize('conditional', [False, True], ids=['all', 'by class'])
@pytest.mark.parametrize('kind', ['uint8', 'float32'])
def test_a_block_at_a_time_is_in_memory(kind, conditional):
  rows, size, features, block = 16, 4096, 64, 32
  source = stored_examples(conditional)._replace(
    examples=np.zeros((size, features), kind),
    labels=np.arange(size) % 4 if conditional else None,
    classes=4 * conditional,
  )
  kept = fields.Reference(*map(jnp.asarray, reference(source)))

  def mean(reference, x, t, x0, cond, index):
    return fields.stable_denoiser(
      reference, x0, cond, index, sigma_threshold=0.0, block_size=block
    )(x, t)

  x, t, index = jnp.ones((rows, features)), jnp.ones(rows), jnp.arange(rows)
  cond = jnp.eye(4)[index % 4] if conditional else None
  compiled = jax.jit(mean).lower(kept, x, t, x, cond, index).compile()
  needed = compiled.memory_analysis().temp_size_in_bytes
  # A block of floats a row, and as much again for what is small beside it; neither
  # rows x size x features, 512 blocks, nor the set as floats, 8.
  assert needed < 2 * 4 * rows * block * features
