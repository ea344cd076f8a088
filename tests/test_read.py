import contextlib
import io
import json
import marshal
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
import safetensors.numpy

from cmjax.core import UserError
from cmjax.port import pickles, read, write
from tests import foreign

ARRAYS = {
  'a.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
  'a.bias': np.float16([1, 2, 3]),
  'b': np.arange(4).astype(jnp.bfloat16),
  'c': np.array(7),
  'd': np.arange(24.0).reshape(2, 3, 4),
  'e': np.array([True, False]),
  'f': np.arange(5, dtype=np.uint8),
}


def same(found, arrays):
  assert list(found) == list(arrays)
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    assert found[name].shape == array.shape
    assert found[name].tobytes() == array.tobytes()


def flax_bytes():
  chunks = {'0': np.arange(4.0), '1': np.arange(4.0, 6.0)}
  chunked = dict(__msgpack_chunked_array__=True, shape={'0': 2, '1': 3}, chunks=chunks)
  tree = dict(step=3, params=dict(ARRAYS), rate=np.float32(0.5), big=chunked, z=1 + 2j)
  return foreign.flax(tree)


WRITERS = {
  'pickle': lambda: foreign.edm()[0],
  'legacy': lambda: foreign.torch_legacy(ARRAYS),
  'zip': lambda: foreign.torch_zip(ARRAYS),
  'msgpack': flax_bytes,
  'safetensors': lambda: safetensors.numpy.save(
    {k: v for k, v in ARRAYS.items() if k != 'b'}, {'made': 'here'}
  ),
}


@pytest.fixture
def reading(tmp_path):
  """data -> what `read` says of a file of it, whose name tells nothing."""

  def read_bytes(data):
    path = tmp_path / 'file'
    path.write_bytes(data)
    return read.read(path)

  return read_bytes


@pytest.fixture
def refusal(reading, tmp_path):
  """data -> the one line that refuses it, within its memory."""

  def refuse(data):
    tracemalloc.start()
    try:
      with pytest.raises(UserError) as caught:
        reading(data)
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    assert peak < 2 * len(data) + 2**21
    line = str(caught.value)
    assert line.startswith(f'{tmp_path / "file"}: ')
    assert '\n' not in line
    return line

  return refuse


def test_edm_pickle(reading):
  data, arrays = foreign.edm(dataset_kwargs=dict(use_labels=True))
  file = reading(data)
  assert (file.kind, file.metadata) == ('pickle', {})
  ema = file.content['ema']
  assert ema.class_name == 'EDMPrecond'
  assert ema.arguments == dict(model_type='SongUNet', depth=2, args=(8,))
  same(ema.tensors, arrays)
  assert file.content['loss_fn'] == pickles.Module('EDMLoss', {}, {})
  assert file.content['dataset_kwargs'] == dict(use_labels=True)
  same(read.tensors(file.content['ema']), arrays)
  assert next(iter(read.tensors(file.content, '/'))) == 'ema/model/map/weight'


@pytest.mark.parametrize('write', [foreign.torch_legacy, foreign.torch_zip])
def test_torch_state_dict(reading, write):
  file = reading(write(dict(ARRAYS, step=3, rates=[0.5, None], name='x')))
  assert file.kind == 'torch'
  same({name: file.content[name] for name in ARRAYS}, ARRAYS)
  assert [file.content[k] for k in ('step', 'rates', 'name')] == [3, [0.5, None], 'x']


def test_torch_views_share_their_storage(reading):
  whole = np.arange(24, dtype=np.float32)
  root = {
    'turned': foreign.tensor(foreign.storage(whole, '0'), (4, 6), (1, 4)),
    'part': foreign.tensor(foreign.storage(whole, '0'), (2, 3), (12, 2), 1),
    'empty': foreign.tensor(foreign.storage(whole, '0'), (0, 5), (5, 1)),
  }
  found = reading(foreign.legacy(root, {'0': whole})).content
  assert np.array_equal(found['turned'], whole.reshape(6, 4).T)
  assert np.array_equal(found['part'], whole.reshape(2, 12)[:, 1:7:2])
  assert np.shares_memory(found['turned'], found['part'])
  assert found['empty'].shape == (0, 5)


