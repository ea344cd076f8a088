"""Data larger than memory: zip files, shards, folders; resizing; the decoded cache."""

import concurrent.futures
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
from PIL import Image
import pytest

from cmjax import pictures
from cmjax.core import UserError
from cmjax.data import decoded, images
from cmjax.data.files import from_path
from cmjax.data.reference import reference
from cmjax.data.source import all_x0, batch_at, contents
from cmjax.data.tfds import DATA_DIR_VARIABLE, tfds
from cmjax.runtime import loader, sharding
from cmjax.runtime.records import Loader
from tests.conftest import ROOT
from tests.test_data import at_once, cut, png, save_image

TFDS_COPY = os.environ.get(DATA_DIR_VARIABLE, '')
NUM, SIZE = 23, 12  # images, and pixels of their sides
LABELS = np.arange(NUM) % 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('CMJAX_CACHE_DIR', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'decoded'


def pixels(num=NUM, size=SIZE, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8)


def name_of(i):
  return f'{i // 10:05d}/img{i:08d}.png'


def save_tree(folder, labels=LABELS):
  for i, image in enumerate(pixels()):
    (folder / name_of(i)).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / name_of(i))
  if labels is not None:
    text = {'labels': [[name_of(i), int(n)] for i, n in enumerate(labels)]}
    (folder / 'dataset.json').write_text(json.dumps(text))
  return folder


def save_zip(path, members, compression=zipfile.ZIP_STORED):
  """A zip of names and contents, in the order of a dict."""
  with zipfile.ZipFile(path, 'w', compression) as file:
    for name, content in members.items():
      file.writestr(name, content)
  return path


def members_of(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'), reverse=True)
    if path.is_file()
  }


def make_folder(place):
  return save_tree(place / 'folder')


def make_classes(place):
  for i, image in enumerate(pixels()):
    path = place / 'classes' / f'class_{LABELS[i]}' / f'{i:03d}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
  return place / 'classes'


def make_zip(place):
  return save_zip(place / 'set.zip', members_of(save_tree(place / 'folder')))


def make_deflated(place):
  members = members_of(save_tree(place / 'folder'))
  return save_zip(place / 'set.zip', members, zipfile.ZIP_DEFLATED)


def make_npz(place):
  np.savez(place / 'set.npz', images=pixels(), labels=LABELS)
  return place / 'set.npz'


def make_shards(place):
  (place / 'shards').mkdir()
  for i, rows in enumerate(np.split(np.arange(NUM), [1, 9, 10])):
    path = place / 'shards' / f'{i:03d}.npz'
    np.savez(path, images=pixels()[rows], labels=LABELS[rows].astype(np.uint8))
  return place / 'shards'


KINDS = (make_folder, make_classes, make_zip, make_deflated, make_npz, make_shards)
each_kind = pytest.mark.parametrize('make', KINDS, ids=lambda make: make.__name__[5:])


def both(make, place, **settings):
  """The same data in memory and on disk."""
  path = str(make(place))
  settings = {'conditional': True, 'flip': True} | settings
  held = from_path(path=path, **settings)
  on_disk = from_path(path=path, memory_gib=0.0, **settings)
  assert held.in_memory
  assert not on_disk.in_memory
  return held, on_disk


def same_batch(a, b):
  np.testing.assert_array_equal(a.x0, b.x0)
  np.testing.assert_array_equal(a.cond, b.cond)
  np.testing.assert_array_equal(a.indices, b.indices)


@each_kind
def test_batches_of_data_on_disk_are_those_of_data_in_memory(make, tmp_path):
  held, on_disk = both(make, tmp_path)
  assert held.shape == on_disk.shape == (SIZE, SIZE, 3)
  assert (len(on_disk.examples), on_disk.classes) == (NUM, 4)
  np.testing.assert_array_equal(held.labels, on_disk.labels)
  if make is not make_classes:  # whose order is that of the classes
    np.testing.assert_array_equal(held.examples, pixels())
    np.testing.assert_array_equal(held.labels, LABELS)
  np.testing.assert_array_equal(on_disk.examples[:], held.examples)
  np.testing.assert_array_equal(on_disk.examples[3:20:4], held.examples[3:20:4])
  for step in (0, 2, 5):  # step 2 crosses an epoch
    same_batch(batch_at(held, 1, step, 8), batch_at(on_disk, 1, step, 8))
    rows = np.array([5, 2])
    same_batch(batch_at(held, 1, step, 8, rows), batch_at(on_disk, 1, step, 8, rows))


