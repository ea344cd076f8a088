"""EDM on scikit-learn's digits: the teacher of `ect_digits`.

Command:   cmjax --config=configs/edm_digits.py --workdir=runs/edm_digits
Hardware:  two CPU cores, under a minute
Source:    objective, sampler and noise levels of Karras et al. 2022, table 1;
           network, optimiser and length are cmjax choices
Expected:  pixel Frechet distance <= 0.12, label agreement >= 0.98 at 35 evaluations
Measured:  0.097 and 0.988 (README.md, "Quick start")
"""

import parts


def get_config():
  c = parts.base()
  c.batch_size = 128
  c.total_images = 3_000 * 128
  c.data = parts.digits()
  c.network = parts.digits_network()
  c.precond = parts.edm_precond()
  c.objective = parts.edm()
  c.optimizer = parts.adam(parts.cosine(1e-3))
  c.ema = dict(slow=parts.constant(0.998))
  c.sample_weights = 'slow'
  c.samplers = dict(heun=parts.heun())
  c.metrics = parts.digits_metrics()
  c.evaluation.samples = 1797
  c.every.picture_steps = 1_000
  c.every.checkpoint_steps = 1_000
  return c