@pytest.mark.parametrize('write', [foreign.torch_legacy, foreign.torch_zip])
def test_the_state_of_an_optimizer_of_torch(reading, write):
  # By number of the parameter, and by its address in memory before torch 1.5.
  states = {key: dict(step=key) for key in (0, 1, 2**47 - 1)}
  groups = [dict(lr=0.1, betas=(0.9, 0.99), params=[0, 1], foreach=None)]
  optimizer = dict(state=states, param_groups=groups)
  assert reading(write(dict(optimizer=optimizer))).content == dict(optimizer=optimizer)


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_torch_module_in_a_pickle(reading, protocol):
  arrays = dict(weight=np.arange(6.0).reshape(2, 3), count=np.array(2))
  weight, count = ({name: array} for name, array in arrays.items())
  state = foreign.module_state(weight, count)
  linear = foreign.Call('torch.nn.modules.linear', 'Linear', state=state)
  net = reading(foreign.dumps([linear], protocol)).content[0]
  assert (net.class_name, net.arguments) == ('', {})
  same(net.tensors, arrays)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_numpy_and_sets_in_a_pickle(reading, protocol):
  arrays = dict(rows=np.arange(6.0).reshape(2, 3), columns=np.ones((2, 3), 'i4', 'F'))
  tree = dict(arrays=arrays, number=np.float32(2), labels={1, 2})
  content = reading(foreign.dumps(tree, protocol)).content
  same(content['arrays'], arrays)
  assert content['number'] == np.float32(2)
  assert content['labels'] == [1, 2]


def test_flax_msgpack(reading):
  file = reading(flax_bytes())
  assert (file.kind, file.content['step']) == ('msgpack', 3)
  same(file.content['params'], ARRAYS)
  assert file.content['rate'] == np.float32(0.5)
  assert file.content['z'] == 1 + 2j
  assert np.array_equal(file.content['big'], np.arange(6.0).reshape(2, 3))
  assert 'params.a.weight' in read.tensors(file.content)


def test_safetensors(reading):
  arrays = {k: ARRAYS[k] for k in sorted(ARRAYS)}
  header, at = {'__metadata__': {'made': 'here'}}, 0
  kinds = dict(float32='F32', float16='F16', bfloat16='BF16', int64='I64')
  kinds |= dict(float64='F64', bool='BOOL', uint8='U8')
  for name, array in arrays.items():
    span = [at, at := at + array.nbytes]
    header[name] = dict(
      dtype=kinds[array.dtype.name], shape=array.shape, data_offsets=span
    )
  text = json.dumps(header).encode()
  data = b''.join(array.tobytes() for array in arrays.values())
  file = reading(struct.pack('<Q', len(text)) + text + data)
  assert (file.kind, file.metadata) == ('safetensors', {'made': 'here'})
  same({name: file.content[name] for name in arrays}, arrays)


def test_tensors_refuses_two_of_one_name():
  with pytest.raises(ValueError, match='duplicate'):
    read.tensors({'a.b': np.zeros(1), 'a': {'b': np.zeros(1)}})


# Nothing is run


def hostile(marker):
  """Pickles that would write `marker`, and the global that each is refused for."""
  command = f'touch {marker}'
  source = f'open({str(marker)!r}, "w")'
  code = marshal.dumps(compile(source, 'x', 'exec'))
  system, call = foreign.Call('os', 'system', command), foreign.Call
  function = call('types', 'FunctionType', call('marshal', 'loads', code), {})
  state = foreign.module_state(extra=system)
  load = foreign.Name('torch.serialization', 'load')
  nested = call('torch.storage', '_load_from_bytes', foreign.legacy(system, {}))
  dotted = call('collections', 'OrderedDict.__init__.__globals__', 'x')
  yield 'stack_global', foreign.dumps(system, 4), 'os.system'
  yield 'global', foreign.dumps(system, 2), 'os.system'
  yield 'eval', foreign.dumps(call('builtins', 'eval', source)), 'builtins.eval'
  yield 'py2', foreign.dumps(call('__builtin__', 'eval', source)), '__builtin__.eval'
  yield 'lambda', foreign.dumps(function), 'types.FunctionType'
  yield 'code', foreign.dumps([call('marshal', 'loads', code)]), 'marshal.loads'
  yield 'state', foreign.edm(more=foreign.persistent('Net', state))[0], 'os.system'
  yield 'torch', foreign.dumps([load]), 'torch.serialization.load'
  yield 'jit', foreign.dumps([foreign.Name('torch.jit', 'load')]), 'torch.jit.load'
  yield 'nested', foreign.dumps(nested), 'os.system'
  yield 'dotted', foreign.dumps(dotted), 'collections.OrderedDict.__init__.__globals__'
  yield 'legacy', foreign.legacy(system, {}), 'os.system'
  yield 'zip', foreign.torch_zip({}, pickled=foreign.dumps(system, 2)), 'os.system'


