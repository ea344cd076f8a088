"""Simplified consistency training (sCM), from data; starts from a diffusion model.

Command:   cmjax --config=sct:digits --workdir=runs/sct
             --config.init_from=runs/trigflow
Hardware:  toy2d, digits: two CPU cores, two minutes; cifar10: not run
Source:    Lu & Song 2024 (sCM), algorithm 1 and appendix G: P = -1.0, 1.4, normaliser
           0.1, warm-up 10,000 iterations, RAdam 1e-4 (0.9, 0.99), batch 512, EMA
           half-life 0.5 M images; length of NVlabs/FastGen; toy2d, digits: optimiser,
           EMA, warm-up and length are cmjax choices
Expected:  cifar10: FID 2.85 at one evaluation, 2.06 at two (sCT, their table 1)
Measured:  toy2d: error of the map 0.040; digits, width 192:
           0.456 at one evaluation, 0.208 at two (means of three seeds)
"""

from cmjax.configs import parts


def get_config(data='digits'):
  c = parts.tuned(data, **parts.trigflow_network(data), log_weight=True)
  c.precond = parts.trigflow_precond()
  warmup_images = c.total_images // 4
  if data == 'cifar10':
    c.network.dropout = 0.2
    c.total_images = 350_000 * c.batch_size
    c.optimizer = parts.radam(parts.constant(1e-4), b2=0.99)
    c.ema = dict(slow=parts.half_life(500_000))
    warmup_images = 10_000 * c.batch_size
  c.objective = dict(
    fn='cmjax.objectives.trigflow:sct',
    times=parts.lognormal(-1.0, 1.4),
    warmup=parts.warmup(1.0, warmup_images=warmup_images),
    normaliser=0.1,
  )
  return c
