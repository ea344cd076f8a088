"""Files made to be slow or large, and damaged ones: each is read, or refused quickly.

`python -m tests.test_hostile_files FOLDER COUNT` reads the crafted files and COUNT
damaged ones, and prints a line of JSON for each of the crafted, and one for the others.
The tests run it in a separate process, as a hang in C cannot be interrupted.
"""

import io
import json
from pathlib import Path
import signal
import struct
import subprocess
import sys
import time
import zipfile

import msgpack
import numpy as np
import pytest
import safetensors.numpy

from cmjax.core import UserError
from cmjax.port import read, released, write
from tests import foreign
from tests.conftest import ROOT

MOST_S = 10.0  # of a processor: others may run beside it
MOST_BYTES = 200 * 2**20  # beyond twice the file
DAMAGED = 600  # in the suite: a second
P = b'\x80\x04'
PRIME = 2**61 - 1  # whole numbers are hashed modulo it

# Crafted files --------------------------------------------------------------------


def index(i):
  return struct.pack('<I', i)


def doubled(levels=60):
  """A tuple of the one before twice, and so on: 2^levels leaves to walk."""
  return b')' + b''.join(b'r%b0j%bj%b\x86' % ((index(i),) * 3) for i in range(levels))


def doubled_calls(levels=30):
  """torch.Size of two of the one before: calls that share their parts."""
  part = b'r%b0ctorch\nSize\nj%bj%b\x86\x85R'
  return b')' + b''.join(part % ((index(i),) * 3) for i in range(levels))


def number(value):
  raw = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
  return b'\x8a' + bytes([len(raw)]) + raw


def text(value):
  return b'X' + index(len(value)) + value


def call(module, name, arguments):
  return b'c%b\n%b\n%bR' % (module, name, arguments)


def mapping(**pairs):
  return b'}(' + b''.join(text(k.encode()) + v for k, v in pairs.items()) + b'u'


def edm(arguments):
  """An EDM2 file whose network was made with the arguments, a piece of a pickle."""
  state = mapping(_init_kwargs=arguments)
  meta = mapping(class_name=text(b'Precond'), state=state)
  name = b'torch_utils.persistence', b'_reconstruct_persistent_obj'
  return P + mapping(ema=call(*name, meta + b'\x85')) + b'.'


def edm2(**arguments):
  sizes = dict(img_resolution=b'K\x08', img_channels=b'K\3')
  return edm(mapping(**sizes | arguments))


def storage(key):
  parts = text(b'storage') + b'ctorch\nFloatStorage\n' + key + text(b'cpu') + b'K\1'
  return b'(' + parts + b'tQ'


def zipped(pickled, **members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('net/data.pkl', P + pickled + b'.')
    for name, content in members.items():
      archive.writestr(f'net/data/{name}', content)
  return file.getvalue()


def central(count):
  """A zip whose list has many members, all of them at one place."""
  member = struct.pack('<4s6H3I5H2I', b'PK\1\2', *(0,) * 9, 5, *(0,) * 6)
  listed = b''.join(member + b'%05d' % i for i in range(count))
  end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, count, count, len(listed), 64, 0)
  return b'PK\3\4' + bytes(60) + listed + end


def views(names, wrap=dict):
  """A torch file of many tensors of 4 MB, all of one storage."""
  whole = np.zeros(10**6, np.float32)
  one = foreign.storage(whole, '0')
  root = {n: foreign.tensor(one, (1000, 1000), (1000, 1)) for n in names}
  return foreign.legacy(wrap(root), {'0': whole})


def unet(levels, width=1):
  """The names of a U-Net of OpenAI's with as many levels."""
  wide, last = np.zeros(128, np.float32), 2 * levels + 1
  found = {f'output_blocks.{i}.1.in_layers.0.weight': wide for i in range(levels)}
  found |= {f'input_blocks.{i}.0.weight': wide[None] for i in range(last + 1)}
  found |= {f'input_blocks.{i}.0.out_layers.3.bias': wide for i in range(1, last + 1)}
  found[f'input_blocks.{last}.1.qkv.weight'] = wide
  found['input_blocks.1.0.emb_layers.1.bias'] = wide
  return found | {'time_embed.0.weight': np.zeros((1, width), np.float32)}


def stream(opcodes):
  """A stream of torch's older format that does not end."""
  part = P + b'N0' * (opcodes // 2)
  data = b'B' + index(len(part)) + part
  return call(b'torch.storage', b'_load_from_bytes', data + b'\x85')


def entry(shape=(1,), span=(0, 4)):
  return dict(dtype='F32', shape=shape, data_offsets=span)


def safe(header, data=bytes(4)):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(header)) + header + data


