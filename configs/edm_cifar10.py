"""EDM on CIFAR-10, unconditional, DDPM++: the teacher of `ect_cifar10`.

Command:   cmjax --config=configs/edm_cifar10.py --workdir=runs/edm_cifar10
Hardware:  never run here to the end
Source:    Karras et al. 2022, table 1; NVlabs/edm `train.py` and README
Differs:   horizontal flips only, without the augmentation pipeline
Expected:  FID 1.97 at 35 evaluations, with augmentation (NVlabs/edm README)
Measured:  not yet
"""

import parts


def get_config():
  c = parts.base()
  c.batch_size = 512
  c.total_images = 200_000_000
  c.data = parts.cifar10(flip=True)
  c.network = parts.ddpmpp(dropout=0.13)
  c.precond = parts.edm_precond()
  c.objective = parts.edm()
  c.optimizer = parts.adam(parts.warmup(1e-3, warmup_images=10_000_000))
  c.ema = dict(half_million=parts.half_life(500_000, rampup_ratio=0.05))
  c.sample_weights = 'half_million'
  c.samplers = dict(heun=parts.heun())
  c.metrics = parts.pixel_metrics()
  c.every.picture_steps = 5_000
  c.every.checkpoint_steps = 5_000
  return c
