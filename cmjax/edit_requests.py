"""The edits of `--mode=edit`: from flags to a computation on a batch of images."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cmjax import editing, inversion
from cmjax.core import Array, Key, Model, Params, UserError
from cmjax.data.inputs import read_mask
from cmjax.runtime import logs, paths, pretrained
from cmjax.runtime.errors import user_errors
from cmjax.runtime.pretrained import SIGMA_RANGE
from cmjax.runtime.reopen import Opened
from cmjax.samplers import normal
from cmjax.times import karras

# The flags that each edit takes; of those marked !, it needs a value.
FLAGS = {
  'inpaint': ('input!', 'mask!', 'steps'),
  'colourise': ('input!', 'steps'),
  'super_resolution': ('input!', 'factor!', 'steps'),
  'stroke': ('input!', 'sigma'),
  'denoise': ('input!', 'sigma!'),
  'interpolate': ('input', 'second', 'steps', 'denoiser'),
  'reconstruct': ('input!', 'steps', 'denoiser'),
}
NUM_STEPS = 40  # Song et al. 2023, table 3, for LSUN
ERRORS = dict.fromkeys(FLAGS, 'error of known values') | {
  'reconstruct': 'difference from the input'
}
NUM_BETWEEN = 10  # images of an interpolation; cmjax choice


class Rows(NamedTuple):
  """A batch: images to edit, those to end at, and their labels."""

  index: Array  # u32[B], of the image among all
  y: Array  # f32[B, H, W, C]
  end: Array | None  # f32[B, H, W, C], of an interpolation between images
  cond: Array | None  # f32[B, K]
  end_cond: Array | None  # f32[B, K], of an interpolation


class Result(NamedTuple):
  """What an edit returns of a batch; None where an edit has no such thing."""

  x: Array  # f32[B, H, W, C]
  steps: Array | None = None  # f32[B, N, H, W, C], shown as an animation
  given: Array | None = None  # f32[B, H, W, C], what is known of the image
  error: Array | None = None  # f32[B]; see ERRORS


Compute = Callable[[Any, Rows, Key], Result]  # (params, rows, keys key[B]) -> Result


def check_flags(flags: argparse.Namespace) -> None:
  """Raises: UserError if flags of the edit are missing, or others are given."""
  if not flags.edit:
    raise UserError(f'--mode=edit needs --edit=EDIT, one of {", ".join(FLAGS)}')
  takes = {flag.rstrip('!'): flag.endswith('!') for flag in FLAGS[flags.edit]}
  for name in sorted({flag.rstrip('!') for row in FLAGS.values() for flag in row}):
    if getattr(flags, name) and name not in takes:
      raise UserError(f'--{name}: --edit={flags.edit} does not take it; leave it out')
    if takes.get(name) and not getattr(flags, name):
      raise UserError(f'--{name}: missing; --edit={flags.edit} needs it')
  if flags.edit == 'interpolate' and bool(flags.input) != bool(flags.second):
    raise UserError(
      '--edit=interpolate: give --input and --second, to go from one image to the '
      'other, or neither, for two random ones'
    )
  if flags.denoiser and not flags.input:
    raise UserError('--denoiser: only inverts images; give --input and --second too')
  if flags.steps and not 2 <= flags.steps <= 1000:
    raise UserError(f'--steps={flags.steps}: must be from 2 to 1000')


def check_model(opened: Opened, edit: str) -> None:
  """Raises: UserError if the model is not one of images, or has not their channels."""
  shape, source = opened.source.shape, opened.source
  if len(shape) != 3 or shape[2] not in (1, 3) or not np.isfinite(source.high):
    raise UserError(
      f'--workdir: needs a model of images with 1 or 3 channels; this has shape {shape}'
    )
  if edit == 'colourise' and shape[2] != 3:
    raise UserError('--edit=colourise: the model has one channel, and no colours')
  if is_diffusion(opened.config) and edit not in ('interpolate', 'reconstruct'):
    logs.say('a diffusion model: its denoiser is used as the consistency function')


def computation(flags: argparse.Namespace, opened: Opened) -> tuple[Any, Compute]:
  """The parameters and the computation of an edit, from its flags.

  Raises: UserError if a flag has a value out of range, or a file cannot be read.
  """
  if flags.edit in ('interpolate', 'reconstruct'):
    return _through_noise(flags, opened)
  shape, sigma_min = opened.source.shape, _sigma_min(opened.config)
  if flags.edit in ('stroke', 'denoise'):
    sigmas = _sigmas(flags, sigma_min)
    build = _stroke if flags.edit == 'stroke' else _denoise
    return opened.params, build(opened.f, sigmas, sigma_min)
  if flags.edit == 'inpaint':
    edit = editing.inpaint(jnp.asarray(read_mask(flags.mask, '--mask', shape)))
  elif flags.edit == 'colourise':
    edit = editing.colourise()
  else:
    with user_errors(f'--factor={flags.factor}'):
      edit = editing.super_resolution(flags.factor, shape)
  grid = karras(flags.steps or NUM_STEPS, sigma_min=SIGMA_RANGE[0]).tolist()
  sigmas = [sigma for sigma in grid if sigma > sigma_min]  # f(x, sigma_min) is x
  compute = _algorithm4(opened.f, edit, sigmas, sigma_min, flags.edit == 'colourise')
  return opened.params, compute


def _algorithm4(
  f: Model, edit: editing.Edit, sigmas: list[float], sigma_min: float, grey: bool
) -> Compute:
  def compute(params, rows, keys):
    y, cond = rows.y, rows.cond
    x, steps = editing.edit_images(
      f, params, y, edit, sigmas=sigmas, keys=keys, cond=cond, sigma_min=sigma_min
    )
    # The known coordinate of colours alone is not a grey image, but one of equal hue.
    given = editing.grey(y) if grey else editing.merge(edit, y, jnp.zeros_like(y))
    return Result(x, jnp.swapaxes(steps, 0, 1), given, editing.known_error(edit, y, x))

  return compute


def _stroke(f: Model, sigmas: list[float], sigma_min: float) -> Compute:
  def compute(params, rows, keys):
    y, cond = rows.y, rows.cond
    x, steps = editing.stroke(
      f, params, y, sigmas=sigmas, keys=keys, cond=cond, sigma_min=sigma_min
    )
    return Result(x, jnp.swapaxes(steps, 0, 1))

  return compute


def _denoise(f: Model, sigmas: list[float], sigma_min: float) -> Compute:
  (sigma,) = sigmas

  def compute(params, rows, keys):
    return Result(editing.denoise(f, params, rows.y, sigma=sigma, cond=rows.cond))

  return compute


def _through_noise(flags: argparse.Namespace, opened: Opened) -> tuple[Any, Compute]:
  """Edits that generate from noise: that of images, by a diffusion model, or random.

  The parameters are those of the model and of the diffusion model.
  """
  f, between = opened.f, flags.edit == 'interpolate'
  denoiser, denoiser_params = f, opened.params
  if flags.input:
    denoiser, denoiser_params = _denoiser(flags, opened)
  num_steps = NUM_STEPS if between else flags.steps or NUM_STEPS
  low, high = SIGMA_RANGE
  grid = karras(num_steps, sigma_min=low, sigma_max=high).tolist()
  by_ode = is_diffusion(opened.config)
  if flags.input:  # by the same model
    by_ode = denoiser_params is opened.params

  def images_of(params, z, cond):
    if by_ode:
      return inversion.solve(lambda x, sigma: f(params[0], x, sigma, cond), z, grid)
    return inversion.generate(f, params[0], z, sigma_max=high, cond=cond)

  def noise_of(params, x, cond):
    def field(x, sigma):
      return denoiser(params[1], x, sigma, cond)

    return inversion.invert(
      field, x, num_steps=num_steps, sigma_min=low, sigma_max=high
    )

  def reconstruct(params, rows, keys):
    x = images_of(params, noise_of(params, rows.y, rows.cond), rows.cond)
    return Result(x, error=jnp.max(jnp.abs(x - rows.y), axis=(1, 2, 3)))

  def interpolate(params, rows, keys):
    if rows.end is None:
      a, b = (normal(keys, draw, rows.y.shape[1:]) for draw in (0, 1))
    else:
      a = noise_of(params, rows.y, rows.cond)
      b = noise_of(params, rows.end, rows.end_cond)

    def at(z, alpha):
      cond = rows.cond
      if cond is not None:
        cond = (1.0 - alpha) * cond + alpha * rows.end_cond
      return images_of(params, z, cond)

    steps = inversion.interpolate(at, a, b, flags.steps or NUM_BETWEEN)
    return Result(steps[-1], jnp.swapaxes(steps, 0, 1))

  return (opened.params, denoiser_params), interpolate if between else reconstruct


def _denoiser(flags: argparse.Namespace, opened: Opened) -> tuple[Model, Params]:
  """The diffusion model that inverts images, with its parameters."""
  config, given = opened.config, flags.denoiser
  itself = (
    paths.path(given) == paths.path(opened.path) if given else is_diffusion(config)
  )
  if itself:
    return opened.f, opened.params
  path = given or config.teacher or config.init_from
  advice = 'give --denoiser=PATH, a diffusion model of the same data'
  if not path:
    raise UserError(f'--edit={flags.edit}: a consistency function has no ODE; {advice}')
  model = pretrained.load(path, trust=flags.trust, mesh=opened.mesh, say=logs.say)
  if not given:
    if not is_diffusion(model.config):
      raise UserError(f'--edit={flags.edit}: {path} is no diffusion model; {advice}')
    logs.say(f'images are inverted by {path}')
  if (model.shape, model.classes) != (opened.source.shape, opened.source.classes):
    raise UserError(
      f'--denoiser: {path} has examples of shape {model.shape} with {model.classes} '
      f'classes, and --workdir {opened.source.shape} with {opened.source.classes}'
    )
  return model.f, model.params


def is_diffusion(config: Any) -> bool:
  """Whether a config says that its model was trained as a denoiser.

  A released file says it by its preconditioning, for it has no objective.
  """
  if 'fn' in config.objective:
    return config.objective.fn.startswith('cmjax.objectives.denoise:')
  return config.precond.fn == 'cmjax.precond:edm'


def _sigma_min(config: Any) -> float:
  """The sigma at which the model is the identity."""
  default = SIGMA_RANGE[0] if config.precond.fn.endswith(':consistency') else 0.0
  return dict(config.precond).get('sigma_min', default)


def _sigmas(flags: argparse.Namespace, low: float) -> list[float]:
  """The noise levels of --sigma, checked."""
  text = flags.sigma or '5.38,2.24'  # Song et al. 2023, appendix D
  low, high = max(low, SIGMA_RANGE[0]), SIGMA_RANGE[1]
  try:
    sigmas = [float(word) for word in text.split(',')]
  except ValueError:
    raise UserError(f'--sigma={text}: must be numbers, such as 5.38,2.24') from None
  if not all(low < sigma <= high for sigma in sigmas):
    raise UserError(
      f'--sigma={text}: must be above {low} and at most {high}, the range of the model'
    )
  if sigmas != sorted(set(sigmas), reverse=True):
    raise UserError(f'--sigma={text}: must descend, such as 5.38,2.24')
  if flags.edit == 'denoise' and len(sigmas) > 1:
    raise UserError(f'--sigma={text}: --edit=denoise takes one')
  return sigmas
