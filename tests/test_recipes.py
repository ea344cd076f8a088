"""The list of recipes, and the table of what their compiled steps take."""

import pytest

from cmjax.configs import papers
from cmjax.runtime.config import load, shipped
from tests.test_readme import launch_script

recipes = launch_script('recipes')
FACTS = recipes.read()
each_compiled = pytest.mark.parametrize('name', FACTS)


def test_every_recipe_is_compiled_with_its_present_config():
  assert recipes.changed(FACTS) == []


@each_compiled
def test_every_compiled_step_fits(name):
  fact = FACTS[name]
  assert fact['fits'], fact['refusal']
  assert fact['memory'] <= fact['usable']
  assert fact['topology'] == papers.RECIPES[name].topology


def test_the_table_is_that_of_the_facts():
  text = recipes.README.read_text(encoding='utf-8')
  assert text == recipes.placed(text, recipes.table(FACTS))
  assert all(f'| `{name}` |' in text for name in papers.RECIPES)


def test_facts_of_another_config_are_not_in_the_table():
  name = 'ect:cifar10'
  old = FACTS | {name: FACTS[name] | {'digest': 'of another config'}}
  table = recipes.table(recipes.current(old))
  assert sorted(set(recipes.table(FACTS).split('\n')) - set(table.split('\n'))) == [
    recipes._row(name, FACTS[name])
  ]


def test_every_recipe_is_of_a_config_that_ships():
  assert {name.partition(':')[0] for name in papers.RECIPES} <= shipped().keys()


@pytest.mark.parametrize(
  ('change', 'again'),
  [
    (dict(batch_size=256), True),
    (dict(network=dict(dropout=0.5)), True),
    (dict(evaluation=dict(num_samples=3)), False),
    (dict(data=dict(flip=True)), False),
  ],
  ids=str,
)
def test_a_recipe_is_compiled_again_if_its_step_changes(change, again, monkeypatch):
  name = 'ect:cifar10'
  before = recipes.digest(name)
  monkeypatch.setattr(recipes, 'config_of', lambda name: load(name, **change))
  assert (recipes.digest(name) != before) == again


def test_a_compiled_step_is_reused_and_a_failure_named(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(recipes, 'FACTS', tmp_path / 'compiled.json')
  calls = []

  def compiled(name):
    calls.append(name)
    if name.startswith('ect'):
      raise RuntimeError('took too long')
    keys = dict(digest=recipes.digest(name), memory=2**30, fits=True, refusal='')
    return keys

  monkeypatch.setattr(recipes, 'compiled', compiled)
  names = ['cd:lsun_bedroom256', 'ect:cifar10', 'cd:lsun_cat256']
  assert recipes._compile_all(names) == ['ect:cifar10']
  assert calls == names[:2]  # the step of cats is that of bedrooms
  assert recipes.read().keys() == {'cd:lsun_bedroom256', 'cd:lsun_cat256'}
  assert set(recipes.changed(recipes.read())).isdisjoint(recipes.read())
  assert '2/3 ect:cifar10: took too long' in capsys.readouterr().out
