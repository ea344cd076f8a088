"""The locuslab/ect side of `bench_peers`: its network, loss and generator.

The step is rewritten in the order of its `training_loop`, which cannot be called
without DistributedDataParallel, its statistics and its data loader.
"""

import copy
import itertools
from typing import Any

import torch
from training.ct_training_loop import generator_fn
from training.loss import ECMLoss
from training.networks import ECMPrecond


def build(task: dict[str, Any]) -> dict[str, Any]:
  """The functions to time, which run a number of calls and wait, and facts.

  Raises: RuntimeError if cmjax runs on a GPU and PyTorch finds none.
  """
  on_gpu = task['platform'] == 'gpu'
  if on_gpu and not torch.cuda.is_available():
    raise RuntimeError(f'PyTorch {torch.__version__} finds no GPU, and cmjax uses one')
  device = torch.device('cuda' if on_gpu else 'cpu')
  flags = set(task['variant'].split('+'))
  memory = torch.channels_last if 'channels_last' in flags else torch.contiguous_format
  torch.manual_seed(0)
  torch.set_num_threads(task['threads'])
  torch.backends.cudnn.benchmark = True
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
  if not on_gpu:  # the loss restores the random state of a GPU to repeat a mask
    torch.cuda.get_rng_state = torch.get_rng_state
    torch.cuda.set_rng_state = torch.set_rng_state

  net = ECMPrecond(
    img_resolution=32,
    img_channels=3,
    model_type='SongUNet',
    use_fp16='float16' in flags,
    model_channels=task['channels'],
    channel_mult=[2, 2, 2],
    num_blocks=task['num_blocks'],
    dropout=0.2,
  )
  if 'bfloat16' in flags:
    net.model = _InAutocast(net.model, device.type)
  net = net.train().requires_grad_(True).to(device, memory_format=memory)
  average = copy.deepcopy(net).eval().requires_grad_(False)
  parameters = sum(p.numel() for p in net.parameters())
  if 'compile' in flags:
    net.compile()
    average.compile()
  loss_fn = ECMLoss(P_mean=-1.1, P_std=2.0, q=2, c=0.0, k=8.0, b=1.0, adj='sigmoid')
  loss_fn.update_schedule(0)
  tx = torch.optim.RAdam(net.parameters(), lr=1e-4, betas=[0.9, 0.999], eps=1e-8)
  shape = [task['batch'], 3, 32, 32]
  pool = [torch.randint(256, shape, dtype=torch.uint8) for _ in range(8)]
  batches = itertools.cycle([a.pin_memory() for a in pool] if on_gpu else pool)

  def wait():
    if on_gpu:
      torch.cuda.synchronize()

  def steps(calls):
    for _ in range(calls):
      tx.zero_grad(set_to_none=True)
      images = next(batches).to(device).to(torch.float32) / 127.5 - 1
      images = images.contiguous(memory_format=memory)
      loss_fn(net=net, images=images).mean().backward()
      for p in net.parameters():
        torch.nan_to_num_(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)
      tx.step()
      with torch.no_grad():
        for ema, online in zip(average.parameters(), net.parameters()):
          ema.lerp_(online, 1e-4)
    wait()

  def sample(calls):
    with torch.no_grad():
      for _ in range(calls):
        generator_fn(average, torch.randn(shape, device=device))
    wait()

  return {
    'versions': {'torch': torch.__version__},
    'platform': task['platform'],
    'parameters': parameters,
    'train': steps,
    'sample': sample,
  }


class _InAutocast(torch.nn.Module):
  """The network in bfloat16, with the float32 output that its caller asserts."""

  def __init__(self, inner, device_type):
    super().__init__()
    self.inner, self.device_type = inner, device_type

  def forward(self, *arguments, **keywords):
    with torch.autocast(self.device_type, dtype=torch.bfloat16):
      out = self.inner(*arguments, **keywords)
    return out.to(torch.float32)
