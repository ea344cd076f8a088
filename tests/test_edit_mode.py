"""--mode=edit by its command line: files in, pictures and arrays out; mistakes."""

import re
import shutil
import types

import jax
import numpy as np
from PIL import Image
import pytest

from cmjax import edit_requests, main
from cmjax.core import UserError
from cmjax.data.digits import digits
from cmjax.data.inputs import read_inputs, read_mask
from cmjax.data.source import as_uint8, as_x0, from_uint8, placeholder
from cmjax.modes import edit as edit_mode
from cmjax.networks import mlp
from cmjax.runtime import checkpoint, pretrained
from cmjax.runtime.config import read
from cmjax.runtime.config_record import ConfigDict
from tests.conftest import ROOT

NETWORK = dict(width=16, num_blocks=1, embedding=8)


def save_weights(workdir, step, config, shape, classes):
  """A checkpoint of random weights of a small network."""
  network = mlp.mlp(**NETWORK)
  inputs = [
    x and np.zeros(x.shape, x.dtype)
    for x in pretrained.example_inputs(shape, classes, 1)
  ]
  params = jax.jit(network.init)(jax.random.key(0), *inputs)
  config.network = dict(fn='cmjax.networks.mlp:mlp', **NETWORK)
  config.sample_weights = 'online'
  model = pretrained.Pretrained(
    lambda *args, key=None: args[1], params, config, step, shape, classes
  )
  checkpoint.save_weights(workdir, step, params, model.meta())


