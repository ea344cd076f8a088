"""Writes results into files: by the first process alone, and into new folders."""

from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np


def write_text(path: Path, text: str) -> None:
  """Writes a text in UTF-8."""
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name as .npz."""
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    named: Any = dict(arrays)  # `np.savez` has keywords of other types
    np.savez(path, **named)


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

  Path(path).parent.mkdir(parents=True, exist_ok=True)
  animation: dict[str, Any] = {}
  if len(later):
    duration = max(40, min(500, 4000 // len(later)))  # in ms, of each
    animation['duration'] = [duration] * len(later) + [duration + 1000]
    animation['append_images'] = [Image.fromarray(frame) for frame in later]
    animation |= dict(save_all=True, loop=0)
  Image.fromarray(image).save(path, **animation)
