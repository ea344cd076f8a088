"""ECT on scikit-learn's digits: one- and two-step samples from the EDM teacher.

Command:   cmjax --config=configs/ect_digits.py --workdir=runs/ect_digits
             --config.init_from=runs/edm_digits
Hardware:  two CPU cores, about three minutes
Source:    objective of Geng et al. 2024 (ECT) for CIFAR-10; smooth stages, optimiser
           and length are cmjax choices
Expected:  pixel Frechet distance <= 0.18 at one evaluation, <= 0.12 at two; label
           agreement >= 0.98
Measured:  0.167 and 0.089, agreement 0.988 and 0.991 (README.md, "Quick start")
"""

import parts


def get_config():
  c = parts.base()
  c.init_from = parts.REQUIRED
  c.batch_size = 128
  c.total_images = 8_000 * 128
  c.data = parts.digits()
  c.network = parts.digits_network()
  c.precond = parts.consistency_precond(0.0)
  c.objective = parts.ect(q=2.0, stage_images=1_000 * 128, smooth=True)
  c.optimizer = parts.radam(parts.cosine(7e-4))
  c.ema = dict(slow=parts.constant(0.998))
  c.sample_weights = 'slow'
  c.samplers = dict(one_step=parts.one_step(), two_steps=parts.two_steps())
  c.metrics = parts.digits_metrics()
  c.evaluation.samples = 1797
  c.every.picture_steps = 1_000
  c.every.checkpoint_steps = 1_000
  return c
