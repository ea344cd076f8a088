"""Simplified consistency distillation (sCM) of a TrigFlow or EDM teacher.

Command:   cmjax --config=configs/scd.py:digits --workdir=runs/scd
             --config.teacher=runs/trigflow
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: never run here
Source:    Lu & Song 2024 (sCM), algorithm 1 and appendix G: P = -1.0, 1.4, normaliser
           0.1, warm-up 10,000 iterations, RAdam 1e-4 (0.9, 0.99), batch 512, EMA
           half-life 0.5 M images; length of NVlabs/FastGen; toy2d, digits: optimiser,
           EMA, warm-up and length are cmjax choices
Expected:  cifar10: FID 3.66 at one evaluation, 2.52 at two (sCD, their table 1)
Measured:  MEASURED
"""

import parts


def get_config(data='digits'):
  c = parts.distilled(data, **parts.trigflow_network(data), log_weight=True)
  c.precond = parts.trigflow_precond()
  warmup_images = c.total_images // 4
  if data == 'cifar10':
    c.network.dropout = 0.0
    c.total_images = 500_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(1e-4), b2=0.99)
    c.ema = dict(slow=parts.half_life(500_000))
    warmup_images = 10_000 * c.batch_size
  c.objective = dict(
    fn='cmjax.objectives.trigflow:scd',
    times=parts.lognormal(-1.0, 1.4),
    warmup=parts.warmup(1.0, warmup_images=warmup_images),
    normaliser=0.1,
    guidance=1.0,
  )
  return c
