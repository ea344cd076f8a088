"""Settings of networks, which may come from an untrusted file, are checked first."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.networks import adapter, adm, edm2, mlp, songunet

UNETS = [songunet.songunet, adm.adm, edm2.edm2]
BUILDERS = [mlp.mlp, *UNETS]
WHOLE = {
  'num_blocks': BUILDERS,
  'num_times': BUILDERS,
  'width': [mlp.mlp],
  'embedding': [mlp.mlp],
  'channels': UNETS,
  'head_channels': [adm.adm, edm2.edm2],
  'dropout_resolution': [adm.adm, edm2.edm2],
  'augment': [songunet.songunet],
}
REAL = {
  'dropout': BUILDERS,
  'noise_scale': BUILDERS,
  'balance': [edm2.edm2],
  'clip': [edm2.edm2],
}
WHOLES = {
  'channel_mult': UNETS,
  'attention_resolutions': UNETS,
  'taps': [songunet.songunet],
}
WORDS = {
  'dtype': BUILDERS,
  'attention_implementation': UNETS,
  'embedding': [songunet.songunet],
}
BOOLS = {
  'log_weight': BUILDERS,
  'remat': UNETS,
  'film': [adm.adm],
  'residual_input': [songunet.songunet],
}
LONG = 'x' * 10**5
NOT_WHOLE = None, '4', 4.0, [4], (4,), True, -1, 10**8, 10**12, np.nan, LONG
NOT_REAL = None, '0.1', [0.1], True, np.nan, np.inf, -np.inf, 1e300, 10**400, LONG
NOT_WHOLES = (
  None, '12', 4, {}, (1,) * 10**6, [1] * 100, ('1',), (1.5,), (np.nan,), (True,), (-1,),
  (10**12,), (None,), ((1,),), LONG,
)  # fmt: skip
NOT_WORDS = None, 'other', '', 1, ('float32',), ['exact'], {}, LONG
NOT_BOOLS = None, 'true', 1, 0.0, (True,), LONG


def cases():
  for table, values in [
    (WHOLE, NOT_WHOLE),
    (REAL, NOT_REAL),
    (WHOLES, NOT_WHOLES),
    (WORDS, NOT_WORDS),
    (BOOLS, NOT_BOOLS),
  ]:
    for name, builders in table.items():
      yield from ((build, name, values) for build in builders)


@pytest.mark.parametrize(('build', 'name', 'values'), list(cases()))
def test_an_invalid_setting_is_named_in_one_line(build, name, values):
  for value in values:
    began = time.process_time()
    with pytest.raises(ValueError, match=f'^{name} must be ') as caught:
      build(**{name: value})
    assert time.process_time() - began < 1
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_every_setting_is_checked():
  checked = {
    build: {
      name for table in (WHOLE, REAL, WHOLES, WORDS, BOOLS) for name in table
      if build in table[name]
    }
    for build in BUILDERS
  }  # fmt: skip
  for build in BUILDERS:
    assert set(build.__kwdefaults__) == checked[build], build.__name__


def test_equivalent_settings_of_other_types():
  songunet.songunet(channels=np.int64(8), channel_mult=[1, 2], dropout=np.float32(0.1))
  edm2.edm2(clip=256, balance=np.float64(0.5), attention_resolutions=[], noise_scale=1)


@pytest.mark.parametrize('build', UNETS)
def test_the_total_number_of_blocks_is_bounded(build):
  with pytest.raises(ValueError, match=r'num_blocks.* 16 levels'):
    build(num_blocks=adapter.MAX_BLOCKS // 8, channel_mult=(1,) * 16)


@pytest.mark.parametrize('setting', [dict(balance=0), dict(clip=0)])
def test_edm2_needs_positive_numbers(setting):
  with pytest.raises(ValueError, match='balance and clip'):
    edm2.edm2(**setting)


def test_the_filter_of_songunet_does_not_divide_by_zero():
  with pytest.raises(ValueError, match=r'taps .*not all 0'):
    songunet.songunet(taps=(0, 0))


def test_the_largest_network_has_its_shapes_in_seconds():
  net = songunet.songunet(
    channels=2**16,
    channel_mult=(1,),
    num_blocks=adapter.MAX_BLOCKS // 4,
    attention_resolutions=(32,),
  )
  struct = jax.ShapeDtypeStruct
  began = time.process_time()
  inputs = struct((1, 32, 32, 3), jnp.float32), struct((1,), jnp.float32), None
  jax.eval_shape(net.init, jax.random.key(0), *inputs)
  # A quarter of the most blocks took 2 s: no bound lets a config stall for minutes.
  assert time.process_time() - began < 20