def test_many_examples_are_decoded_by_threads_in_their_order(tmp_path):
  (tmp_path / 'shards').mkdir()
  values = np.arange(300, dtype=np.float32)[:, None] / 300
  for i, part in enumerate(np.split(values, 3)):
    np.savez(tmp_path / 'shards' / f'{i}.npz', images=part)
  points = from_path(path=str(tmp_path / 'shards'), memory_gib=0.0)
  np.testing.assert_array_equal(points.examples[:], values)
  np.testing.assert_array_equal(points.examples[::-1], values[::-1])


SETTINGS = [Loader(0, 1, 1), Loader(0, 8, 3), Loader(2, 2, 2)]


@pytest.mark.parametrize('settings', SETTINGS, ids=['one thread', 'threads', 'workers'])
def test_reading_ahead_returns_the_batches_of_each_step(
  settings, tmp_path, monkeypatch
):
  monkeypatch.setattr(loader, '_ROWS', 3)  # several parts of a batch
  held, on_disk = both(make_zip, tmp_path)
  for first, rows in ((0, np.arange(8)), (7, np.array([6, 7, 0, 1]))):
    batches = loader.read_ahead(on_disk, 5, first, 8, rows, settings)
    for step in range(first, first + 6):
      same_batch(next(batches), batch_at(held, 5, step, 8, rows))
    batches.close()
    if settings.workers:  # two starts of processes are enough
      break


def test_a_float_outside_the_range_is_found_when_it_is_read(tmp_path):
  values = np.zeros((5, 2), np.float32)
  values[3] = np.nan
  np.savez(tmp_path / 'set.npz', images=values)
  points = from_path(path=str(tmp_path / 'set.npz'), memory_gib=0.0)
  np.testing.assert_array_equal(points.examples[:3], values[:3])
  with pytest.raises(UserError, match=r'example 3 of .*set\.npz are outside \[-1, 1\]'):
    points.examples[np.array([1, 3])]


# What needs more than a batch ------------------------------------------------------


def test_what_needs_all_data_in_memory_refuses_data_on_disk(tmp_path):
  held, on_disk = both(make_zip, tmp_path)
  assert all_x0(held, 'a study').shape == (NUM, SIZE, SIZE, 3)
  with pytest.raises(UserError, match=r'a study needs all .*config\.data\.memory_gib'):
    all_x0(on_disk, 'a study')


def test_pictures_and_references_are_those_of_data_in_memory(tmp_path):
  held, on_disk = both(make_zip, tmp_path)
  np.testing.assert_array_equal(pictures.data(held, 9), pictures.data(on_disk, 9))
  a, b = (reference(s, per_class=2) for s in (held, on_disk))
  np.testing.assert_array_equal(a.examples, b.examples)
  values = np.random.default_rng(0).uniform(-1, 1, (9, 2)).astype(np.float32)
  np.savez(tmp_path / 'points.npz', images=values)
  points = from_path(path=str(tmp_path / 'points.npz'), memory_gib=0.0)
  assert pictures.samples(points, values).shape[2] == 3


@each_kind
def test_a_fingerprint_changes_with_the_files(make, tmp_path):
  path = make(tmp_path)
  settings = dict(path=str(path), conditional=True, memory_gib=0.0)
  first, labels = contents(from_path(**settings))
  assert isinstance(first, str)
  np.testing.assert_array_equal(labels, from_path(**settings).labels)
  assert contents(from_path(**settings))[0] == first
  file = path if path.is_file() else max(p for p in path.rglob('*.*[gz]'))
  status = file.stat()
  os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  assert contents(from_path(**settings))[0] != first


# Resizing --------------------------------------------------------------------------


def picture(width, height):
  """Smooth, so that every rule differs, and with no symmetry."""
  y, x = np.mgrid[:height, :width] / 7
  waves = [np.sin(x + y * k) + np.cos(x * k) for k in (0.3, 1.1, 2.7)]
  return Image.fromarray(np.uint8(127 + 60 * np.stack(waves, axis=-1)))


