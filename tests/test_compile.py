"""What a compiled step takes: on eight fake CPU devices, and on TPUs by libtpu."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cmjax import core, train
from cmjax.modes import compile
from cmjax.runtime import sharding, topology
from cmjax.runtime.batches import abstract_batch, batch
from cmjax.runtime.collectives import Collective, collectives
from cmjax.runtime.config import read
from cmjax.runtime.run import prepare
from cmjax.runtime.state import abstract_state
from tests.conftest import ROOT
from tests.test_main import SMALL
from tests.test_train import small

NEEDS_LIBTPU = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'),
  reason="the TPU's compiler is not installed: pip install 'cmjax[aot]'",
)
BLANK = dict(fn='cmjax.data.blank:blank', size=8)


def size_of(tree):
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def collective(kind, size, in_loop=False):
  return Collective(kind, size, in_loop)


def named(found, kind):
  return [one for one in found if one.kind == kind]


def on_images(name, classes=0, network=None, **changes):
  """A config with blank images for its data."""
  config = read(ROOT / 'configs' / name)
  config.network.update(network or {})
  with config.unlocked():
    for key, value in (changes | dict(data=BLANK | dict(classes=classes))).items():
      config[key] = value
  return config


@pytest.fixture(scope='module')
def unet():
  """ECT of a small DDPM++, data parallel."""
  small = dict(channels=16, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,))
  config = on_images('ect.py:cifar10', network=small, batch_size=16)
  return prepare(config, sharding.data_mesh())


# Collectives -----------------------------------------------------------------------


def test_data_parallel_exchanges_the_gradient_once_and_little_else(unet):
  report = compile.compile_step(unet)
  parameters = size_of(unet.abstract_params())
  reduced = sum(one.bytes for one in named(report.collectives, 'all-reduce'))
  assert parameters <= reduced <= 1.05 * parameters
  others = [one for one in report.collectives if one.kind != 'all-reduce']
  assert sum(one.bytes for one in others) <= 1024  # where t lies in the batch
  assert not any(one.in_loop for one in report.collectives)


def mean_removed(x):
  return x - jnp.mean(x, keepdims=True)


@pytest.mark.parametrize('in_loop', [False, True])
def test_a_collective_in_a_loop_is_marked(in_loop):
  def repeated(x):
    return jax.lax.fori_loop(0, 3, lambda _, x: mean_removed(x), x)

  place = sharding.by_example(sharding.data_mesh())
  x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=place)
  program = jax.jit(repeated if in_loop else mean_removed, out_shardings=place)
  found = collectives(program.lower(x).compile().as_text())
  assert found == [collective('all-reduce', 4, in_loop)]


def test_an_all_gather_counts_what_a_chip_gets():
  mesh = sharding.data_mesh()
  x = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=sharding.by_example(mesh))
  program = jax.jit(lambda x: x + 1, out_shardings=sharding.replicated(mesh))
  found = collectives(program.lower(x).compile().as_text())
  assert found == [collective('all-gather', 16 * 3 * 4)]


TPU_TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner (p.9: bf16[4,8]) -> bf16[4,8] {
  %p.9 = bf16[4,8]{1,0:T(4,128)(2,1)} parameter(0)
  ROOT %collective-permute.1 = bf16[4,8]{1,0} collective-permute(%p.9), channel_id=9
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(4,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0:T(4,128)(2,1)} get-tuple-element(%p), index=1
  %fusion = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%inner
  ROOT %out = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %fusion)
}

%condition (p.2: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[]{:T(512)} compare(%i.2, %n), direction=LT
}

ENTRY %main (w: f32[2,8], g: f32[3], h: pred[5]) -> f32[] {
  %w = f32[2,8]{1,0:T(2,128)} parameter(0), sharding={devices=[4]<=[4]}
  %g = f32[3]{0:T(128)} parameter(1)
  %h = pred[5]{0:T(512)} parameter(2)
  %all-gather-start.1 = (f32[2,8]{1,0:T(2,128)}, f32[8,8]{1,0:T(8,128)}) all-gather-start(%w), channel_id=1, dimensions={0}
  %all-gather-done.1 = f32[8,8]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  %all-reduce.1 = (f32[3]{0:T(128)}, /*index=1*/pred[5]{0}) all-reduce(%g, /*index=1*/%h), to_apply=%add
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %start = (f32[8,8], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%all-gather-done.1)
  %done = f32[8,8] collective-permute-done(%start)
}
"""  # noqa: E501


def test_a_tpu_program_is_read_with_its_layouts_starts_and_calls():
  assert collectives(TPU_TEXT) == [
    collective('collective-permute', 64, in_loop=True),
    collective('all-gather', 256),
    collective('all-reduce', 17),
    collective('collective-permute', 256),
  ]


@pytest.mark.parametrize('effort', [-1, 0, 1])
def test_every_effort_is_one_that_this_jax_takes(effort, one_device):
  run = prepare(small(network__width=16, network__num_blocks=1), one_device)
  assert compile.compile_step(run, effort).memory.total > 0


