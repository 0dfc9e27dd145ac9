"""Every config of every size builds, has the shapes it should, and can be changed everywhere."""

import ast
import dataclasses
import pathlib
import re
import shlex
import typing

import jax
import pytest
from flax import nnx

from metamorph_jax import cli, options, sharding
from metamorph_jax import config as configs
from metamorph_jax.data.config import DataConfig
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.recipe import find
from metamorph_jax.train import optim, state
from metamorph_jax.train.config import resolve
from metamorph_jax.train.show_config import show

ROOT = pathlib.Path(__file__).parents[1] / "configs"
MODULES = {file: configs.load_module(file) for file in sorted(ROOT.glob("*/*.py"))}
FILES = [file for file, module in MODULES.items() if "get_config" in vars(module)]
# These are decoder.py:8b (tested below), which takes ten seconds.
_SAME = [("decoder", size) for size in ("1b", "qwen3-1.7b", "qwen3-8b")]
CASES = [(f, s) for f in FILES for s in MODULES[f].SIZES if (f.stem, s) not in _SAME]
# Their large models are those of `sft` (tested below).
_TUNED = ("caption", "vqa", "grounding", "segment_to_image", "dialogue")
BUILT = [(f, s) for f, s in CASES if f.stem not in _TUNED or s == "smoke"]


def named_by(file) -> str:
    """A config's name, with its folder where other folders have one of that name."""
    alone = sum(f.stem == file.stem for f in FILES) == 1
    return file.stem if alone else f"{file.parent.name}/{file.stem}"


def named(cases):
    return dict(argvalues=cases, ids=[f"{named_by(file)}-{size}" for file, size in cases])


def test_there_are_three_stages():
    assert {f.stem for f in FILES if f.parent.name == "metamorph"} >= {
        "connector", "vpit", "decoder"
    }  # fmt: skip


def test_decoders_are_the_same_for_all_language_models():
    """With SigLIP 2, which has the shapes of SigLIP, they are as well, but for its weights."""
    (file,) = [f for f in FILES if f.stem == "decoder"]
    sizes = ("1b", "8b", "qwen3-1.7b", "qwen3-8b")
    one, same, *newer = (configs.load_config(f"{file}:{size}").to_dict() for size in sizes)
    assert one == same and newer[0] == newer[1]
    assert newer[0]["model"]["vision"].pop("weights") == "hf:google/siglip2-so400m-patch14-384"
    assert one["model"]["vision"].pop("weights") == "hf:google/siglip-so400m-patch14-384"
    assert one == newer[0]


def test_fine_tuning_has_the_models_of_instruction_tuning():
    """All but the number of drawings in a row."""
    (sft,) = [f for f in FILES if f.stem == "sft"]
    for file, size in set(CASES) - set(BUILT):
        one, other = (resolve(configs.load_config(f"{f}:{size}")) for f in (file, sft))
        reads = not one.model.max_drawings
        assert reads == (file.stem != "segment_to_image") and reads != ("decoder" in one.pattern)
        assert reads or one.pattern == other.pattern
        models = (dataclasses.replace(run.model, max_drawings=1) for run in (one, other))
        assert next(models) == next(models)
        assert one.recipe.batch_spec(one.data, one.model, 2).counted


@pytest.mark.parametrize("name", ["metamorf", "benchmarks.none", "no_such_package.recipe"])
def test_an_unknown_recipe_is_named(name):
    with pytest.raises(ConfigError, match=name):
        find(name)


