"""Batches as a pure function of the step, sources, and the faults a user can make."""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zipfile
import zlib

import jax
import numpy as np
from PIL import Image
import pytest

from cmjax import oracles
from cmjax.core import UserError
from cmjax.data.blank import blank
from cmjax.data.digits import digits
from cmjax.data.files import from_path
from cmjax.data.inputs import read_inputs
from cmjax.data.points import points
from cmjax.data.reference import reference
from cmjax.data.source import (
  Source,
  as_uint8,
  as_x0,
  batch_at,
  check_batch,
  clip,
  one_hot,
  placeholder,
)
from cmjax.data.tfds import DATA_DIR_VARIABLE, tfds
from cmjax.runtime import sharding
from tests.conftest import ROOT

TFDS_COPY = os.environ.get(DATA_DIR_VARIABLE, '')


def source(n=10, conditional=True, flip=False, seed=0):
  """Example i is marked by its first pixel and its label, both i."""
  images = np.random.default_rng(seed).integers(0, 256, (n, 4, 6, 3), np.uint8)
  images[:, 0, 0, 0] = np.arange(n)
  labels = np.arange(n) if conditional else None
  return Source(
    'noise', images, labels, n if conditional else 0, 0, 255, 127.5, 1 / 127.5, flip
  )


def numbers(source, batch):
  """Which examples a batch holds."""
  return as_uint8(source, batch.x0)[:, 0, 0, 0]


def test_blank_images_take_no_memory_and_make_batches():
  source = blank(size=64, classes=1000, examples=1_281_167)
  assert source.shape == (64, 64, 3)
  assert source.examples.strides == (0, 0, 0, 0)
  batch = batch_at(source, 0, 3, 4)
  np.testing.assert_array_equal(batch.x0, np.full((4, 64, 64, 3), -1, np.float32))
  np.testing.assert_array_equal(batch.cond, np.eye(1000, dtype=np.float32)[[0] * 4])
  assert batch_at(blank(size=8), 0, 0, 2).cond is None


@pytest.mark.parametrize(
  'numbers',
  [
    {'size': 0},
    {'size': 10**7},
    {'size': 8, 'channels': 10**12},
    {'size': 8, 'examples': 2**31},
    {'size': 8, 'classes': 10**9},
    {'size': 8, 'classes': -1},
  ],
  ids=str,
)
def test_invalid_sizes_of_blank_images_are_refused(numbers):
  with pytest.raises(ValueError, match=f'{list(numbers)[-1]}='):
    blank(**numbers)


@pytest.mark.parametrize('samples', [0, -1, 10**11, 2**31])
def test_invalid_numbers_of_points_are_refused(samples):
  with pytest.raises(ValueError, match=f'{samples=}'):
    points(oracle=oracles.ring(), num_samples=samples)


def test_points_that_do_not_fit_into_memory_are_refused(monkeypatch):
  monkeypatch.setattr(sharding, 'host_memory', lambda: 1000)
  with pytest.raises(ValueError, match='memory'):
    points(oracle=oracles.ring(), num_samples=1000)


def test_a_batch_larger_than_the_data_names_both_numbers():
  check_batch(source(n=10), 10)
  with pytest.raises(UserError, match=r'batch of 11 .* noise has 10;') as error:
    check_batch(source(n=10), 11)
  assert '\n' not in str(error.value)
  assert len(batch_at(source(n=10), 0, 0, 11).x0) == 11


def test_a_stand_in_for_data_has_its_shape_classes_and_range_and_no_examples():
  images = placeholder((8, 8, 3), 10)
  assert (images.shape, images.classes, len(images.examples)) == ((8, 8, 3), 10, 0)
  np.testing.assert_array_equal(images.labels, np.arange(10))
  np.testing.assert_array_equal(one_hot(images, np.arange(10)), np.eye(10))
  wild = np.array([-9, -1, 0.5, 1, 9], np.float32)
  np.testing.assert_array_equal(clip(images, wild), np.clip(wild, -1, 1))
  np.testing.assert_array_equal(as_uint8(images, wild), [0, 0, 191, 255, 255])
  points = placeholder((2,), 0)
  assert (points.shape, points.labels, points.classes) == ((2,), None, 0)
  np.testing.assert_array_equal(clip(points, wild), wild)


