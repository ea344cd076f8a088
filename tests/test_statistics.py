"""Reference statistics: each format, and files that are damaged or hostile."""

import io
import pickle
import resource
import struct
import time
import zipfile

import numpy as np
import pytest

from cmjax.core import UserError
from cmjax.port import statistics
from tests import foreign

SIZE = 6


def gaussian(seed=0, size=SIZE):
  x = np.random.default_rng(seed).normal(size=(40, size))
  return x.mean(0), np.cov(x.T)


def npz(compressed=False, **arrays):
  file = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(file, **arrays)
  return file.getvalue()


def images(n=3, channels=3):
  return np.random.default_rng(0).integers(0, 256, (n, 8, 8, channels)).astype(np.uint8)


MEAN, COV = gaussian()


@pytest.fixture
def written(tmp_path):
  def write(data, name='reference.npz'):
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)

  return write


# Formats --------------------------------------------------------------------------


@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('names', [('mu', 'sigma'), ('ref_mu', 'ref_sigma')])
@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_npz_of_a_mean_and_a_covariance(written, names, compressed, dtype):
  pair = dict(zip(names, (MEAN.astype(dtype), COV.astype(dtype))))
  found = statistics.read(path=written(npz(compressed, **pair, split=np.array(3))))
  assert found.name == 'reference.npz'
  assert found.mean.dtype == found.covariance.dtype == np.float64
  np.testing.assert_array_equal(found.mean, MEAN.astype(dtype))
  np.testing.assert_array_equal(found.covariance, COV.astype(dtype))
  assert found.spatial_mean is found.images is None


@pytest.mark.parametrize('compressed', [False, True])
def test_npz_of_openai_has_spatial_statistics_and_images(written, compressed):
  spatial = gaussian(1, 4)
  path = written(
    npz(
      compressed,
      arr_0=images(),
      mu=MEAN,
      sigma=COV,
      mu_s=spatial[0],
      sigma_s=spatial[1],
    )
  )
  found = statistics.read(path=path)
  np.testing.assert_array_equal(found.images, images())
  np.testing.assert_array_equal(found.gaussian('pool')[1], COV)
  np.testing.assert_array_equal(found.gaussian('spatial')[0], spatial[0])
  np.testing.assert_array_equal(found.gaussian('spatial')[1], spatial[1])


def test_pickle_of_edm2_has_entries(written):
  other = gaussian(1, 4)
  content = {
    'num_images': 40,
    'fid': dict(mu=MEAN, sigma=COV),
    'fd_dinov2': dict(mu=other[0], sigma=other[1]),
  }
  path = written(pickle.dumps(content), 'ref.pkl')
  found = statistics.read(path=path, key='fid')
  assert found.name == 'ref.pkl:fid'
  np.testing.assert_array_equal(found.covariance, COV)
  found = statistics.read(path=path, key='fd_dinov2')
  np.testing.assert_array_equal(found.mean, other[0])
  with pytest.raises(UserError, match=r'set key to one of .fid., .fd_dinov2.'):
    statistics.read(path=path)
  with pytest.raises(UserError, match=r"no entry 'fids'; it has .fid., .fd_dinov2."):
    statistics.read(path=path, key='fids')


def test_files_of_torch_are_read_too(written):
  data = foreign.torch_zip(dict(mu=MEAN, sigma=COV))
  found = statistics.read(path=written(data, 'statistics.pt'))
  np.testing.assert_array_equal(found.covariance, COV)


def test_rounding_in_float32_counts_as_symmetric(written):
  noise = 1e-7 * np.random.default_rng(0).normal(size=COV.shape)
  found = statistics.read(path=written(npz(mu=MEAN, sigma=COV + noise)))
  np.testing.assert_array_equal(found.covariance, found.covariance.T)
  np.testing.assert_allclose(found.covariance, COV, atol=1e-6)


# Refusals -------------------------------------------------------------------------

ASYMMETRIC = COV + np.triu(np.ones_like(COV), 1)
NAN = np.where(np.eye(SIZE) > 0, np.nan, COV)


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    (dict(mu=MEAN, covariance=COV), "no mu and sigma, .* it has 'mu', 'covariance'"),
    (dict(), 'it has nothing'),
    (
      dict(mu=MEAN[:4], sigma=COV),
      r'must be \[D\] and \[D, D\] .* \(4,\) and \(6, 6\)',
    ),
    (dict(mu=MEAN[None], sigma=COV), r'must be \[D\] and \[D, D\]'),
    (dict(mu=np.float64(1), sigma=COV), r'must be \[D\] and \[D, D\]'),
    (dict(mu=MEAN[:0], sigma=COV[:0, :0]), r'must be \[D\] and \[D, D\]'),
    (dict(mu=MEAN, sigma=NAN), 'not finite'),
    (dict(mu=MEAN * np.inf, sigma=COV), 'not finite'),
    (dict(mu=MEAN, sigma=ASYMMETRIC), 'not the symmetric matrix of a covariance'),
    (dict(mu=MEAN, sigma=-COV), 'not the symmetric matrix of a covariance'),
    (dict(mu=MEAN + 1j, sigma=COV), 'mu is not an array of numbers'),
    (dict(mu=np.array(['a']), sigma=COV), 'mu is not an array of numbers'),
    (dict(mu=MEAN, sigma=COV, arr_0=images().astype('f4')), 'arr_0 must be images'),
    (dict(mu=MEAN, sigma=COV, arr_0=images(channels=2)), 'arr_0 must be images'),
    (dict(mu=MEAN, sigma=COV, mu_s=MEAN, sigma_s=NAN), 'mu_s or sigma_s .* not finite'),
  ],
)
def test_arrays_that_are_no_statistics(written, arrays, message):
  with pytest.raises(UserError, match=message):
    statistics.read(path=written(npz(**arrays)))


