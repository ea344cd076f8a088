"""Shortcut models: two half steps of the target network teach one whole step.

Command:   cmjax --config=configs/shortcut.py:digits --workdir=runs/shortcut
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: never run here
Source:    Frans et al. 2024 (shortcut models): r < t in a quarter of the rows, 128
           finest steps, target rate 0.999; the rest as in `meanflow`; toy2d, digits:
           half of the rows and 0.99, as short runs need (cmjax choice)
Expected:  nothing published on these data
Measured:  toy2d: error of the map 0.042; digits, of width 192:
           0.337 at one evaluation, 0.264 at two (means of three seeds)
"""

import meanflow
import parts


def get_config(data='digits'):
  c = meanflow.get_config(data)
  short = data != 'cifar10'
  c.objective = dict(
    fn='cmjax.objectives.meanflow:shortcut',
    pairs=dict(
      fn='cmjax.times:dyadic_times', finest=128, equal_share=0.5 if short else 0.75
    ),
  )
  c.target_rate = parts.constant(0.99 if short else 0.999)
  return c
