"""Recipes by name: whose code is imported, and whose is not."""

import json
import sys

import pytest

from metamorph_jax import recipe
from metamorph_jax.convert import load
from metamorph_jax.errors import ConfigError, FileError
from tests.hostile import harness

NAME = "evil_recipe_of_a_folder.inside"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, on Python's path, with a module that leaves a trace when imported."""
    package = tmp_path / NAME.partition(".")[0]
    package.mkdir()
    (package / "__init__.py").write_text("")
    trace = f"open({str(tmp_path / 'imported')!r}, 'w')\n"
    (package / "inside.py").write_text(trace)
    (tmp_path / "run").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(package.name)]:
        del sys.modules[name]


def saved(folder, **values):
    (folder / "run" / "config.json").write_text(json.dumps({"model": {}, **values}))
    return folder / "run"


COMMANDS = {
    "generate": ["generate", "--workdir", "run", "--prompt", "x"],
    "convert": ["convert", "--from", "workdir:run", "--out", "out"],
    "adapters": ["convert", "--from", "workdir:run", "--to", "peft", "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_s_config_imports_no_code(folder, command):
    saved(folder, recipe=NAME)
    found = harness.check(COMMANDS[command], folder, code=2, naming="run/config.json")
    assert f"add --recipe {NAME}" in found.err
    assert not (folder / "imported").exists() and NAME not in sys.modules


def test_the_user_s_own_recipe_is_imported(folder):
    saved(folder, recipe=NAME)
    words = [*COMMANDS["convert"], "--recipe", NAME]
    harness.check(words, folder, code=2, naming="is not a recipe, it lacks Config")
    assert (folder / "imported").exists()


def test_modules_that_the_user_has_named_are_found(folder):
    run = saved(folder, recipe="tests.recipes.toy")
    sys.modules.pop("tests.recipes.toy", None)
    with pytest.raises(ConfigError, match="--recipe tests.recipes.toy"):
        load.open_run(run)
    toy = recipe.find("tests.recipes.toy")
    assert load.open_run(run)[0] is toy


@pytest.mark.parametrize("name", [None, 5, [], {}, "", ".", "..", ".x", "os.path", "a\x1b[2J.b",
                                  "metamorph/../x", "x" * 10**5, "not_there"])  # fmt: skip
def test_names_that_are_none(folder, name):
    run = saved(folder, recipe=name)
    with pytest.raises(ConfigError) as caught:
        load.open_run(run)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    with pytest.raises(ConfigError):
        recipe.find(name)


BAD = {
    "list": ("[]", "holds a list, not an object"),
    "cut": ('{"recipe": "meta', "is not JSON"),
    "deep": ("[" * 10**5, "nested deeper"),
    "no recipe": ('{"model": {}}', "has no recipe"),
    "no model": ('{"recipe": "metamorph"}', "has no model"),
    "model": ('{"recipe": "metamorph", "model": 3}', "its model is not an object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_configs_of_runs_that_are_none(folder, kind):
    text, message = BAD[kind]
    run = saved(folder)
    (run / "config.json").write_text(text)
    with pytest.raises((ConfigError, FileError), match=f"run/config.json.*{message}"):
        load.open_run(run)


def test_what_a_recipe_lacks(folder):
    (folder / "evil_recipe_of_a_folder" / "needy.py").write_text("import not_installed_at_all")
    with pytest.raises(ConfigError, match="needs the module not_installed_at_all"):
        recipe.find("evil_recipe_of_a_folder.needy")
