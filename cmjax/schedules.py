"""Functions of the step: learning rates, EMA rates, discretisation curricula.

Lengths are in images, so that a change of batch size keeps the recipe; a run gives
`batch_size` and `total_images`. Each schedule maps i32[] or f32[] to f32[].
"""

import math

import jax.numpy as jnp
import numpy as np

from cmjax import checks
from cmjax.core import Schedule


def constant(*, value: float) -> Schedule:
  """The same value at every step. Raises: ValueError if it is not finite."""
  checks.finite(value=value)
  return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def cosine(
  *, peak: float, batch_size: int, total_images: int, warmup_images: int = 0
) -> Schedule:
  """Linear warm-up to `peak`, then half a cosine down to zero at the end of the run.

  Raises: ValueError for a negative peak or warm-up.
  """
  checks.not_negative(peak=peak, warmup_images=warmup_images)
  checks.positive(batch_size=batch_size, total_images=total_images)

  def schedule(step):
    images = jnp.asarray(step, jnp.float32) * batch_size
    warm = jnp.minimum((images + batch_size) / max(warmup_images, batch_size), 1.0)
    share = (images - warmup_images) / max(total_images - warmup_images, 1)
    return peak * warm * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(share, 0.0, 1.0)))

  return schedule


def warmup(*, peak: float, batch_size: int, warmup_images: int) -> Schedule:
  """Linear from 0 to `peak` over `warmup_images`, then constant.

  Raises: ValueError for a negative peak or warm-up.

  Source: NVlabs/edm `training_loop.py`, where warm-up takes 10 million images.
  """
  checks.not_negative(peak=peak, warmup_images=warmup_images)
  checks.positive(batch_size=batch_size)
  return lambda step: (
    peak
    * jnp.minimum(
      jnp.asarray(step, jnp.float32) * batch_size / max(warmup_images, 1), 1.0
    )
  )


def inverse_root(
  *, peak: float, hold_images: int, batch_size: int, rampup_images: int = 0
) -> Schedule:
  """`peak` for the first `hold_images`, then as one over the root of the images seen.

  Beside it, linear from 0 to 1 over `rampup_images`, as a factor.

  Raises: ValueError unless it is held for some images, or for a negative peak or
    ramp-up.

  Source: NVlabs/edm2 `training_loop.py`, `learning_rate_schedule`, whose ramp-up takes
    10 million images; that of locuslab/ect, branch imgnet, has none.
  """
  checks.not_negative(peak=peak, rampup_images=rampup_images)
  checks.positive(hold_images=hold_images, batch_size=batch_size)

  def schedule(step):
    images = jnp.asarray(step, jnp.float32) * batch_size
    held = peak / jnp.sqrt(jnp.maximum(images / hold_images, 1.0))
    if rampup_images == 0:
      return held
    return held * jnp.minimum(images / rampup_images, 1.0)

  return schedule


def half_life(
  *, half_life_images: int, batch_size: int, rampup_ratio: float = 0.0
) -> Schedule:
  """EMA rate whose memory halves each `half_life_images`: 0.5^(batch / half-life).

  With `rampup_ratio` the half-life is at most that share of the images seen so far.

  Raises: ValueError unless the half-life is positive and the ratio not negative.

  Source: NVlabs/edm `training_loop.py` (half-life 500k images, ramp-up 0.05).
  """
  checks.positive(half_life_images=half_life_images, batch_size=batch_size)
  checks.not_negative(rampup_ratio=rampup_ratio)

  def schedule(step):
    life = jnp.full(jnp.shape(step), half_life_images, jnp.float32)
    if rampup_ratio > 0:
      seen = jnp.asarray(step, jnp.float32) * batch_size * rampup_ratio
      life = jnp.minimum(life, seen)
    return 0.5 ** (batch_size / jnp.maximum(life, 1e-8))

  return schedule


def power(*, relative_std: float) -> Schedule:
  """EMA rate (1 - 1/k)^(gamma + 1), k = step + 1: the power-function profile.

  Its memory is a fixed share of the run: `relative_std` is the profile's standard
  deviation over the run's length.

  Raises: ValueError unless 0 < relative_std < 0.288, where gamma is positive.

  Source: Karras et al. 2024 (EDM2), section 3.1.
  """
  if not 0 < relative_std < 12**-0.5:
    raise ValueError(f'needs 0 < relative_std < 0.288, got {relative_std}')
  gamma = power_gamma(relative_std)
  return lambda step: (
    (1.0 - 1.0 / (jnp.asarray(step, jnp.float32) + 1.0)) ** (gamma + 1.0)
  )


def power_gamma(relative_std: float) -> float:
  """The exponent gamma of a power-function EMA, from its relative standard deviation.

  Source: Karras et al. 2024 (EDM2), appendix C.
  """
  square = relative_std**-2
  return float(np.max(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real))


