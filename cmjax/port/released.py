"""Recognises released checkpoints of EDM, EDM2, ECT and OpenAI."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmjax.core import UserError
from cmjax.port import edm, names, openai, pickles, read


def plan(file: read.File, path: str | Path, form: str = '') -> names.Plan:
  """The plan of a checkpoint of EDM, EDM2, ECT or OpenAI, recognised by its contents.

  Args:
    file: the result of `read.read`.
    path: of the file, for errors, and to infer the form of OpenAI's checkpoints.
    form: 'denoiser' or 'consistency', for OpenAI's checkpoints, which do not store it;
      if empty, the path must contain edm, cd or ct as a word, as released paths do.

  Raises: UserError if the format or the network is not supported.
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
  raise _unknown(path, ', '.join(names.short_repr(name) for name in list(content)[:5]))


def _flat(content: Any, separator: str, path: str | Path) -> names.Tensors:
  try:
    return read.tensors(content, separator)
  except ValueError as error:
    raise UserError(
      f'{path}: damaged or not a checkpoint ({read.printable(error)})'
    ) from error


def _unknown(path: str | Path, contents: str) -> UserError:
  return UserError(
    f'{path}: not a checkpoint of EDM, EDM2, ECT, OpenAI or cmjax; it contains '
    f'{contents or "nothing"}'
  )