def test_labels_of_many_classes_take_the_memory_of_their_batch():
  # A table of 10**6 by 10**6 would be four terabytes.
  many = source()._replace(classes=10**6, labels=np.arange(10) * 100_003)
  batch = batch_at(many, 0, 0, 3)
  assert batch.cond.shape == (3, 10**6)
  np.testing.assert_array_equal(batch.cond.sum(axis=1), 1)
  np.testing.assert_array_equal(
    batch.cond.argmax(axis=1), np.array(many.labels)[batch.indices]
  )


def save_npz(folder, **arrays):
  np.savez(folder / 'set.npz', **arrays)
  return str(folder / 'set.npz')


def save_image(path, size=(6, 4), mode='RGB', value=7):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value if mode == 'L' else (value,) * 3).save(path)


# The batch of a step ---------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone():
  s = source(flip=True)
  first = batch_at(s, 3, 5, 4)
  for step in (6, 0, 200):
    batch_at(s, 3, step, 4)  # neither the past nor a cache plays a part
  again = batch_at(s, 3, 5, 4)
  np.testing.assert_array_equal(first.x0, again.x0)
  np.testing.assert_array_equal(first.cond, again.cond)
  for other in (batch_at(s, 4, 5, 4), batch_at(s, 3, 6, 4)):
    assert not np.array_equal(first.x0, other.x0)