def shrinking_gap(
  *,
  q: float,
  stage_images: int,
  batch_size: int,
  smooth: bool = False,
  total_images: int = 0,
) -> Schedule:
  """The relative gap q^-a of ECT, a = 1 + images / stage_images.

  By stages (`smooth=False`) the quotient is rounded down, as locuslab/ect does; smooth
  lets it shrink with every step (cmjax choice).

  Raises: ValueError unless q > 1 and the stages have a length, or if the gap falls
    below 2^-18 within `total_images`, where r would round to t.

  Source: Geng et al. 2024 (ECT); locuslab/ect `loss.py`.
  Differs: from the paper's a = floor(images / stage_images), whose first stage is
    plain diffusion training; as in the released code that stage is left out.
  """
  checks.positive(stage_images=stage_images, batch_size=batch_size)
  checks.not_negative(total_images=total_images)
  if not 1 < q < math.inf:
    raise ValueError(f'q must be finite and above 1, got {q}')
  stages = 1 + total_images / stage_images
  if stages * math.log2(q) > 18:
    raise ValueError(
      f'the gap falls to {q}^-{stages:.3g}, and r would round to t; raise '
      f'stage_images above {stage_images}'
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    if smooth:
      stage = step * batch_size / stage_images
    else:  # half a step off the edges, where rounding would decide
      stage = jnp.floor((step + 0.5) * batch_size / stage_images)
    return jnp.float32(q) ** -(1.0 + stage)

  return schedule


def adaptive_bins(
  *, start: int, end: int, batch_size: int, total_images: int
) -> Schedule:
  """N(k), the number of points of the consistency-training grid, from start to end + 1.

  Raises: ValueError unless 1 <= start <= end.

  Source: Song et al. 2023, appendix C, with s0 = start and s1 = end.
  """
  _check_bins(start, end, batch_size, total_images)

  def schedule(step):
    share = jnp.asarray(step, jnp.float32) * batch_size / total_images
    square = jnp.clip(share, 0.0, 1.0) * ((end + 1) ** 2 - start**2) + start**2
    return jnp.maximum(jnp.ceil(jnp.sqrt(square) - 1.0), 1.0) + 1.0

  return schedule


def adaptive_target_rate(
  *,
  start_rate: float,
  start: int,
  end: int,
  batch_size: int,
  total_images: int,
  as_released: bool = False,
) -> Schedule:
  """mu(k) = exp(start ln(start_rate) / N(k)), the target network's EMA rate.

  With `as_released` the divisor is N(k) - 1, as in openai/consistency_models.

  Raises: ValueError unless 0 < start_rate < 1 and 1 <= start <= end.

  Source: Song et al. 2023, appendix C.
  """
  if not 0 < start_rate < 1:
    raise ValueError(f'start_rate must be in (0, 1), got {start_rate}')
  bins = adaptive_bins(
    start=start, end=end, batch_size=batch_size, total_images=total_images
  )
  fewer = 1.0 if as_released else 0.0
  return lambda step: jnp.exp(start * math.log(start_rate) / (bins(step) - fewer))


def doubling_bins(
  *, start: int = 10, end: int = 1280, batch_size: int, total_images: int
) -> Schedule:
  """N(k) = min(start 2^floor(k / K'), end) + 1, in equal stages over the run.

  Raises: ValueError unless 1 <= start <= end, and no more stages than steps.

  Source: Song & Dhariwal 2023 (iCT), section 3.4.
  """
  _check_bins(start, end, batch_size, total_images)
  stages = math.log2(end // start) + 1
  stage_steps = math.floor(total_images // batch_size / stages)
  if stage_steps < 1:
    raise ValueError(
      f'{stages:.3g} stages do not fit {total_images // batch_size} steps; raise '
      'config.total_images or `start`'
    )

  def schedule(step):
    return jnp.minimum(start * 2.0 ** _stage(step, stage_steps), end) + 1.0

  return schedule


def _check_bins(start, end, batch_size, total_images):
  checks.whole(1, start=start, end=end)
  checks.positive(batch_size=batch_size, total_images=total_images)
  if start > end:
    raise ValueError(f'needs start <= end, got {start=}, {end=}')


def halving_steps(*, start: int, stage_images: int, batch_size: int) -> Schedule:
  """The student's number of sampling steps, halved at each stage down to one.

  Raises: ValueError unless start >= 1 and the stages have a step.

  Source: Salimans & Ho 2022, algorithm 2.
  Differs: stages are equally long; theirs for two steps and for one take twice as long.
  """
  checks.whole(1, start=start)
  stage_steps = _stage_steps(stage_images, batch_size)
  return lambda step: jnp.maximum(
    jnp.floor(start * 0.5 ** _stage(step, stage_steps)), 1.0
  )


def copy_at_stages(*, stage_images: int, batch_size: int) -> Schedule:
  """A target rate of 0 in the last step of each stage, and 1 in between.

  The target network is then the student as the last stage left it.

  Raises: ValueError unless the stages have a step.

  Source: Salimans & Ho 2022, algorithm 2, where the student becomes the teacher.
  """
  steps = _stage_steps(stage_images, batch_size)
  return lambda step: jnp.where(
    (jnp.asarray(step, jnp.int32) + 1) % steps == 0, 0.0, 1.0
  )


def stage_decay(*, peak: float, stage_images: int, batch_size: int) -> Schedule:
  """Falls linearly from `peak` to zero in each stage.

  Raises: ValueError for a negative peak, or unless the stages have a step.

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