def edm_crop(image, size):
  """NVlabs/edm dataset_tool.py, center_crop, of an array."""
  array = np.asarray(image)
  (h, w), crop = array.shape[:2], min(array.shape[:2])
  array = array[(h - crop) // 2 : (h + crop) // 2, (w - crop) // 2 : (w + crop) // 2]
  return np.asarray(Image.fromarray(array).resize((size, size), Image.LANCZOS))


def adm_crop(image, size):
  """openai/guided-diffusion image_datasets.py, center_crop_arr."""
  while min(image.size) >= 2 * size:
    image = image.resize(tuple(n // 2 for n in image.size), resample=Image.BOX)
  return shorter(image, size, Image.BICUBIC)


def shorter(image, size, rule):
  scale = size / min(image.size)
  image = image.resize(tuple(round(n * scale) for n in image.size), resample=rule)
  array = np.asarray(image)
  top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
  return array[top : top + size, left : left + size]


# Compared with the original programs outside, on 300 images: equal to the bit.
RULES = {
  'edm': edm_crop,
  'adm': adm_crop,
  'lsun': lambda image, size: shorter(image, size, Image.BOX),
}


@pytest.mark.parametrize('crop', RULES)
@pytest.mark.parametrize('shape', [(97, 40), (40, 97), (35, 35), (65, 64), (11, 9)])
def test_images_are_cropped_by_the_rule_of_the_paper(crop, shape):
  image, size = picture(*shape), 16
  got = images.Resize(size, crop)(image)
  assert got.shape == (size, size, 3)
  np.testing.assert_array_equal(got, RULES[crop](image, size))
  for other in RULES:
    if other != crop:
      assert not np.array_equal(got, images.Resize(size, other)(image))


def test_a_square_needs_no_crop_and_another_image_does():
  image = picture(40, 40)
  expected = np.asarray(image.resize((16, 16), Image.LANCZOS))
  np.testing.assert_array_equal(images.Resize(16)(image), expected)
  np.testing.assert_array_equal(images.Resize()(image), np.asarray(image))
  with pytest.raises(OSError, match=r'41 x 40 pixels are no square; .*data\.crop'):
    images.Resize(16)(picture(41, 40))


@pytest.mark.parametrize('memory_gib', [0.0, 4.0])
def test_images_of_many_sizes_are_one_data_set_if_they_are_resized(
  memory_gib, tmp_path
):
  shapes = [(40, 30), (30, 41), (35, 35)]
  for i, shape in enumerate(shapes):
    picture(*shape).save(tmp_path / f'{i}.png')
  path = str(tmp_path)
  found = from_path(path=path, size=16, crop='adm', memory_gib=memory_gib)
  for i, shape in enumerate(shapes):
    np.testing.assert_array_equal(
      found.examples[i : i + 1][0], adm_crop(picture(*shape), 16)
    )
  with pytest.raises(UserError, match=r'0\.png is 40x30, .*1\.png is 30x41; resize'):
    from_path(path=path, memory_gib=memory_gib).examples[:]
  with pytest.raises(UserError, match=r'0\.png \(40 x 30 pixels are no square'):
    from_path(path=path, size=16, memory_gib=memory_gib)


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    (dict(crop='adm'), r"config\.data\.crop: 'adm' needs config\.data\.size"),
    (dict(size=16, crop='center'), r"one of '', 'edm', 'adm', 'lsun', got 'center'"),
    (dict(size=-1), r'config\.data\.size: -1 is not from 0 to'),
    (dict(size=10**6), r'config\.data\.size: 1000000 is not from 0 to'),
    (dict(memory_gib=-1.0), r'config\.data\.memory_gib: must not be negative, got -1'),
    (dict(memory_gib=float('nan')), r'must not be negative, got nan'),
  ],
  ids=str,
)
def test_a_wrong_setting_is_refused(settings, told, tmp_path):
  save_image(tmp_path / '0.png')
  with pytest.raises(UserError, match=told):
    from_path(path=str(tmp_path), **settings)


def test_an_oblong_image_does_not_fill_the_memory(tmp_path):
  save_image(tmp_path / '0.png', size=(20_000, 1))
  for crop in ('adm', 'lsun'):
    with pytest.raises(UserError, match='20000 x 1 pixels are too oblong'):
      from_path(path=str(tmp_path), size=512, crop=crop)


def test_arrays_are_not_resized(tmp_path):
  with pytest.raises(UserError, match=r'config\.data\.size: arrays of \.npz'):
    from_path(path=str(make_npz(tmp_path)), size=8)


# Zip files and dataset.json --------------------------------------------------------


def test_an_edm_zip_without_labels_is_unconditional(tmp_path):
  folder = save_tree(tmp_path / 'folder', None)
  (folder / 'dataset.json').write_text('{"labels": null}')
  path = str(save_zip(tmp_path / 'set.zip', members_of(folder)))
  for each in (path, str(folder)):
    assert from_path(path=each).labels is None
    with pytest.raises(UserError, match=r'has no labels.*config\.data\.conditional=F'):
      from_path(path=each, conditional=True)


def test_a_zip_without_dataset_json_has_the_classes_of_its_folders(tmp_path):
  image = members_of(save_tree(tmp_path / 'folder', None))[name_of(0)]
  members = {'dog/a.png': image, 'cat/b.PNG': image, 'notes.txt': b'text'}
  found = from_path(path=str(save_zip(tmp_path / 'a.zip', members)), conditional=True)
  np.testing.assert_array_equal(found.labels, [0, 1])
  path = save_zip(tmp_path / 'b.zip', members | {'0.png': image})
  with pytest.raises(UserError, match='outside a class folder'):
    from_path(path=str(path), conditional=True)


def pairs(changes=None, **more):
  names = {name_of(i): i % 4 for i in range(NUM)} | (changes or {})
  return {'labels': [[name, n] for name, n in names.items() if n != 'none']} | more


BAD_LABELS = {
  'no JSON': ('{"labels": [', 'cannot read'),
  'deep JSON': ('[' * 100_000, 'cannot read'),
  'not text': (b'\xff\xfe{', 'cannot read'),
  'a list': ([1, 2], 'must be {"labels"'),
  'other keys': ({'classes': []}, 'must be {"labels"'),
  'not pairs': ({'labels': {'a': 1}}, 'must be pairs of a name and an integer'),
  'a vector': (pairs({name_of(3): [0, 1]}), 'must be pairs of a name and an integer'),
  'a float': (pairs({name_of(3): 1.0}), 'must be pairs of a name and an integer'),
  'a bool': (pairs({name_of(3): True}), 'must be pairs of a name and an integer'),
  'a name': (pairs({name_of(3): 'cat'}), 'must be pairs of a name and an integer'),
  'beyond int64': (
    pairs({name_of(3): 2**70}),
    'must be pairs of a name and an integer',
  ),
  'below 0': (pairs({name_of(3): -1}), 'must be integers from 0'),
  'too large': (pairs({name_of(3): 10**9}), 'is 1000000000, which is too large for 23'),
  'twice': (
    {'labels': pairs()['labels'] + [[name_of(0), 2]]},
    'names an image twice',
  ),
  'no such image': (
    pairs({'../../etc/passwd.png': 0}),
    r"names '\.\./\.\./etc/passwd\.png', which is not among the images",
  ),
  'without a label': (
    pairs({name_of(3): 'none'}),
    r"has no label for '00000/img00000003\.png'",
  ),
}


@pytest.mark.parametrize('fault', BAD_LABELS)
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_labels_that_are_not_what_they_claim_are_one_line(kind, fault, tmp_path):
  content, told = BAD_LABELS[fault]
  path = save_tree(tmp_path / 'folder', None)
  text = content if isinstance(content, str | bytes) else json.dumps(content)
  (path / 'dataset.json').write_bytes(
    text if isinstance(text, bytes) else text.encode()
  )
  if kind == 'zip':
    path = save_zip(tmp_path / 'set.zip', members_of(path))
  with pytest.raises(UserError, match=told) as error:
    from_path(path=str(path), conditional=True)
  assert '\n' not in str(error.value)
  assert len(from_path(path=str(path)).examples) == NUM  # without labels


def changed(path, *changes):
  """A zip whose bytes are changed: (before, after) of one length."""
  content = path.read_bytes()
  for old, new in changes:
    assert content.count(old) >= 1
    content = content.replace(old, new)
  path.write_bytes(content)


def zip_of(place, content=None, compression=zipfile.ZIP_STORED):
  if content is None:
    save_image(place / '0.png')
    content = (place / '0.png').read_bytes()
  return save_zip(place / 'set.zip', {'a/0.png': content}, compression)


def promises_more(place):  # sizes of one member, in both headers
  path = zip_of(place, bytes(1000), zipfile.ZIP_DEFLATED)
  changed(path, ((1000).to_bytes(4, 'little'), (2**30).to_bytes(4, 'little')))


def deflated_bomb(place):  # of 32 MiB, that claims to be small
  path = zip_of(place, bytes(2**25 + 12345), zipfile.ZIP_DEFLATED)
  changed(path, ((2**25 + 12345).to_bytes(4, 'little'), (1000).to_bytes(4, 'little')))


def bomb_without_size(place):  # and with the checksum of nothing
  path = zip_of(place, bytes(2**25 + 12345), zipfile.ZIP_DEFLATED)
  crc = zlib.crc32(bytes(2**25 + 12345)).to_bytes(4, 'little')
  size = (2**25 + 12345).to_bytes(4, 'little')
  changed(path, (size, bytes(4)), (crc, bytes(4)))


def long_name(place):
  save_image(place / '0.png')
  content = (place / '0.png').read_bytes()
  save_zip(place / 'set.zip', {'a/0.png': content, f'a/{"x" * 60_000}.png': content})


def wrong_bytes(place):
  path = zip_of(place)
  changed(path, (b'IHDR', b'IHDX'))


def encrypted(place):
  path = zip_of(place)
  content = bytearray(path.read_bytes())
  content[content.index(b'PK\1\2') + 8] |= 1
  path.write_bytes(content)


def moved(place):  # a member whose header is not where the directory states
  path = zip_of(place)
  content = bytearray(path.read_bytes())
  content[content.index(b'PK\1\2') + 42] = 7
  path.write_bytes(content)


def twice(place):
  save_image(place / '0.png')
  with zipfile.ZipFile(place / 'set.zip', 'w') as file:
    file.writestr('a/0.png', (place / '0.png').read_bytes())
    with pytest.warns(UserWarning, match='Duplicate name'):
      file.writestr('a/0.png', (place / '0.png').read_bytes())


BAD_ZIPS = {
  promises_more: r'0\.png is larger than 512 MiB',
  deflated_bomb: r'set\.zip/a/0\.png \(the zip file is damaged\)',
  long_name: r'set\.zip \(a name of 60006 bytes, which is longer than 1024\)',
  wrong_bytes: r'set\.zip/a/0\.png \(the zip file is damaged\)',
  encrypted: r'0\.png is encrypted',
  moved: r'cannot read .*set\.zip',
  twice: 'two images have the same name',
  lambda place: zip_of(place, png(20_000, 20_000)): r'0\.png .*pixels',
  lambda place: zip_of(place, b''): r'cannot read .*set\.zip/a/0\.png',
  lambda place: save_zip(place / 'set.zip', {'a.txt': b''}): r'no image in .*set\.zip',
  lambda place: (place / 'set.zip').write_bytes(b'PK'): r'cannot read .*set\.zip',
  lambda place: cut(zip_of(place)): r'cannot read .*set\.zip',
  lambda place: os.mkfifo(place / 'set.zip'): 'neither a folder nor an .npz or .zip',
}


@pytest.mark.parametrize('make', BAD_ZIPS)
@pytest.mark.parametrize('memory_gib', [0.0, 4.0])
def test_a_bad_zip_is_one_line(make, memory_gib, tmp_path):
  make(tmp_path)
  path = str(tmp_path / 'set.zip')
  with at_once(), pytest.raises(UserError, match=BAD_ZIPS[make]) as error:
    from_path(path=path, conditional=True, memory_gib=memory_gib)
  assert '\n' not in str(error.value)


def test_a_bomb_without_a_size_does_not_fill_the_memory(tmp_path):
  bomb_without_size(tmp_path)
  tracemalloc.start()
  with pytest.raises(UserError, match='damaged'):
    from_path(path=str(tmp_path / 'set.zip'))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**22  # of 32 MiB; 0.2 MiB is measured


def test_names_in_a_zip_that_lead_outside_write_nothing(tmp_path):
  save_image(tmp_path / 'in' / '0.png')
  content = (tmp_path / 'in' / '0.png').read_bytes()
  names = ('../0.png', '/etc/0.png', '..\\0.png', 'a/../../0.png')
  (tmp_path / 'deep').mkdir()
  path = save_zip(tmp_path / 'deep' / 'set.zip', dict.fromkeys(names, content))
  found = from_path(path=str(path), memory_gib=0.0)
  assert found.examples[:].shape[0] == 4
  assert {p.name for p in tmp_path.iterdir()} == {'in', 'deep'}
  assert [p.name for p in (tmp_path / 'deep').iterdir()] == ['set.zip']


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_is_one_line_that_names_it(workers, tmp_path):
  folder = save_tree(tmp_path / 'folder')
  cut(folder / name_of(17))
  with pytest.raises(UserError, match=r'cannot read .*img00000017\.png .*truncated'):
    from_path(path=str(folder))  # in memory, and so before anything starts
  on_disk = from_path(path=str(folder), memory_gib=0.0)
  rows, settings = np.arange(NUM), Loader(workers, 2, 2)
  batches = loader.read_ahead(on_disk, 0, 0, NUM, rows, settings)
  with pytest.raises(UserError, match=r'cannot read .*img00000017\.png') as error:
    next(batches)
  assert '\n' not in str(error.value)


@each_kind
def test_files_that_are_deleted_after_the_start_are_one_line(make, tmp_path):
  path = make(tmp_path)
  on_disk = from_path(path=str(path), memory_gib=0.0)
  path.rename(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match=r'config\.data\.path: cannot read') as error:
    on_disk.examples[:3]
  assert '\n' not in str(error.value)


# Shards ----------------------------------------------------------------------------


def shards(place, *arrays, save=np.savez):
  (place / 'set').mkdir()
  for i, values in enumerate(arrays):
    save(place / 'set' / f'{i}.npz', **values)


def u8(*shape):
  return np.zeros(shape, np.uint8)


GOOD = dict(images=u8(3, 4, 4, 3), labels=np.arange(3))
BAD_SHARDS = {
  'shapes': ((GOOD, GOOD | dict(images=u8(3, 4, 5, 3))), r"'images' differ: .*0\.npz"),
  'dtypes': (
    (GOOD, GOOD | dict(images=np.zeros((3, 4, 4, 3), np.float32))),
    r"'images' differ: .*0\.npz.*1\.npz float32",
  ),
  'no labels in one': ((GOOD, dict(images=GOOD['images'])), r"1\.npz has no 'labels'"),
  'too few labels': (
    (GOOD, GOOD | dict(labels=np.arange(2))),
    r"1\.npz has no 'labels'",
  ),
  'labels of floats': ((GOOD, GOOD | dict(labels=np.ones(3))), 'integers from 0'),
  'labels below 0': ((GOOD, GOOD | dict(labels=-np.ones(3, int))), 'integers from 0'),
  'labels too large': (
    (GOOD, GOOD | dict(labels=np.full(3, 99))),
    'is 99, .* too large',
  ),
  'labels beyond int64': (
    (GOOD, GOOD | dict(labels=np.full(3, 2**64 - 1, np.uint64))),
    'too large',
  ),
  'an empty one': ((GOOD, dict(images=u8(0, 4, 4, 3), labels=np.arange(0))), r'1\.npz'),
  'no images in one': ((GOOD, dict(pixels=u8(3, 4, 4, 3))), r"1\.npz has no 'images'"),
  'objects': (
    (GOOD, GOOD | dict(images=np.array([None] * 3))),
    r'cannot read .*1\.npz',
  ),
  'four channels': ((GOOD | dict(images=u8(3, 4, 4, 4)),) * 2, '4 channels'),
  'a number': ((GOOD | dict(images=np.uint8(1)),), r'shape \(\)|should be'),
}


@pytest.mark.parametrize('fault', BAD_SHARDS)
@pytest.mark.parametrize('memory_gib', [0.0, 4.0])
def test_a_bad_shard_is_one_line(fault, memory_gib, tmp_path):
  arrays, told = BAD_SHARDS[fault]
  shards(tmp_path, *arrays)
  path = str(tmp_path / 'set')
  with pytest.raises(UserError, match=told) as error:
    from_path(path=path, conditional=True, memory_gib=memory_gib)
  assert '\n' not in str(error.value)


def test_arrays_that_cannot_be_read_in_part_stay_in_memory(tmp_path):
  shards(tmp_path, GOOD, GOOD, save=np.savez_compressed)
  path = str(tmp_path / 'set')
  assert len(from_path(path=path).examples) == 6
  with pytest.raises(UserError, match=r'0\.npz is compressed.*np\.savez, or raise'):
    from_path(path=path, memory_gib=0.0)


@pytest.mark.parametrize('dtype', ['<f2', '<f4', '>f4', '<f8', '>f8', '|i1', '<i8'])
def test_arrays_on_disk_are_converted_as_those_in_memory(dtype, tmp_path):
  values = np.linspace(-1, 1, 6 * 4 * 4 * 3).reshape(6, 4, 4, 3).astype(dtype)
  np.savez(tmp_path / 'set.npz', images=values)
  path = str(tmp_path / 'set.npz')
  held, on_disk = (from_path(path=path, memory_gib=gib).examples for gib in (4.0, 0.0))
  assert held.dtype == on_disk.dtype == np.float32
  np.testing.assert_array_equal(on_disk[:], held)


def test_a_shard_that_is_cut_is_refused(tmp_path):
  shards(tmp_path, GOOD, GOOD)
  cut(tmp_path / 'set' / '1.npz')
  for memory_gib in (0.0, 4.0):
    with pytest.raises(UserError, match=r'cannot read .*1\.npz'):
      from_path(path=str(tmp_path / 'set'), memory_gib=memory_gib)


# The cache of decoded data ---------------------------------------------------------


@pytest.fixture
def decodes(monkeypatch):
  """How many images have been decoded so far, beyond the first of each start."""
  counted, plain = [], images.decoded

  def counting(file, resize):
    counted.append(file)
    return plain(file, resize)

  monkeypatch.setattr(images, 'decoded', counting)
  return lambda: len(counted)


@pytest.mark.parametrize('make', [make_folder, make_zip], ids=['folder', 'zip'])
def test_a_second_start_decodes_nothing_but_the_first_image(
  make, tmp_path, decodes, own_cache
):
  path = str(make(tmp_path))
  first = from_path(path=path)
  before = decodes()
  assert before >= NUM
  again = from_path(path=path)
  assert decodes() == before + 1
  np.testing.assert_array_equal(first.examples, again.examples)
  assert len(list(own_cache.iterdir())) == 1
  resized = from_path(path=path, size=8)  # other settings, another file
  assert resized.shape == (8, 8, 3)
  assert len(list(own_cache.iterdir())) == 2


def test_a_changed_file_is_decoded_again(tmp_path, own_cache):
  folder = make_folder(tmp_path)
  from_path(path=str(folder))
  Image.fromarray(pixels(seed=1)[0]).save(folder / name_of(5))
  found = from_path(path=str(folder))
  np.testing.assert_array_equal(found.examples[5], pixels(seed=1)[0])


@pytest.mark.parametrize('fault', ['cut', 'a bit', 'empty', 'object', 'other'])
def test_a_damaged_cache_is_reported_and_replaced(fault, tmp_path, own_cache, capsys):
  path = str(make_zip(tmp_path))
  from_path(path=path)
  (file,) = own_cache.iterdir()
  good = file.read_bytes()
  if fault == 'object':  # which would run code if it were unpickled
    np.savez(file, images=np.array([{}], object))
  elif fault == 'other':
    np.savez(file, images=np.zeros((NUM, 2, 2, 3), np.uint8))
  else:
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    file.write_bytes({'cut': good[:middle], 'a bit': flipped, 'empty': b''}[fault])
  capsys.readouterr()
  found = from_path(path=path)
  np.testing.assert_array_equal(found.examples, pixels())
  reported = capsys.readouterr()
  reported = reported.out + reported.err
  assert len(re.findall(r'damaged, decoded again', reported)) == 1
  (file,) = own_cache.iterdir()
  assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, own_cache, capsys):
  own_cache.parent.mkdir()
  own_cache.write_text('no folder')
  found = from_path(path=str(make_zip(tmp_path)))
  np.testing.assert_array_equal(found.examples, pixels())
  assert 'cannot cache the decoded data' in ''.join(capsys.readouterr())


