"""Released checkpoints of every family load, with the numbers of their own code."""

from collections import OrderedDict
import json

import jax
import numpy as np
import pytest

from cmjax.core import UserError
from cmjax.networks import mlp
from cmjax.runtime import build, pretrained
from cmjax.runtime.config_record import ConfigDict
from tests import foreign, recipe
from tests.conftest import ROOT

PICKLES = ('ddpmpp', 'ncsnpp', 'adm', 'ecm', 'edm2')
TORCH = ('cd_imagenet', 'edm_lsun')
MSGPACK = ('ct_ve', 'cd_vp')


def golden(family):
  """What the family's own code gave; names, shapes and arguments of its tensors."""
  found = dict(np.load(ROOT / 'tests' / 'golden' / f'{family}.npz'))
  return found | {key: json.loads(str(found[key])) for key in ('names', 'arguments')}


def tensors_of(family):
  """The family's tensors by the recipe, in the file's own dtype."""
  tensors = {n: recipe.weights(n, s) for n, s in golden(family)['names'].items()}
  dtype = np.float16 if family == 'edm2' else np.float32
  return {name: np.asarray(a, dtype) for name, a in tensors.items()}


def nested(tensors, separator):
  tree = {}
  for name, array in tensors.items():
    *folders, leaf = name.split(separator)
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[leaf] = array
  return tree


def module(tree, class_name='Linear', **more):
  """A pickled module of pickled modules, as torch_utils.persistence writes them."""
  buffers = ('freqs', 'phases', 'resample_filter')
  arrays = {k: v for k, v in tree.items() if not isinstance(v, dict)}
  state = foreign.module_state(
    {k: v for k, v in arrays.items() if k not in buffers},
    {k: v for k, v in arrays.items() if k in buffers},
    OrderedDict((k, module(v)) for k, v in tree.items() if isinstance(v, dict)),
    **more,
  )
  return foreign.persistent(class_name, state)


def pickled(tensors, class_name, arguments):
  extra = dict(_init_args=(), _init_kwargs=arguments)
  ema = module(nested(tensors, '.'), class_name, **extra)
  return foreign.dumps(dict(ema=ema, loss_fn=None, dataset_kwargs={}))


def write(folder, family, tensors=None, name='', **arguments):
  """A file of the family in its own format."""
  tensors = tensors_of(family) if tensors is None else tensors
  facts = golden(family)
  if family in PICKLES:
    path = folder / (name or f'{family}.pkl')
    constructor = facts['arguments'] | arguments
    path.write_bytes(pickled(tensors, str(facts['class_name']), constructor))
  elif family in TORCH:
    path = folder / (name or f'{family}.pt')
    path.write_bytes(foreign.torch_zip(tensors))
  else:
    path = folder / (name or f'{family}_checkpoint_80')
    state = dict(step=80, params_ema=nested(tensors, '/'), rng_state={})
    path.write_bytes(foreign.flax(state))
  return path


def outputs(model, family):
  x, sigma, _, cond = recipe.inputs(
    int(golden(family)['size']), 3, int(golden(family)['classes'])
  )
  return np.asarray(jax.jit(model.f)(model.params, x, sigma, cond))


def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope='module', params=[*PICKLES, *TORCH, *MSGPACK])
def opened(request, tmp_path_factory, one_device):
  path = write(tmp_path_factory.mktemp('released'), request.param)
  messages = []
  model = pretrained.load(path, mesh=one_device, say=messages.append)
  return request.param, path, model, messages


def test_a_released_checkpoint_gives_the_numbers_of_its_own_code(opened):
  family, _, model, messages = opened
  facts = golden(family)
  # Float32 in another order of operations: measured 1e-7 to 1e-6.
  assert relative(outputs(model, family), facts['output']) < 1e-5
  size = int(facts['size'])
  assert model.shape == (size, size, 3)
  assert model.classes == facts['classes']
  assert model.unread == ()
  assert messages == []


def test_a_released_checkpoint_is_recognised(opened):
  family, _, model, _ = opened
  of = {
    'ddpmpp': ('NVlabs/edm', 'edm'),
    'ncsnpp': ('NVlabs/edm', 'edm'),
    'adm': ('NVlabs/edm', 'edm'),
    'ecm': ('locuslab/ect', 'consistency'),
    'edm2': ('NVlabs/edm2', 'edm'),
    'cd_imagenet': ('openai/consistency_models', 'consistency'),
    'edm_lsun': ('openai/consistency_models', 'edm'),
    'ct_ve': ('openai/consistency_models_cifar10', 'consistency'),
    'cd_vp': ('openai/consistency_models_cifar10', 'consistency'),
  }
  origin, form = of[family]
  assert model.origin == origin
  assert model.config.precond.fn == f'cmjax.precond:{form}'
  assert (model.sigma_range, model.data_range) == ((0.002, 80.0), (-1.0, 1.0))
  boundary = {'ecm': 0.003}.get(family, 0.002)
  if form == 'consistency':
    assert model.config.precond.sigma_min == boundary


