"""`--mode=edit`: edits images with a run or a file of weights."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmjax import edit_requests, pictures
from cmjax.core import UserError, unused
from cmjax.data.inputs import read_inputs, read_one
from cmjax.data.source import Source, as_uint8, from_uint8, one_hot_labels
from cmjax.edit_requests import Compute, Rows
from cmjax.modes import sample
from cmjax.runtime import logs, results, sharding
from cmjax.runtime.reopen import Opened, beside, reopen_for

CELL = 192  # pixels of an image in the pictures of one image


def run(flags: argparse.Namespace) -> None:
  """Writes a folder per image with pictures and arrays, and a picture of all."""
  edit_requests.check_flags(flags)
  opened = reopen_for(
    flags.workdir, flags.config, flags.overrides, flags.trust, needs_data=False
  )
  source, most_pictured = opened.source, opened.config.evaluation.num_pictured
  edit_requests.check_model(opened, flags.edit)
  labels = _labels(source, flags.labels)
  names, x0, end = ['random'], np.zeros((1, *source.shape), np.float32), None
  if flags.input:
    factor = flags.factor or 1
    names, pixels = read_inputs(flags.input, '--input', source.shape, factor)
    x0 = from_uint8(source, pixels)
  if flags.second:
    end = from_uint8(source, read_one(flags.second, '--second', source.shape)[None])
  params, compute = edit_requests.computation(flags, opened)

  folder = beside(opened) / 'edits' / f'{flags.edit}_step_{opened.step:08d}'
  folder = unused(folder)
  panels: dict[str, list[np.ndarray]] = {}
  errors = []
  batches = _batches(opened, x0, end, labels, flags.edit == 'interpolate')
  edited = _edited(opened, compute, params, batches)
  for name, y, result in zip(names, x0, edited):
    if not np.all(np.isfinite(result.x)):
      raise UserError(f'{name}: the model returns values that are not finite')
    images = _images(source, y, result, flags)
    _write(unused(folder / name), source, y, result, images)
    for title, of_title in images.items():
      if len(panels.setdefault(title, [])) < most_pictured * len(of_title):
        panels[title] += of_title
    errors += [] if result.error is None else [float(result.error)]
  columns = min(20, max(5, len(names)))
  if flags.edit == 'interpolate':
    columns = len(panels['images']) // min(len(names), most_pictured)
  sheet = {title: pictures.grid(np.stack(p), columns) for title, p in panels.items()}
  results.write_png(folder / 'all.png', pictures.sheet(sheet))
  worst = (
    f'; largest {edit_requests.ERRORS[flags.edit]}: {max(errors):.1e}' if errors else ''
  )
  logs.say(f'{folder / "all.png"}; each image has a folder there{worst}')


def _labels(source: Source, text: str) -> np.ndarray | None:
  """The labels of --labels as rows f32[L, K]; None for an unconditional model."""
  if not source.classes and not text:
    return None
  if not text:
    raise UserError(
      '--labels: missing, and the model is conditional; give one per image, repeated '
      'as needed, with --second then its own, or none if it had label_dropout'
    )
  if source.classes and text == 'none':
    return np.zeros((1, source.classes), np.float32)
  labels = sample.with_labels(source, text).labels
  assert labels is not None  # as --labels is not empty
  return one_hot_labels(labels, source.classes)


def _batches(
  opened: Opened,
  x0: np.ndarray,
  end: np.ndarray | None,
  labels: np.ndarray | None,
  between: bool,
) -> list[Rows]:
  """The images in batches of one size, the last filled up with the first image.

  Labels are repeated as needed. If `between`, the last is that of the image at the end
  of the interpolation, and also that of the others if there is only one.
  """
  size = min(opened.config.evaluation.batch_size, len(x0))
  size = -(-size // opened.mesh.size) * opened.mesh.size
  batches = []
  for first in range(0, len(x0), size):
    index = np.arange(first, first + size)
    y = x0[np.where(index < len(x0), index, 0)]
    ends = None if end is None else np.repeat(end, size, axis=0)
    conds: list[Any] = [None, None]
    if labels is not None:
      of_y = labels[:-1] if between and len(labels) > 1 else labels
      conds = [of_y[index % len(of_y)]]
      conds.append(np.broadcast_to(labels[-1], conds[0].shape) if between else None)
    # `_make`, because the fields of Rows are annotated as arrays on a device.
    batches.append(Rows._make((index.astype(np.uint32), y, ends, *conds)))
  return batches


def _edited(
  opened: Opened, compute: Compute, params: Any, batches: Sequence[Rows]
) -> Iterator[Any]:
  """The `Result` of each image, as NumPy arrays without the first axis.

  Up to rounding it depends only on the seed and on the image's index: neither on the
  batch size nor on the number of devices.
  """
  by_example = sharding.by_example(opened.mesh)
  root = jax.random.key(opened.config.evaluation.seed)

  def edit_batch(params, root, rows):
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(rows.index)
    return compute(params, rows, keys)

  compiled = jax.jit(edit_batch, out_shardings=sharding.replicated(opened.mesh))
  logs.say('compiling an edit ...')
  size = len(batches[0].index)
  for rows in logs.counted(batches, size, 'images'):
    result = compiled(params, root, sharding.place(rows, by_example))
    result = jax.tree.map(np.asarray, result)
    for i in range(size):
      yield jax.tree.map(lambda a: a[i], result)  # noqa: B023 (used at once)


def _images(
  source: Source, y: np.ndarray, result: Any, flags: argparse.Namespace
) -> dict[str, list[np.ndarray]]:
  """The images u8[H, W, C] to show of one image, by title."""
  if flags.edit == 'interpolate':
    return {'images': list(as_uint8(source, result.steps))}
  shown = {'input': y, flags.edit: result.x}
  if result.given is not None:
    shown = {'input': y, 'known': result.given, flags.edit: result.x}
  return {title: [as_uint8(source, x)] for title, x in shown.items()}


def _write(
  folder: Path,
  source: Source,
  y: np.ndarray,
  result: Any,
  images: dict[str, list[np.ndarray]],
) -> None:
  """Writes the result, its pictures and its arrays."""
  final = as_uint8(source, result.x)
  flat = final[..., 0] if final.shape[2] == 1 else final
  results.write_png(folder / 'result.png', flat)
  row = np.stack([image for of_title in images.values() for image in of_title])
  results.write_png(folder / 'before_after.png', pictures.grid(row, len(row), CELL))
  arrays: dict[str, Any] = {'input': y, 'result': result.x}
  if result.steps is not None:
    frames = [pictures.grid(x[None], 1, CELL) for x in as_uint8(source, result.steps)]
    results.write_png(folder / 'steps.png', frames[0], frames[1:])
    arrays['steps'] = result.steps
  if result.given is not None:
    arrays['known'] = result.given
  if result.error is not None:
    arrays['error'] = result.error
  results.write_arrays(folder / 'arrays.npz', arrays)
