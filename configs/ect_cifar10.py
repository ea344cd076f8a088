"""ECT on CIFAR-10, unconditional, DDPM++: the recipe of 200,000 iterations.

Command:   cmjax --config=configs/ect_cifar10.py --workdir=runs/ect_cifar10
             --config.init_from=runs/edm_cifar10
Hardware:  here 20 steps of a narrow network on two CPU cores
Source:    Geng et al. 2024 (ECT); locuslab/ect `run_ecm.sh`
Differs:   released networks sample with `--config.precond.sigma_min=0.003`; optax's
           RAdam adds eps after its bias correction, PyTorch's before
Expected:  FID 3.86 at one evaluation, 2.15 at two (locuslab/ect README)
Measured:  not yet
"""

import parts


def get_config():
  c = parts.base()
  c.init_from = parts.REQUIRED
  c.batch_size = 128
  c.total_images = 25_600_000
  c.data = parts.cifar10(flip=False)
  c.network = parts.ddpmpp(dropout=0.2)
  c.precond = parts.consistency_precond(0.0)
  c.objective = parts.ect(q=2.0, stage_images=3_200_000)
  c.optimizer = parts.radam(parts.constant(1e-4))
  c.ema = dict(slow=parts.constant(0.9999))
  c.sample_weights = 'slow'
  c.samplers = dict(one_step=parts.one_step(), two_steps=parts.two_steps())
  c.metrics = parts.pixel_metrics()
  c.every.picture_steps = 5_000
  c.every.checkpoint_steps = 5_000
  return c
