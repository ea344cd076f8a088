"""Shortcut models: two half steps of the target network teach one whole step.

Command:   cmjax --config=shortcut:digits --workdir=runs/shortcut
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Frans et al. 2024 (shortcut models): r < t in a quarter of the batch, 128
           steps at the finest, target decay 0.999; the rest as in `meanflow`; toy2d,
           digits: half of the batch and 0.99, as the runs are short (cmjax choice)
Differs:   half steps are not clipped; the network is given t - r, not its logarithm
Expected:  no published numbers on these data
Measured:  toy2d: error of the map 0.049, most of it at noise levels from 2 to 10,
           from which no single step is trained; digits, width 192:
           0.330 at one evaluation, 0.260 at two (means of three seeds)
"""

from cmjax.configs import meanflow, parts


def get_config(data='digits'):
  c = meanflow.get_config(data)
  short = data != 'cifar10'
  c.objective = dict(
    fn='cmjax.objectives.flow_map:shortcut',
    num_steps=128,
    flow_fraction=0.5 if short else 0.75,
  )
  # Steps of lengths that are trained, 1 and 1/2 of the linear process; sigma = 1000 is
  # its t = 0.999, close to 1 without loss of precision in float32.
  c.samplers = dict(
    one_step=dict(fn='cmjax.samplers:flow_map', sigmas=(1000.0,)),
    two_steps=dict(fn='cmjax.samplers:flow_map', sigmas=(1000.0, 1.0)),
  )
  c.target_decay = parts.constant(0.99 if short else 0.999)
  return c
