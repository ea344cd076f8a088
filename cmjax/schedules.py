"""Schedules: learning rates, EMA decays and discretisation curricula by training step.

Each maps a step, i32[] or f32[], to f32[]. Lengths are in images, not steps, so that a
recipe does not depend on the batch size.
"""

import math

import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Schedule


def constant(*, value: float) -> Schedule:
  """`value` at every step. Raises: ValueError if it is not finite."""
  checks.finite(value=value)
  return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def cosine(
  *, peak: float, batch_size: int, total_images: int, warmup_images: int = 0
) -> Schedule:
  """Linear warm-up to `peak`, then cosine decay to zero at the end of training.

  Raises: ValueError unless peak and warmup_images are >= 0.
  """
  checks.not_negative(peak=peak, warmup_images=warmup_images)
  checks.positive(batch_size=batch_size, total_images=total_images)

  def schedule(step):
    images = jnp.asarray(step, jnp.float32) * batch_size
    warm = jnp.minimum((images + batch_size) / max(warmup_images, batch_size), 1.0)
    progress = (images - warmup_images) / max(total_images - warmup_images, 1)
    return peak * warm * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0.0, 1.0)))

  return schedule


def warmup(*, peak: float, batch_size: int, warmup_images: int) -> Schedule:
  """Linear from 0 to `peak` over `warmup_images`, then constant.

  Raises: ValueError unless peak and warmup_images are >= 0.

  Source: NVlabs/edm `training_loop.py`, with warmup_images of 10 million.
  """
  checks.not_negative(peak=peak, warmup_images=warmup_images)
  checks.positive(batch_size=batch_size)

  def schedule(step):
    images = jnp.asarray(step, jnp.float32) * batch_size
    return peak * jnp.minimum(images / max(warmup_images, 1), 1.0)

  return schedule


def inverse_root(
  *, peak: float, hold_images: int, batch_size: int, rampup_images: int = 0
) -> Schedule:
  """`peak` / sqrt(max(images / hold_images, 1)), times a linear ramp-up.

  Raises: ValueError unless hold_images > 0, and peak and rampup_images are >= 0.

  Source: NVlabs/edm2 `training_loop.py`, with rampup_images of 10 million;
    locuslab/ect, branch imgnet, without ramp-up.
  """
  checks.not_negative(peak=peak, rampup_images=rampup_images)
  checks.positive(hold_images=hold_images, batch_size=batch_size)

  def schedule(step):
    images = jnp.asarray(step, jnp.float32) * batch_size
    rate = peak / jnp.sqrt(jnp.maximum(images / hold_images, 1.0))
    if rampup_images == 0:
      return rate
    return rate * jnp.minimum(images / rampup_images, 1.0)

  return schedule


def half_life(
  *, half_life_images: int, batch_size: int, rampup_ratio: float = 0.0
) -> Schedule:
  """EMA decay with a half-life in images: 0.5^(batch_size / half_life).

  With `rampup_ratio` > 0 the half-life is at most rampup_ratio times the images so far.

  Raises: ValueError unless half_life_images > 0 and rampup_ratio >= 0.

  Source: NVlabs/edm `training_loop.py` (half-life 500k images, ramp-up ratio 0.05).
  """
  checks.positive(half_life_images=half_life_images, batch_size=batch_size)
  checks.not_negative(rampup_ratio=rampup_ratio)

  def schedule(step):
    half_life = jnp.full(jnp.shape(step), half_life_images, jnp.float32)
    if rampup_ratio > 0:
      limit = jnp.asarray(step, jnp.float32) * batch_size * rampup_ratio
      half_life = jnp.minimum(half_life, limit)
    return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))

  return schedule


def power(*, relative_std: float) -> Schedule:
  """EMA decay (1 - 1/k)^(gamma + 1), k = step + 1, of a power-function profile.

  `relative_std` is the standard deviation of the profile relative to the training time.

  Raises: ValueError unless 0 < relative_std < 0.288, which makes gamma positive.

  Source: Karras et al. 2024 (EDM2), section 3.1.
  """
  if not 0 < relative_std < 12**-0.5:
    raise ValueError(f'needs 0 < relative_std < 0.288, got {relative_std}')
  gamma = power_gamma(relative_std)

  def schedule(step):
    k = jnp.asarray(step, jnp.float32) + 1.0
    # Not (1 - 1/k)^(gamma + 1): rounding 1 - 1/k changes 1 - decay by 2^-25 k of it.
    return jnp.exp((gamma + 1.0) * jnp.log1p(-1.0 / k))

  return schedule


def power_gamma(relative_std: float) -> float:
  """The exponent gamma of a power-function EMA, from its relative standard deviation.

  Source: Karras et al. 2024 (EDM2), appendix C.
  """
  square = relative_std**-2
  return float(np.max(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real))


