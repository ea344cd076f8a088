"""Our weights as safetensors: flat names, and a config beside them in one file."""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cmjax.core import Params, UserError, first_line, unused
from cmjax.port import names, read

MARK = 'cmjax'  # the metadata entry that says what the weights are of
MOST_CONFIG = 2**18  # letters, of a config and of all that is beside it
MOST_DEPTH = 32  # of parts within parts
MOST_STEP = 2**53
MOST_ORIGIN = 200  # letters


def safetensors(path: Path, params: Params, meta: Mapping[str, Any]) -> None:
  """Writes parameters, under names such as `enc_32x32_conv/kernel`, and their meta.

  The file is there as a whole or not at all, and nothing is left beside it.

  Raises: UserError if the file exists, or cannot be written.
  """
  flat = {k: np.asarray(a, order='C') for k, a in read.tensors(params, '/').items()}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = unused(path, '.new')
    new.touch(exist_ok=False)
    try:
      rights = new.stat().st_mode  # of any new file; `save_file` makes it private
      save_file(flat, new, {MARK: json.dumps(dict(meta))})
      new.chmod(rights)
      _move(new, path)
    finally:
      new.unlink(missing_ok=True)
  except (OSError, SafetensorError) as error:
    why = getattr(error, 'strerror', None) or first_line(error)
    raise UserError(f'{path}: cannot be written ({why})') from error


def _move(new: Path, path: Path) -> None:
  """Gives a whole file its name at once, which no other file may have."""
  try:
    os.link(new, path)
  except FileExistsError as error:
    raise UserError(f'{path}: exists already; give another place') from error
  except OSError:  # a file system without links
    if path.exists():
      raise UserError(f'{path}: exists already; give another place') from None
    new.replace(path)


def read_meta(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
  """What `safetensors` wrote beside the parameters, as of `checked_meta`.

  Raises: UserError if it is not what that writes.
  """
  return checked_meta(_loads(metadata.get(MARK), f'{path}: its entry {MARK!r}'), path)


def checked_meta(meta: Any, path: str | Path) -> dict[str, Any]:
  """What weights say they are of, once it is what cmjax writes; nothing is built.

  {'config': JSON of a dict with dicts `network` and `precond`, 'shape': (H, W, C) or
  (C,), 'classes': int, 'step': int, 'origin': str, 'data': dict}; `step` is 0, `origin`
  'cmjax' and `data` None where they are missing, and other entries drop.

  Raises: UserError naming the first entry that is missing or of another kind.
  """
  where = f'{path}: its entry {MARK!r}'
  for key in ('config', 'shape', 'classes'):
    if not isinstance(meta, Mapping) or key not in meta:
      raise UserError(f'{where} is not what cmjax writes; it has no {key}')
  parts = _loads(meta['config'], f'{where}: the config')
  for name in ('network', 'precond'):
    if not isinstance(parts, dict) or not isinstance(parts.get(name), dict):
      raise UserError(f'{where}: the config has no {name}')
  _check_depth(parts, where)
  step, origin = meta.get('step', 0), meta.get('origin', 'cmjax')
  if type(step) is not int or not 0 <= step <= MOST_STEP:
    raise UserError(f'{where}: the step must be in [0, 2**53], got {names.shown(step)}')
  if type(origin) is not str or len(origin) > MOST_ORIGIN or not origin.isprintable():
    raise UserError(f'{where}: the origin is no name, got {names.shown(origin)}')
  return {
    'config': meta['config'],
    'shape': names.shape_of(meta['shape'], where),
    'classes': names.classes_of(meta['classes'], where),
    'step': step,
    'origin': origin,
    'data': _checked_data(meta.get('data'), where),
  }


def _checked_data(data: Any, where: str) -> dict[str, Any] | None:
  """The name and the range of the data, if weights tell them."""
  if data is None:
    return None
  numbers = ('low', 'high', 'offset', 'scale')
  try:
    found = {key: None if data[key] is None else float(data[key]) for key in numbers}
    finite = all(value is None or math.isfinite(value) for value in found.values())
    whole = finite and None not in (found['offset'], found['scale'])
    if not whole or found['scale'] <= 0:
      raise ValueError('a range that is none')
    name = data['name']
    if type(name) is not str or len(name) > MOST_ORIGIN or not name.isprintable():
      raise ValueError('a name that is none')
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(
      f'{where}: data is not what cmjax writes ({first_line(error)[:80]})'
    ) from error
  return found | {'name': name}


def _loads(text: Any, where: str) -> Any:
  """JSON of a bounded length; raises UserError for anything else."""
  try:
    if type(text) is not str or len(text) > MOST_CONFIG:
      raise ValueError('no text, or too long')
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{where} is not what cmjax writes ({first_line(error)[:80]})'
    ) from error


def _check_depth(value: Any, where: str, depth: int = 0) -> None:
  if depth > MOST_DEPTH:
    raise UserError(f'{where}: the config has more than {MOST_DEPTH} parts in parts')
  parts = value.values() if isinstance(value, dict) else value
  if isinstance(value, dict | list):
    for part in parts:
      _check_depth(part, where, depth + 1)