@pytest.mark.parametrize(("file", "size"), **named(BUILT))
def test_config_builds(file, size):
    run = resolve(configs.load_config(f"{file}:{size}"))
    recipe, model_cfg = run.recipe, run.model
    assert recipe.batch_spec(run.data, model_cfg, 2).counted

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = nnx.eval_shape(lambda: recipe.create(model_cfg, build.rngs(0)))
    _, trained, frozen = state.split(model, run.pattern, mesh)
    optimizer = optim.build(run.cfg.optim, trained, run.cfg.batch_size, run.cfg.steps)
    assert set(optimizer.shapes) == set(trained) and optimizer.rate(1) >= 0
    count = {True: 0, False: 0}
    for name, x in (trained | frozen).items():
        count[name in trained] += x.size
    found = (round(count[True] / 1e6, 1), round(count[False] / 1e6, 1))
    assert found == MILLIONS[named_by(file), size]


# (stage, size) -> millions of parameters that are trained, and that are not
MILLIONS = {
    ("minigpt5/stage1", "smoke"): (0.0, 6.4),
    ("minigpt5/stage1", "quickstart"): (18.9, 149.0),
    ("minigpt5/stage1", "7b"): (123.0, 9122.6),
    ("minigpt5/stage2", "smoke"): (0.0, 6.4),
    ("minigpt5/stage2", "quickstart"): (23.8, 149.0),
    ("minigpt5/stage2", "7b"): (121.8, 8787.6),
    ("stage2_mmdialog", "smoke"): (0.0, 6.4),
    ("stage2_mmdialog", "7b"): (121.8, 8787.6),
    ("stage2_vist", "smoke"): (0.0, 6.4),
    ("stage2_vist", "7b"): (121.8, 8787.6),
    ("connector", "smoke"): (0.0, 3.3),
    ("connector", "quickstart"): (0.6, 151.3),
    ("connector", "1b"): (6.6, 1655.4),
    ("connector", "8b"): (21.5, 8464.8),
    ("connector", "70b"): (76.6, 71043.3),
    ("connector", "qwen3-1.7b"): (6.6, 2140.1),
    ("connector", "qwen3-8b"): (21.5, 8625.2),
    ("decoder", "smoke"): (0.3, 0.0),
    ("decoder", "quickstart"): (3.3, 0.0),
    ("decoder", "1b"): (863.5, 496.6),
    ("decoder", "8b"): (863.5, 496.6),
    ("vpit", "smoke"): (3.2, 0.0),
    ("vpit", "quickstart"): (107.3, 44.5),
    ("vpit", "1b"): (1248.9, 413.0),
    ("vpit", "8b"): (8073.3, 413.0),
    ("vpit", "70b"): (70706.9, 413.0),
    ("vpit", "qwen3-1.7b"): (1733.7, 413.0),
    ("vpit", "qwen3-8b"): (8233.8, 413.0),
    ("anyres", "smoke"): (3.3, 0.0),
    ("anyres", "7b"): (7050.3, 0.0),
    ("anyres", "13b"): (13338.2, 0.0),
    ("anyres", "qwen3-8b"): (8610.0, 0.0),
    ("lora", "smoke"): (0.0, 3.3),
    ("lora", "7b"): (340.8, 7029.3),
    ("lora", "13b"): (532.2, 13306.8),
    ("lora", "7b-4bit"): (340.8, 3893.9),  # two values of 4 bits are one element
    ("lora", "13b-4bit"): (532.2, 7163.3),
    ("scienceqa", "smoke"): (3.2, 0.0),
    ("scienceqa", "v1-7b"): (6742.6, 290.6),
    ("scienceqa", "v1-13b"): (13021.1, 290.6),
    ("llava/stage1", "smoke"): (0.0, 3.3),
    ("llava/stage1", "quickstart"): (0.6, 150.7),
    ("llava/stage1", "7b"): (21.0, 7029.3),
    ("llava/stage1", "13b"): (31.5, 13306.8),
    ("llava/stage1", "v1-7b"): (4.2, 7029.0),
    ("llava/stage1", "v1-13b"): (5.2, 13306.4),
    ("llava/stage1", "qwen3-8b"): (21.5, 8588.5),
    ("llava/stage2", "smoke"): (3.2, 0.0),
    ("llava/stage2", "quickstart"): (106.8, 44.5),
    ("llava/stage2", "7b"): (6759.4, 290.9),
    ("llava/stage2", "13b"): (13047.3, 290.9),
    ("llava/stage2", "v1-7b"): (6742.6, 290.6),
    ("llava/stage2", "v1-13b"): (13021.1, 290.6),
    ("pretrain", "smoke"): (0.1, 6.5),
    ("pretrain", "quickstart"): (25.4, 149.0),
    ("pretrain", "7b"): (1290.4, 7125.3),
    ("pretrain", "13b"): (1465.3, 13402.8),
    ("sft", "smoke"): (0.1, 6.5),
    ("sft", "quickstart"): (131.6, 42.8),
    ("sft", "7b"): (1290.4, 7125.3),
    ("sft", "13b"): (1465.3, 13402.8),
    ("story", "smoke"): (0.1, 6.5),
    ("story", "quickstart"): (25.4, 149.0),
    ("story", "7b"): (1290.4, 7125.3),
    ("story", "13b"): (1465.3, 13402.8),
    ("caption", "smoke"): (0.1, 6.5),
    ("vqa", "smoke"): (0.1, 6.5),
    ("grounding", "smoke"): (0.1, 6.5),
    ("segment_to_image", "smoke"): (0.1, 6.5),
    ("dialogue", "smoke"): (0.1, 6.5),
}