HOSTILE = [name for name, *_ in hostile('x')]


@pytest.mark.parametrize('name', HOSTILE)
def test_a_payload_is_refused_by_name_and_not_run(refusal, tmp_path, name):
  marker = tmp_path / 'ran'
  data, code_name = {n: rest for n, *rest in hostile(marker)}[name]
  assert f'contains code, {code_name}, which cmjax does not run' in refusal(data)
  assert not marker.exists()


def test_the_source_of_a_module_is_not_run(reading, tmp_path):
  marker = tmp_path / 'ran'
  data, arrays = foreign.edm(source=f'open({str(marker)!r}, "w")')
  same(reading(data).content['ema'].tensors, arrays)
  assert not marker.exists()


def test_streams_do_not_nest(refusal):
  inner = foreign.legacy(foreign.stream(np.zeros(2)), {})
  data = foreign.dumps(foreign.Call('torch.storage', '_load_from_bytes', inner))
  assert 'damaged or not a checkpoint' in refusal(data)


# Files that are not checkpoints


@pytest.mark.parametrize(
  ('data', 'says'),
  [
    (b'', 'is empty'),
    (b'\n<!DOCTYPE html><html>', 'is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'git lfs pull'),
    (b'{"a": 1}', 'damaged or not a checkpoint'),
    (b'\x93NUMPY\1\0', 'damaged or not a checkpoint'),
    (bytes(100), 'damaged or not a checkpoint'),
    (b'\xff' * 100, 'damaged or not a checkpoint'),
    (b'\x80', 'damaged or not a checkpoint'),
  ],
)
def test_a_file_that_is_not_a_checkpoint(reading, data, says):
  with pytest.raises(UserError, match=says):
    reading(data)


def test_a_safetensors_file_is_one_whatever_the_length_of_its_header(reading):
  for length in range(2, 2**16):
    kind = read.kind_of(struct.pack('<Q', length) + b'{"a":{')
    assert kind == 'safetensors', length
  # Lengths that begin as a web page, a pickle, msgpack and a pointer of git-lfs do.
  for start in (b' <', b'<!', b'\x80\x02', b'\x81\xa1', b've'):
    length = int.from_bytes(start, 'little')
    data = safetensors.numpy.save({'a': np.ones(3)}, {'note': ''})
    size = int.from_bytes(data[:8], 'little')
    padded = data[8 : 8 + size].replace(
      b'"note":""', b'"note":"%b"' % (b'x' * (length - size))
    )
    assert len(padded) == length
    whole = struct.pack('<Q', length) + padded + data[8 + size :]
    assert reading(whole).content['a'].tolist() == [1, 1, 1]


@pytest.mark.parametrize('text', ['<!DOCTYPE HTML>', '\r\n <html>', '\ufeff<?xml?>'])
def test_web_pages_are_recognised(reading, text):
  with pytest.raises(UserError, match='is a web page'):
    reading(text.encode())


def test_a_folder_and_a_missing_file(tmp_path):
  with pytest.raises(UserError, match='is a folder'):
    read.read(tmp_path)
  with pytest.raises(UserError, match='no such file'):
    read.read(tmp_path / 'none')


@pytest.mark.parametrize('kind', WRITERS)
def test_truncated_anywhere(reading, kind):
  data = WRITERS[kind]()
  for end in np.linspace(1, len(data) - 1, 60).astype(int):
    with pytest.raises(UserError) as caught:
      reading(data[:end])
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', WRITERS)
def test_flipped_bits_give_a_content_or_one_line(reading, kind):
  data = WRITERS[kind]()
  draw = np.random.default_rng(0)
  for _ in range(400):
    flipped = bytearray(data)
    for at in draw.integers(len(data), size=draw.integers(1, 4)):
      flipped[at] ^= 1 << int(draw.integers(8))
    with contextlib.suppress(UserError):
      content = reading(bytes(flipped)).content
      with contextlib.suppress(ValueError):
        read.tensors(content)


# Sizes and shapes that the file does not have

FILLER = b'\x80\x04' + b'B' + struct.pack('<I', 2**20) + bytes(2**20) + b'0'
PICKLES = {
  'binbytes8': b'\x8e' + struct.pack('<Q', 2**30) + b'.',
  'binbytes': b'B' + struct.pack('<I', 2**30) + b'.',
  'bytearray8': b'\x96' + struct.pack('<Q', 2**62) + b'.',
  'unicode': b'X' + struct.pack('<I', 2**30) + b'.',
  'long4': b'\x8b' + struct.pack('<I', 2**30) + b'.',
  'memo': b'Nr' + struct.pack('<I', 2**31 - 1) + b'.',
  'memo in text': b'Np999999999\n.',
  'inst': b'(ios\nsystem\n.',
  'long key': b'}\x8a\x08' + bytes(7) + b'\x10Ns.',
  'extension': b'\x82\x01.',
  'no stop': b'N',
  'more after it': b'N.N.',
  'deep': b']' * 3000 + b'a' * 2999 + b'.',
  'deep tuples': b')' + b'\x85' * 70_000 + b'.',
  'text': b'N' + (b'X' + struct.pack('<I', 2**18) + b'a' * 2**18 + b'0') * 70 + b'.',
}


@pytest.mark.parametrize('name', PICKLES)
def test_pickle_claims(refusal, name):
  assert 'damaged or not a checkpoint' in refusal(FILLER + PICKLES[name])


def test_a_long_chain_of_states_comes_apart(reading):
  links = b'h\0)R' * 80_000 + b'b' * 80_000
  with pytest.raises(UserError, match='unexpected arguments'):
    reading(b'\x80\x04ctorch\nSize\nq\0)R' + links + b'.')


def test_many_small_objects_take_a_bounded_memory(reading):
  tracemalloc.start()
  with pytest.raises(UserError, match='opcodes'):
    reading(b'\x80\x04' + b'\x8f' * 2**21 + b'.')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**27  # 64 bytes for each of the opcodes that are read


def test_shared_lists_do_not_multiply(reading):
  doubled = b''.join(b'q%c](h%ch%ce' % (i, i, i) for i in range(60))
  tracemalloc.start()
  with pytest.raises(UserError, match='too many values'):
    reading(b'\x80\x04]' + doubled + b'.')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**25


FLOATS = np.zeros(1000, np.float32)
TENSORS = {
  'beyond its storage': ((2000,), (1,), 0),
  'offset': ((1000,), (1,), 1),
  'stride': ((10, 10), (1000, 1), 0),
  'expanded': ((2**30,), (0,), 0),
  'negative': ((-1,), (1,), 0),
  'negative stride': ((10,), (-1,), 9),
  'negative offset': ((10,), (1,), -1),
  'overflow': ((2**40, 2**40), (1, 1), 0),
  'overflowing stride': ((2, 2), (2**62, 2**62), 0),
  'ranks': ((2, 2), (1,), 0),
  'a float': ((2.0,), (1,), 0),
  'many axes': ((1,) * 100, (1,) * 100, 0),
}


@pytest.mark.parametrize('name', TENSORS)
def test_tensor_claims(refusal, name):
  shape, strides, offset = TENSORS[name]
  root = foreign.tensor(foreign.storage(FLOATS, '0'), shape, strides, offset)
  refusal(foreign.legacy([root], {'0': FLOATS}))
  refusal(
    foreign.dumps([foreign.tensor(foreign.stream(FLOATS), shape, strides, offset)])
  )


def test_storage_claims(refusal):
  large = foreign.Storage('FloatStorage', '0', 2**28)
  root = foreign.tensor(large, (10,), (1,))
  refusal(foreign.legacy([root], {'0': FLOATS}))
  refusal(foreign.torch_zip({'0': FLOATS}, pickled=foreign.dumps([root], 2)))


def test_zip_claims(refusal):
  compressed = foreign.torch_zip(ARRAYS, compression=zipfile.ZIP_DEFLATED)
  assert 'compressed' in refusal(compressed)
  data = bytearray(foreign.torch_zip(ARRAYS))
  central = data.find(b'PK\1\2')
  data[central + 20 : central + 28] = struct.pack('<II', 2**30, 2**30)
  assert 'larger than the file' in refusal(bytes(data))
  data = bytearray(foreign.torch_zip(ARRAYS))
  end = data.find(b'PK\5\6')
  data[end + 12 : end + 16] = struct.pack('<I', 2**31)
  refusal(bytes(data))
  member = struct.pack('<4s6H3I5H2I5s', b'PK\1\2', *(0,) * 9, 5, *(0,) * 6, b'aaaaa')
  ends = b'PK\5\6', 0, 0, 2**15, 2**15, len(member) * 2**15, 64, 0
  listed = b'PK\3\4' + bytes(60) + member * 2**15 + struct.pack('<4s4H2IH', *ends)
  assert 'too many members' in refusal(listed)
  data = foreign.torch_zip(ARRAYS)
  at = data.find(ARRAYS['d'].tobytes())
  assert 'CRC' in refusal(data[: at + 9] + b'\1' + data[at + 10 :])
  file = io.BytesIO(data)
  with (
    zipfile.ZipFile(file, 'a') as archive,
    pytest.warns(UserWarning, match='Duplicate'),
  ):
    archive.writestr('net/data.pkl', foreign.dumps({}))
  assert 'two members' in refusal(file.getvalue())


@pytest.mark.parametrize(
  'data',
  [
    b'\x81\xa1a\xc6' + struct.pack('>I', 2**30),
    b'\x81\xa1a\xdb' + struct.pack('>I', 2**30),
    b'\x81\xa1a\xc9' + struct.pack('>I', 2**30) + b'\1',
    b'\xdf' + struct.pack('>I', 2**31),
    b'\x81\xa1a' + (b'\xdd' + struct.pack('>I', 2**17)) * 200 + bytes(2**18),
    b'\x81\xa1a' * 400 + b'\1',
    foreign.flax({'a': foreign.msgpack.ExtType(1, b'\x93\x91\xcf' + bytes(8))}),
  ],
)
def test_msgpack_claims(refusal, data):
  assert 'damaged or not a checkpoint' in refusal(data)


@pytest.mark.parametrize('name', ['object', 'V1000', 'f4,f4', '(9,)f4', 'nothing'])
def test_dtypes_that_are_not_numbers(refusal, name):
  data = foreign.msgpack.packb(((1,), name, bytes(8)))
  refusal(foreign.flax({'a': foreign.msgpack.ExtType(1, data)}))


def test_safetensors_claims(refusal):
  refusal(struct.pack('<Q', 2**31) + b'{"a":1}')
  refusal(struct.pack('<Q', 2**62) + b'{"a":1}')
  for shape, span in [([2**28], [0, 2**30]), ([4], [0, 8]), ([2**62, 8], [0, 8])]:
    header = json.dumps({'a': dict(dtype='F32', shape=shape, data_offsets=span)})
    refusal(struct.pack('<Q', len(header)) + header.encode() + bytes(8))


def test_an_ordered_dict_of_python_2_keeps_its_items(reading):
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  root, arrays = foreign.state({'a': array})
  pairs = [[name, value] for name, value in root.items()]
  root = foreign.Call('collections', 'OrderedDict', pairs)
  np.testing.assert_array_equal(
    reading(foreign.legacy(root, arrays)).content['a'], array
  )


# Files that cmjax writes

OURS = dict(
  config='{"network": {"fn": "x"}, "precond": {}}',
  shape=[8, 8, 3],
  classes=10,
  origin='cmjax',
  step=7,
)


def test_the_metadata_of_a_native_file():
  found = write.read_meta({write.MARK: json.dumps(OURS)}, 'file')
  assert found == OURS | dict(shape=(8, 8, 3), data=None)
  known = dict(name='photos', low=0.0, high=255.0, offset=127.5, scale=1 / 127.5)
  found = write.checked_meta(OURS | dict(data=known), 'file')
  assert found['data'] == known
  for key, value in dict(
    name=3, low='x', high=float('nan'), offset=None, scale=0.0
  ).items():
    with pytest.raises(UserError, match='data is invalid'):
      write.checked_meta(OURS | dict(data=known | {key: value}), 'file')
  fewer = {k: OURS[k] for k in ('config', 'shape', 'classes')}  # of a checkpoint
  found = write.checked_meta(fewer, 'run')
  assert (found['step'], found['origin']) == (0, 'cmjax')


@pytest.mark.parametrize(
  'mark', [None, '', '[]', '3', 'null', '{}', '[' * 10**5, '[{}]', 'NaN', '9' * 5000]
)
def test_invalid_metadata_is_refused(mark):
  with pytest.raises(UserError) as caught:
    write.read_meta({} if mark is None else {write.MARK: mark}, 'file')
  assert str(caught.value).startswith("file: the entry 'cmjax' is invalid")
  assert len(str(caught.value)) < 200
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('key', 'value', 'says'),
  [
    *(('config', value, 'config') for value in (None, '', '[]', '3', '[' * 10**5, {})),
    ('config', '{"network": []}', 'no network'),
    ('config', '{"network": {}, "precond": null}', 'no precond'),
    (
      'config',
      '{"network": {}, "precond": {"a": ' + '[' * 100 + ']' * 100 + '}}',
      'parts',
    ),
    *(
      ('shape', value, 'shape')
      for value in (None, 3, 'abc', [], [1, 2], [0], [-1], [2**40], [8, 8, 3.0], [True])
    ),
    *(('classes', value, 'classes') for value in (None, -1, 1.0, '1', 10**7, True)),
    *(('step', value, 'step') for value in (None, -1, 1.0, 10**300, [[]] * 10**6)),
    *(
      ('origin', value, 'origin') for value in (None, 3, 'a\nb', 'a' * 10**6, '\33[2J')
    ),
  ],
)
def test_each_entry_of_the_metadata_is_checked(key, value, says):
  with pytest.raises(UserError, match=says) as caught:
    write.checked_meta(OURS | {key: value}, 'file')
  assert len(str(caught.value)) < 300
  assert str(caught.value).isprintable()