def ours_meta(**meta):
  config = json.dumps(dict(network={}, precond={}))
  meta = dict(config=config, shape=[8, 8, 3], classes=0, origin='x', step=0) | meta
  return json.dumps(meta)


def ours(mark=None, **meta):
  """A file of cmjax with another entry for what it is of."""
  mark = ours_meta(**meta) if mark is None else mark
  return safetensors.numpy.save({'a': np.zeros(2, np.float32)}, {write.MARK: mark})


def nested_lists(size, leaf=b'\x90'):
  """msgpack: lists of 15 lists of 15 ... down to leaves of a byte."""
  while len(leaf) < size:
    leaf = b'\x9f' + leaf * 15
  return leaf


def array(data):
  return foreign.flax({'a': msgpack.ExtType(1, data)})


def pickles():
  """Pieces of pickles, by what is wrong with each."""
  colliding = [number(i * PRIME) for i in range(1, 60_001)]
  # Small numbers that meet in a table of CPython's, up to their highest bits.
  meeting = [number((i << 40) + 1) for i in range(100_000)]
  floats = [b'G' + struct.pack('>d', 2.0 ** (61 * i % 1000)) for i in range(10**5)]
  size, ordered = b'ctorch\nSize\nq\0', (b'collections', b'OrderedDict')
  deep, calls = doubled(), doubled_calls()
  yield 'key: tuple', b'}' + deep + b'Ns'
  yield 'key: tuple of many', b'}(' + deep + b'Nu'
  yield 'key: tuple in text', b'(' + deep + b'Nd'
  yield 'key: tuple in a set', b'\x8f(' + deep + b'\x90'
  yield 'key: tuple in a frozenset', b'(' + deep + b'\x91'
  yield 'key: tuple of python 2', call(b'__builtin__', b'set', b'](' + deep + b'e\x85')
  yield 'key: tuple in pairs', call(*ordered, b'](' + deep + b'N\x86e\x85')
  yield 'key: tuple as a name', deep + deep + b'\x93'
  yield 'key: tuple as a storage', storage(deep)
  yield 'key: calls', b'}' + calls + b'Ns'
  yield 'key: calls in pairs', call(*ordered, b'](' + calls + b'N\x86e\x85')
  for name, keys in dict(colliding=colliding, meeting=meeting, floats=floats).items():
    yield f'keys: {name}', b'}(' + b'N'.join(keys) + b'Nu'
    yield f'keys: {name} in a set', b'\x8f(' + b''.join(keys) + b'\x90'
    yield f'keys: {name} in a frozenset', b'(' + b''.join(keys) + b'\x91'
    yield (
      f'keys: {name} in pairs',
      call(*ordered, b'](' + b'N\x86'.join(keys) + b'N\x86e\x85'),
    )
  yield 'keys: as many as may meet', b'}(' + b'N'.join(meeting[: 2**14]) + b'Nu'
  places = b''.join(b'r' + index(i << 12) for i in range(10**5))
  yield 'memo: far places', b'N' + places
  yield 'memo: many', b'N' + b'\x94' * 2**20
  yield (
    'memo: doubled lists',
    b']' + b''.join(b'r%b](j%bj%be' % ((index(i),) * 3) for i in range(60)),
  )
  yield 'memo: doubled calls', calls
  yield (
    'memo: one list of pairs',
    b']('
    + b'K\1K\2\x86' * 5000
    + (b'e\x85q\0ccollections\nOrderedDict\nq\1' + b'h\1h\0R' * 150_000),
  )
  yield (
    'memo: one text',
    text(b'\xc3\xa9' * 2**16)
    + text(b'latin1')
    + (b'\x86q\0c_codecs\nencode\nq\1](' + b'h\1h\0R' * 100_000 + b'e'),
  )
  yield 'memo: one stream', b'](' + stream(98) + b'q\0' + b'h\0' * 2**18 + b'e'
  yield 'memo: a list in itself', b']q\0h\0a'
  yield 'memo: a tuple in itself', b']q\0h\0\x85q\1a'
  yield 'many: sets', b'\x8f' * 2**21
  yield 'many: dicts', b'}' * 2**21
  yield 'many: streams', b'](' + stream(2**19) * 30 + b'e'
  yield 'many: lists', b'](' + (b'](' + b']' * 1000 + b'e') * 300 + b'e'
  yield 'deep: tuples', b')' + b'\x85' * 300_000
  yield 'deep: lists', b']' * 200_000 + b'a' * 199_999
  yield 'deep: dicts', text(b'a') + b'q\0' + b'}h\0' * 200_000 + b'N' + b's' * 200_000
  yield 'deep: calls', size + b'h\0' * 100_000 + b')' + b'\x85R' * 100_000
  yield 'deep: states', size + b')R' + b'h\0)R' * 150_000 + b'b' * 150_000
  yield 'long: number', b'\x8b' + index(2**24) + b'\x7f' * 2**24
  yield 'long: decimal', b'I' + b'9' * 2**20 + b'\n'
  yield 'long: decimal of python 2', b'L' + b'9' * 2**20 + b'L\n'
  yield 'long: dtype', call(b'numpy', b'dtype', text(b'9' * 2**20) + b'\x85')
  yield 'long: line', b'c' + b'a' * 2**24
  yield 'long: lines', (b'c' + b'a' * 1000) * 2**14
  yield 'long: text', text('\U0001f600'.encode() + b'a' * (2**24 - 100))
  yield 'long: name', text(b'a' * 2**22) + text(b'b\n' * 2**20) + b'\x93'


