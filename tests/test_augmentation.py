"""EDM's augmentation beside NVlabs/edm, its exact cases, and its place in a run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax import augmentation, config, core, main, times
from cmjax.augmentation import Transforms
from cmjax.objectives import denoise
from cmjax.runtime import pretrained, sharding
from cmjax.runtime.checkpoint import save_weights
from cmjax.runtime.run import prepare
from tests.conftest import ROOT

GOLDEN = np.load(ROOT / 'tests' / 'golden' / 'augmentation.npz')
IMAGES = jnp.asarray(GOLDEN['x0'])
EDM = augmentation.edm(p=0.5)


def some(**changes):
  """The transforms of two images that change only what is named."""
  none = jnp.zeros(2, bool)
  zeros = dict.fromkeys(('scale', 'angle', 'stretch', 'direction'), jnp.zeros(2))
  given = dict(flip_x=none, flip_y=none, shift=jnp.zeros((2, 2)), **zeros)
  return Transforms(**given | {k: jnp.asarray(v) for k, v in changes.items()})


def smooth(size=32):
  """Two images without detail, f32[2, size, size, 1], whose axes differ."""
  y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing='ij')
  waves = [np.cos(np.pi * x) * np.cos(2 * np.pi * y), np.cos(np.pi * y) + 0.5 * x**2]
  return jnp.asarray(np.stack(waves)[..., None], jnp.float32)


def test_images_and_labels_are_those_of_edm():
  rows = jnp.asarray(GOLDEN['draws'])
  transforms = Transforms(rows[:, 0] > 0, rows[:, 1] > 0, *rows[:, 2:6].T, rows[:, 6:])
  images, labels = jax.jit(augmentation.transform)(transforms, IMAGES)
  # Measured 4.1e-6: positions of up to 60 pixels in float32; labels are equal.
  np.testing.assert_allclose(images, GOLDEN['output'], atol=2e-5)
  np.testing.assert_allclose(labels, GOLDEN['labels'], atol=1e-6)


def test_nothing_changes_at_p_0():
  images, labels = augmentation.edm(p=0)(jax.random.key(0), IMAGES)
  np.testing.assert_array_equal(images, IMAGES)
  assert labels.shape == (len(IMAGES), 9)
  assert not labels.any()


def test_flips_are_exact():
  flips = some(flip_x=[True, True], flip_y=[False, True])
  images, labels = augmentation.transform(flips, IMAGES[:2])
  np.testing.assert_array_equal(images[0], IMAGES[0, :, ::-1])
  np.testing.assert_array_equal(images[1], IMAGES[1, ::-1, ::-1])
  np.testing.assert_array_equal(labels, [[1] + [0] * 8, [1, 1] + [0] * 7])


def test_a_shift_by_whole_pixels_moves_right_and_down():
  x = IMAGES[:2, :8, :8]  # an eighth is one pixel
  images, labels = augmentation.transform(some(shift=[[1.0, 0.0], [0.0, 2.0]]), x)
  # Measured 4e-7: the filters for magnification and reduction are orthogonal.
  np.testing.assert_allclose(images[0, :, 1:], x[0, :, :-1], atol=3e-6)
  np.testing.assert_allclose(images[1, 2:], x[1, :-2], atol=3e-6)
  np.testing.assert_allclose(images[0, :, 0], x[0, :, 1], atol=3e-6)  # reflected
  np.testing.assert_array_equal(labels[:, 7:], [[1, 0], [0, 2]])


def test_a_quarter_turn_is_anticlockwise():
  x = smooth()
  angles = np.array([0.5, -0.5], np.float32) * np.pi
  images, labels = augmentation.transform(some(angle=angles), x)
  expected = np.stack([np.rot90(x[0]), np.rot90(x[1], -1)])
  np.testing.assert_allclose(images, expected, atol=0.02)
  np.testing.assert_allclose(labels[:, 3:5], [[-1, 1], [-1, -1]], atol=1e-6)


def test_scale_and_stretch_magnify():
  """Against the image at the positions from which each pixel comes."""
  size, middle = 32, slice(12, 20)
  x = smooth(size)
  at = np.arange(size) - (size - 1) / 2
  down, right = np.meshgrid(at, at, indexing='ij')

  def image(down, right):
    position = [(v + size / 2) / size for v in (down, right)]
    return np.cos(np.pi * position[1]) * np.cos(2 * np.pi * position[0])

  for changes, (tall, wide) in {
    ('scale', 5.0): (2.0, 2.0),
    ('stretch', 5.0): (0.5, 2.0),
  }.items():
    name, value = changes
    made = augmentation.transform(some(**{name: np.full(2, value, 'f4')}), x)[0]
    expected = image(down / tall, right / wide)[middle, middle]
    np.testing.assert_allclose(made[0, middle, middle, 0], expected, atol=0.01)
  # Along an axis that is turned by a quarter, the other way round.
  turned = some(stretch=np.full(2, 5.0), direction=np.full(2, np.pi / 2))
  made, labels = augmentation.transform(turned, x)
  expected = image(down / 2.0, right / 0.5)[middle, middle]
  np.testing.assert_allclose(made[0, middle, middle, 0], expected, atol=0.01)
  np.testing.assert_allclose(labels[0, 5:7], [0, 5], atol=1e-5)


def test_draws_have_their_probabilities():
  size, p = 40_000, 0.12
  drawn = augmentation.draw(jax.random.key(0), size, p)
  shares = [jnp.mean(jnp.reshape(a != 0, (size, -1))[:, 0]) for a in drawn]
  expected = np.array([0.5, p / 2, p, p, p, 0.5, p])
  # Four standard errors.
  bounds = 4 * np.sqrt(expected * (1 - expected) / size)
  assert np.all(np.abs(np.array(shares) - expected) < bounds)
  for values in (drawn.scale, drawn.stretch, drawn.shift[:, 1]):
    chosen = values[values != 0]
    np.testing.assert_allclose([chosen.mean(), chosen.std()], [0, 1], atol=0.06)
  for values in (drawn.angle, drawn.direction):
    chosen = values[values != 0]
    np.testing.assert_allclose(chosen.std(), np.pi / 3**0.5, atol=0.06)
    assert np.abs(chosen).max() <= np.pi
  together = np.corrcoef(np.stack([a != 0 for a in drawn[:6]]))
  assert np.abs(together - np.eye(6)).max() < 4 / size**0.5


def test_an_image_does_not_depend_on_its_batch():
  drawn = augmentation.draw(jax.random.key(2), len(IMAGES), 0.8)
  images, labels = augmentation.transform(drawn, IMAGES)
  for i in (0, 5):
    alone = augmentation.transform(
      *jax.tree.map(lambda a, i=i: a[i : i + 1], (drawn, IMAGES))
    )
    # Measured 2e-7: another order of sums.
    np.testing.assert_allclose(alone[0][0], images[i], atol=3e-6)
    np.testing.assert_allclose(alone[1][0], labels[i], atol=1e-6)


def test_eight_devices_give_the_images_of_one():
  key = jax.random.key(3)
  alone = jax.jit(EDM)(key, IMAGES)
  split = jax.device_put(IMAGES, sharding.by_example(sharding.data_mesh()))
  compiled = jax.jit(EDM).lower(key, split).compile()
  for a, b in zip(alone, compiled(key, split)):
    np.testing.assert_allclose(a, b, atol=3e-6)
  assert 'all-gather' not in compiled.as_text()


def test_the_loss_is_that_of_augmented_images_and_labels():
  seen = []

  def f(params, x, t, cond, *, key=None):
    seen.append(cond)
    return params * x

  def keys():
    return core.streams(jax.random.key(1), 0)

  draw = times.lognormal(mean=0.0, std=1.0)
  augmented = denoise.edm(f, times=draw, augmentation=EDM)
  x0, labels = EDM(keys()['augmentation'], IMAGES)
  classes = jax.nn.one_hot(jnp.arange(8) % 3, 3)
  nets = core.Nets(0.5)
  out = augmented(nets, core.Batch(IMAGES, classes), 0, keys())
  plain = denoise.edm(f, times=draw)(nets, core.Batch(x0, classes), 0, keys())
  np.testing.assert_array_equal(out.loss, plain.loss)
  np.testing.assert_array_equal(seen[0], np.concatenate([classes, labels], axis=1))
  augmented(nets, core.Batch(IMAGES, None), 0, keys())
  np.testing.assert_array_equal(seen[-1], labels)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (['network.augment=0'], '10 columns of labels, and may have 0 more'),
    (['network.augment=4'], 'may have 4 more of an augmentation'),
    (['objective.augmentation.p=1.5'], r'augmentation: p must be in \[0, 1\]'),
    (['objective.augmentation.q=1'], 'q: cmjax.augmentation:edm has no such key'),
    (['objective.augmentation=edm'], 'has keys of its own'),
  ],
)
def test_a_mistake_is_one_line(changes, message, tmp_path, capfd):
  path = tmp_path / 'augmented.py'
  path.write_text(CONFIG)
  flags = ['--mode=dry_run', *(f'--config.{change}' for change in changes)]
  assert main.main([f'--config={path}', *flags]) == 2
  error = capfd.readouterr().err.strip().splitlines()[-1]
  assert re.search(message, error), error


CONFIG = """
from cmjax.configs import edm, parts

