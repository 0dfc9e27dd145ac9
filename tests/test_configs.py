"""Every config of every size builds, and its model has the shapes it should."""

import importlib.util
import pathlib

import jax
import pytest
from flax import nnx

from metamorph_jax import config as configs
from metamorph_jax import sharding
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import find
from metamorph_jax.train import optim, state
from metamorph_jax.train.config import TrainConfig

ROOT = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(ROOT.glob("*/*.py"))


def sizes(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SIZES


# decoder.py:1b is 8b (tested below) and takes ten seconds.
CASES = [(f, s) for f in FILES for s in sizes(f) if (f.stem, s) != ("decoder", "1b")]


def load(file, size):
    table = configs.load_config(f"{file}:{size}").to_dict()
    return configs.build(TrainConfig, table)


def test_there_are_three_stages():
    assert {f.stem for f in FILES if f.parent.name == "metamorph"} >= {
        "connector", "vpit", "decoder"
    }  # fmt: skip


def test_decoders_are_the_same_for_all_language_models():
    (file,) = [f for f in FILES if f.stem == "decoder"]
    one, other = (configs.load_config(f"{file}:{size}").to_dict() for size in ("1b", "8b"))
    assert one == other


@pytest.mark.parametrize("name", ["metamorf", "benchmarks.none", "no_such_package.recipe"])
def test_an_unknown_recipe_is_named(name):
    with pytest.raises(ConfigError, match=name):
        find(name)


@pytest.mark.parametrize(("file", "size"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_config_builds(file, size):
    cfg = load(file, size)
    recipe = find(cfg.recipe)
    model_cfg = configs.build(recipe.Config, cfg.model, "config.model")
    data = configs.build(recipe.Data, cfg.data, "config.data")
    assert recipe.batch_spec(data, model_cfg, 2).counted
    optim.make_schedule(cfg.optim, cfg.batch_size, cfg.steps)

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = nnx.eval_shape(lambda: recipe.create(model_cfg, nnx.Rngs(0)))
    parts, trained, frozen = state.split(model, recipe.STAGES[cfg.stage](model_cfg), mesh)
    optim.check_multipliers(cfg.optim, set(parts.part_of.values()))
    count = {True: 0, False: 0}
    for name, x in (trained | frozen).items():
        count[name in trained] += x.size
    found = (round(count[True] / 1e6, 1), round(count[False] / 1e6, 1))
    assert found == MILLIONS[file.stem, size]


# (stage, size) -> millions of parameters that are trained, and that are not
MILLIONS = {
    ("connector", "smoke"): (0.0, 3.3),
    ("connector", "quickstart"): (0.6, 151.3),
    ("connector", "1b"): (6.6, 1655.4),
    ("connector", "8b"): (21.5, 8464.8),
    ("connector", "70b"): (76.6, 71043.3),
    ("decoder", "smoke"): (0.3, 0.0),
    ("decoder", "quickstart"): (3.3, 0.0),
    ("decoder", "1b"): (863.5, 496.6),
    ("decoder", "8b"): (863.5, 496.6),
    ("vpit", "smoke"): (3.2, 0.0),
    ("vpit", "quickstart"): (107.3, 44.5),
    ("vpit", "1b"): (1248.9, 413.0),
    ("vpit", "8b"): (8073.3, 413.0),
    ("vpit", "70b"): (70706.9, 413.0),
}


def test_doc_strings_say_how():
    for file in FILES:
        text = file.read_text()
        where = file.relative_to(ROOT.parent)
        assert f"metamorph train --config={where}:SIZE --workdir=" in text, where
        for size in sizes(file):
            assert size in text.split('"""')[1]


@pytest.mark.parametrize(("file", "size"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_sweeps(file, size, tmp_path):
    """Every run of every sweep would start."""
    from metamorph_jax.sweep.command import plan

    if not hasattr(configs.load_module(file), "sweep"):
        assert file.stem != "vpit", "the one that others are modelled on"
        return
    runs = plan(f"{file}:{size}", {}, tmp_path)
    assert len(runs) > 1 and len({r.folder for r in runs}) == len(runs)


def test_unknown_size():
    with pytest.raises(ValueError, match="size '9b' is none of smoke, quickstart, 1b, 8b"):
        configs.load_config(f"{FILES[0]}:9b")
