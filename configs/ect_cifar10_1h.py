"""ECT on CIFAR-10 in one A100-hour: a constant gap of 1/256 from the first step.

Command:   cmjax --config=configs/ect_cifar10_1h.py --workdir=runs/ect_cifar10_1h
             --config.init_from=runs/edm_cifar10
Hardware:  one A100 for an hour by the paper; never run here to the end
Source:    Geng et al. 2024 (ECT); locuslab/ect `run_ecm_1hour.sh`
Expected:  FID 2.73 at two evaluations (abstract of the paper)
Measured:  not yet
"""

import ect_cifar10
import parts


def get_config():
  c = ect_cifar10.get_config()
  c.total_images = 8_000 * 128
  c.objective = parts.ect(q=256.0, stage_images=128_000_000)
  c.ema = dict(slow=parts.constant(0.9993))
  c.every.picture_steps = 1_000
  c.every.checkpoint_steps = 1_000
  return c