@pytest.mark.parametrize('batch_size', [1, 5, 4, 7, 23])  # 10 examples
def test_each_example_comes_once_an_epoch_whatever_the_batch_size(batch_size):
  s = source(n=10)
  steps = -(-40 // batch_size)
  seen = [numbers(s, batch_at(s, 1, i, batch_size)) for i in range(steps)]
  assert all(len(batch) == batch_size for batch in seen)
  epochs = np.concatenate(seen)[:40].reshape(4, 10)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 4  # each in another order


def test_labels_belong_to_their_examples():
  s = source()
  batch = batch_at(s, 0, 3, 8)
  assert (batch.x0.dtype, batch.cond.dtype) == (np.float32, np.float32)
  np.testing.assert_array_equal(batch.cond, np.eye(10)[numbers(s, batch)])
  assert batch_at(source(conditional=False), 0, 3, 8).cond is None


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('processes', [2, 4])
def test_shares_of_processes_are_the_batch_of_one(processes, flip):
  s = source(flip=flip)
  for step in (0, 1, 5):  # step 1 crosses an epoch: 10 examples, 8 a batch
    whole = batch_at(s, 0, step, 8)
    rows = np.split(np.arange(8), processes)
    shares = [batch_at(s, 0, step, 8, own) for own in rows]
    np.testing.assert_array_equal(np.concatenate([b.x0 for b in shares]), whole.x0)
    np.testing.assert_array_equal(np.concatenate([b.cond for b in shares]), whole.cond)


@pytest.mark.parametrize('flip', [False, True])
def test_a_batch_says_which_examples_it_holds(flip):
  s = source(flip=flip)
  for step in (0, 1, 5):  # step 1 crosses an epoch: 10 examples, 8 a batch
    batch = batch_at(s, 0, step, 8)
    assert (batch.indices.shape, batch.indices.dtype) == ((8,), np.int32)
    plain = as_x0(s, s.examples[batch.indices])
    mirrored = plain[:, :, ::-1] if flip else plain
    for x0, *either in zip(batch.x0, plain, mirrored):
      assert any(np.array_equal(x0, stored) for stored in either)
    rows = np.split(np.arange(8), 2)
    shares = [batch_at(s, 0, step, 8, own).indices for own in rows]
    np.testing.assert_array_equal(np.concatenate(shares), batch.indices)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_a_batch_is_exact_and_leaves_the_examples_as_they_are(dtype, channels, order):
  stored = np.random.default_rng(0).uniform(0, 255, (9, 4, 6, channels)).astype(dtype)
  stored = np.array(stored, order=order)
  before = stored.copy()
  s = source()._replace(examples=stored, labels=None, classes=0, flip=True)
  batch = batch_at(s, 0, 0, 9)
  bits = np.random.Generator(np.random.Philox(key=[0, 2**32])).integers(2, size=9)
  for x0, i, mirrored in zip(batch.x0, batch.indices, bits):
    expected = (before[i].astype(np.float32) - np.float32(127.5)) * np.float32(
      1 / 127.5
    )
    np.testing.assert_array_equal(x0, expected[:, ::-1] if mirrored else expected)
  np.testing.assert_array_equal(stored, before)


def test_flip_mirrors_half_of_the_images_left_to_right():
  plain, flipped = source(n=200), source(n=200, flip=True)
  a = batch_at(plain, 0, 0, 200).x0
  b = batch_at(flipped, 0, 0, 200).x0
  same = np.array([np.array_equal(x, y) for x, y in zip(a, b)])
  mirrored = np.array([np.array_equal(x[:, ::-1], y) for x, y in zip(a, b)])
  np.testing.assert_array_equal(same, ~mirrored)  # all of the image, and only width
  assert 65 < mirrored.sum() < 135  # 100 by 5 standard deviations of sqrt(50)


# Stored values and x0 --------------------------------------------------------------


def test_every_uint8_value_survives_the_round_trip():
  s = source()
  stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  x0 = as_x0(s, stored)
  assert (x0.dtype, x0.min(), x0.max()) == (np.float32, -1, 1)
  np.testing.assert_array_equal(as_uint8(s, x0), stored)


def test_digits_are_centred_scaled_labelled_and_inside_the_range():
  s = digits()
  assert (s.examples.shape, s.classes) == ((1797, 8, 8, 1), 10)
  x0 = as_x0(s, s.examples)
  assert abs(x0.mean()) < 1e-5  # float32 sums of 115,008 pixels
  assert x0.std() == pytest.approx(0.5, abs=1e-5)
  assert -1 < x0.min() < -0.4
  assert 0.9 < x0.max() < 1
  assert set(s.labels) == set(range(10))
  np.testing.assert_array_equal(s.labels[:10], np.arange(10))  # the first ten scans
  unlabelled = digits(conditional=False)
  assert (unlabelled.labels, unlabelled.classes) == (None, 0)


def test_every_grey_of_the_digits_has_its_own_uint8():
  s = digits()
  stored = np.arange(17, dtype=np.float32)[:, None]
  expected = np.rint(np.arange(17) * 255 / 16)[:, None]
  np.testing.assert_array_equal(as_uint8(s, as_x0(s, stored)), expected)


@pytest.mark.parametrize('make', [source, digits])
def test_clip_keeps_the_range_of_the_data_and_bounds_the_rest(make):
  s = make()
  x0 = as_x0(s, s.examples)
  # One rounding of float32 at the ends of the range.
  np.testing.assert_allclose(clip(s, x0), x0, atol=1e-7)
  low, high = as_x0(s, np.array([s.low, s.high]))
  wild = np.array([-9, 9], np.float32)
  np.testing.assert_allclose(clip(s, wild), [low, high], atol=1e-7)
  np.testing.assert_array_equal(as_uint8(s, wild), [0, 255])


def test_points_are_the_oracle_s_samples_and_have_no_range():
  oracle = oracles.ring(modes=3, radius=0.7, std=0.01)
  s = points(oracle=oracle, num_samples=500, seed=2)
  assert (s.examples.shape, s.labels, s.shape) == ((500, 2), None, (2,))
  drawn = oracles.sample(oracle, jax.random.key(2), 500)
  np.testing.assert_array_equal(s.examples, np.asarray(drawn, np.float32))
  gap = np.linalg.norm(s.examples[:, None] - oracle.means[None], axis=2).min(axis=1)
  assert gap.max() < 0.06  # six standard deviations of the modes
  wild = np.array([[-50.0, 50.0]], np.float32)
  np.testing.assert_array_equal(clip(s, as_x0(s, wild)), wild)


# The reference set -----------------------------------------------------------------

LABELS = np.array([2, 0, 2, 1, 2, 0, 2])  # class 3 has no example


def labelled(**changes):
  s = source(n=len(LABELS), conditional=False)
  return s._replace(labels=LABELS, classes=4, **changes)


def test_a_reference_holds_every_example_once_in_the_bucket_of_its_class():
  s = labelled()
  found = reference(s)
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
  for s in (labelled(), digits(), points(oracle=oracles.ring(), num_samples=9)):
    found = reference(s)
    stored = found.examples[0, found.slots[0]] if s.labels is None else s.examples[0]
    x0 = (stored.astype(np.float32) - found.offset) * found.scale
    np.testing.assert_array_equal(x0, as_x0(s, s.examples[:1])[0])


def test_a_reference_without_labels_is_one_bucket():
  s = source(conditional=False)
  found = reference(s)
  np.testing.assert_array_equal(found.examples, s.examples[None])
  np.testing.assert_array_equal(found.counts, [10])
  np.testing.assert_array_equal(found.slots, np.arange(10))


def test_a_reference_of_a_few_a_class_is_drawn_by_its_seed():
  s = labelled()
  found = reference(s, per_class=2, seed=1)
  np.testing.assert_array_equal(found.counts, [2, 1, 2, 0])  # all, of smaller classes
  for label, count in enumerate(found.counts):
    of_class = np.flatnonzero(np.equal(LABELS, label))
    kept = of_class[found.slots[of_class] >= 0]
    assert len(kept) == count
    for i in kept:
      stored = found.examples[label, found.slots[i]]
      np.testing.assert_array_equal(stored, s.examples[i])
  again = reference(s, per_class=2, seed=1)
  np.testing.assert_array_equal(found.slots, again.slots)
  drawn = {tuple(reference(s, per_class=2, seed=i).slots >= 0) for i in range(20)}
  assert len(drawn) == 6  # all pairs of the four of class 2


def test_a_reference_of_a_negative_number_is_refused():
  with pytest.raises(ValueError, match='per_class=-1'):
    reference(labelled(), per_class=-1)


# Your own data ---------------------------------------------------------------------


def test_npz_of_uint8_with_labels(tmp_path):
  images = source().examples
  path = save_npz(tmp_path, images=images, labels=np.arange(10) % 3)
  s = from_path(path=path, conditional=True, flip=True)
  np.testing.assert_array_equal(s.examples, images)
  np.testing.assert_array_equal(s.labels, np.arange(10) % 3)
  assert (s.classes, s.flip, s.name) == (3, True, 'set.npz')
  x0 = as_x0(s, s.examples)
  np.testing.assert_array_equal(as_uint8(s, x0), images)
  assert from_path(path=path).labels is None


def test_npz_of_floats_is_x0_unchanged(tmp_path):
  values = np.random.default_rng(0).uniform(-1, 1, (5, 7))
  s = from_path(path=save_npz(tmp_path, images=values))
  assert (s.examples.dtype, s.shape) == (np.float32, (7,))
  np.testing.assert_array_equal(as_x0(s, s.examples), values.astype(np.float32))


def test_folder_of_images_in_class_folders(tmp_path):
  save_image(tmp_path / 'dog' / 'a.png', value=1)
  save_image(tmp_path / 'cat' / 'deep' / 'b.png', value=2)
  save_image(tmp_path / 'cat' / 'c.PNG', mode='L', value=3)  # grey becomes RGB
  (tmp_path / 'notes.txt').write_text('not an image')
  s = from_path(path=str(tmp_path), conditional=True)
  assert s.examples.shape == (3, 4, 6, 3)
  assert s.examples.dtype == np.uint8
  marks = s.examples[:, 0, 0]
  np.testing.assert_array_equal(marks, np.repeat([[3], [2], [1]], 3, axis=1))
  np.testing.assert_array_equal(s.labels, [0, 0, 1])  # cat, dog: by name
  assert s.classes == 2
  assert from_path(path=str(tmp_path)).labels is None


@pytest.mark.parametrize('labels', [[0, 5], [5, 0, 5, 1, 3, 2, 5]], ids=str)
def test_labels_may_have_gaps_up_to_the_number_of_examples(labels, tmp_path):
  labels = np.array(labels, np.uint64)
  path = save_npz(tmp_path, images=images_of(len(labels)), labels=labels)
  if labels.max() >= len(labels):
    with pytest.raises(UserError, match='is 5, which is too large for 2 examples'):
      from_path(path=path, conditional=True)
    return
  s = from_path(path=path, conditional=True)
  assert s.classes == 6
  np.testing.assert_array_equal(
    one_hot(s, np.arange(len(labels))), np.eye(6)[labels.astype(int)]
  )


def test_one_image_is_a_data_set(tmp_path):
  s = from_path(path=save_npz(tmp_path, images=images_of(1)))
  assert batch_at(s, 0, 0, 2).x0.shape == (2, 2, 2, 3)


def test_an_npz_is_read_no_further_than_needed(tmp_path):
  # Neither a bomb nor an object array beside the images is opened.
  np.savez_compressed(
    tmp_path / 'set.npz',
    images=images_of(3),
    labels=np.zeros(10**7, np.uint8),
    notes=np.array([{}], object),
  )
  s = from_path(path=str(tmp_path / 'set.npz'))
  np.testing.assert_array_equal(s.examples, images_of(3))


def images_of(n):
  return np.zeros((n, 2, 2, 3), np.uint8)


BAD_NPZ = {
  'four channels': (
    dict(images=np.zeros((2, 5, 5, 4), np.uint8)),
    r'4 channels; .*\[\.\.\., :3\]',
  ),
  'two channels': (dict(images=np.zeros((2, 5, 5, 2))), '2 channels; store one or'),
  'channels first': (
    dict(images=np.zeros((2, 3, 5, 5), np.uint8)),
    r'np\.moveaxis\(images, 1, -1\)',
  ),
  'one image alone': (dict(images=images_of(1)[0]), r'one image is images\[None\]'),
  'no pixels': (dict(images=np.zeros((2, 0, 5, 3), np.uint8)), r'shape \(2, 0, 5, 3\)'),
  'infinite': (dict(images=np.full((2, 3), np.inf)), r'outside \[-1, 1\]'),
  'one not a number': (dict(images=np.array([[0, 0.5], [np.nan, 1]])), 'not numbers'),
  'beyond float32': (dict(images=np.full((2, 3), 1e300)), r'outside \[-1, 1\]'),
  'complex': (dict(images=np.zeros((2, 3), complex)), 'complex128; store uint8'),
  'labels of another data set': (
    dict(images=images_of(3), labels=np.array([0, 1, 10**9])),
    'is 1000000000, which is too large for 3 examples',
  ),
  'labels beyond int64': (
    dict(images=images_of(2), labels=np.array([0, 2**64 - 1], np.uint64)),
    'is 18446744073709551615, which is too large',
  ),
  'no images': (dict(pixels=images_of(2)), r"no 'images'.*\['pixels'\]"),
  'object array': (dict(images=np.array([1, 'a'], object)), 'cannot read'),
  'out of range': (
    dict(images=np.full((2, 3), 1.01)),
    r'outside \[-1, 1\].*store uint8',
  ),
  'not numbers': (dict(images=np.full((2, 3), np.nan)), 'not numbers'),
  'integers to 255': (dict(images=np.full((2, 3), 255)), r'outside \[-1, 1\]'),
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


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('fault', BAD_NPZ)
def test_a_bad_npz_is_one_line_with_the_way_out(fault, tmp_path):
  arrays, told = BAD_NPZ[fault]
  path = save_npz(tmp_path, **arrays)
  with pytest.raises(UserError, match=told) as error:
    from_path(path=path, conditional=True)
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
  (place / 'a').mkdir()
  path = place / 'a' / '0.png'
  Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
  cut(path)


def not_an_image(place):
  (place / 'a').mkdir()
  (place / 'a' / '0.png').write_bytes(b'')


def png(width, height, *chunks, depth=8):
  """A PNG that says it is of that size, with little behind it."""

  def chunk(kind, content):
    check = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + check

  head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, 2, 0, 0, 0))
  rest = b''.join(
    chunk(*c) for c in (*chunks, (b'IDAT', zlib.compress(b'')), (b'IEND', b''))
  )
  return b'\x89PNG\r\n\x1a\n' + head + rest


