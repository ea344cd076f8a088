"""Easy Consistency Tuning: from diffusion to consistency as t - r shrinks.

Command:   cmjax --config=ect:digits --workdir=runs/ect
             --config.init_from=runs/edm
Data:      cifar10, with labels cifar10_cond, its one-hour run cifar10_1h; imagenet64
           in EDM2-S, and _m, _l, _xl; ffhq64, which needs --config.data.path;
           init_from: edm:cifar10, edm:cifar10_cond, edm:ffhq64, edm:imagenet64_s to
           _xl, or the released files of NVlabs/edm and edm2
Hardware:  digits: two CPU cores, about three minutes; toy2d: one minute; cifar10: only
           20 steps of a narrow network on two CPU cores; the others: not run; TPUs:
           configs/README.md, "Recipes", and launch/README.md, "Compile for a TPU
           without one"
Source:    Geng et al. 2024 (ECT); cifar10: locuslab/ect `run_ecm.sh`, and cifar10_1h
           `run_ecm_1hour.sh`; toy2d, digits: smooth stages, optimiser and length are
           cmjax choices; imagenet64: branch imgnet, `run_imgnet_ecm.sh` and the presets
           of EDM2-S to -XL, 100k steps of 128, _xl of 1024 (paper); ffhq64: the recipe
           of cifar10 with EDM's network, a cmjax choice
Differs:   released networks sample with `--config.precond.sigma_min=0.003`; optax's
           RAdam adds eps after its bias correction, PyTorch's before; imagenet64: TFDS
           does not resize as EDM2's tool does; ffhq64, imagenet64_m to _xl: bfloat16,
           recomputed blocks and a sharded state are cmjax choices, to fit in memory
Expected:  digits: pixel Frechet distance <= 0.18 at one evaluation, <= 0.12 at two;
           label agreement >= 0.98; cifar10: FID 3.86 at one evaluation, 2.15 at two
           (locuslab/ect README); cifar10_1h: 2.73 at two (abstract of the paper);
           imagenet64: 5.51 and 3.18, _m 3.67 and 2.35, _xl 2.49 and 1.67 (paper; that
           of _l has not been looked up)
Measured:  digits: 0.161 and 0.083, agreement 0.991 and 0.990 (README.md, "Quick start")
"""

from cmjax.configs import papers, parts


def get_config(data='digits'):
  data, _, variant = data.partition('_')
  if data == 'imagenet64':
    return _imagenet64(variant or 's')
  toy = data in ('toy2d', 'digits')
  c = parts.tuned(data) if toy else papers.on(data)
  c.init_from = parts.REQUIRED
  c.precond = parts.consistency_precond(0.0)
  if data == 'digits':
    c.total_images = 8_000 * c.batch_size
  gap = parts.relative_gap(q=2.0, stage_images=c.total_images // 8, smooth=True)
  if not toy:
    c.batch_size = 128
    c.data.flip = False
    c.network.dropout = 0.2
    c.total_images = 25_600_000
    c.optimizer = parts.radam(parts.constant(1e-4))
    c.ema = dict(slow=parts.constant(0.9999))
    gap = parts.relative_gap(q=2.0, stage_images=3_200_000, smooth=False)
  if variant == '1h':
    c.total_images = 8_000 * c.batch_size
    c.ema = dict(slow=parts.constant(0.9993))
    gap = parts.relative_gap(q=256.0, stage_images=128_000_000, smooth=False)
  if data == 'cifar10' and variant == 'cond':
    c.data.conditional = True
  c.objective = _objective(
    times=parts.lognormal(-1.1, 2.0),
    relative_gap=gap,
    distance=parts.pseudo_huber(0.0),
    weighting=parts.weighting('inverse_gap'),
  )
  return c


def _objective(**keywords):
  return dict(fn='cmjax.objectives.consistency:ect', k=8.0, b=1.0) | keywords


# Batch size, learning rate, dropout.
_EDM2 = {
  's': (128, 1e-3, 0.4),
  'm': (128, 9e-4, 0.5),
  'l': (128, 8e-4, 0.5),
  'xl': (1024, 7e-4, 0.5),
}


def _imagenet64(size):
  batch_size, learning_rate, dropout = _EDM2[size]
  c = papers.edm2(size, dropout)
  if size == 's':
    c.network.update(dtype='float32', remat=False)
    c.mesh.fsdp = False
  c.init_from = parts.REQUIRED
  c.precond = parts.consistency_precond(0.0)
  c.samplers.two_steps = parts.two_steps(middle=1.526)
  c.batch_size = batch_size
  c.total_images = 100_000 * batch_size
  rate = parts.inverse_root(learning_rate, hold_images=2_000 * batch_size)
  c.optimizer = parts.unit_weights(parts.adam(rate, b2=0.99))
  c.ema = dict(slow=parts.constant(0.9999))
  c.objective = _objective(
    times=parts.lognormal(-0.8, 1.6),
    relative_gap=parts.relative_gap(
      q=4.0, stage_images=25_000 * batch_size, smooth=False
    ),
    distance=parts.pseudo_huber(0.06),
    weighting=parts.weighting('edm'),
  )
  return c
