"""Writes checkpoints in the formats of other projects, without importing them."""

from collections import OrderedDict
import io
import pickle
from typing import Any, NamedTuple
import zipfile

import jax.numpy as jnp
import msgpack
import numpy as np

KINDS = {
  'float64': 'DoubleStorage',
  'float32': 'FloatStorage',
  'float16': 'HalfStorage',
  'bfloat16': 'BFloat16Storage',
  'int64': 'LongStorage',
  'int32': 'IntStorage',
  'int16': 'ShortStorage',
  'int8': 'CharStorage',
  'uint8': 'ByteStorage',
  'bool': 'BoolStorage',
}


class Name:
  """A global, written by name and never imported."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class Call:
  """REDUCE of a global with arguments, then BUILD with a state if there is one."""

  def __init__(self, module, name, *arguments, state=None):
    self.function, self.arguments, self.state = Name(module, name), arguments, state


class Storage(NamedTuple):
  kind: str
  key: str
  numel: int


class Pickler(pickle._Pickler):
  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Name) and self.proto >= 4:
      super().save(obj.module)
      super().save(obj.name)
      self.write(pickle.STACK_GLOBAL)
    elif isinstance(obj, Name):
      self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
    elif isinstance(obj, Call):
      self.save(obj.function)
      self.save(obj.arguments)
      self.write(pickle.REDUCE)
      if obj.state is not None:
        self.save(obj.state)
        self.write(pickle.BUILD)
    elif isinstance(obj, Storage):
      kind = Name('torch', obj.kind)
      self.save(('storage', kind, obj.key, 'cpu', obj.numel))
      self.write(pickle.BINPERSID)
    else:
      super().save(obj, save_persistent_id)


def dumps(obj: Any, protocol: int = 4) -> bytes:
  file = io.BytesIO()
  Pickler(file, protocol).dump(obj)
  return file.getvalue()


def tensor(storage: Any, shape: Any, strides: Any, offset: Any = 0) -> Call:
  more = False, OrderedDict()
  return Call(
    'torch._utils', '_rebuild_tensor_v2', storage, offset, shape, strides, *more
  )


def storage(array: np.ndarray, key: str) -> Storage:
  return Storage(KINDS[array.dtype.name], key, array.size)


def elements(array: np.ndarray) -> tuple:
  return tuple(s // array.itemsize for s in array.strides)


def legacy(root: Any, arrays: dict[str, np.ndarray], protocol: int = 2) -> bytes:
  """torch's format before zip."""
  system = dict(protocol_version=1001, little_endian=True, type_sizes={})
  parts = [0x1950A86A20F9469CFC6C, 1001, system, root, sorted(arrays)]
  data = b''.join(dumps(part, protocol) for part in parts)
  for key in sorted(arrays):
    data += arrays[key].size.to_bytes(8, 'little') + arrays[key].tobytes()
  return data


def state(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Arrays replaced by tensors, and the arrays by storage key."""
  arrays, root = {}, {}
  for number, (name, value) in enumerate(values.items()):
    if isinstance(value, np.ndarray):
      arrays[str(number)] = value
      value = tensor(storage(value, str(number)), value.shape, elements(value))
    root[name] = value
  return root, arrays


def torch_legacy(values: dict[str, Any]) -> bytes:
  return legacy(*state(values))


def torch_zip(values, *, pickled=None, compression=zipfile.ZIP_STORED) -> bytes:
  root, arrays = state(values)
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', compression) as archive:
    archive.writestr('net/data.pkl', pickled or dumps(root, 2))
    archive.writestr('net/byteorder', 'little')
    for key, array in arrays.items():
      archive.writestr(f'net/data/{key}', array.tobytes())
    archive.writestr('net/version', '3\n')
  return file.getvalue()


def stream(array: np.ndarray) -> Call:
  """A storage as a pickled module holds it: a stream of the older format."""
  data = legacy(storage(array, '7'), {'7': array})
  return Call('torch.storage', '_load_from_bytes', data)


def parameter(array: np.ndarray) -> Call:
  whole = tensor(stream(array), array.shape, elements(array))
  return Call('torch._utils', '_rebuild_parameter', whole, True, OrderedDict())


def module_state(parameters=(), buffers=(), modules=(), **more) -> dict[str, Any]:
  return dict(
    training=True,
    _parameters=OrderedDict((k, parameter(v)) for k, v in dict(parameters).items()),
    _buffers=OrderedDict(
      (k, tensor(stream(v), v.shape, elements(v))) for k, v in dict(buffers).items()
    ),
    _non_persistent_buffers_set=set(),
    _modules=OrderedDict(modules),
    **more,
  )


def persistent(class_name, state, source='') -> Call:
  """An object of torch_utils.persistence, which carries its source."""
  meta = dict(
    type='class', version=6, module_src=source, class_name=class_name, state=state
  )
  return Call('torch_utils.persistence', '_reconstruct_persistent_obj', meta)


def edm(seed: int = 0, source: str = '', **extra: Any) -> tuple[bytes, dict]:
  """A pickle as NVlabs/edm writes one, and what its tensors are."""
  draw = np.random.default_rng(seed)
  arrays = {
    'model.map.weight': draw.normal(size=(4, 3)).astype(np.float32),
    'model.enc.8x8_conv.weight': draw.normal(size=(2, 3, 3, 3)).astype(np.float16),
    'model.enc.8x8_conv.resample_filter': np.full((1, 1, 2, 2), 0.25, np.float32),
    'model.enc.8x8_conv.half': np.arange(3).astype(jnp.bfloat16),
  }
  weight, conv, kernel, half = arrays.values()
  buffers = dict(resample_filter=kernel, half=half)
  conv = persistent('Conv2d', module_state(dict(weight=conv), buffers), source)
  parts = module_state(modules={'8x8_conv': conv})
  enc = Call('torch.nn.modules.container', 'ModuleDict', state=parts)
  linear = persistent('Linear', module_state(dict(weight=weight)), source)
  inner = persistent('SongUNet', module_state(modules=dict(map=linear, enc=enc)))
  arguments = dict(_init_args=(8,), _init_kwargs=dict(model_type='SongUNet', depth=2))
  ema = persistent('EDMPrecond', module_state(modules=dict(model=inner), **arguments))
  loss_fn = persistent('EDMLoss', dict(P_mean=-1.2, _init_args=(), _init_kwargs={}))
  return dumps(dict(ema=ema, loss_fn=loss_fn, **extra)), arrays


def extension(array: Any) -> msgpack.ExtType:
  """An array as flax.serialization writes it."""
  if isinstance(array, complex):
    return msgpack.ExtType(2, msgpack.packb((array.real, array.imag)))
  data = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
  return msgpack.ExtType(1 if isinstance(array, np.ndarray) else 3, data)


def flax(tree: Any) -> bytes:
  return msgpack.packb(tree, default=extension, strict_types=True)