def bomb(place):
  (place / 'a').mkdir()
  (place / 'a' / '0.png').write_bytes(png(20_000, 20_000))


def half_a_bomb(place):  # of which Pillow only warns
  (place / 'a').mkdir()
  (place / 'a' / '0.png').write_bytes(png(10_000, 10_000))


def broken_chunk(place):  # a SyntaxError of Pillow's
  (place / 'a').mkdir()
  rows = zlib.compress(np.random.default_rng(0).bytes(4 * (1 + 3 * 6)))
  parts = (b'IDAT', rows[:20]), (b'\0\1\2\3', rows[20:])
  (place / 'a' / '0.png').write_bytes(png(6, 4, *parts))


def transparent_colour(place):
  (place / 'a').mkdir()
  image = Image.new('P', (6, 4))
  image.save(place / 'a' / '0.png', transparency=0)


def sixteen_bits(place):  # which Pillow reads as 8 without a warning
  (place / 'a').mkdir()
  rows = zlib.compress(bytes(4 * (1 + 6 * 6)))
  (place / 'a' / '0.png').write_bytes(png(6, 4, (b'IDAT', rows), depth=16))


def pipe(place):
  (place / 'a').mkdir()
  os.mkfifo(place / 'a' / '0.png')


def link_to_itself(place):
  (place / 'a').mkdir()
  (place / 'a' / '0.png').symlink_to(place / 'a' / '0.png')