def test_doc_strings_say_how():
    for file in FILES:
        text = ast.get_docstring(ast.parse(file.read_text()))
        where = file.relative_to(ROOT.parent)
        assert f"metamorph train --config={where}:SIZE --workdir=" in text, where
        for size in MODULES[file].SIZES:
            assert size in text


@pytest.mark.parametrize(("file", "size"), **named(CASES))
def test_sweeps(file, size, tmp_path):
    """Every run of every sweep would start."""
    from metamorph_jax.sweep.command import plan

    if "sweep" not in vars(MODULES[file]):
        assert file.stem != "vpit", "the one that others are modelled on"
        return
    runs = plan(f"{file}:{size}", {}, tmp_path)
    assert len(runs) > 1 and len({r.folder for r in runs}) == len(runs)


def test_unknown_size():
    for file in FILES:
        known = ", ".join(MODULES[file].SIZES)
        with pytest.raises(ConfigError, match=f"size '9b' is none of {known}"):
            configs.load_config(f"{file}:9b")


# ---- every option can be changed on the command line


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a dataclass that a config can reach, or a new key of a table with any keys.

    Attributes:
        owner: the dataclass that has it, at `table`.
        needed: other options that have to be given with it.
    """

    path: str
    hint: typing.Any
    value: typing.Any
    owner: type
    table: str
    needed: dict = dataclasses.field(default_factory=dict)


def settings(hint, value, where: str, owner=None, table=""):
    """Every `Setting` below, found by the dataclasses and their values alone.

    Dataclasses that are not in use are visited, too: of options that are None, and of entries that
    are still to be made (called "new").
    """
    members = [m for m in typing.get_args(hint) if m is not type(None)] or [hint]
    classes = [m for m in members if dataclasses.is_dataclass(m)]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    entry = args[{tuple: 0, dict: 1}[origin]] if origin in (tuple, dict) and args else None
    if dataclasses.is_dataclass(entry):
        entries = value if origin is tuple else tuple(value.values())
        for each in entries:
            yield from settings(entry, each, f"{where}.{each.name}")
        alike = dataclasses.asdict(entries[0]) | {"name": "new"} if entries else {}
        for each in settings(entry, None, f"{where}.new"):
            needed = {f"{where}.new.{k}": v for k, v in alike.items()} | each.needed
            yield dataclasses.replace(each, needed=needed)
    elif hint is dict or origin is dict:
        yield Setting(f"{where}.new", entry or typing.Any, None, owner, table)
    elif classes:
        cls = type(value) if value is not None else classes[0]
        VISITED.add(cls)
        hints = typing.get_type_hints(cls)
        needed = {}
        if value is None:  # what has no default must be given with it
            needed = {f"{where}.{f.name}": other(hints[f.name], None) for f in _required(cls)}
        for field in dataclasses.fields(cls):
            now = _default(field) if value is None else getattr(value, field.name)
            for each in settings(hints[field.name], now, f"{where}.{field.name}", cls, where):
                yield dataclasses.replace(each, needed=needed | each.needed)
    else:
        yield Setting(where, hint, value, owner, table)


VISITED: set[type] = set()


def _required(cls):
    """Fields without a default; the `name` of an entry is its key."""
    found = dataclasses.fields(cls)
    return [f for f in found if f.name != "name" and _default(f) is dataclasses.MISSING]


def _default(field):
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def other(hint, value):
    """A value of this type that differs from `value`."""
    members = [m for m in typing.get_args(hint) if m is not type(None)]
    if typing.get_origin(hint) is tuple:
        values = (None,) if value in (None, ()) else value
        return tuple(other(members[0], v) for v in values)
    kind = members[0] if members else hint
    if typing.get_origin(kind) is tuple:
        return other(kind, value)
    old = 1 if value in (None, dataclasses.MISSING) else value
    return {
        bool: lambda: not old,
        int: lambda: old * 2 or 1,
        float: lambda: old / 2 or 0.25,
        str: lambda: "other" if value in (None, dataclasses.MISSING) else f"{old}x",
        typing.Any: lambda: 3,
    }[kind]()


def reached(run, path: str, value):
    """What a built dataclass has at this path, where `value` should be."""
    *parts, last = path.split(".")[1:]
    for part in [*parts, last]:
        if isinstance(run, tuple):
            (run,) = [each for each in run if each.name == (value if last == "name" else part)]
        else:
            run = run[part] if isinstance(run, dict) else getattr(run, part)
    return run


@pytest.mark.parametrize(
    ("file", "size"), **named([c for c in CASES if c[1] in ("smoke", "quickstart", "8b")])
)
def test_every_option_can_be_changed(file, size):
    """The new value arrives in its dataclass, or the dataclass refuses it and names the field."""
    config = configs.load_config(f"{file}:{size}")
    cls, values = configs.declared(config), config.to_dict()
    found = list(settings(cls, configs.build(cls, values), "config"))
    assert len(found) > 60
    for each in found:
        new = other(each.hint, each.value)
        given = {**each.needed, each.path: new}
        words = [f"--{k}={v if isinstance(v, str) else repr(v)}" for k, v in given.items()]
        overrides, rest = cli._take_overrides(words)
        assert not rest
        table = options.change(cls, values, overrides)
        try:
            assert reached(configs.build(cls, table), each.path, new) == new, words
        except ConfigError:  # it does not fit other options, or is never allowed
            for part in each.table.split(".")[1:]:
                table = table[part]
            inside = each.path.removeprefix(each.table)
            try:
                assert reached(configs.build(each.owner, table), inside, new) == new, words
            except ConfigError as refused:
                name = each.path.rpartition(".")[2]
                assert re.search(rf"\b{name}\b", str(refused)), (words, refused)


@pytest.mark.parametrize(("file", "size"), **named(CASES))
def test_lines_of_metamorph_config_can_be_given_back(file, size):
    config = configs.load_config(f"{file}:{size}")
    cls, values = configs.declared(config), config.to_dict()
    lines = [
        show(option).splitlines()[0].rpartition("   (")[0]
        for option in options.listed(cls, values)
        if option.used and not (option.is_table and option.value)
    ]
    overrides, rest = cli._take_overrides([word for line in lines for word in shlex.split(line)])
    assert len(overrides) == len(lines) > 60 and not rest
    assert options.change(cls, values, overrides) == values


def test_every_dataclass_was_visited():
    """Every one that a config can reach, in some file and size."""
    VISITED.clear()
    reachable = set()
    for file, size in CASES:
        config = configs.load_config(f"{file}:{size}")
        cls = configs.declared(config)
        for _ in settings(cls, configs.build(cls, config.to_dict()), "config"):
            pass
        reachable |= set(_reachable(cls))
    names = {cls.__qualname__ for cls in VISITED}
    assert {cls.__qualname__ for cls in reachable} == names


def _reachable(hint):
    if dataclasses.is_dataclass(hint):
        yield hint
        for each in typing.get_type_hints(hint).values():
            yield from _reachable(each)
    for each in typing.get_args(hint):
        yield from _reachable(each)


@pytest.mark.parametrize(("file", "size"), **named(CASES))
def test_dataclasses_have_defaults(file, size):
    """All but what names a run, a source or a group."""
    cls = configs.declared(configs.load_config(f"{file}:{size}"))
    required = {(c.__name__, f.name) for c in _reachable(cls) for f in _required(c)}
    assert required <= {
        ("TrainConfig", "recipe"), ("TrainConfig", "stage"), ("TrainConfig", "steps"),
        ("TrainConfig", "batch_size"), ("SourceConfig", "path"), ("Group", "match"),
    }  # fmt: skip


# What was refused before every option could be changed -> its name now, and a value.
REFUSED = {
    "model.reduction": ("model.vision.reduction", "area"),
    "model.train_tower": ("model.train_tower", "true"),
    "model.max_visual_targets": ("model.max_visual_targets", "8"),
    "model.visual_loss": ("model.visual_loss", "l1"),
    "model.connector_tokens": ("model.connector_tokens", "all"),
    "optim.ema_decay": ("optim.ema_decay", "0.9"),
    "optim.b1": ("optim.b1", "0.5"),
    "optim.eps": ("optim.eps", "1e-6"),
    "data.packing": ("data.row.packing", "pad"),
    "data.max_images": ("data.images.max_images", "3"),
    "data.epochs": ("data.order.epochs", "2"),
}


@pytest.mark.parametrize("old", REFUSED)
def test_options_that_were_refused(old):
    new, value = REFUSED[old]
    spec = f"{ROOT}/metamorph/vpit.py:smoke"
    run = resolve(configs.load_config(spec, {new: value}))
    table, *keys = new.split(".")
    found = {"model": run.model, "data": run.data, "optim": run.cfg.optim}[table]
    for key in keys:
        found = getattr(found, key)
    assert str(found).lower() == str(options._parse(type(found), value, "", None)).lower()
    if new != old:
        near = re.escape(f"config.{old} is not an option; did you mean config.{new}?")
        with pytest.raises(ConfigError, match=near):
            configs.load_config(spec, {old: value})


@pytest.mark.parametrize(("file", "size"), **named(CASES))
def test_limits_agree(file, size):
    """A video of any length fits into a row, with some room for what is asked about it."""
    run = resolve(configs.load_config(f"{file}:{size}"))
    data = run.data
    if not isinstance(data, DataConfig):
        return
    spec = run.recipe.batch_spec(data, run.model, 1)
    if run.recipe.__name__.endswith("minigpt5"):  # of which stage 1 reads no images
        slots = run.model.qformer.tokens + 2
        if not data.row.images:
            return
    else:
        slots = run.model.vision.tokens + 2
    assert 0 < data.frames <= min(data.row.images, data.images.max_images)
    assert data.frames * slots < 0.8 * spec.tokens.shape[1]


def test_limits_that_contradict_each_other_are_refused():
    spec = f"{ROOT}/metamorph/vpit.py:8b"
    config = configs.load_config(spec, {"data.images.max_frames": "45", "data.row.images": "24"})
    with pytest.raises(ConfigError, match="max_frames is 45, but row.images is 24"):
        resolve(config)
    assert resolve(configs.load_config(spec, {"data.row.images": "48"})).data.frames == 45
