"""Whether the weights of a checkpoint are those of a network."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax

from cmjax.core import Params, UserError
from cmjax.runtime import checksums, sharding


def fitted(
  path: str | Path,
  saved: Mapping[str, checksums.Record],
  like: Params,
  optional: Collection[str],
) -> tuple[Params, Params]:
  """`like` without what is not saved, and what is saved besides it, both abstract.

  Args:
    path: of the checkpoint, for errors.
    saved: the records of its weights.
    like: the abstract parameters of the network.
    optional: top-level entries that only one of the two may have.

  Raises: UserError naming the first parameter that differs otherwise.
  """
  entries = {key.partition('/')[0] for key in saved}
  lacking = set(optional) - entries
  fitting = {key: tree for key, tree in like.items() if key not in lacking}
  unused = set(optional) - like.keys()
  mesh = jax.tree.leaves(like)[0].sharding.mesh
  dropped: Params = {}
  for key, record in saved.items():
    *parents, last = key.split('/')
    if key.partition('/')[0] in unused:
      inner = dropped
      for name in parents:
        inner = inner.setdefault(name, {})
      inner[last] = jax.ShapeDtypeStruct(
        record.shape, record.dtype, sharding=sharding.replicated(mesh)
      )
  _check_same(path, saved, fitting | dropped)
  return fitting, dropped


def _check_same(
  path: str | Path, saved: Mapping[str, checksums.Record], like: Params
) -> None:
  model = {
    key: checksums.Record(str(a.dtype), a.shape)
    for key, a in checksums.by_path(like).items()
  }
  for key in [*model, *saved]:
    a, b = saved.get(key), model.get(key)
    if a is None or b is None or a[:2] != b[:2]:
      what = 'dtype' if a and b and a.shape == b.shape else 'shape'
      theirs, ours = (str(getattr(v, what)) if v else 'missing' for v in (a, b))
      raise UserError(
        f'{path}: weights of another network: parameter {key} is {theirs} in the '
        f'checkpoint and {ours} in the model; give the config.network and config.data '
        'of that run'
      )
