"""Continuous-time distillation by the true loss of the l2 norm: Theorem 4.

Command:   cmjax --config=theorem4:digits --workdir=runs/theorem4
             --config.teacher=runs/edm
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Song et al. 2023, theorem 4, with lambda = (tau^-1)'; cifar10: batch
           512, RAdam 1e-3, dropout 0.3, EMA 0.9999 (released launch script); toy2d,
           digits: optimiser, EMA and length are cmjax choices
Expected:  cifar10: the "l2" curve of their figure 7 (no number is given)
Measured:  toy2d: error of the map 0.019; digits, width 192:
           1.328 at one evaluation, 0.466 at two (means of three seeds)
"""

from cmjax.configs import continuous_cd, parts


def get_config(data='digits'):
  c = continuous_cd.get_config(data)
  c.objective.fn = 'cmjax.objectives.continuous:theorem4'
  c.objective.distance = parts.pseudo_huber(0.0)
  if data == 'cifar10':
    c.optimizer.learning_rate.value = 1e-3
  return c
