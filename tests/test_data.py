"""Batches as a pure function of the step, sources, and the faults a user can make."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from cmjax import data, oracles
from cmjax.core import UserError
from tests.conftest import ROOT

TFDS_COPY = os.environ.get(data.DATA_DIR_VARIABLE, '')


def source(n=10, conditional=True, flip=False, seed=0):
  """Example i is marked by its first pixel and its label, both i."""
  images = np.random.default_rng(seed).integers(0, 256, (n, 4, 6, 3), np.uint8)
  images[:, 0, 0, 0] = np.arange(n)
  labels = np.arange(n) if conditional else None
  return data.Source(
    'noise', images, labels, n if conditional else 0, 0, 255, 127.5, 1 / 127.5, flip
  )


def numbers(source, batch):
  """Which examples a batch holds."""
  return data.as_uint8(source, batch.x0)[:, 0, 0, 0]


def test_blank_images_take_no_memory_and_make_batches():
  blank = data.blank(size=64, classes=1000, examples=1_281_167)
  assert blank.shape == (64, 64, 3)
  assert blank.examples.strides == (0, 0, 0, 0)
  batch = data.batch_at(blank, 0, 3, 4)
  np.testing.assert_array_equal(batch.x0, np.full((4, 64, 64, 3), -1, np.float32))
  np.testing.assert_array_equal(batch.cond, np.eye(1000, dtype=np.float32)[[0] * 4])
  assert data.batch_at(data.blank(size=8), 0, 0, 2).cond is None
  with pytest.raises(ValueError, match='size=0'):
    data.blank(size=0)


def save_npz(folder, **arrays):
  np.savez(folder / 'set.npz', **arrays)
  return str(folder / 'set.npz')


def save_image(path, size=(6, 4), mode='RGB', value=7):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value if mode == 'L' else (value,) * 3).save(path)


# The batch of a step ---------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone():
  s = source(flip=True)
  first = data.batch_at(s, 3, 5, 4)
  for step in (6, 0, 200):
    data.batch_at(s, 3, step, 4)  # neither the past nor a cache plays a part
  again = data.batch_at(s, 3, 5, 4)
  np.testing.assert_array_equal(first.x0, again.x0)
  np.testing.assert_array_equal(first.cond, again.cond)
  for other in (data.batch_at(s, 4, 5, 4), data.batch_at(s, 3, 6, 4)):
    assert not np.array_equal(first.x0, other.x0)


@pytest.mark.parametrize('batch_size', [1, 5, 4, 7, 23])  # 10 examples
def test_each_example_comes_once_an_epoch_whatever_the_batch_size(batch_size):
  s = source(n=10)
  steps = -(-40 // batch_size)
  seen = [numbers(s, data.batch_at(s, 1, i, batch_size)) for i in range(steps)]
  assert all(len(batch) == batch_size for batch in seen)
  epochs = np.concatenate(seen)[:40].reshape(4, 10)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 4  # each in another order


def test_labels_belong_to_their_examples():
  s = source()
  batch = data.batch_at(s, 0, 3, 8)
  assert (batch.x0.dtype, batch.cond.dtype) == (np.float32, np.float32)
  np.testing.assert_array_equal(batch.cond, np.eye(10)[numbers(s, batch)])
  assert data.batch_at(source(conditional=False), 0, 3, 8).cond is None


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('processes', [2, 4])
def test_shares_of_processes_are_the_batch_of_one(processes, flip):
  s = source(flip=flip)
  for step in (0, 1, 5):  # step 1 crosses an epoch: 10 examples, 8 a batch
    whole = data.batch_at(s, 0, step, 8)
    rows = np.split(np.arange(8), processes)
    shares = [data.batch_at(s, 0, step, 8, own) for own in rows]
    np.testing.assert_array_equal(np.concatenate([b.x0 for b in shares]), whole.x0)
    np.testing.assert_array_equal(np.concatenate([b.cond for b in shares]), whole.cond)


@pytest.mark.parametrize('flip', [False, True])
def test_a_batch_says_which_examples_it_holds(flip):
  s = source(flip=flip)
  for step in (0, 1, 5):  # step 1 crosses an epoch: 10 examples, 8 a batch
    batch = data.batch_at(s, 0, step, 8)
    assert (batch.index.shape, batch.index.dtype) == ((8,), np.int32)
    plain = data.as_x0(s, s.examples[batch.index])
    mirrored = plain[:, :, ::-1] if flip else plain
    for x0, *either in zip(batch.x0, plain, mirrored):
      assert any(np.array_equal(x0, stored) for stored in either)
    rows = np.split(np.arange(8), 2)
    shares = [data.batch_at(s, 0, step, 8, own).index for own in rows]
    np.testing.assert_array_equal(np.concatenate(shares), batch.index)


def test_flip_mirrors_half_of_the_images_left_to_right():
  plain, flipped = source(n=200), source(n=200, flip=True)
  a = data.batch_at(plain, 0, 0, 200).x0
  b = data.batch_at(flipped, 0, 0, 200).x0
  same = np.array([np.array_equal(x, y) for x, y in zip(a, b)])
  mirrored = np.array([np.array_equal(x[:, ::-1], y) for x, y in zip(a, b)])
  np.testing.assert_array_equal(same, ~mirrored)  # all of the image, and only width
  assert 65 < mirrored.sum() < 135  # 100 by 5 standard deviations of sqrt(50)


# Stored values and x0 --------------------------------------------------------------


def test_every_uint8_value_survives_the_round_trip():
  s = source()
  stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  x0 = data.as_x0(s, stored)
  assert (x0.dtype, x0.min(), x0.max()) == (np.float32, -1, 1)
  np.testing.assert_array_equal(data.as_uint8(s, x0), stored)


def test_digits_are_centred_scaled_labelled_and_inside_the_range():
  s = data.digits()
  assert (s.examples.shape, s.classes) == ((1797, 8, 8, 1), 10)
  x0 = data.as_x0(s, s.examples)
  assert abs(x0.mean()) < 1e-5  # float32 sums of 115,008 pixels
  assert x0.std() == pytest.approx(0.5, abs=1e-5)
  assert -1 < x0.min() < -0.4
  assert 0.9 < x0.max() < 1
  assert set(s.labels) == set(range(10))
  np.testing.assert_array_equal(s.labels[:10], np.arange(10))  # the first ten scans
  unlabelled = data.digits(conditional=False)
  assert (unlabelled.labels, unlabelled.classes) == (None, 0)


def test_every_grey_of_the_digits_has_its_own_uint8():
  s = data.digits()
  stored = np.arange(17, dtype=np.float32)[:, None]
  expected = np.rint(np.arange(17) * 255 / 16)[:, None]
  np.testing.assert_array_equal(data.as_uint8(s, data.as_x0(s, stored)), expected)


@pytest.mark.parametrize('make', [source, data.digits])
def test_clip_keeps_what_data_can_be_and_bounds_the_rest(make):
  s = make()
  x0 = data.as_x0(s, s.examples)
  # One rounding of float32 at the ends of the range.
  np.testing.assert_allclose(data.clip(s, x0), x0, atol=1e-7)
  low, high = data.as_x0(s, np.array([s.low, s.high]))
  wild = np.array([-9, 9], np.float32)
  np.testing.assert_allclose(data.clip(s, wild), [low, high], atol=1e-7)
  np.testing.assert_array_equal(data.as_uint8(s, wild), [0, 255])


def test_points_are_the_oracle_s_samples_and_have_no_range():
  oracle = oracles.ring(modes=3, radius=0.7, std=0.01)
  s = data.points(oracle=oracle, samples=500, seed=2)
  assert (s.examples.shape, s.labels, s.shape) == ((500, 2), None, (2,))
  drawn = oracles.sample(oracle, jax.random.key(2), 500)
  np.testing.assert_array_equal(s.examples, np.asarray(drawn, np.float32))
  gap = np.linalg.norm(s.examples[:, None] - oracle.means[None], axis=2).min(axis=1)
  assert gap.max() < 0.06  # six standard deviations of the modes
  wild = np.array([[-50.0, 50.0]], np.float32)
  np.testing.assert_array_equal(data.clip(s, data.as_x0(s, wild)), wild)


# The reference set -----------------------------------------------------------------

LABELS = np.array([2, 0, 2, 1, 2, 0, 2])  # class 3 has no example


def labelled(**changes):
  s = source(n=len(LABELS), conditional=False)
  return s._replace(labels=LABELS, classes=4, **changes)


def test_a_reference_holds_every_example_once_in_the_bucket_of_its_class():
  s = labelled()
  found = data.reference(s)
  assert found.examples.shape == (4, 4, *s.shape)  # as wide as the largest class
  assert found.examples.dtype == s.examples.dtype
  np.testing.assert_array_equal(found.counts, [2, 1, 4, 0])
  assert found.slots.dtype == found.counts.dtype == np.int32
  for i, (label, slot) in enumerate(zip(LABELS, found.slots)):
    assert 0 <= slot < found.counts[label]
    np.testing.assert_array_equal(found.examples[label, slot], s.examples[i])
  taken = set(zip(LABELS, found.slots))
  assert len(taken) == len(LABELS)
  for bucket, count in zip(found.examples, found.counts):
    assert not np.any(bucket[count:])  # filled up with zeros


def test_a_reference_turns_what_is_stored_into_x0_as_a_batch_does():
  for s in (labelled(), data.digits(), data.points(oracle=oracles.ring(), samples=9)):
    found = data.reference(s)
    stored = found.examples[0, found.slots[0]] if s.labels is None else s.examples[0]
    x0 = (stored.astype(np.float32) - found.offset) * found.scale
    np.testing.assert_array_equal(x0, data.as_x0(s, s.examples[:1])[0])


def test_a_reference_without_labels_is_one_bucket():
  s = source(conditional=False)
  found = data.reference(s)
  np.testing.assert_array_equal(found.examples, s.examples[None])
  np.testing.assert_array_equal(found.counts, [10])
  np.testing.assert_array_equal(found.slots, np.arange(10))


def test_a_reference_of_a_few_a_class_is_drawn_by_its_seed():
  s = labelled()
  found = data.reference(s, per_class=2, seed=1)
  np.testing.assert_array_equal(found.counts, [2, 1, 2, 0])  # all, of smaller classes
  for label, count in enumerate(found.counts):
    of_class = np.flatnonzero(np.equal(LABELS, label))
    kept = of_class[found.slots[of_class] >= 0]
    assert len(kept) == count
    for i in kept:
      stored = found.examples[label, found.slots[i]]
      np.testing.assert_array_equal(stored, s.examples[i])
  again = data.reference(s, per_class=2, seed=1)
  np.testing.assert_array_equal(found.slots, again.slots)
  drawn = {tuple(data.reference(s, per_class=2, seed=i).slots >= 0) for i in range(20)}
  assert len(drawn) == 6  # all pairs of the four of class 2


def test_a_reference_of_a_negative_number_is_refused():
  with pytest.raises(ValueError, match='per_class=-1'):
    data.reference(labelled(), per_class=-1)


# Your own data ---------------------------------------------------------------------


def test_npz_of_uint8_with_labels(tmp_path):
  images = source().examples
  path = save_npz(tmp_path, images=images, labels=np.arange(10) % 3)
  s = data.array(path=path, conditional=True, flip=True)
  np.testing.assert_array_equal(s.examples, images)
  np.testing.assert_array_equal(s.labels, np.arange(10) % 3)
  assert (s.classes, s.flip, s.name) == (3, True, 'set.npz')
  x0 = data.as_x0(s, s.examples)
  np.testing.assert_array_equal(data.as_uint8(s, x0), images)
  assert data.array(path=path).labels is None


def test_npz_of_floats_is_x0_as_it_stands(tmp_path):
  values = np.random.default_rng(0).uniform(-1, 1, (5, 7))
  s = data.array(path=save_npz(tmp_path, images=values))
  assert (s.examples.dtype, s.shape) == (np.float32, (7,))
  np.testing.assert_array_equal(data.as_x0(s, s.examples), values.astype(np.float32))


def test_folder_of_images_in_class_folders(tmp_path):
  save_image(tmp_path / 'dog' / 'a.png', value=1)
  save_image(tmp_path / 'cat' / 'deep' / 'b.png', value=2)
  save_image(tmp_path / 'cat' / 'c.PNG', mode='L', value=3)  # grey becomes RGB
  (tmp_path / 'notes.txt').write_text('not an image')
  s = data.array(path=str(tmp_path), conditional=True)
  assert s.examples.shape == (3, 4, 6, 3)
  assert s.examples.dtype == np.uint8
  marks = s.examples[:, 0, 0]
  np.testing.assert_array_equal(marks, np.repeat([[3], [2], [1]], 3, axis=1))
  np.testing.assert_array_equal(s.labels, [0, 0, 1])  # cat, dog: by name
  assert s.classes == 2
  assert data.array(path=str(tmp_path)).labels is None


def images_of(n):
  return np.zeros((n, 2, 2, 3), np.uint8)


BAD_NPZ = {
  'no images': (dict(pixels=images_of(2)), r"no 'images'.*\['pixels'\]"),
  'object array': (dict(images=np.array([1, 'a'], object)), 'cannot read'),
  'out of range': (dict(images=np.full((2, 3), 1.01)), r'leave \[-1, 1\].*store uint8'),
  'not numbers': (dict(images=np.full((2, 3), np.nan)), 'not numbers'),
  'integers to 255': (dict(images=np.full((2, 3), 255)), r'leave \[-1, 1\]'),
  'nothing in it': (dict(images=images_of(0)), r'shape \(0, 2, 2, 3\)'),
  'a number': (dict(images=np.uint8(1)), r'shape \(\)'),
  'a list': (dict(images=images_of(2)[:, 0, 0, 0]), r'shape \(2,\)'),
  'no labels': (
    dict(images=images_of(2)),
    r"no 'labels' of shape \(2,\).*config\.data\.conditional=False",
  ),
  'too few labels': (
    dict(images=images_of(3), labels=np.arange(2)),
    r"no 'labels' of shape \(3,\).*config\.data\.conditional=False",
  ),
  'labels below 0': (
    dict(images=images_of(2), labels=np.array([-1, 0])),
    "'labels'.*integers from 0",
  ),
  'labels of floats': (
    dict(images=images_of(2), labels=np.ones(2)),
    "'labels'.*integers from 0",
  ),
}


@pytest.mark.parametrize('fault', BAD_NPZ)
def test_a_bad_npz_is_one_line_with_the_way_out(fault, tmp_path):
  arrays, told = BAD_NPZ[fault]
  path = save_npz(tmp_path, **arrays)
  with pytest.raises(UserError, match=told) as error:
    data.array(path=path, conditional=True)
  assert path in str(error.value)
  assert '\n' not in str(error.value)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder_without_images(place):
  (place / 'notes.txt').write_text('nothing')


def mixed_sizes(place):
  save_image(place / 'a' / '0.png')
  save_image(place / 'a' / '1.png', size=(5, 4))


def truncated(place):
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(place / '0.png')
  cut(place / '0.png')


def not_an_image(place):
  (place / '0.png').write_bytes(b'')


def unsorted(place):
  save_image(place / 'a' / '0.png')
  save_image(place / '1.png')


BAD_FOLDERS = {
  folder_without_images: r'no image in .*\.png',
  mixed_sizes: r'a/0\.png is 6x4, .*a/1\.png is 5x4; resize',
  truncated: r'cannot read .*0\.png .*truncated',
  not_an_image: r'cannot read .*0\.png',
  unsorted: r'outside a class folder.*config\.data\.conditional=False',
}


@pytest.mark.parametrize('make', BAD_FOLDERS, ids=lambda make: make.__name__)
def test_a_bad_folder_is_one_line_with_the_way_out(make, tmp_path):
  make(tmp_path)
  with pytest.raises(UserError, match=BAD_FOLDERS[make]) as error:
    data.array(path=str(tmp_path), conditional=True)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['absent', 'set.npy', 'cut.npz', 'empty.npz'])
def test_what_is_neither_folder_nor_npz_is_refused(name, tmp_path):
  np.save(tmp_path / 'set.npy', images_of(2))
  save_npz(tmp_path, images=images_of(2))
  (tmp_path / 'set.npz').rename(tmp_path / 'cut.npz')
  cut(tmp_path / 'cut.npz')
  (tmp_path / 'empty.npz').touch()
  path = str(tmp_path / name)
  with pytest.raises(UserError, match=re.escape(path)) as error:
    data.array(path=path)
  told = 'cannot read' if name.endswith('.npz') else 'neither a folder nor an .npz file'
  assert told in str(error.value)
  assert '\n' not in str(error.value)


# TFDS ------------------------------------------------------------------------------


@pytest.fixture
def cifar10_copy(monkeypatch):
  if not os.path.isdir(os.path.join(TFDS_COPY, 'cifar10')):
    pytest.skip(f'no CIFAR-10 under {TFDS_COPY}; set {data.DATA_DIR_VARIABLE}')
  monkeypatch.setenv(data.DATA_DIR_VARIABLE, TFDS_COPY)


def test_cifar10_by_tfds(cifar10_copy):
  s = data.tfds(
    name='cifar10', split='test[:64]', conditional=True, quoted_as='CIFAR-10 (part)'
  )
  assert (s.examples.shape, s.examples.dtype) == ((64, 32, 32, 3), np.uint8)
  assert (s.name, s.classes) == ('CIFAR-10 (part)', 10)
  assert s.examples.std() > 30  # photographs
  assert 5 <= len(set(s.labels)) <= 10  # 64 draws of ten classes
  batch = data.batch_at(s, 0, 0, 16)
  assert (batch.x0.shape, batch.cond.shape) == ((16, 32, 32, 3), (16, 10))
  plain = data.tfds(name='cifar10', split='test[:64]')
  assert (plain.name, plain.labels, plain.classes) == ('cifar10', None, 0)
  np.testing.assert_array_equal(plain.examples, s.examples)


def test_data_dir_is_looked_in_before_the_variable(cifar10_copy, monkeypatch, tmp_path):
  monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path))
  s = data.tfds(name='cifar10', split='test[:2]', data_dir=TFDS_COPY)
  assert len(s.examples) == 2


@pytest.mark.parametrize('name', ['no_such_set', 'cifar10'])
def test_a_data_set_that_is_not_there_names_the_variable(name, monkeypatch, tmp_path):
  monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path))
  with pytest.raises(UserError, match=f'{name}.*{data.DATA_DIR_VARIABLE}') as error:
    data.tfds(name=name)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)
  assert not any(tmp_path.iterdir())  # nothing downloaded, nothing made


def test_no_module_of_cmjax_imports_tensorflow_or_torch():
  package = ROOT / 'cmjax'
  names = [
    '.'.join(('cmjax', *p.relative_to(package).with_suffix('').parts))
    for p in package.rglob('*.py')
    if p.name != '__init__.py'
  ]
  program = (
    'import importlib, sys\n'
    f'for name in {names}: importlib.import_module(name)\n'
    "print(sorted({'tensorflow', 'torch', 'keras'} & set(sys.modules)))"
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout) == (0, '[]\n'), done.stderr