def crafted():
  """name -> file, each of which hung, or took gigabytes, or broke a reader once."""
  deep, calls = doubled(), doubled_calls()
  for name, piece in pickles():
    yield name, P + piece + b'.'
  yield 'edm: arguments in pairs', edm(b'](' + calls + b'N\x86e')
  yield 'edm: arguments of numbers', edm(b'}K\1K\2s')
  yield 'edm: doubled', edm2(channel_mult=calls, channel_mult_noise=calls)
  yield 'edm: compared', edm2(res_balance=calls, attn_balance=calls)
  yield 'edm: repeated', edm2(sparkle=calls)
  yield 'edm: repeated at length', edm2(sparkle=text(b'\n' * 10**6))
  yield 'edm: name', edm(mapping(**{'x\n' * 10**5: b'N'}))
  yield 'edm: large', edm2(img_resolution=b'J\xff\xff\xff\x7f')
  big = b'(' + (b'\x8a\xff' + b'\x7f' * 255) * 50_000 + b't'
  parts = b'(' + storage(text(b'0')) + b'K\0' + big + big + b't'
  tensor = call(b'torch._utils', b'_rebuild_tensor_v2', parts)
  yield 'zip: a shape of numbers', zipped(tensor, **{'0': bytes(4)})
  two = b'(' + storage(text(b'0')) + storage(text(b'0'))[:-4] + deep + b'tQt'
  yield 'zip: storages compared', zipped(two)
  yield 'zip: key', zipped(b'}' + deep + b'Ns')
  yield 'zip: members', central(20_000)
  yield 'zip: too many members', central(2**15)
  yield 'zip: ends', b'PK\3\4' + b'PK\5\6' * 2**14
  zeros = {'a': np.zeros(2**22)}
  yield 'zip: deflated', foreign.torch_zip(zeros, compression=zipfile.ZIP_DEFLATED)
  yield 'zip: levels', foreign.torch_zip(unet(3000))
  yield 'zip: no width', foreign.torch_zip(unet(1, 0))
  head = b''.join(foreign.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001))
  system = foreign.dumps(dict(little_endian=True), 2)
  yield 'legacy: key', head + system + P + b'}.' + P + b'](' + deep + b'e.'
  yield 'legacy: system', head + P + b'](' + deep + b'e.' + P + b'}.' * 2
  yield 'legacy: views', views(f't{i}' for i in range(5000))
  joined = [f'AttnBlockpp_{i}/NIN_{j}/W' for i in range(2000) for j in range(3)]
  yield (
    'legacy: views joined',
    views(['Conv_0/kernel', *joined], lambda root: dict(params_ema=root)),
  )
  empty = b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
  many = b','.join(b'"%d%b' % (i, empty) for i in range(250_000))
  yield 'safetensors: entries', safe(b'{' + many + b'}', b'')
  yield (
    'safetensors: twice',
    safe(b'{' + b','.join([b'"a' + empty] * 10**5) + b'}', b''),
  )
  yield 'safetensors: brackets', safe(b'{"a":' + b'[' * 2**23 + b']' * 2**23 + b'}')
  digits = json.dumps(dict(a=entry())).replace('[1]', f'[{"9" * 2**20}]')
  yield 'safetensors: digits', safe(digits.encode())
  yield 'safetensors: axes', safe(dict(a=entry([1] * 10**6)))
  spans = {str(i): entry([2**20], [0, 2**22]) for i in range(1000)}
  yield 'safetensors: overlap', safe(spans, bytes(2**22))
  notes = {str(i): 'a' for i in range(400_000)}
  yield 'safetensors: notes', safe(dict(__metadata__=notes, a=entry()))
  yield 'safetensors: name', safe({'a' * 2**22: entry()})
  yield 'ours: brackets', ours('[' * 10**5)
  yield 'ours: list', ours('[]')
  yield 'ours: null', ours('null')
  yield 'ours: config', ours(config='[' * 10**5)
  nested = '{"network": ' + '{"a":' * 900 + '1' + '}' * 900 + ', "precond": {}}'
  yield 'ours: deep config', ours(config=nested)
  yield 'ours: digits', ours(config='9' * 10**6)
  yield 'ours: long config', ours(config=json.dumps(dict(network=dict(a='a' * 10**6))))
  yield 'ours: axes', ours(shape=[1] * 10**5)
  yield 'ours: origin', ours(origin='a\n' * 10**4)
  yield 'msgpack: lists', b'\x81\xa1a' + nested_lists(2**22)
  yield 'msgpack: maps', b'\x81\xa1a' + nested_lists(2**22, b'\x80')
  yield 'msgpack: deep', b'\x81\xa1a' * 10**5 + b'\1'
  yield 'msgpack: deep lists', b'\x81\xa1a' + b'\x91' * 10**6 + b'\1'
  keys = (struct.pack('>Q', i * PRIME % 2**64) for i in range(4000))
  pairs = b''.join(b'\xcf' + key + b'\xc0' for key in keys)
  yield 'msgpack: numbers as keys', b'\xde' + struct.pack('>H', 4000) + pairs
  yield 'msgpack: lists as keys', b'\x81\x92\x90\x90\xc0'
  yield 'msgpack: lists in an array', array(nested_lists(2**22))
  inner = msgpack.packb(msgpack.ExtType(1, bytes(2**20)))
  yield 'msgpack: array in an array', array(inner)
  yield 'msgpack: axes', array(msgpack.packb(((1,) * 64, 'float32', bytes(4))))
  chunked = dict(__msgpack_chunked_array__=True, shape={'0': 2**62, '1': 4})
  chunked['chunks'] = {str(i): np.zeros(0) for i in range(3000)}
  yield 'msgpack: chunks', foreign.flax({'a': chunked})
  yield 'msgpack: name', foreign.flax({'a' * 2**22: np.zeros(2)})


