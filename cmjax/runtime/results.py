"""Writes results into files: by the first process alone, and into new folders."""

from collections.abc import Callable, Mapping, Sequence
import io
import json
import math
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from cmjax.runtime import paths


def write_text(path: Path, text: str) -> None:
  """Writes a text in UTF-8."""
  if jax.process_index() == 0:
    _store(path, lambda file: file.write(text.encode()))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name as .npz."""
  if jax.process_index() == 0:
    named: Any = dict(arrays)  # `np.savez` has keywords of other types
    _store(path, lambda file: np.savez(file, **named))


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
  """Writes indented JSON, with null for NaN and infinity."""
  write_text(path, json.dumps(_finite(facts), indent=2))


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write_png(
  path: str | Path, image: np.ndarray, later: Sequence[np.ndarray] = ()
) -> None:
  """Writes u8[H, W, 3] or grey u8[H, W].

  With `later` images of the same size, the file is an animation of about four seconds
  that shows the last for one more.
  """
  if jax.process_index() != 0:
    return
  from PIL import Image  # slow to import

  animation: dict[str, Any] = {}
  if len(later):
    duration = max(40, min(500, 4000 // len(later)))  # in ms, of each
    animation['duration'] = [duration] * len(later) + [duration + 1000]
    animation['append_images'] = [Image.fromarray(frame) for frame in later]
    animation |= dict(save_all=True, loop=0)
  path = paths.path(path)
  settings = dict(format=path.suffix[1:], **animation)
  _store(path, lambda file: Image.fromarray(image).save(file, **settings))


def _store(path: Path, write: Callable[[IO[bytes]], object]) -> None:
  if paths.remote(path):
    content = io.BytesIO()
    write(content)
    paths.write_bytes(path, content.getvalue())
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    write(file)