def get_config():
  c = edm.get_config('digits')
  c.network = parts.ddpmpp(dropout=0.0) | dict(
    channels=8, channel_mult=(1, 1), num_blocks=1, attention_resolutions=(), augment=9
  )
  c.objective.augmentation = parts.augmentation(0.5)
  c.batch_size = 16
  c.total_images = 32
  c.metrics, c.sample_weights = {}, 'online'
  c.every.picture_steps = 0
  return c
"""


def some_values(a):
  values = np.random.default_rng(a.size).normal(size=a.shape) * 0.2
  return jax.device_put(values.astype(a.dtype), a.sharding)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, one_device):
  """Runs with 9 and 0 inputs for an augmentation, and their checkpoints."""
  runs = {}
  for augment in (9, 0):
    path = tmp_path_factory.mktemp('config') / 'augmented.py'
    path.write_text(CONFIG)
    loaded = config.load(str(path), network=dict(augment=augment))
    if not augment:
      loaded.objective.augmentation = None
    made = prepare(loaded, one_device)
    workdir = tmp_path_factory.mktemp('run')
    params = jax.tree.map(some_values, made.abstract_params())
    save_weights(workdir, 1, params, made.meta())
    runs[augment] = made, workdir
  return runs


def test_a_student_without_augmentation_starts_from_a_teacher_with_it(prepared):
  """And the reverse: labels of zero, which are those of sampling, change nothing."""
  x, sigma = jnp.ones((2, 8, 8, 1)), jnp.array([0.5, 3.0])
  labels = jax.nn.one_hot(jnp.arange(2), 10)
  for ours, theirs in ((0, 9), (9, 0), (9, 9)):
    run, (teacher, folder), said = prepared[ours][0], prepared[theirs], []
    like = run.abstract_params()
    params, _ = pretrained.load_weights(folder, like, said.append)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    assert any('map_augment' in line for line in said) == (ours < theirs)
    original = pretrained.load(folder, mesh=run.mesh)
    np.testing.assert_array_equal(
      run.f(params, x, sigma, labels), teacher.f(original.params, x, sigma, labels)
    )
  kernel = pretrained.load_weights(prepared[9][1], like)[0]['map_augment']['kernel']
  assert kernel.any()