def link_to_a_folder_above(place):
  save_image(place / 'a' / '0.png')
  (place / 'a' / 'b').symlink_to(place)


def unsorted(place):
  save_image(place / 'a' / '0.png')
  save_image(place / '1.png')


BAD_FOLDERS = {
  folder_without_images: r'no image in .*\.png',
  mixed_sizes: r'a/0\.png is 6x4, .*a/1\.png is 5x4; resize',
  truncated: r'cannot read .*0\.png .*truncated',
  not_an_image: r'cannot read .*0\.png',
  bomb: r'cannot read .*0\.png .*pixels',
  half_a_bomb: r'cannot read .*0\.png .*pixels',
  broken_chunk: r'cannot read .*0\.png \(',
  transparent_colour: r'cannot read .*0\.png \(mode P; .*no transparency',
  sixteen_bits: r'cannot read .*0\.png \(mode RGB; store 8 bits per channel',
  pipe: r'cannot read .*0\.png \(not a file\)',
  link_to_itself: r'cannot read .*0\.png \(not a file\)',
  link_to_a_folder_above: r'a/b links to a folder that contains it',
  unsorted: r'outside a class folder.*config\.data\.conditional=False',
}


@contextlib.contextmanager
def at_once():
  """Fails where reading would wait for a writer that never comes."""

  def fail(signum, frame):
    raise AssertionError('still waiting after 20 s')

  before = signal.signal(signal.SIGALRM, fail)
  signal.alarm(20)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize('make', BAD_FOLDERS, ids=lambda make: make.__name__)