@pytest.mark.parametrize('family', ['ddpmpp', 'edm2'])
def test_a_checkpoint_goes_to_ours_and_to_safetensors_and_back_bit_for_bit(
  family, tmp_path, one_device
):
  path = write(tmp_path, family)
  model = pretrained.load(path, mesh=one_device)
  quiet = dict(say=lambda text: None)
  pretrained.convert(path, tmp_path / 'a', **quiet)
  pretrained.convert(tmp_path / 'a', tmp_path / 'b.safetensors', **quiet)
  pretrained.convert(tmp_path / 'b.safetensors', tmp_path / 'c', **quiet)
  for place in ('a', 'b.safetensors', 'c'):
    again = pretrained.load(tmp_path / place, mesh=one_device)
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params)):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)
    assert again.config == model.config
    assert again[3:] == model[3:]  # step, shape, classes, origin, unread, levels


def test_edm2_brings_its_uncertainty(tmp_path, one_device):
  model = pretrained.load(write(tmp_path, 'edm2'), mesh=one_device)
  network = build.build(model.config.network, 'network')
  sigma = recipe.inputs(16, 3, 5)[1]
  u = -network.log_weight(model.params, np.log(sigma) / 4)
  np.testing.assert_allclose(u, golden('edm2')['log_variance'], rtol=1e-5)


def test_edm2_tuned_by_ect_has_no_uncertainty(tmp_path, one_device):
  tensors = {n: a for n, a in tensors_of('edm2').items() if 'logvar' not in n}
  path = write(tmp_path, 'edm2', tensors, dropout_res=16)
  model = pretrained.load(path, mesh=one_device)
  assert 'log_weight' not in model.params
  assert relative(outputs(model, 'edm2'), golden('edm2')['output']) < 1e-5


def test_a_duplicate_name_is_refused(tmp_path):
  path = tmp_path / 'cd-l2'
  twice = {'a': {'b': np.ones(2)}, 'a/b': np.ones(2)}
  path.write_bytes(foreign.flax(dict(params_ema=twice)))
  with pytest.raises(UserError, match='duplicate'):
    pretrained.load(path)


def test_augmentation_is_an_input(tmp_path, one_device):
  model = pretrained.load(write(tmp_path, 'ddpmpp'), mesh=one_device)
  assert model.params['map_augment']['kernel'].shape == (9, 16)
  x, sigma, _, cond = recipe.inputs(16, 3, 5)
  plain = model.f(model.params, x, sigma, cond)
  augmented = [np.concatenate([cond, np.full((2, 9), v, 'f4')], axis=1) for v in (0, 1)]
  np.testing.assert_array_equal(model.f(model.params, x, sigma, augmented[0]), plain)
  assert relative(model.f(model.params, x, sigma, augmented[1]), plain) > 1e-3
  with pytest.raises(ValueError, match='5 columns of labels, and may have 9 more'):
    model.f(model.params, x, sigma, augmented[0][:, :8])


@pytest.mark.parametrize(
  ('family', 'conv'),
  [
    ('ddpmpp', 'model.enc.16x16_block0.conv0.weight'),
    ('edm2', 'unet.enc.16x16_block0.conv_res0.weight'),
    ('edm_lsun', 'input_blocks.1.0.in_layers.2.weight'),
    ('ct_ve', 'ResnetBlockBigGANpp_0/Conv_0/kernel'),
  ],
)
def test_a_missing_a_foreign_and_a_reshaped_tensor_are_named(family, conv, tmp_path):
  tensors = tensors_of(family)
  without = {name: a for name, a in tensors.items() if name != conv}
  with pytest.raises(UserError, match='has no ') as error:
    pretrained.load(write(tmp_path, family, without))
  assert conv in str(error.value)
  other = tensors | {conv: tensors[conv][:, :, :1, :1].copy()}
  with pytest.raises(UserError, match=r'has shape .* of another network') as error:
    pretrained.load(write(tmp_path, family, other))
  assert conv in str(error.value)
  stray = f'{conv}_copy'
  messages = []
  more = tensors | {stray: tensors[conv]}
  model = pretrained.load(write(tmp_path, family, more), say=messages.append)
  assert model.unread == (stray,)
  assert len(messages) == 1
  assert stray in messages[0]
  broken = tensors | {conv: np.full_like(tensors[conv], np.nan)}
  with pytest.raises(UserError, match='not finite') as error:
    pretrained.load(write(tmp_path, family, broken))
  assert conv in str(error.value)


