"""Simplified consistency distillation (sCM) of a TrigFlow or EDM teacher.

Command:   cmjax --config=scd:digits --workdir=runs/scd
             --config.teacher=runs/trigflow
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Lu & Song 2024 (sCM), algorithm 1 and appendix G: P = -1.0, 1.4, normaliser
           0.1, warm-up 10,000 iterations, RAdam 1e-4 (0.9, 0.99), batch 512, EMA
           half-life 0.5 M images; length of NVlabs/FastGen; toy2d, digits: optimiser,
           EMA, warm-up and length are cmjax choices
Expected:  cifar10: FID 3.66 at one evaluation, 2.52 at two (sCD, their table 1)
Measured:  toy2d: error of the map 0.033; digits, width 192:
           0.639 at one evaluation, 0.290 at two (means of three seeds)
"""

from cmjax.configs import parts, sct


def get_config(data='digits'):
  c = parts.distilled(sct.get_config(data))
  c.objective.fn = 'cmjax.objectives.trigflow:scd'
  with c.unlocked():
    c.objective.guidance = 1.0
  if data == 'cifar10':
    c.network.dropout = 0.0
    c.total_images = 500_000 * c.batch_size
  return c