def test_a_bad_folder_is_one_line_with_the_way_out(make, tmp_path):
  make(tmp_path)
  with at_once(), pytest.raises(UserError, match=BAD_FOLDERS[make]) as error:
    from_path(path=str(tmp_path), conditional=True)
  assert '\n' not in str(error.value)


def test_a_class_folder_may_be_a_link(tmp_path):
  save_image(tmp_path / 'elsewhere' / 'deep' / '0.png', value=1)
  save_image(tmp_path / 'set' / 'dog' / '0.png', value=2)
  (tmp_path / 'set' / 'cat').symlink_to(tmp_path / 'elsewhere')
  s = from_path(path=str(tmp_path / 'set'), conditional=True)
  np.testing.assert_array_equal(s.examples[:, 0, 0, 0], [1, 2])
  np.testing.assert_array_equal(s.labels, [0, 1])


@pytest.mark.parametrize('path', ['', ' '])
def test_an_empty_path_is_not_the_current_folder(path, tmp_path, monkeypatch):
  save_image(tmp_path / '0.png')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'config\.data\.path: is empty'):
    from_path(path=path)
  assert len(from_path(path='.').examples) == 1


@pytest.mark.parametrize('kind', ['npz', 'folder'])
def test_data_beyond_memory_is_refused_before_it_is_read(kind, tmp_path, monkeypatch):
  path = str(tmp_path)
  if kind == 'npz':  # a thousandth of its size on disk
    np.savez_compressed(tmp_path / 'set.npz', images=np.zeros((9, 99, 99, 3), np.uint8))
    path += '/set.npz'
    assert os.path.getsize(path) < 2000
  else:
    for i in range(9):
      save_image(tmp_path / f'{i}.png', size=(99, 99))
  size = 9 * 99 * 99 * 3
  monkeypatch.setattr(sharding, 'host_memory', lambda: size + 1000)
  assert len(from_path(path=path).examples) == 9
  monkeypatch.setattr(sharding, 'host_memory', lambda: size - 1)
  with pytest.raises(UserError, match=r'GiB, and this machine has') as error:
    from_path(path=path)
  assert path in str(error.value)


