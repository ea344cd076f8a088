"""The command-line flags; jax is not imported, so that `cmjax --help` is fast."""

import argparse
import difflib
from pathlib import Path
import platform
import re
from typing import Any

import cmjax

MODES = {  # one line each, for --help
  'train': 'train, or continue the run in --workdir',
  'sample': 'draw samples with every sampler, as pictures and .npz files',
  'edit': 'edit the images of --input: --edit=inpaint, colourise, ...',
  'evaluate': 'draw samples and compute every metric, as a table',
  'search': 'find the noise levels, or a number, of a sampler that measure best',
  'study': 'measure the weights at each sigma, as tables and plots',
  'report': 'write the page report.html of a run, or of RUN RUN ... side by side',
  'bench': 'time the training step, its parts and its data',
  'port': 'write weights as a checkpoint or a safetensors file',
  'compile': 'compile the training step for the TPUs of --topology',
  'dry_run': 'build and print everything without training',
  'configs': 'list the configs that ship with cmjax',
}
EDITS = {  # one line each, for --help
  'inpaint': 'fill the white part of --mask',
  'colourise': 'colour images, of which the grey values are kept',
  'super_resolution': 'add detail; the means of --factor x --factor pixels are kept',
  'stroke': 'a realistic image of strokes: noise of --sigma=5.38,2.24 is added',
  'denoise': 'remove noise whose standard deviation is --sigma',
  'interpolate': '--steps images from --input to --second, or between two random ones',
  'reconstruct': 'find the noise of an image, and its image again',
}
CACHE = str(Path.home() / '.cache' / 'cmjax' / platform.node())


class FlagError(Exception):
  """A mistake in the flags themselves."""


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would print its usage and exit."""

  def error(self, message: str):
    raise FlagError(message)


def parsed(argv: list[str]) -> argparse.Namespace:
  """The flags, with each `--config.KEY=VALUE` as a pair in `overrides`.

  Words that are no flags are in `runs`, with --mode=report alone.

  Raises: FlagError for an unknown flag, or a missing value or one of the wrong type.
  """
  plain, overrides = [], []
  words = iter(argv)
  for word in words:
    if word.startswith('--config.'):
      key, attached, value = word.removeprefix('--config.').partition('=')
      value = value if attached else next(words, '--')
      if not attached and value.startswith('--'):
        raise FlagError(f'--config.{key}: needs a value, as in --config.{key}=VALUE')
      overrides.append((key, value))
    else:
      plain.append(word)
  parser, names = _parser()
  flags, rest = parser.parse_known_args(plain)
  flags.runs = []
  for word in rest:
    if flags.mode == 'report' and not word.startswith('-'):
      flags.runs.append(word)
      continue
    if not word.startswith('-'):
      raise FlagError(f'unexpected {word!r}; flags look like --workdir=DIR')
    name = word.partition('=')[0]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f', did you mean {close[0]}?' if close else ''
    raise FlagError(f'unknown flag {name}{hint}')
  if flags.profile and flags.mode != 'train':
    raise FlagError('--profile goes with --mode=train')
  flags.trust = tuple(filter(None, flags.trust.split(',')))
  # Functions first, as they decide which keys a part may have.
  flags.overrides = sorted(overrides, key=lambda pair: not pair[0].endswith('.fn'))
  return flags


def _span(text: str) -> tuple[int, int]:
  """The steps of `FIRST:LAST`, from 1."""
  found = re.fullmatch(r'([1-9][0-9]{0,9}):([1-9][0-9]{0,9})', text, re.ASCII)
  first, last = map(int, found.groups()) if found else (1, 0)
  if first > last:
    raise argparse.ArgumentTypeError(f'must be FIRST:LAST, such as 100:109, not {text}')
  return first, last


def names_code(flags: argparse.Namespace) -> bool:
  """Whether the command itself names functions that may be the user's own."""
  in_file = flags.config.partition(':')[0].endswith('.py')
  by_flag = any(key.endswith('.fn') for key, _ in flags.overrides)
  return in_file or by_flag or bool(flags.trust)


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
  """The parser, and the names of its flags."""
  modes = '\n'.join(f'  {mode:10}{text}' for mode, text in MODES.items())
  edits = '\n'.join(f'  {edit:18}{text}' for edit, text in EDITS.items())
  parser = _Parser(
    prog='cmjax',
    allow_abbrev=False,
    usage='cmjax --config=NAME --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]',
    epilog=f'modes:\n{modes}\n\nedits:\n{edits}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = ['--help']

  def add(name: str, **settings: Any) -> None:
    names.append(f'--{name}')
    parser.add_argument(f'--{name}', **settings)

  def text(name: str, metavar: str, help: str) -> None:
    add(name, default='', metavar=metavar, help=help)

  def number(name: str, default: int, help: str) -> None:
    add(name, type=int, default=default, metavar='N', help=help)

  add('version', action='version', version=f'cmjax {cmjax.__version__}')
  text('config', 'NAME', 'ect:digits, FILE.py:ARGUMENT or RUN/config.json')
  text('workdir', 'DIR', 'the folder of the run, or a file of weights to sample')
  add('mode', default='train', choices=MODES, metavar='MODE', help='default: train')
  add('debug', action='store_true', help='print the full traceback of every error')
  add(
    'profile',
    type=_span,
    metavar='FIRST:LAST',
    help='with --mode=train: trace these steps for TensorBoard and Perfetto',
  )
  text('trust', 'A,B', 'packages whose functions a stored config may name')
  text('samplers', 'A,B', 'with --mode=sample or evaluate: which; all if empty')
  text('labels', '0,3,7', 'with --mode=sample and edit: one class per image, or none')
  add('edit', default='', choices=EDITS, metavar='EDIT', help='with --mode=edit')
  text('input', 'PATH', 'with --mode=edit: an image, or a folder of images')
  text('mask', 'FILE', 'with --edit=inpaint: an image, white where to generate')
  number('factor', 0, 'with --edit=super_resolution: 2, 4, 8, ...')
  text(
    'sigma', 'A,B', 'with --edit=stroke, denoise: noise levels, of pixels in [-1, 1]'
  )
  number('steps', 0, 'with --mode=edit: noise levels (default: 40) or images (10)')
  text('second', 'FILE', 'with --edit=interpolate: the last image')
  text('denoiser', 'PATH', 'of --edit=interpolate, reconstruct: a diffusion model')
  text('from', 'PATH', 'with --mode=port: a run, a checkpoint or a released file')
  text(
    'to',
    'PATH',
    'with --mode=port: a new folder, or FILE.safetensors; report: FILE.html',
  )
  text('form', 'FORM', 'kind of an OpenAI checkpoint: denoiser or consistency')
  add('distributed', action='store_true', help='join a job on a TPU pod, GKE or Slurm')
  text('coordinator', 'HOST:PORT', 'address of process 0, where it is not detected')
  number('processes', 0, 'with --coordinator: the number of processes')
  number('process', -1, 'with --coordinator: the index of this process, from 0')
  cache = f'folder of compiled programs (default: {CACHE}; empty: none)'
  add('compilation_cache', metavar='DIR', help=cache)
  text('topology', 'CHIPS', 'with --mode=compile: the TPUs, such as v5e:16x16')
  blank = 'with --mode=compile and dry_run: instead of files that must be given'
  text('blank', 'SIZE,CHANNELS,CLASSES', blank)
  number('effort', -1, 'with --mode=compile: -1 least, 0 as in a run, 1 most')
  return parser, names
