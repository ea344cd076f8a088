"""Writes weights and their config as one safetensors file, and checks its metadata."""

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

MARK = 'cmjax'  # the key of the metadata that describes the model
MAX_CONFIG = 2**18  # characters of a config, and of all metadata
MAX_DEPTH = 32  # of nested parts
MAX_STEP = 2**53
MAX_ORIGIN = 200  # characters


def safetensors(path: Path, params: Params, meta: Mapping[str, Any]) -> None:
  """Writes parameters, with names such as `enc_32x32_conv/kernel`, and their metadata.

  Atomic: a failed write leaves no file.

  Raises: UserError if the file exists, or cannot be written.
  """
  flat = {k: np.asarray(a, order='C') for k, a in read.tensors(params, '/').items()}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = unused(path, '.new')
    new.touch(exist_ok=False)
    try:
      mode = new.stat().st_mode  # as for any new file; `save_file` makes it private
      save_file(flat, new, {MARK: json.dumps(dict(meta))})
      new.chmod(mode)
      _move(new, path)
    finally:
      new.unlink(missing_ok=True)
  except (OSError, SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or first_line(error)
    raise UserError(f'{path}: cannot be written ({reason})') from error


def _move(new: Path, path: Path) -> None:
  """Renames a file atomically; raises UserError if the path exists."""
  try:
    os.link(new, path)
  except FileExistsError as error:
    raise UserError(f'{path}: already exists; give another path') from error
  except OSError:  # a file system without links
    if path.exists():
      raise UserError(f'{path}: already exists; give another path') from None
    new.replace(path)


def read_meta(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
  """The metadata that `safetensors` wrote, checked by `checked_meta`.

  Raises: UserError if it is missing or invalid.
  """
  return checked_meta(_loads(metadata.get(MARK), f'{path}: the entry {MARK!r}'), path)


def checked_meta(meta: Any, path: str | Path) -> dict[str, Any]:
  """Checks the metadata of untrusted weights, without building anything.

  {'config': JSON of a dict with dicts `network` and `precond`, 'shape': (H, W, C) or
  (C,), 'classes': int, 'step': int, 'origin': str, 'data': dict}; defaults are
  step 0, origin 'cmjax' and data None. Other entries are dropped.

  Raises: UserError naming the first entry that is missing or invalid.
  """
  where = f'{path}: the entry {MARK!r}'
  for key in ('config', 'shape', 'classes'):
    if not isinstance(meta, Mapping) or key not in meta:
      raise UserError(f'{where} is invalid: it has no {key}')
  parts = _loads(meta['config'], f'{where}: the config')
  for name in ('network', 'precond'):
    if not isinstance(parts, dict) or not isinstance(parts.get(name), dict):
      raise UserError(f'{where}: the config has no {name}')
  _check_depth(parts, where)
  step, origin = meta.get('step', 0), meta.get('origin', 'cmjax')
  if type(step) is not int or not 0 <= step <= MAX_STEP:
    raise UserError(
      f'{where}: step must be in [0, 2**53], got {names.short_repr(step)}'
    )
  if type(origin) is not str or len(origin) > MAX_ORIGIN or not origin.isprintable():
    got = names.short_repr(origin)
    raise UserError(
      f'{where}: origin must be text of at most {MAX_ORIGIN} characters, got {got}'
    )
  return {
    'config': meta['config'],
    'shape': names.shape_of(meta['shape'], where),
    'classes': names.classes_of(meta['classes'], where),
    'step': step,
    'origin': origin,
    'data': _checked_data(meta.get('data'), where),
  }


def _checked_data(data: Any, where: str) -> dict[str, Any] | None:
  """The name and the range of the data, if the metadata has them."""
  if data is None:
    return None
  numbers = ('low', 'high', 'offset', 'scale')
  try:
    values = {key: None if data[key] is None else float(data[key]) for key in numbers}
    finite = all(value is None or math.isfinite(value) for value in values.values())
    offset, scale = values['offset'], values['scale']
    if not finite or offset is None or scale is None or scale <= 0:
      raise ValueError('an invalid range')
    name = data['name']
    if type(name) is not str or len(name) > MAX_ORIGIN or not name.isprintable():
      raise ValueError('an invalid name')
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(f'{where}: data is invalid ({first_line(error)[:80]})') from error
  return values | {'name': name}


def _loads(text: Any, where: str) -> Any:
  """Parses JSON of a bounded length; raises UserError if invalid."""
  try:
    if type(text) is not str or len(text) > MAX_CONFIG:
      raise ValueError('missing or too long')
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where} is invalid ({first_line(error)[:80]})') from error


def _check_depth(value: Any, where: str, depth: int = 0) -> None:
  if depth > MAX_DEPTH:
    raise UserError(
      f'{where}: the config has more than {MAX_DEPTH} levels of nested parts'
    )
  parts = value.values() if isinstance(value, dict) else value
  if isinstance(value, dict | list):
    for part in parts:
      _check_depth(part, where, depth + 1)
