"""Precision of df/dt, by `jax.jvp` and by finite differences."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cmjax import checks, times
from cmjax.process import VE, perturb
from cmjax.studies.study import Study, Subject, study


def jvp_precision(
  subject: Subject,
  *,
  num_samples: int = 32,
  widths: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> Study:
  """Relative error of t df/dt, by `jax.jvp` and by central differences of step h t.

  The reference is `jax.jvp` in float64. Derivatives are along x_t = x0 + t z for fixed
  x0 and z, at lognormal t. One row per h; the error of `jax.jvp`, which does not depend
  on h, is repeated in each.

  Raises: ValueError if the dtype of the model cannot be set, num_samples < 1, or the
    widths are empty or outside (0, 1).
  """
  checks.whole(1, num_samples=num_samples)
  if not widths or not all(0 < h < 1 for h in widths):
    raise ValueError(f'widths must be in (0, 1) and not empty, got {tuple(widths)}')
  in_dtype = subject.in_dtype
  if in_dtype is None:
    raise ValueError('jvp_precision needs a network with a `dtype`')
  keys = jax.random.split(jax.random.key(2), 3)
  index = jax.random.randint(keys[0], (num_samples,), 0, len(subject.x0))
  cond = None if subject.cond is None else subject.cond[index]
  t = times.lognormal(mean=-1.1, std=1.5)(keys[1], num_samples)
  x0, z = subject.x0[index], jax.random.normal(keys[2], subject.x0[index].shape)

  def derivative(compute_dtype, array_dtype, h):
    f = in_dtype(compute_dtype)
    params, *data = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a), array_dtype),
      (subject.nets.online, x0, z, t),
    )

    @jax.jit
    def run(params, x0, z, t):
      def at(s):
        scaled = t * (1 + s)
        return f(params, perturb(VE, x0, z, scaled), scaled, cond)

      if h is None:
        zero, one = jnp.zeros((), array_dtype), jnp.ones((), array_dtype)
        return jax.jvp(at, (zero,), (one,))[1]
      return (at(h) - at(-h)) / (2 * h)

    return np.asarray(run(params, *data), np.float64)

  with jax.enable_x64(True):
    exact = derivative('float64', np.float64, None)

  def error(dtype, h):
    difference = derivative(dtype, np.float32, h) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))

  dtypes = ('float32', 'bfloat16')
  jvp = {f'{dtype}_jvp': error(dtype, None) for dtype in dtypes}
  rows = [
    {'h': float(h)} | {dtype: error(dtype, h) for dtype in dtypes} | jvp for h in widths
  ]
  columns = {'h': 'step of the differences, relative to t'}
  columns |= {
    dtype: f'relative error of central differences in {dtype}' for dtype in dtypes
  }
  columns |= {
    f'{dtype}_jvp': f'relative error of jax.jvp in {dtype}' for dtype in dtypes
  }
  ys = tuple(name for name in columns if name != 'h')
  return study('Relative error of df/dt', rows, 'h', ys, columns)