def test_the_cache_is_bounded_and_keeps_what_was_used_last(own_cache, monkeypatch):
  monkeypatch.setattr(decoded, '_MAX_BYTES', 4500)
  for name in 'abc':
    decoded.cached(name, lambda: {'images': u8(1000)})
    stamp = ord(name)
    os.utime(decoded._path(name), (stamp, stamp))
  assert decoded.found('a') is not None  # and thereby used
  decoded.cached('d', lambda: {'images': u8(1000)})
  kept = [name for name in 'abcd' if decoded._path(name).exists()]
  assert 'd' in kept
  assert 'a' in kept
  assert 'b' not in kept
  assert sum(p.stat().st_size for p in own_cache.iterdir()) <= 4500 + 500  # headers
  decoded.cached('large', lambda: {'images': u8(9000)})
  assert not decoded._path('large').exists()


def test_files_that_another_process_deletes_do_not_stop_writing(own_cache, monkeypatch):
  decoded.cached('a', lambda: {'images': u8(10)})
  monkeypatch.setattr(decoded, '_MAX_BYTES', 100)
  listed, is_file = Path.iterdir, Path.is_file
  gone = own_cache / 'b.unfinished'  # renamed between two system calls
  monkeypatch.setattr(Path, 'iterdir', lambda folder: [gone, *listed(folder)])
  monkeypatch.setattr(Path, 'is_file', lambda path: path == gone or is_file(path))
  decoded.cached('c', lambda: {'images': u8(10)})
  assert decoded._path('c').exists()
  assert not decoded._path('a').exists()