def leftovers(path):
  return sorted(p.name for p in path.parent.iterdir())


def test_a_native_file_is_written_once(tmp_path):
  path = tmp_path / 'new' / 'a.safetensors'
  write.safetensors(path, {'a': {'b': np.arange(3.0)}}, OURS)
  assert leftovers(path) == ['a.safetensors']
  before = path.read_bytes()
  with pytest.raises(UserError, match='already exists'):
    write.safetensors(path, {'a': {'b': np.zeros(3)}}, OURS)
  assert (leftovers(path), path.read_bytes()) == (['a.safetensors'], before)
  file = read.read(path)
  assert file.content['a/b'].tolist() == [0, 1, 2]
  assert write.read_meta(file.metadata, path)['step'] == 7


def test_a_file_system_without_links(tmp_path, monkeypatch):
  def link(*_):
    raise PermissionError(1, 'Operation not permitted')

  monkeypatch.setattr(write.os, 'link', link)
  test_a_native_file_is_written_once(tmp_path)


@pytest.mark.parametrize(
  'error', [OSError(28, 'No space left'), KeyboardInterrupt(), SafetensorError('full')]
)
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
  path = tmp_path / 'a.safetensors'

  def save_file(tensors, name, metadata):
    name.write_bytes(b'half')
    raise error

  monkeypatch.setattr(write, 'save_file', save_file)
  kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
  with pytest.raises(kind):
    write.safetensors(path, {'a': np.zeros(3)}, OURS)
  assert leftovers(path) == []


def test_a_path_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='cannot be written'):
    write.safetensors(tmp_path / 'file' / 'a.safetensors', {'a': np.zeros(3)}, OURS)
