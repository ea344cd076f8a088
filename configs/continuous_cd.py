"""Continuous-time distillation by the pseudo-objective of Theorem 5.

Command:   cmjax --config=continuous_cd:digits --workdir=runs/continuous_cd
             --config.teacher=runs/edm
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Song et al. 2023, theorem 5, with lambda = (tau^-1)'; cifar10: batch
           512, RAdam 5e-6, dropout 0.3, EMA 0.9999 (released launch script); toy2d,
           digits: optimiser, EMA and length are cmjax choices
Expected:  cifar10: the "l2, stopgrad" curve of their figure 7 (no number is given)
Measured:  toy2d: error of the map 0.036; digits, width 192:
           1.105 at one evaluation, 0.440 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.distilled(parts.tuned(data))
  c.precond = parts.consistency_precond(0.002)
  c.samplers.two_steps.sigma_min = 0.002
  if data == 'cifar10':
    c.network.dropout = 0.3
    c.total_images = 800_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(5e-6))
    c.ema = dict(slow=parts.constant(0.9999))
  c.objective = dict(
    fn='cmjax.objectives.continuous:cd',
    times=parts.karras_uniform(),
    distance=parts.squared_l2(),
    weighting=parts.weighting('uniform'),
    guidance=1.0,
  )
  return c
