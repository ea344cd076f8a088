"""Parts that configs are made of: functions that return dicts."""

from ml_collections import ConfigDict

REQUIRED = '?'  # must be given: --config.KEY=VALUE


def base() -> ConfigDict:
  """Every key of the top level; a config fills in the parts."""
  return ConfigDict(
    dict(
      seed=0,  # of initial weights, data order and training noise
      batch_size=256,  # over all devices
      total_images=0,  # length of the run; steps = total_images / batch_size
      grad_clip_norm=0.0,  # global norm; 0 is off
      max_skipped_steps=100,  # steps that are not finite, in one start, before it stops
      init_from='',  # work directory or checkpoint whose weights to start from
      teacher='',  # the same, for objectives that distil a teacher
      sample_weights='online',  # or the name of an EMA
      data={},
      network={},
      precond={},
      objective={},
      optimizer={},
      target_rate={},  # EMA rate of the target network; empty: stop-gradient of online
      ema={},
      samplers={},
      metrics={},
      evaluation=dict(samples=10_000, batch_size=512, seed=1, pictured=100),
      every=dict(  # 0 is never; pictures, evaluations and checkpoints also at the end
        log_steps=100, picture_steps=0, evaluate_steps=0, checkpoint_steps=1000
      ),
      keep_checkpoints=2,
    )
  )


def digits(conditional: bool = True) -> dict:
  """The 1,797 real digits inside scikit-learn."""
  return dict(fn='cmjax.data:digits', conditional=conditional)


def cifar10(flip: bool) -> dict:
  """CIFAR-10 by TFDS; data_dir is TFDS's own, or the variable CMJAX_DATA_DIR."""
  return dict(
    fn='cmjax.data:tfds',
    name='cifar10',
    split='train',
    data_dir='',
    conditional=False,
    flip=flip,
    quoted_as='CIFAR-10',
  )


def ring() -> dict:
  """Six equal Gaussians on a circle (cmjax choice)."""
  return dict(fn='cmjax.oracles:ring', modes=6, radius=0.7, std=0.08)


def digits_network() -> dict:
  """A residual MLP of 1.7 M parameters (cmjax choice)."""
  return _mlp(width=384, blocks=4, noise_scale=100.0)


def toy_network() -> dict:
  """A residual MLP of 0.6 M parameters (cmjax choice)."""
  return _mlp(width=256, blocks=3, noise_scale=20.0)


def _mlp(width: int, blocks: int, noise_scale: float) -> dict:
  return dict(
    fn='cmjax.networks.mlp:mlp',
    width=width,
    blocks=blocks,
    embedding=128,
    dropout=0.0,
    noise_scale=noise_scale,
    dtype='float32',
  )


def ddpmpp(dropout: float) -> dict:
  """DDPM++ of 55.7 M parameters for 32x32 images; NVlabs/edm `train.py`."""
  return dict(
    fn='cmjax.networks.songunet:songunet',
    channels=128,
    channel_mult=(2, 2, 2),
    blocks=4,
    attention=(16,),
    dropout=dropout,
    dtype='float32',
  )


def edm_precond() -> dict:
  """EDM's denoiser."""
  return dict(fn='cmjax.precond:edm', sigma_data=0.5)


def consistency_precond(sigma_min: float) -> dict:
  """A consistency function with its boundary at sigma_min; 0 in ECT's training."""
  return dict(fn='cmjax.precond:consistency', sigma_data=0.5, sigma_min=sigma_min)


def lognormal(mean: float, std: float) -> dict:
  """The logarithm of t is N(mean, std^2)."""
  return dict(fn='cmjax.times:lognormal', mean=mean, std=std)


def edm() -> dict:
  """EDM's denoising objective; Karras et al. 2022, table 1."""
  return dict(
    fn='cmjax.objectives.denoise:edm', times=lognormal(-1.2, 1.2), sigma_data=0.5
  )


