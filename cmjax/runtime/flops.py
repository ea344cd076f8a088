"""Floating-point operations of a traced program, and peak rates of devices."""

from collections.abc import Iterator
import math
from typing import Any

# Peak FLOP/s of one device in bfloat16, dense. Source: the data sheets of the vendors.
PEAKS = {
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}


def flops(jaxpr: Any) -> float:
  """Operations of the matrix products and convolutions of a jaxpr, on all devices.

  Padding counts as data. A scan counts once per iteration, any other loop once, and a
  conditional as its most expensive branch. XLA's own count is not used: it counts every
  loop once, and XLA adds loops that overlap products with collectives.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    inner = [flops(part) for part in _jaxprs(equation.params.values())]
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2.0 * equation.outvars[0].aval.size * math.prod(sizes)
    elif equation.primitive.name == 'conv_general_dilated':
      kernel = equation.invars[1].aval
      features = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
      total += 2.0 * equation.outvars[0].aval.size * kernel.size / features
    elif equation.primitive.name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * equation.params.get('length', 1)
  return total


def _jaxprs(values: Any) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation."""
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from _jaxprs(value)
    elif hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
      yield value