def test_an_npz_that_promises_more_than_it_holds_is_refused(tmp_path):
  for shape in ((2**40, 9), (2**62, 2**62), (-1, 4), (1e3, 2)):
    header = str({'descr': '|u1', 'fortran_order': False, 'shape': shape}).encode()
    header += b' ' * (63 - (10 + len(header)) % 64) + b'\n'
    path = tmp_path / 'set.npz'
    with zipfile.ZipFile(path, 'w') as file:
      start = b'\x93NUMPY\1\0' + struct.pack('<H', len(header))
      file.writestr('images.npy', start + header + bytes(16))
    with pytest.raises(UserError, match='cannot read') as error:
      from_path(path=str(path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name', ['absent', 'set.npy', 'cut.npz', 'empty.npz', 'pipe', 'loop']
)
def test_what_is_neither_folder_nor_npz_is_refused(name, tmp_path):
  np.save(tmp_path / 'set.npy', images_of(2))
  save_npz(tmp_path, images=images_of(2))
  (tmp_path / 'set.npz').rename(tmp_path / 'cut.npz')
  cut(tmp_path / 'cut.npz')
  (tmp_path / 'empty.npz').touch()
  os.mkfifo(tmp_path / 'pipe.npz')
  (tmp_path / 'loop.npz').symlink_to(tmp_path / 'loop.npz')
  path = str(tmp_path / name) + ('.npz' if name in ('pipe', 'loop') else '')
  with at_once(), pytest.raises(UserError, match=re.escape(path)) as error:
    from_path(path=path)
  told = (
    'cannot read'
    if path.endswith(('cut.npz', 'empty.npz'))
    else 'neither a folder nor an .npz or .zip file'
  )
  assert told in str(error.value)
  assert '\n' not in str(error.value)


# TFDS ------------------------------------------------------------------------------


@pytest.fixture
def cifar10_copy(monkeypatch):
  if not os.path.isdir(os.path.join(TFDS_COPY, 'cifar10')):
    pytest.skip(f'no CIFAR-10 under {TFDS_COPY}; set {DATA_DIR_VARIABLE}')
  monkeypatch.setenv(DATA_DIR_VARIABLE, TFDS_COPY)


def test_cifar10_by_tfds(cifar10_copy):
  s = tfds(
    name='cifar10', split='test[:64]', conditional=True, display_name='CIFAR-10 (part)'
  )
  assert (s.examples.shape, s.examples.dtype) == ((64, 32, 32, 3), np.uint8)
  assert (s.name, s.classes) == ('CIFAR-10 (part)', 10)
  assert s.examples.std() > 30  # photographs
  assert 5 <= len(set(s.labels)) <= 10  # 64 draws of ten classes
  batch = batch_at(s, 0, 0, 16)
  assert (batch.x0.shape, batch.cond.shape) == ((16, 32, 32, 3), (16, 10))
  plain = tfds(name='cifar10', split='test[:64]')
  assert (plain.name, plain.labels, plain.classes) == ('cifar10', None, 0)
  np.testing.assert_array_equal(plain.examples, s.examples)


def test_data_dir_is_looked_in_before_the_variable(cifar10_copy, monkeypatch, tmp_path):
  monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
  s = tfds(name='cifar10', split='test[:2]', data_dir=TFDS_COPY)
  assert len(s.examples) == 2


@pytest.mark.parametrize('name', ['no_such_set', 'cifar10'])
def test_a_data_set_that_is_not_there_names_the_variable(name, monkeypatch, tmp_path):
  monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
  with pytest.raises(UserError, match=f'{name}.*{DATA_DIR_VARIABLE}') as error:
    tfds(name=name)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)
  assert not any(tmp_path.iterdir())  # nothing downloaded, nothing made


