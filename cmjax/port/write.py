"""Our weights as safetensors: flat names, and a config beside them in one file."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cmjax.core import Params, UserError
from cmjax.port import read

MARK = 'cmjax'  # the metadata entry that says what the weights are of


def safetensors(path: Path, params: Params, meta: Mapping[str, Any]) -> None:
  """Writes parameters, under names such as `enc_32x32_conv/kernel`, and their meta.

  Raises: UserError if the file cannot be written.
  """
  flat = {k: np.asarray(a, order='C') for k, a in read.tensors(params, '/').items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(path.name + '.new')
  try:
    new.touch()
    rights = new.stat().st_mode  # of any new file; `save_file` makes it private
    save_file(flat, new, {MARK: json.dumps(dict(meta))})
    new.chmod(rights)
    new.replace(path)  # at once: a kill leaves no half of a file under its name
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror})') from error


def read_meta(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
  """What `safetensors` wrote beside the parameters.

  Raises: UserError if it is not what that writes.
  """
  try:
    meta = json.loads(metadata[MARK])
    return {key: meta[key] for key in ('config', 'shape', 'classes', 'origin', 'step')}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: its entry {MARK!r} is not what cmjax writes') from error