def test_missing_files_and_needless_keys(written, tmp_path):
  with pytest.raises(UserError, match='no such file'):
    statistics.read(path=str(tmp_path / 'none.npz'))
  with pytest.raises(UserError, match='is a folder'):
    statistics.read(path=str(tmp_path))
  with pytest.raises(UserError, match='it has one set; leave key out'):
    statistics.read(path=written(npz(mu=MEAN, sigma=COV)), key='fid')
  content = pickle.dumps(dict(fid=dict(mu=[1.0, 2.0], sigma=3)))
  with pytest.raises(UserError, match='must be arrays of numbers'):
    statistics.read(path=written(content), key='fid')
  with pytest.raises(UserError, match='contains no named arrays'):
    statistics.read(path=written(pickle.dumps([MEAN])))


# Hostile files --------------------------------------------------------------------


class Danger:
  """A pickle that would create a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


def member(header, data=b''):
  """An .npy with any header."""
  text = header if isinstance(header, bytes) else repr(header).encode()
  return b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + data


def header(shape, descr='<f8'):
  return dict(descr=descr, fortran_order=False, shape=shape)


def zipped(compression=zipfile.ZIP_DEFLATED, **members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', compression) as archive:
    for name, content in members.items():
      archive.writestr(f'{name}.npy', content)
  return file.getvalue()


def crafted(path):
  good = npz(mu=MEAN, sigma=COV)
  mean = npz(mu=MEAN)
  with zipfile.ZipFile(io.BytesIO(mean)) as archive:
    mu = archive.read('mu.npy')
  pickled = np.empty(1, object)
  pickled[0] = Danger(path)
  zeros = np.zeros((4000, 4000))
  yield 'objects', npz(mu=pickled, sigma=COV)
  yield 'code', pickle.dumps(dict(fid=Danger(path)))
  yield 'bomb', npz(True, mu=np.zeros(4000), sigma=zeros)
  yield 'bomb of images', npz(True, mu=MEAN, sigma=COV, arr_0=np.zeros(2**28, 'u1'))
  yield 'large shape', zipped(mu=mu, sigma=member(header((2**40, 2**20))))
  yield 'long shape', zipped(mu=mu, sigma=member(header((2**13, 2**13))))
  yield 'negative', zipped(mu=mu, sigma=member(header((-6, -6)), bytes(288)))
  yield 'many axes', zipped(mu=member(header((1,) * 60), bytes(8)), sigma=mu)
  yield 'brackets', zipped(mu=member(b'[' * 60_000), sigma=mu)
  yield 'huge number', zipped(mu=member(b'9' * 60_000), sigma=mu)
  yield 'no header', zipped(mu=b'NUMPY', sigma=mu)
  yield 'version 3', zipped(mu=b'\x93NUMPY\3\0' + mu[8:], sigma=mu)
  yield 'many members', zipped(**{f'a{i}': b'' for i in range(100)})
  yield 'long name', zipped(**{'a' * 60_000: b''})
  yield 'truncated', good[: len(good) // 2]
  yield 'one byte', b'P'
  yield 'empty', b''
  yield 'text', b'mu, sigma\n1, 2\n'
  yield 'web page', b'<html>not found</html>'


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_crafted_files_are_refused_quickly_and_without_running_them(written, tmp_path):
  touched = tmp_path / 'touched'
  for name, data in crafted(str(touched)):
    path = written(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    with pytest.raises(UserError) as error:
      statistics.read(path=path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert len(str(error.value)) <= 600 + len(path), name
    assert '\n' not in str(error.value), name
    assert time.process_time() - began < 2, name
    assert after.ru_maxrss - before.ru_maxrss < 100 * 1024, name  # KiB
    assert not touched.exists(), name


def test_damaged_files_are_read_or_refused(written):
  draw = np.random.default_rng(0)
  files = [
    npz(mu=MEAN, sigma=COV, arr_0=images()),
    npz(True, mu=MEAN, sigma=COV),
    pickle.dumps(dict(mu=MEAN, sigma=COV)),
  ]
  refused = 0
  for i in range(150):
    data = bytearray(files[i % len(files)])
    at = draw.integers(len(data))
    match i // len(files) % 3:
      case 0:
        data[at] ^= 1 << draw.integers(8)
      case 1:
        del data[at : at + draw.integers(1, 50)]
      case 2:
        data[at:at] = bytes(draw.integers(0, 256, 5, dtype=np.uint8))
    try:
      found = statistics.read(path=written(bytes(data)))
    except UserError:
      refused += 1
    else:
      assert np.all(np.isfinite(found.covariance))
  assert refused > 75