# Damaged files --------------------------------------------------------------------


def whole_files():
  """Small files of every format, as they should be."""
  draw = np.random.default_rng(0)
  arrays = {f'a.{i}': draw.normal(size=(2, 3)).astype('f4') for i in range(6)}
  arrays['half'] = np.float16([1, 2])
  optimizer = dict(state={i: dict(step=i) for i in range(5)}, groups=[dict(lr=0.1)])
  meta = {write.MARK: ours_meta()}
  return [
    foreign.edm()[0],
    foreign.dumps(dict(arrays, s={1, 2}, o=optimizer), 2),
    foreign.dumps(dict(arrays, s={1, 2}, o=optimizer), 5),
    foreign.torch_legacy(arrays),
    foreign.torch_zip(dict(arrays, optimizer=optimizer)),
    foreign.flax(dict(params_ema=dict(arrays, nested=dict(b=np.arange(3.0))), step=3)),
    safetensors.numpy.save(arrays, meta),
  ]


OPCODES = (
  b'0(){}]NKMJXCBhjqr\x85\x86\x87\x88\x8a\x8b\x8c\x8e\x8f\x90\x91\x93\x94tuesabRQ.cdl2'
)
LENGTHS = 0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1


def damaged(draw, files):
  """One of the files with bits, parts, lengths or opcodes changed."""
  data = bytearray(files[draw.integers(len(files))])
  for _ in range(draw.integers(1, 3)):
    at = int(draw.integers(len(data) or 1))
    end = at + int(draw.integers(1, 64))
    opcode = OPCODES[draw.integers(len(OPCODES))]
    match draw.integers(7):
      case 0:
        data[at:end] = bytes(byte ^ 1 << draw.integers(8) for byte in data[at : at + 1])
      case 1:
        del data[at:end]
      case 2:
        del data[at:]
      case 3:
        other = files[draw.integers(len(files))]
        start = int(draw.integers(len(other)))
        data[at:at] = other[start : start + end - at]
      case 4:
        kind = ('<I', '<Q', '>I', '<H')[draw.integers(4)]
        most = 2 ** (8 * struct.calcsize(kind)) - 1
        value = min(LENGTHS[draw.integers(len(LENGTHS))], most)
        data[at : at + struct.calcsize(kind)] = struct.pack(kind, value)
      case 5:
        data[at : at + 1] = bytes([opcode])
      case 6:
        data[at:at] = data[at:end] * int(draw.integers(1, 50))
  return bytes(data)