def test_released_tensors_that_a_student_does_not_use_are_reported(
  tmp_path, one_device
):
  path = write(tmp_path, 'ddpmpp')
  model = pretrained.load(path, mesh=one_device)
  part = model.config.network.to_dict() | dict(augment=0, log_weight=True)
  network = build.build(ConfigDict(part), 'network')
  like = pretrained.abstract_params(network, (16, 16, 3), 5, one_device)
  messages = []
  params, config = pretrained.load_weights(path, like, messages.append)
  assert messages == [f"{path}: tensors that are not used: 'model.map_augment.weight'"]
  assert (config.network, config.precond) == (
    model.config.network,
    model.config.precond,
  )
  assert not np.any(params.pop('log_weight'))
  expected = {k: v for k, v in model.params.items() if k != 'map_augment'}
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(a, b)


def test_a_name_without_the_form_is_refused(tmp_path, one_device):
  path = write(tmp_path, 'cd_imagenet', name='model.pt')
  with pytest.raises(UserError, match='denoiser or a consistency function'):
    pretrained.load(path, mesh=one_device)
  model = pretrained.load(path, form='consistency', mesh=one_device)
  expected = golden('cd_imagenet')['output']
  assert relative(outputs(model, 'cd_imagenet'), expected) < 1e-5
  denoiser = pretrained.load(path, form='denoiser', mesh=one_device)
  assert denoiser.config.precond.fn == 'cmjax.precond:edm'
  with pytest.raises(UserError, match=r"form must be one of .*; got 'flow'"):
    pretrained.load(path, form='flow')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(encoder_type='skip'), "encoder_type='skip', which is not supported"),
    (dict(decoder_type='skip'), "decoder_type='skip', which is not supported"),
    (
      dict(model_type='Transformer'),
      "model_type='Transformer', which is not supported",
    ),
    (dict(channel_mult_emb=2), 'channel_mult_emb=2, which is not supported'),
    (dict(sparkle=3), 'sparkle=3, which is not supported'),
    (dict(sparkle='a' * 10**5), "sparkle='a{30,50}....*, which is not supported"),
    (dict(model_channels='16'), "model_channels='16', which is not supported"),
    (dict(channel_mult=[1, 2.5]), r'channel_mult=\(1, 2.5\), which is not supported'),
    (dict(sigma_data=float('nan')), 'sigma_data=nan, which is not supported'),
    (dict(img_resolution=10**9), 'the shape must be 1 or 3 whole numbers'),
    (dict(label_dim=-1), 'the number of classes must be in'),
    (dict(num_blocks=10**8), 'num_blocks must be a whole number in'),
  ],
)
def test_an_unsupported_network_is_named(arguments, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    pretrained.load(write(tmp_path, 'ddpmpp', **arguments))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('shape', [(), (7,), (7, 2), (2, 7, 1, 1, 1)])
@pytest.mark.parametrize(
  ('family', 'qkv'),
  [
    ('ddpmpp', 'model.enc.8x8_block0.qkv.weight'),
    ('cd_imagenet', 'middle_block.1.qkv.weight'),
    ('ct_ve', 'AttnBlockpp_0/NIN_0/W'),
  ],
)
def test_attention_of_another_layout_is_named(family, qkv, shape, tmp_path):
  tensors = tensors_of(family)
  assert qkv in tensors
  odd = np.zeros(shape, np.float32)
  with pytest.raises(UserError, match=r'another network|differs in shape') as error:
    pretrained.load(write(tmp_path, family, tensors | {qkv: odd}))
  assert '\n' not in str(error.value)


def test_a_student_of_another_network_is_refused(tmp_path, one_device):
  path = write(tmp_path, 'cd_imagenet')
  student = mlp.mlp(width=8, num_blocks=1, embedding=8)
  like = pretrained.abstract_params(student, (8, 8, 3), 0, one_device)
  with pytest.raises(UserError, match=r'has no parameter .*another network'):
    pretrained.load_weights(path, like)


def test_other_files_are_refused_with_their_contents(tmp_path):
  path = tmp_path / 'cd.pt'
  path.write_bytes(foreign.torch_zip({'weight': np.zeros(2, np.float32)}))
  with pytest.raises(UserError, match=r"not a checkpoint of EDM.*it contains 'weight'"):
    pretrained.load(path)
  baseline = pickled(tensors_of('ddpmpp'), 'VPPrecond', {})
  path.write_bytes(baseline)
  with pytest.raises(UserError, match='contains a VPPrecond; supported are EDMPrecond'):
    pretrained.load(path)
