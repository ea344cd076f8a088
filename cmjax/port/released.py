"""Which of the released kinds a file is: EDM, EDM2, ECT or OpenAI."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmjax.core import UserError
from cmjax.port import edm, names, openai, pickles, read


def plan(file: read.File, path: str | Path, form: str = '') -> names.Plan:
  """Recognises a file of EDM, EDM2, ECT or OpenAI by what it holds.

  Args:
    file: as `port.read.read` gives it.
    path: names the file in errors; of OpenAI's files it also says the form.
    form: 'denoiser' or 'consistency', for OpenAI's, which do not say it; if empty, the
      path must hold edm, cd or ct as a word, as those that were released do.

  Raises: UserError if it is of no known kind, or of a network that is not here.
  """
  content = file.content
  if not isinstance(content, pickles.Module | Mapping):
    raise _unknown(path, f'a {type(content).__name__}')
  if isinstance(content, Mapping):
    modules = (content.get(entry) for entry in ('ema', 'net'))
    content = next((m for m in modules if isinstance(m, pickles.Module)), content)
  if isinstance(content, pickles.Module):
    return edm.plan(content, path)
  if 'params_ema' in content:
    return openai.plan_jax(_flat(content['params_ema'], '/', path), path, form)
  if 'time_embed.0.weight' in content:
    return openai.plan_torch(_flat(content, '.', path), path, form)
  raise _unknown(path, ', '.join(names.shown(name) for name in list(content)[:5]))


def _flat(content: Any, separator: str, path: str | Path) -> names.Tensors:
  try:
    return read.tensors(content, separator)
  except ValueError as error:
    raise UserError(
      f'{path}: damaged or not a checkpoint ({read.one_line(error)})'
    ) from error


def _unknown(path: str | Path, holds: str) -> UserError:
  return UserError(
    f'{path}: not a checkpoint of EDM, EDM2, ECT, OpenAI or cmjax; it holds '
    f'{holds or "nothing"}'
  )
