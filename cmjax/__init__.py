"""Consistency models in JAX."""

from cmjax.runtime import startup

__version__ = '0.3.0.dev0'

startup.fast_convolutions()