# Reading --------------------------------------------------------------------------


def outcome(path):
  """Reads a file as `--mode=port` does, up to its network.

  Returns whether it opens, and the error that says why it is of no model.
  """
  opens = False
  try:
    file = read.read(path)
    opens = True
    if write.MARK in file.metadata:
      write.read_meta(file.metadata, path)
    else:
      released.plan(file, path, 'denoiser')
  except UserError as error:
    return opens, str(error)
  except KeyboardInterrupt:
    return opens, 'interrupted'
  return opens, ''


def memory(entry):
  """Bytes of this process: VmRSS now, VmHWM at most so far."""
  # Not ru_maxrss, which begins at that of the parent.
  status = Path('/proc/self/status').read_text()
  return 1024 * int(status.partition(f'{entry}:')[2].split()[0])


def measured(path, data):
  """What a file gives, its seconds, and the most memory beyond what is allowed it."""
  path.write_bytes(data)
  before, began = memory('VmRSS'), time.process_time()
  signal.setitimer(signal.ITIMER_PROF, MOST_S)
  opens, line = outcome(path)
  signal.setitimer(signal.ITIMER_PROF, 0)
  seconds = time.process_time() - began
  # The peak is that of the process so far: from the smallest file to the largest.
  peak = memory('VmHWM') - before
  return dict(
    size=len(data),
    opens=opens,
    line=line.replace(str(path), 'FILE'),
    seconds=seconds,
    peak=peak,
  )


def is_fine(report):
  line = report['line']
  refused = line.startswith('FILE: ') and line.isprintable() and len(line) < 400
  within = (
    report['seconds'] < MOST_S and report['peak'] < 2 * report['size'] + MOST_BYTES
  )
  return within and (refused or (report['opens'] and not line))


def main(folder, count):
  def interrupt(*_):
    raise KeyboardInterrupt

  signal.signal(signal.SIGPROF, interrupt)
  path = Path(folder) / 'file'
  for name, data in sorted(crafted(), key=lambda pair: len(pair[1])):
    print(json.dumps(dict(name=name)), flush=True)  # the last one, if it never returns
    found = measured(path, data)
    print(json.dumps(found | dict(name=name, fine=is_fine(found))), flush=True)
  draw, files = np.random.default_rng(0), whole_files()
  worst = dict(name='damaged', seconds=0.0, peak=0, read=0, refused=0, bad=[])
  for _ in range(int(count)):
    data = damaged(draw, files)
    found = measured(path, data)
    worst['seconds'] = max(worst['seconds'], found['seconds'])
    worst['peak'] = max(worst['peak'], found['peak'])
    worst['read' if found['opens'] else 'refused'] += 1
    if not is_fine(found):
      worst['bad'].append(found)
      (Path(folder) / f'bad{len(worst["bad"])}').write_bytes(data)
  print(json.dumps(worst), flush=True)


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
  """The report of each file, read in a separate process, by name."""
  folder = tmp_path_factory.mktemp('hostile')
  command = [
    sys.executable,
    '-m',
    'tests.test_hostile_files',
    str(folder),
    str(DAMAGED),
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
  return {line['name']: line for line in lines if len(line) > 1}


def test_a_crafted_file_is_refused_in_one_line_in_seconds_and_bounded_memory(reports):
  names = [name for name in reports if name != 'damaged']
  assert len(names) >= 90
  assert [reports[name] for name in names if not reports[name]['fine']] == []


def test_a_damaged_file_is_read_or_refused_in_one_line(reports):
  found = reports['damaged']
  assert found['bad'] == []
  assert found['refused'] + found['read'] == DAMAGED
  assert min(found['refused'], found['read']) > DAMAGED // 50  # both sides are tried


if __name__ == '__main__':
  main(*sys.argv[1:])
