"""Continuous-time consistency training: the pseudo-objective of Theorem 6.

Command:   cmjax --config=continuous_ct:digits --workdir=runs/continuous_ct
             --config.init_from=runs/edm
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Song et al. 2023, theorem 6, with lambda = (tau^-1)'; cifar10: batch
           512, RAdam 5e-6, dropout 0.3, EMA 0.9999 (released launch script); toy2d,
           digits: optimiser, EMA and length are cmjax choices
Expected:  cifar10: the "l2" curve of their figure 7 (no number is given)
Measured:  toy2d: error of the map 0.067; digits, width 192:
           0.873 at one evaluation, 0.315 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.tuned(data)
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps.sigma_min = 0.002
  if data == 'cifar10':
    c.network.dropout = 0.3
    c.total_images = 800_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(5e-6))
    c.ema = dict(slow=parts.constant(0.9999))
  c.objective = dict(
    fn='cmjax.objectives.continuous:ct',
    times=parts.karras_uniform(),
    distance=parts.squared_l2(),
    weighting=parts.weighting('uniform'),
  )
  return c