def test_a_cached_set_that_shall_be_on_disk_is_not_loaded(tmp_path, monkeypatch):
  identity, stored = 'a set', {'images': u8(10_000)}
  decoded.cached(identity, lambda: stored)
  assert decoded.found(identity, 10_000) is not None
  monkeypatch.setattr(np, 'load', lambda *_, **__: pytest.fail('loaded'))
  assert decoded.found(identity, 100) is None
  assert decoded._path(identity).exists()


def test_starts_at_the_same_time_share_the_cache(tmp_path, own_cache):
  path = str(make_zip(tmp_path))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda _: from_path(path=path).examples, range(4)))
  for each in found:
    np.testing.assert_array_equal(each, pixels())
  assert [p.suffix for p in own_cache.iterdir()] == ['.npz']


def test_data_that_should_be_in_memory_and_does_not_fit_names_the_key(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(sharding, 'host_memory', lambda: 1000)
  path = str(make_zip(tmp_path))
  with pytest.raises(UserError, match=r'use a smaller config\.data\.memory_gib'):
    from_path(path=path)
  assert not from_path(path=path, memory_gib=0.0).in_memory


# TFDS ------------------------------------------------------------------------------


@pytest.fixture
def cifar10(monkeypatch):
  if not os.path.isdir(os.path.join(TFDS_COPY, 'cifar10')):
    pytest.skip(f'no CIFAR-10 under {TFDS_COPY}; set {DATA_DIR_VARIABLE}')
  return dict(name='cifar10', split='test[:96]', conditional=True, flip=True)


@pytest.mark.parametrize('resize', [{}, dict(size=16, crop='adm')], ids=str)
def test_tfds_on_disk_is_tfds_in_memory(resize, cifar10):
  held, on_disk = (tfds(memory_gib=gib, **cifar10, **resize) for gib in (4.0, 0.0))
  assert held.in_memory
  assert not on_disk.in_memory
  np.testing.assert_array_equal(on_disk.examples[:], held.examples)
  batches = loader.read_ahead(on_disk, 0, 0, 8, np.arange(8), Loader(0, 2, 2))
  for step in range(15):  # beyond an epoch
    same_batch(next(batches), batch_at(held, 0, step, 8))
  batches.close()
  assert contents(on_disk)[0] == contents(tfds(memory_gib=0.0, **cifar10, **resize))[0]


def test_a_second_start_of_tfds_does_not_import_it(cifar10):
  program = (
    'import sys; from cmjax.data.tfds import tfds;'
    f's = tfds(**{cifar10}); b = s.examples[:3].sum(), s.labels.sum(), s.classes;'
    'print(*b, *{"tensorflow_datasets", "tensorflow", "grain"} & set(sys.modules))'
  )
  first, second = (
    subprocess.run(
      [sys.executable, '-c', program],
      cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
    for _ in range(2)
  )  # fmt: skip
  assert first[3:] == ['tensorflow_datasets']
  assert second == first[:3]


def test_the_default_folder_is_that_of_tfds(monkeypatch):
  from tensorflow_datasets.core import constants

  from cmjax.data import tfds as module

  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  folder = Path(module._default_folder()).expanduser()
  assert folder == Path(constants.get_default_data_dir())


# Whole processes -------------------------------------------------------------------


def command(path, workdir, **settings):
  values = {
    'data.fn': 'cmjax.data.files:from_path',
    'data.path': path,
    'data.memory_gib': 0.0,
    'batch_size': 8,
    'loader.workers': 1,
    'network.width': 8,
    'network.num_blocks': 1,
    'every.picture_steps': 0,
    'every.checkpoint_steps': 20,
    'every.log_steps': 10,
  } | settings
  flags = [f'--config.{key}={value}' for key, value in values.items()]
  start = [sys.executable, '-m', 'cmjax.main', '--config=edm:digits']
  return [*start, *flags, f'--workdir={workdir}']


def children(pid):
  """The worker processes of a process; not Python's tracker of shared memory."""
  found = []
  for path in Path('/proc').glob('[0-9]*'):
    try:
      parent = int((path / 'stat').read_text().rpartition(')')[2].split()[1])
      if parent == pid and b'spawn_main' in (path / 'cmdline').read_bytes():
        found.append(int(path.name))
    except OSError:
      continue
  return found


def is_running(pid):
  try:
    state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except OSError:
    return False
  return state != 'Z'


def until(condition, process=None, seconds=120):
  end = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < end, 'still waiting'
    assert process is None or process.poll() is None, process.communicate()
    time.sleep(0.1)
  return value


def rows_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().split('\n')[:-1]  # whole ones
  return [(row['step'], row['loss']) for row in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='reads /proc')
def test_a_worker_or_a_trainer_that_is_killed_leaves_a_run_that_resumes(tmp_path):
  path, workdir = make_zip(tmp_path), tmp_path / 'run'
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
  endless = command(path, workdir, total_images=8 * 10**6)

  def start():
    process = subprocess.Popen(
      endless, env=environment, text=True,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    before = len(list((workdir / 'checkpoints').glob('[0-9]*')))
    until(lambda: (workdir / 'metrics.jsonl').exists(), process)
    steps = rows_of(workdir)[-1:]
    until(lambda: rows_of(workdir)[-1:] > steps or before == 0, process)
    until(lambda: list((workdir / 'checkpoints').glob('[0-9]*')), process)
    return process, until(lambda: children(process.pid), process)

  trainer, (worker,) = start()
  os.kill(worker, signal.SIGKILL)
  _, err = trainer.communicate(timeout=60)
  assert trainer.returncode == 2
  lines = [line for line in err.splitlines() if line.startswith('cmjax: ')]
  (line,) = lines
  assert re.search(
    r'config\.loader\.workers: a worker process ended .*exit code -9', line
  )

  trainer, (worker,) = start()  # resumes; signals to the group are not for workers
  os.kill(worker, signal.SIGTERM)
  os.kill(worker, signal.SIGINT)
  trainer.kill()
  trainer.wait()
  until(lambda: not is_running(worker), seconds=30)

  # Two starts on disk are one start in memory.
  whole, held = tmp_path / 'whole', {'data.memory_gib': 4.0, 'loader.workers': 0}
  endless = command(path, whole, total_images=8 * 10**6, **held)
  trainer = subprocess.Popen(endless, env=environment, stderr=subprocess.DEVNULL)
  until(lambda: (whole / 'metrics.jsonl').exists(), trainer)
  seen = rows_of(workdir)
  until(lambda: len(rows_of(whole)) >= len(seen), trainer)
  trainer.kill()
  trainer.wait()
  assert seen == rows_of(whole)[: len(seen)]