def relative_gap(
  *,
  q: float,
  stage_images: int,
  batch_size: int,
  smooth: bool = False,
  total_images: int = 0,
) -> Schedule:
  """The relative gap q^-a of ECT, a = 1 + images / stage_images.

  Unless `smooth`, images / stage_images is rounded down, as in locuslab/ect.

  Raises: ValueError unless q > 1 and stage_images > 0, or if the gap falls below 2^-18
    within `total_images`, where r would round to t.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  Differs: the paper has a = floor(images / stage_images), whose first stage is
    diffusion training; the released code omits that stage. `smooth` is a cmjax choice.
  """
  checks.positive(stage_images=stage_images, batch_size=batch_size)
  checks.not_negative(total_images=total_images)
  if not 1 < q < math.inf:
    raise ValueError(f'q must be finite and above 1, got {q}')
  stages = 1 + total_images / stage_images
  if stages * math.log2(q) > 18:
    raise ValueError(
      f'relative gap falls to {q}^-{stages:.3g}, where r rounds to t; raise '
      f'stage_images above {stage_images}'
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    if smooth:
      stage = step * batch_size / stage_images
    else:  # + 0.5 keeps rounding errors away from the stage boundaries
      stage = jnp.floor((step + 0.5) * batch_size / stage_images)
    return jnp.float32(q) ** -(1.0 + stage)

  return schedule


def adaptive_num_scales(
  *, start: int, end: int, batch_size: int, total_images: int
) -> Schedule:
  """N(k), the number of grid points in consistency training, from start to end + 1.

  Raises: ValueError unless 1 <= start <= end.

  Source: Song et al. 2023, appendix C, with s0 = start and s1 = end.
  """
  _check_num_scales(start, end, batch_size, total_images)

  def schedule(step):
    progress = jnp.asarray(step, jnp.float32) * batch_size / total_images
    square = jnp.clip(progress, 0.0, 1.0) * ((end + 1) ** 2 - start**2) + start**2
    return jnp.maximum(jnp.ceil(jnp.sqrt(square) - 1.0), 1.0) + 1.0

  return schedule


def adaptive_decay(
  *,
  start_decay: float,
  start: int,
  end: int,
  batch_size: int,
  total_images: int,
  as_released: bool = False,
) -> Schedule:
  """mu(k) = exp(start ln(start_decay) / N(k)), the EMA decay of the target network.

  With `as_released` the divisor is N(k) - 1, as in openai/consistency_models.

  Raises: ValueError unless 0 < start_decay < 1 and 1 <= start <= end.

  Source: Song et al. 2023, appendix C.
  """
  if not 0 < start_decay < 1:
    raise ValueError(f'start_decay must be in (0, 1), got {start_decay}')
  num_scales = adaptive_num_scales(
    start=start, end=end, batch_size=batch_size, total_images=total_images
  )
  shift = 1.0 if as_released else 0.0
  log_decay = start * math.log(start_decay)
  return lambda step: jnp.exp(log_decay / (num_scales(step) - shift))


def doubling_num_scales(
  *, start: int = 10, end: int = 1280, batch_size: int, total_images: int
) -> Schedule:
  """N(k) = min(start 2^floor(k / K'), end) + 1, in stages of equal length K'.

  Raises: ValueError unless 1 <= start <= end, or if there are more stages than steps.

  Source: Song & Dhariwal 2023 (iCT), section 3.4.
  """
  _check_num_scales(start, end, batch_size, total_images)
  stages = math.log2(end // start) + 1
  stage_steps = math.floor(total_images // batch_size / stages)
  if stage_steps < 1:
    raise ValueError(
      f'{stages:.3g} stages do not fit in {total_images // batch_size} steps; raise '
      'total_images or start'
    )

  def schedule(step):
    return jnp.minimum(start * 2.0 ** _stage(step, stage_steps), end) + 1.0

  return schedule


def _check_num_scales(start, end, batch_size, total_images):
  checks.whole(1, start=start, end=end)
  checks.positive(batch_size=batch_size, total_images=total_images)
  if start > end:
    raise ValueError(f'needs start <= end, got {start=}, {end=}')


def halving_steps(*, start: int, stage_images: int, batch_size: int) -> Schedule:
  """The student's number of sampling steps, halved after each stage down to one.

  Raises: ValueError unless start >= 1 and stage_images >= batch_size.

  Source: Salimans & Ho 2022, algorithm 2.
  Differs: all stages are equally long; in the paper those with two steps and one step
    are twice as long.
  """
  checks.whole(1, start=start)
  stage_steps = _stage_steps(stage_images, batch_size)
  return lambda step: jnp.maximum(start // 2.0 ** _stage(step, stage_steps), 1.0)


def copy_at_stages(*, stage_images: int, batch_size: int) -> Schedule:
  """An EMA decay of 0 in the last step of each stage, and of 1 in all others.

  The target network is thus the student as it was at the end of the previous stage.

  Raises: ValueError unless stage_images >= batch_size.

  Source: Salimans & Ho 2022, algorithm 2, where the student becomes the teacher.
  """
  steps = _stage_steps(stage_images, batch_size)
  return lambda step: jnp.where((jnp.asarray(step, jnp.int32) + 1) % steps, 1.0, 0.0)


def stage_decay(*, peak: float, stage_images: int, batch_size: int) -> Schedule:
  """A learning rate that falls linearly from `peak` to zero in each stage.

  Raises: ValueError unless peak >= 0 and stage_images >= batch_size.

  Source: Salimans & Ho 2022, appendix E.
  """
  checks.not_negative(peak=peak)
  steps = _stage_steps(stage_images, batch_size)
  return lambda step: peak * (1.0 - jnp.asarray(step, jnp.int32) % steps / steps)


def _stage_steps(stage_images, batch_size):
  checks.positive(stage_images=stage_images, batch_size=batch_size)
  if stage_images < batch_size:
    raise ValueError(f'needs {stage_images=} >= {batch_size=}')
  return stage_images // batch_size


def _stage(step, stage_steps):
  return (jnp.asarray(step, jnp.int32) // stage_steps).astype(jnp.float32)