# Memory and places -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'classes'), [('ect.py:cifar10', 0), ('ect.py:imagenet64', 1000)]
)
def test_fully_sharded_each_device_holds_an_eighth_of_the_state(name, classes):
  mesh = dict(fn='cmjax.runtime.sharding:mesh', fsdp=True)
  config = on_images(name, classes, dict(num_blocks=1), batch_size=8, mesh=mesh)
  run = prepare(config)
  state = abstract_state(run)
  for part in (state.params, state.ema, state.opt_state):
    assert sharding.bytes_held(part) <= size_of(part) * (1 / 8 + 0.02)
  whole = prepare(config, sharding.data_mesh())
  params = abstract_state(whole).params
  assert sharding.bytes_held(params) == size_of(params)


def test_without_attached_devices_everything_frozen_is_abstract(tmp_path, monkeypatch):
  teacher = prepare(small('edm.py:digits', total_images=32))
  train.train(teacher, tmp_path, {})
  monkeypatch.setattr(sharding, 'attached', lambda mesh: False)
  run = prepare(small('cd.py:digits', teacher=str(tmp_path)))
  leaves = jax.tree.leaves(run.frozen)
  assert leaves
  assert all(isinstance(a, jax.ShapeDtypeStruct) for a in leaves)
  report = compile.compile_step(run)
  assert report.held['frozen networks and data'] == sharding.bytes_held(run.frozen) > 0
  # All but the index of each example, which this objective does not read.
  held = sum(report.held.values()) - 32 // 8 * 4
  assert held <= report.memory.arguments <= held + 64
  assert report.memory.total >= report.memory.arguments + report.memory.temporaries


def test_an_abstract_batch_has_the_shapes_of_the_real_one(unet):
  real, abstract = batch(unet, 0), abstract_batch(unet)
  for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract)):
    assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


# Mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e', 'v5e:', 'v5e-16', '0*v5e:2x2', ''])
def test_an_unknown_topology_names_the_known_chips(name):
  with pytest.raises(core.UserError, match=r'like v5e:16x16.* v4, v5e, v5p, v6e'):
    topology.devices(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
  with pytest.raises(core.UserError, match=r"pip install 'cmjax\[aot\]'"):
    topology.devices('v5e:2x2')


# TPUs ------------------------------------------------------------------------------

TINY = dict(network__width=64, network__num_blocks=1, batch_size=8)


@pytest.fixture
def on_tpus():
  """A small run, prepared for a topology."""

  def prepared(chips, name='edm.py:digits', **changes):
    mesh = sharding.data_mesh(topology.devices(chips))
    return prepare(small(name, **TINY | changes), mesh)

  return prepared


@NEEDS_LIBTPU
@pytest.mark.parametrize(
  ('name', 'chips'),
  [('v5e:1x1', 1), ('v4:2x2x1', 4), ('v5p:2x2x1', 4), ('v6e:2x2', 4), ('2*v5e:2x2', 8)],
)
def test_a_topology_has_as_many_devices_as_chips(name, chips):
  assert len(topology.devices(name)) == chips


@NEEDS_LIBTPU
def test_a_step_compiles_for_a_tpu_that_is_not_attached(on_tpus):
  run = on_tpus('v5e:2x2')
  assert not sharding.attached(run.mesh)
  report = compile.compile_step(run)
  result = compile.facts(run, 'v5e:2x2', -1, report)
  assert result['fits']
  assert result['chips'] == 4
  reduced = sum(one.bytes for one in named(report.collectives, 'all-reduce'))
  parameters = size_of(run.abstract_params())
  assert parameters <= reduced <= 1.05 * parameters
  text = compile.page(json.loads(json.dumps(result)))
  assert '| temporaries |' in text
  assert '| all-reduce | no |' in text


@NEEDS_LIBTPU
def test_a_step_that_does_not_fit_is_reported(on_tpus):
  run = on_tpus('v5e:1x1', network__width=2**15)  # 34 GB of state
  result = compile.facts(run, 'v5e:1x1', -1, compile.compile_step(run))
  assert not result['fits']
  assert 'DOES NOT FIT: RESOURCE_EXHAUSTED' in compile.page(result)
  without_reason = compile.page(result | {'refusal': ''})
  assert 'DOES NOT FIT: it needs more memory than is available' in without_reason


@NEEDS_LIBTPU
def test_slices_are_the_first_axis_of_a_mesh():
  mesh = sharding.mesh(fsdp=True, num_slices=2, devices=topology.devices('2*v5e:2x2'))
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4}
  rows = [{device.slice_index for device in row} for row in mesh.devices]
  assert rows == [{0}, {1}]


@NEEDS_LIBTPU
def test_the_command_writes_markdown_and_json_and_overwrites_nothing(
  tmp_path, tmp_path_factory
):
  # In a process of its own, without the settings that tests give jax.
  command = [*SMALL, '--mode=compile', '--topology=v5e:2x2', '--blank=8,1,10']
  start = [sys.executable, '-m', 'cmjax.main', f'--workdir={tmp_path}']
  cache = tmp_path_factory.mktemp('cache')
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  for _ in range(2):
    done = subprocess.run(
      [*start, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert '| temporaries |' in done.stdout
  assert not list(cache.glob('jit_train_step*'))  # which would not be read
  names = sorted(path.name for path in tmp_path.iterdir())
  stems = 'compile_v5e_2x2', 'compile_v5e_2x2_2'
  assert names == [f'{stem}.{kind}' for stem in stems for kind in ('json', 'md')]
  result = json.loads((tmp_path / names[0]).read_text(encoding='utf-8'))
  assert result['data'] == 'blank images'
  assert result['fits']