INFO = {
  'name': 'made',
  'version': '1.0.0',
  'fileFormat': 'array_record',
  'moduleName': 'marker',
  'splits': [
    {'name': 'train', 'shardLengths': ['2'], 'numBytes': '9',
     'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'}
  ],
}  # fmt: skip
STRANGE = {'pythonClassName': 'marker.Feature', 'pythonFeature': {}}
FEATURES = {
  'the whole': {'pythonClassName': 'marker.Features'},
  'other case': {'python_class_name': 'marker.Features'},
  'inside': {
    'pythonClassName': 'tensorflow_datasets.core.features.features_dict.FeaturesDict',
    'featuresDict': {'features': {'image': {'pythonClassName': 'marker.Image'}}},
  },
  'old': {'type': 'marker.Features', 'content': {}},
  'old inside': {
    'type': 'tensorflow_datasets.core.features.features_dict.FeaturesDict',
    'content': json.dumps(
      {'features': {'pythonClassName': {'pythonClassName': 'marker.Image'}}}
    ).replace('python', '\\u0070ython'),
    'proto_cls': 'tensorflow_datasets.FeaturesDict',
  },
}


@pytest.mark.parametrize('name', ['made', 'made:1.0.0', 'made/small', 'cifar10:3.0.2'])
@pytest.mark.parametrize('features', FEATURES)
def test_features_of_a_data_set_run_no_code(features, name, tmp_path, monkeypatch):
  (tmp_path / 'marker.py').write_text('raise SystemExit("imported")')
  monkeypatch.syspath_prepend(tmp_path)
  data_set, _, config = name.partition(':')[0].partition('/')
  real = tmp_path / 'real' / config / ('3.0.2' if data_set == 'cifar10' else '1.0.0')
  real.mkdir(parents=True)
  (real / 'dataset_info.json').write_text(json.dumps(INFO | {'name': data_set}))
  (real / 'features.json').write_text(json.dumps(FEATURES[features]))
  (tmp_path / 'sets').mkdir()
  (tmp_path / 'sets' / data_set).symlink_to(tmp_path / 'real')
  with pytest.raises(UserError, match=r"not part of TFDS .'marker") as error:
    tfds(name=name, data_dir=str(tmp_path / 'sets'))
  assert '\n' not in str(error.value)
  assert 'marker' not in sys.modules


def test_a_data_set_without_its_records_is_refused(tmp_path):
  folder = tmp_path / 'made' / '1.0.0'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text(json.dumps(INFO))
  kinds = 'tensorflow_datasets.core.features'
  image = {
    'pythonClassName': f'{kinds}.image_feature.Image',
    'image': {'dtype': 'uint8', 'shape': {'dimensions': ['4', '4', '3']}},
  }
  content = {
    'pythonClassName': f'{kinds}.features_dict.FeaturesDict',
    'featuresDict': {'features': {'image': image}},
  }
  (folder / 'features.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match="'made'") as error:
    tfds(name='made', data_dir=str(tmp_path))
  assert '\n' not in str(error.value)
  (folder / 'made-train.array_record-00000-of-00001').write_bytes(b'no records')
  with pytest.raises(UserError, match="'made'"):
    tfds(name='made', data_dir=str(tmp_path))
  for text in ('', '[' * 100_000, '\xff', '{"featuresDict": 3'):
    (folder / 'features.json').write_text(text, encoding='latin-1')
    with pytest.raises(UserError, match=r'cannot read .*features\.json'):
      tfds(name='made', data_dir=str(tmp_path))


@pytest.mark.parametrize(
  'name',
  [
    'huggingface:mnist',
    'myData',  # TFDS opens my_data for it
    'kaggle:x',
    '../x',
    '/etc',
    'x/..',
    'x/../x',
    '',
    'x\n',
    'x/a=b',
  ],
)
def test_a_name_that_tfds_would_look_for_elsewhere_is_refused(name, tmp_path):
  with pytest.raises(
    UserError, match=r'config\.data\.name.*is not a TFDS name'
  ) as error:
    tfds(name=name, data_dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_data_in_a_bucket_is_refused(tmp_path):
  with pytest.raises(UserError, match='gs://sets is not a local or mounted path'):
    tfds(name='cifar10', data_dir='gs://sets')
  with pytest.raises(UserError, match=r'gs://sets/x\.npz is not a local or mounted'):
    from_path(path='gs://sets/x.npz')
  with pytest.raises(UserError, match='--input: gs://sets is not a local or mounted'):
    read_inputs('gs://sets', '--input', (8, 8, 3))


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
