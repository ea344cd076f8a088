"""TrigFlow diffusion: the teacher of `sct` and `scd`, on the process that they use.

Command:   cmjax --config=trigflow:digits --workdir=runs/trigflow
Hardware:  toy2d, digits: two CPU cores, a minute; cifar10: not run
Source:    Lu & Song 2024 (sCM), section 3.1, with EDM's noise levels; cifar10 400,000
           iterations (their appendix G); the rest as in `edm`
Expected:  cifar10: FID 2.15 (sCM, teacher)
Measured:  digits, width 192: 0.149 at 35 evaluations (three seeds)
"""

from cmjax.configs import edm, parts


def get_config(data='digits'):
  c = edm.get_config(data)
  c.precond = parts.trigflow_precond()
  c.network.update(parts.trigflow_network(data))
  if data == 'cifar10':
    c.total_images = 400_000 * c.batch_size
  return c