def ect(q: float, stage_images: int, smooth: bool = False) -> dict:
  """Easy Consistency Tuning with the constants of locuslab/ect for CIFAR-10."""
  return dict(
    fn='cmjax.objectives.discrete:ect',
    times=lognormal(-1.1, 2.0),
    gap=dict(
      fn='cmjax.schedules:shrinking_gap', q=q, stage_images=stage_images, smooth=smooth
    ),
    distance=pseudo_huber(0.0),
    weighting=dict(fn='cmjax.distances:inverse_gap'),
    k=8.0,
    b=1.0,
  )


def ct(start: int, end: int, c: float) -> dict:
  """Consistency training on a growing Karras grid, with iCT's metric and weighting."""
  return dict(
    fn='cmjax.objectives.discrete:ct',
    pairs=dict(
      fn='cmjax.times:karras_pairs',
      bins=dict(fn='cmjax.schedules:adaptive_bins', start=start, end=end),
      sigma_min=0.002,
      sigma_max=80.0,
      rho=7.0,
    ),
    distance=pseudo_huber(c),
    weighting=dict(fn='cmjax.distances:inverse_gap'),
  )


def pseudo_huber(c: float) -> dict:
  """The metric of iCT; with c = 0, of ECT, the unsquared l2 norm."""
  return dict(fn='cmjax.distances:pseudo_huber', c=c)


def adam(learning_rate: dict) -> dict:
  """Adam with its usual rates."""
  return dict(fn='optax:adam', learning_rate=learning_rate, b1=0.9, b2=0.999, eps=1e-8)


def radam(learning_rate: dict) -> dict:
  """RAdam with its usual rates."""
  return dict(fn='optax:radam', learning_rate=learning_rate, b1=0.9, b2=0.999, eps=1e-8)


def constant(value: float) -> dict:
  """The same at every step: a learning rate, or an EMA's share kept."""
  return dict(fn='cmjax.schedules:constant', value=value)


def cosine(peak: float, warmup_images: int = 0) -> dict:
  """Warm-up, then half a cosine to zero at the end of the run."""
  return dict(fn='cmjax.schedules:cosine', peak=peak, warmup_images=warmup_images)


def warmup(peak: float, warmup_images: int) -> dict:
  """Linear warm-up, then constant."""
  return dict(fn='cmjax.schedules:warmup', peak=peak, warmup_images=warmup_images)


def half_life(half_life_images: int, rampup_ratio: float) -> dict:
  """EMA by its half-life, as EDM counts it."""
  return dict(
    fn='cmjax.schedules:half_life',
    half_life_images=half_life_images,
    rampup_ratio=rampup_ratio,
  )


def adaptive_target_rate(start_rate: float, start: int, end: int) -> dict:
  """EMA rate mu(k) of the target network; Song et al. 2023, appendix C."""
  return dict(
    fn='cmjax.schedules:adaptive_target_rate',
    start_rate=start_rate,
    start=start,
    end=end,
  )


def heun() -> dict:
  """EDM's deterministic sampler: 18 steps, 35 evaluations."""
  return dict(
    fn='cmjax.samplers:ode',
    steps=18,
    solver='heun',
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
  )


def one_step() -> dict:
  """One evaluation at sigma_max."""
  return dict(fn='cmjax.samplers:one_step', sigma_max=80.0)


def two_steps(sigma_min: float = 0.0) -> dict:
  """Two evaluations; 0.821 is the middle time of iCT and ECT for CIFAR-10."""
  return dict(fn='cmjax.samplers:multistep', times=(80.0, 0.821), sigma_min=sigma_min)


def pixel_metrics() -> dict:
  """Frechet distance on pixels: not an FID."""
  return dict(frechet=dict(fn='cmjax.evaluate:pixel_frechet'))


def digits_metrics() -> dict:
  """The above, and agreement of a classifier with the labels asked for."""
  return pixel_metrics() | dict(labels=dict(fn='cmjax.evaluate:label_agreement'))
