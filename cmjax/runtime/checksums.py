"""XXH3-64 hashes of the arrays of a checkpoint, the same on any number of devices."""

from collections.abc import Iterator, Mapping
import functools
import itertools
import json
import operator
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np
import xxhash


class Record(NamedTuple):
  """One array, as the meta of a checkpoint records it."""

  dtype: str
  shape: tuple[int, ...]
  block: tuple[int, ...] = ()  # shape of the shards that were saved
  hash: str = ''  # XXH3-64 of each block, combined by XOR, in hexadecimal


Records = dict[str, dict[str, Record]]  # by item, then by path in the item


def records_of(
  tree: Any, saved: Mapping[str, Record] | None = None
) -> dict[str, Record]:
  """The record of each array of a tree, by its path; the same in every process.

  Hashes are over the shards on the devices, or over the blocks of the `saved` records.
  """
  arrays, blocks, hashes = by_path(tree), {}, {}
  for key, a in arrays.items():
    record = saved.get(key) if saved else None
    blocks[key] = record.block if record else a.sharding.shard_shape(a.shape)
    block_hashes = (_hash_of_block(*block) for block in _blocks(a, blocks[key]))
    hashes[key] = functools.reduce(operator.xor, block_hashes, 0)
  # Of these arrays, each process has hashed only its own shards.
  partial = [
    key
    for key, a in arrays.items()
    if _spans_processes(a) and _is_sharded_by(a, blocks[key])
  ]
  if partial:
    local_hashes = np.array([hashes[key] for key in partial], np.uint64)
    # As pairs of uint32, since JAX has no 64-bit types by default.
    gathered = multihost_utils.process_allgather(local_hashes.view(np.uint32))
    gathered = np.ascontiguousarray(gathered).view(np.uint64)
    hashes |= zip(partial, np.bitwise_xor.reduce(gathered).tolist())
  return {
    key: Record(str(a.dtype), a.shape, blocks[key], f'{hashes[key]:016x}')
    for key, a in arrays.items()
  }


def compare(
  item: str, saved: Mapping[str, Record], restored: Mapping[str, Record]
) -> None:
  """Raises ValueError, naming the array, if a restored array is not the saved one."""
  for key in [*saved, *restored]:
    if saved.get(key) != restored.get(key):
      raise ValueError(f'{item}/{key} differs from its hash')


def sign(meta: Mapping[str, Any], records: Records) -> dict[str, Any]:
  """The meta of a checkpoint with the records of its arrays and a hash of itself."""
  signed = {**meta, 'arrays': records}
  return signed | {'hash': _hash_of_meta(signed)}


def verify(signed: Mapping[str, Any]) -> tuple[dict[str, Any], Records | None]:
  """The meta that `sign` was given, and its records.

  Checkpoints of version 0.2 have no records; those are None.

  Raises: ValueError if the meta differs from its hash.
  """
  meta = {key: value for key, value in signed.items() if key not in ('arrays', 'hash')}
  if meta.keys() == signed.keys():  # neither key: damage could remove one of them
    return meta, None
  hashed = {key: value for key, value in signed.items() if key != 'hash'}
  if signed.get('hash', '') != _hash_of_meta(hashed):
    raise ValueError('meta differs from its hash')
  records = {
    item: {
      key: Record(dtype, tuple(shape), tuple(block), digest)
      for key, (dtype, shape, block, digest) in arrays.items()
    }
    for item, arrays in signed['arrays'].items()
  }
  return meta, records


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths, such as `layer/kernel`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _hash_of_meta(meta: Mapping[str, Any]) -> str:
  return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _blocks(
  a: jax.Array, block: tuple[int, ...]
) -> Iterator[tuple[list[int], np.ndarray]]:
  """The start and the values of each block that this process hashes.

  If the shards of the array are the blocks, these are the local shards of replica 0;
  otherwise, they are all blocks.
  """
  if _is_sharded_by(a, block) and not a.is_fully_replicated:
    for shard in a.addressable_shards:
      if shard.replica_id == 0:
        yield [axis.start or 0 for axis in shard.index], np.asarray(shard.data)
    return
  if _spans_processes(a):
    whole = np.asarray(multihost_utils.process_allgather(a, tiled=True))
  else:
    whole = np.asarray(a)
  starts = (range(0, n, max(k, 1)) for n, k in zip(a.shape, block, strict=True))
  for start in itertools.product(*starts):
    yield list(start), whole[tuple(slice(i, i + k) for i, k in zip(start, block))]


def _spans_processes(a: jax.Array) -> bool:
  """Whether no single process holds the whole array."""
  return not (a.is_fully_addressable or a.is_fully_replicated)


def _is_sharded_by(a: jax.Array, block: tuple[int, ...]) -> bool:
  """Whether the shards of the array have the shape of the block."""
  return a.sharding.shard_shape(a.shape) == block


def _hash_of_block(start: list[int], values: np.ndarray) -> int:
  hasher = xxhash.xxh3_64(str(start).encode())
  hasher.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
  return hasher.intdigest()