def save(path, images):
  """Files u8[H, W] or u8[H, W, 3] by name."""
  path.mkdir()
  for name, image in images.items():
    Image.fromarray(image).save(path / name)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Weights with the config of a run on digits, others without data, and images."""
  place = tmp_path_factory.mktemp('edit')
  config = read(ROOT / 'configs' / 'edm.py:digits')
  config.evaluation.batch_size = 8
  save_weights(place / 'run', 1, config, (8, 8, 1), 10)
  precond = dict(fn='cmjax.precond:consistency', sigma_data=0.5, sigma_min=0.002)
  config = ConfigDict(dict(precond=precond, objective={}))
  save_weights(place / 'colour', 5, config, (8, 8, 3), 0)

  rng = np.random.default_rng(0)
  source = digits()
  grey = as_uint8(source, as_x0(source, source.examples[:9]))[..., 0]
  save(place / 'digits', {f'd{i}.png': image for i, image in enumerate(grey)})
  colours = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
  save(place / 'colours', {'a b.png': colours[0], 'a_b.bmp': colours[1]})
  save(place / 'small', {'s.png': colours[0, :4, :4]})
  save(place / 'wide', {'w.png': np.zeros((8, 9), np.uint8)})
  white = np.zeros((8, 8), np.uint8)
  white[4:] = 255
  save(place / 'masks', {'half.png': white, 'none.png': 0 * white, 'w.png': white[:7]})
  (place / 'empty').mkdir()
  (place / 'text.png').write_text('not an image')
  return place


def command(place, words):
  return main.main(['--mode=edit', *(word.replace('@', str(place)) for word in words)])


RUN, COLOUR = ('--workdir=@/run', '--labels=0,1'), ('--workdir=@/colour',)
DIGITS, COLOURS = '--input=@/digits', '--input=@/colours'
SECOND = '--second=@/digits/d2.png'
INPAINT = ['--edit=inpaint', '--mask=@/masks/half.png']
# The command, the folder of its results, its number of images and of steps.
EDITS = {
  'inpaint': ([*RUN, *INPAINT, DIGITS, '--steps=4'], 'run', 9, 4),
  'super_resolution': (
    [*RUN, '--edit=super_resolution', '--factor=4', '--input=@/digits/d3.png'],
    *('run', 1, 40),
  ),
  'colourise': (
    [*COLOUR, '--edit=colourise', COLOURS, '--steps=3'],
    *('colour', 2, 2),  # f(x, sigma_min) is x, so that the last is left out
  ),
  'stroke': ([*RUN, '--edit=stroke', '--input=@/digits/d1.png'], 'run', 1, 2),
  'denoise': ([*COLOUR, '--edit=denoise', '--sigma=0.3', COLOURS], 'colour', 2, 0),
  'interpolate': (
    [*RUN, '--edit=interpolate', '--input=@/digits/d1.png', SECOND, '--steps=3'],
    *('run', 1, 3),
  ),
  'reconstruct': (
    [*RUN, '--edit=reconstruct', '--input=@/digits/d1.png', '--steps=64'],
    *('run', 1, 0),
  ),
}


def results_of(place, edit):
  """The folder of an edit, which is run if it has not been."""
  words, workdir, *_ = EDITS[edit]
  step = {'run': 1, 'colour': 5}[workdir]
  folder = place / workdir / 'edits' / f'{edit}_step_{step:08d}'
  if not folder.exists():
    assert command(place, words) == 0
  return folder


@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_writes_pictures_and_arrays(edit, place, capsys):
  _, workdir, num_images, num_steps = EDITS[edit]
  folder = results_of(place, edit)
  said = capsys.readouterr().out
  assert f'{folder}/all.png' in said
  names = sorted(path.name for path in folder.iterdir() if path.is_dir())
  assert len(names) == num_images
  source = placeholder((8, 8, 3), 0) if workdir == 'colour' else digits()
  for name in names:
    arrays = np.load(folder / name / 'arrays.npz')
    assert arrays['result'].shape == source.shape
    with Image.open(folder / name / 'result.png') as picture:
      expected = as_uint8(source, arrays['result'])
      np.testing.assert_array_equal(np.asarray(picture).reshape(source.shape), expected)
    with Image.open(folder / name / 'before_after.png') as picture:
      assert min(picture.size) > 100
    if num_steps:
      assert len(arrays['steps']) == num_steps
      np.testing.assert_array_equal(arrays['steps'][-1], arrays['result'])
      with Image.open(folder / name / 'steps.png') as picture:
        # Pillow writes equal frames as one.
        assert 1 < picture.n_frames <= num_steps
  if 'known' in arrays:
    assert arrays['error'] < 1e-5
    assert 'largest error of known values' in said
  elif edit == 'reconstruct':
    # Heun's method there and back on 64 points, with weights near their initial ones.
    assert arrays['error'] < 0.02
    assert arrays['error'] == np.max(np.abs(arrays['result'] - arrays['input']))


def test_values_that_are_known_stay_as_they_were(place):
  """Read from the arrays, without the code of the edits."""
  folder = results_of(place, 'inpaint')
  for i in range(9):  # more than a batch
    arrays = np.load(folder / f'd{i}' / 'arrays.npz')
    np.testing.assert_array_equal(arrays['result'][:4], arrays['input'][:4])
    assert np.std(arrays['result'][4:] - arrays['input'][4:]) > 0.01
    # The digits' own values: 17 levels, which 8 bits hold.
    source = digits()
    np.testing.assert_allclose(
      arrays['input'], as_x0(source, source.examples[i]), atol=16 / 255 * source.scale
    )
  arrays = np.load(results_of(place, 'super_resolution') / 'd3' / 'arrays.npz')
  means = [
    arrays[key].reshape(2, 4, 2, 4).mean(axis=(1, 3)) for key in ('input', 'result')
  ]
  np.testing.assert_allclose(*means, atol=1e-5)
  weights = np.array([0.2989, 0.5870, 0.1140])
  for name in ('a_b', 'a_b_2'):  # two files of the same name
    arrays = np.load(results_of(place, 'colourise') / name / 'arrays.npz')
    np.testing.assert_allclose(
      arrays['result'] @ weights, arrays['input'] @ weights, atol=1e-5
    )
    assert np.ptp(arrays['known'], axis=-1).max() == 0


def test_nothing_is_overwritten_and_random_images_need_no_input(place):
  words = [*RUN, '--edit=interpolate', '--steps=2']
  folder = place / 'run' / 'edits'
  before = {path.name for path in folder.glob('*')}
  assert command(place, words) == command(place, words) == 0
  new = sorted({path.name for path in folder.iterdir()} - before)
  assert len(new) == 2
  first, second = (np.load(folder / n / 'random' / 'arrays.npz') for n in new)
  # The same seed; two programs on eight devices, so equal up to rounding.
  np.testing.assert_allclose(first['steps'], second['steps'], atol=1e-5)


MISTAKES = {
  'no edit': ([*RUN, DIGITS], r'needs --edit=EDIT, one of inpaint, '),
  'unknown edit': ([*RUN, '--edit=paint'], r"--edit: .*'paint' .*inpaint"),
  'no input': ([*RUN, *INPAINT], r'--input: missing; --edit=inpaint needs it'),
  'no mask': ([*RUN, '--edit=inpaint', DIGITS], r'--mask: missing'),
  'no factor': ([*RUN, '--edit=super_resolution', DIGITS], r'--factor: missing'),
  'no sigma': ([*RUN, '--edit=denoise', DIGITS], r'--sigma: missing'),
  'a flag of another edit': (
    [*RUN, *INPAINT, DIGITS, '--factor=2'],
    r'--factor: --edit=inpaint does not take it',
  ),
  'one end': ([*RUN, '--edit=interpolate', DIGITS], r'give --input and --second'),
  'an end that is a folder': (
    [*RUN, '--edit=interpolate', DIGITS, '--second=@/digits'],
    r'--second: .*digits is a folder; give one image',
  ),
  'no workdir': ([*INPAINT, DIGITS], r'give --workdir'),
  'mask of another size': (
    [*RUN, '--edit=inpaint', DIGITS, '--mask=@/masks/w.png'],
    r'--mask: .*w\.png is 8x7 pixels, and the model has 8x8',
  ),
  'mask without white': (
    [*RUN, '--edit=inpaint', DIGITS, '--mask=@/masks/none.png'],
    r'--mask: .*no white pixel',
  ),
  'mask that is a folder': (
    [*RUN, '--edit=inpaint', DIGITS, '--mask=@/masks'],
    r'--mask: .*masks is a folder',
  ),
  'no such mask': (
    [*RUN, '--edit=inpaint', DIGITS, '--mask=@/m.png'],
    r'--mask: .*m\.png does not exist',
  ),
  'no such input': ([*RUN, *INPAINT, '--input=@/i.png'], r'--input: .* does not exist'),
  'no image': ([*RUN, *INPAINT, '--input=@/empty'], r'--input: no image in .*empty'),
  'text for an image': (
    [*RUN, *INPAINT, '--input=@/text.png'],
    r'--input: cannot read .*text\.png',
  ),
  'image of another size': (
    [*RUN, *INPAINT, '--input=@/wide'],
    r'--input: .*w\.png is 9x8 pixels, and the model has 8x8; resize it',
  ),
  'colours for grey': ([*RUN, *INPAINT, COLOURS], r'--input: .*coloured.*one channel'),
  'no colours': ([*RUN, '--edit=colourise', DIGITS], r'colourise: .*one channel'),
  'a factor that does not divide': (
    [*RUN, '--edit=super_resolution', DIGITS, '--factor=3'],
    r'--factor=3: factor must divide 8 and 8',
  ),
  'sigma too large': (
    [*RUN, '--edit=denoise', DIGITS, '--sigma=81'],
    r'--sigma=81: must be above 0\.002 and at most 80',
  ),
  'sigma that is not a number': (
    [*RUN, '--edit=denoise', DIGITS, '--sigma=nan'],
    r'--sigma=nan: must be above',
  ),
  'sigma in words': ([*RUN, '--edit=stroke', DIGITS, '--sigma=x'], r'must be numbers'),
  'sigmas that ascend': (
    [*RUN, '--edit=stroke', DIGITS, '--sigma=1,2'],
    r'must descend',
  ),
  'two sigmas to denoise': (
    [*RUN, '--edit=denoise', DIGITS, '--sigma=2,1'],
    r'denoise takes one',
  ),
  'one step': ([*RUN, *INPAINT, DIGITS, '--steps=1'], r'--steps=1: must be from 2'),
  'no labels': (
    [RUN[0], *INPAINT, DIGITS],
    r'--labels: missing, and the model is conditional',
  ),
  'labels of no class': ([RUN[0], *INPAINT, DIGITS, '--labels=10'], r'from 0 to 9'),
  'labels without classes': (
    [*COLOUR, '--edit=colourise', COLOURS, '--labels=1'],
    r'--labels: this model has no classes',
  ),
  'nothing to invert with': (
    [*COLOUR, '--edit=reconstruct', COLOURS],
    r'a consistency function has no ODE; give --denoiser=PATH',
  ),
  'a denoiser of other images': (
    [*COLOUR, '--edit=reconstruct', COLOURS, '--denoiser=@/run'],
    r'--denoiser: .*\(8, 8, 1\) with 10 classes',
  ),
  'no such denoiser': (
    [*COLOUR, '--edit=reconstruct', COLOURS, '--denoiser=@/none'],
    r'none',
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_computed(mistake, place, capsys):
  words, expected = MISTAKES[mistake]
  folders = [place / name / 'edits' for name in ('run', 'colour')]
  before = [sorted(folder.glob('*')) for folder in folders]
  assert command(place, words) == 2
  out, err = capsys.readouterr()
  assert err.startswith('cmjax: ')
  assert err.count('\n') == 1, err
  assert re.search(expected, err), err
  assert 'compiling' not in out
  assert [sorted(folder.glob('*')) for folder in folders] == before


# Images in, images out ---------------------------------------------------------------


@pytest.mark.parametrize('source', [digits(), placeholder((8, 8, 3), 0)], ids=str)
def test_pixels_are_the_inverse_of_what_is_written(source):
  pixels = np.arange(256, dtype=np.uint8).reshape(4, 64)
  np.testing.assert_array_equal(as_uint8(source, from_uint8(source, pixels)), pixels)
  ends = from_uint8(source, np.array([0, 255], np.uint8))
  expected = as_x0(source, np.array([source.low, source.high]))
  np.testing.assert_allclose(ends, expected, rtol=1e-6)


def test_points_have_no_pixels():
  with pytest.raises(ValueError, match='no range'):
    from_uint8(placeholder((2,), 0), np.zeros((1, 2), np.uint8))


def test_small_images_are_enlarged_for_super_resolution(place):
  names, images = read_inputs(str(place / 'small'), '--input', (8, 8, 3), 2)
  assert names == ['s']
  with Image.open(place / 'small' / 's.png') as small:
    patches = images.reshape(1, 4, 2, 4, 2, 3)
    expected = np.asarray(small)[None, :, None, :, None]
    np.testing.assert_array_equal(patches, np.broadcast_to(expected, patches.shape))


def test_a_grey_file_of_equal_colours_is_read_for_one_channel(tmp_path):
  grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
  save(tmp_path / 'in', {'.odd name!.png': np.repeat(grey[..., None], 3, 2)})
  names, images = read_inputs(str(tmp_path / 'in'), '--input', (8, 8, 1))
  assert names == ['_odd_name_']
  np.testing.assert_array_equal(images[0, ..., 0], grey)


def test_no_name_is_that_of_the_picture_of_all(place, tmp_path):
  (tmp_path / 'in').mkdir()
  shutil.copy(place / 'small' / 's.png', tmp_path / 'in' / 'all.png.png')
  names, _ = read_inputs(str(tmp_path / 'in'), '--input', (4, 4, 3))
  assert names == ['all_png']


def test_an_image_that_a_factor_does_not_enlarge_is_named_with_its_own_size(place):
  with pytest.raises(UserError, match=r's\.png is 4x4 .* has 14x14; resize it'):
    read_inputs(str(place / 'small'), '--input', (14, 14, 3), 3)


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    ({'objective': {'fn': 'cmjax.objectives.denoise:trigflow'}}, True),
    # Progressive distillation has this preconditioning too.
    ({'objective': {'fn': 'cmjax.objectives.progressive:pd'}}, False),
    ({'objective': {}}, True),  # as released files of EDM are read
    ({'objective': {}, 'precond': {'fn': 'cmjax.precond:consistency'}}, False),
  ],
)
def test_a_diffusion_model_is_known_by_its_objective_or_its_preconditioning(
  config, expected
):
  whole = {'precond': {'fn': 'cmjax.precond:edm'}} | config
  assert edit_requests.is_diffusion(ConfigDict(whole)) == expected


@pytest.mark.parametrize(
  ('precond', 'expected'),
  [
    (dict(fn='cmjax.precond:consistency', sigma_min=0.003), 0.003),
    (dict(fn='cmjax.precond:consistency'), 0.002),
    (dict(fn='cmjax.precond:edm', sigma_data=0.5), 0.0),
  ],
)
def test_noise_is_added_as_for_the_sigma_min_of_the_model(precond, expected):
  assert edit_requests._sigma_min(ConfigDict(dict(precond=precond))) == expected


@pytest.mark.parametrize(
  ('between', 'labels', 'of_images', 'at_the_end'),
  [
    (False, [3, 1, 2], [3, 1, 2, 3, 1], None),
    (True, [3, 1, 2], [3, 1, 3, 1, 3], [2] * 5),
    (True, [3], [3] * 5, [3] * 5),
  ],
)
def test_labels_are_repeated_over_images_and_the_last_is_that_of_the_end(
  between, labels, of_images, at_the_end
):
  opened = types.SimpleNamespace(
    config=ConfigDict(dict(evaluation=dict(batch_size=2))),
    mesh=types.SimpleNamespace(size=1),
  )
  x0 = np.arange(5.0, dtype=np.float32)[:, None, None, None]
  batches = edit_mode._batches(opened, x0, None, np.eye(4)[labels], between)
  whole = [
    np.concatenate(a)[:5] for a in zip(*((b.index, b.y, b.cond) for b in batches))
  ]
  np.testing.assert_array_equal(whole[0], np.arange(5))
  np.testing.assert_array_equal(whole[1], x0)
  np.testing.assert_array_equal(whole[2], np.eye(4)[of_images])
  if between:
    ends = np.concatenate([b.end_cond for b in batches])[:5]
    np.testing.assert_array_equal(ends, np.eye(4)[at_the_end])
  else:
    assert all(b.end_cond is None for b in batches)


def test_a_mask_of_grey_levels_is_cut_at_one_half(tmp_path):
  levels = np.repeat(np.array([[0, 127, 128, 255]], np.uint8), 4, 0)
  save(tmp_path / 'in', {'m.png': levels})
  known = read_mask(str(tmp_path / 'in' / 'm.png'), '--mask', (4, 4, 1))
  np.testing.assert_array_equal(known, np.repeat([[1, 1, 0, 0]], 4, 0))


def test_a_mask_is_generated_where_it_is_white(place):
  known = read_mask(str(place / 'masks' / 'half.png'), '--mask', (8, 8, 3))
  np.testing.assert_array_equal(known, np.repeat([[1.0], [0.0]], 4, 0).repeat(8, 1))
