"""The one way in which weights come into a model, for training and for decoding.

    shapes of the model with their shardings        models/build.py
    weights that the config names                   recipe.load_pretrained: specs and key tables
    or those of a finished run                      load_workdir
    random values for what is still open            models/build.py

Every tensor is read when its turn comes, cast, and put on its shards; no other copy exists.
"""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from metamorph_jax import config, files
from metamorph_jax import recipe as recipes
from metamorph_jax.convert import names
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import lora
from metamorph_jax.models.build import build, is_open, rngs
from metamorph_jax.nn import quantized
from metamorph_jax.train import checkpoint

WORKDIR = "workdir:"


def load_model(
    recipe, cfg, mesh: Mesh, *, dtype=None, workdir=None, pack: tuple[str, str] | None = None
) -> nnx.Module:
    """A model on a mesh with its weights.

    Args:
        recipe: a `recipe.Recipe`.
        cfg: its `Config`.
        mesh: for the shardings.
        dtype: of floating-point weights, or a function from a dotted name to it; None: as the
            recipe makes them. Buffers and the scales of packed kernels keep theirs.
        workdir: of a finished run of this config, whose weights are read; None: those that the
            config names.
        pack: (one of `quantized.METHODS`, regular expression); kernels of linears whose dotted name
            it matches are packed one by one, as they are read. Linears with adapters are left as
            they are.

    Raises:
        ConfigError: `workdir` is not that of a finished run.
        CheckpointError: its weights are damaged, or don't fit.
        ValueError: weight files don't fit the model; lists every key.
    """

    def fill(model):
        if workdir is None:
            recipe.load_pretrained(model, cfg)
        else:
            load_workdir(model, workdir)

    def make(rngs):
        model = recipe.create(cfg, rngs)
        if pack is not None:
            quantized.quantize(model, *pack)
        return model

    seed = 0 if workdir is None else open_run(workdir)[2].get("seed", 0)
    return build(make, mesh, seed, fill, dtype)


def open_run(workdir: str | pathlib.Path):
    """(recipe, its Config, the whole resolved config as a dict) of a run, from its workdir.

    Raises:
        FileError: its config.json is not JSON.
        ConfigError: it has no config.json, or one that this version can't read; or it names a
            recipe that is neither in this package nor named by the user.
    """
    file = pathlib.Path(workdir).absolute() / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file.parent} is not the workdir of a training run (no config.json)")
    values = files.read_json(file)
    absent = [key for key in ("recipe", "model") if key not in values]
    if absent or not isinstance(values["model"], dict):
        wrong = f"it has no {absent[0]}" if absent else "its model is not an object"
        raise ConfigError(f"{file} is not the config of a training run: {wrong}")
    recipe = recipes.find_saved(values["recipe"], file)
    return recipe, config.build(recipe.Config, values["model"], "config.model"), values


def load_workdir(model: nnx.Module, workdir: str | pathlib.Path) -> None:
    """Fills a model, in place, with the weights that an earlier stage ended with.

    First the weights that the earlier stage itself started from, as its saved config names them
    (but for what it trained), then what it trained. Its adapters stay adapters if the model has the
    same ones; otherwise they are merged into the kernels.

    Args:
        model: of the same recipe; it may have parts that the earlier stage lacked, which are left
            as they are. Its leaves may be shapes without values.
        workdir: of the earlier stage.

    Raises:
        ConfigError: `workdir` is not that of a finished stage.
        CheckpointError: its weights are damaged, or don't fit the model.
    """
    recipe, cfg, values = open_run(workdir)
    earlier = nnx.eval_shape(lambda: recipe.create(cfg, rngs(0)))
    shapes = checkpoint.export_shapes(workdir)
    with quantized.unpacked(model, empty=is_open(model)):
        trained = [v for n, v in named_leaves(model).items() if n in shapes and is_open(v)]
        with names.passing_over(trained):  # they would only be replaced
            recipe.load_pretrained(model, cfg)
        merging = {} if lora.same(model, earlier) else lora.scales(earlier)
        adapters = _read_trained(model, workdir, shapes, bool(merging))
        if merging:
            make = lambda rngs: recipe.create(cfg, rngs)  # noqa: E731
            _fill_kernels(model, merging, make, values.get("seed", 0))
            lora.fold(model, adapters, merging)


def _read_trained(model, workdir, shapes: Mapping, merging: bool) -> dict[str, jax.Array]:
    """Fills what the stage trained. Adapters that are to be merged are returned instead."""
    apart = {n: x for n, x in shapes.items() if merging and lora.is_adapter(n.split("."))}
    trained = {n: x for n, x in shapes.items() if n not in apart}
    leaves = {n: v for n, v in named_leaves(model).items() if n in trained}
    wanted = {n: _shape(v) for n, v in leaves.items()}
    checkpoint.compare(wanted, trained, pathlib.Path(workdir).absolute() / "final")
    for name, variable in leaves.items():
        variable.set_raw_value(wanted[name])  # the old arrays go before the new ones come
    everywhere = lora.replicated(model)
    for name, x in apart.items():
        wanted[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    alone = {n: v for n, v in leaves.items() if "loaded" in v.get_metadata()}
    values = checkpoint.read_export(workdir, {n: x for n, x in wanted.items() if n not in alone})
    for name, variable in leaves.items():
        if name not in alone:
            variable.set_raw_value(values[name])
    for name, variable in alone.items():  # packed before the next one comes
        read = checkpoint.read_export(workdir, {name: wanted[name]})[name]
        variable.set_raw_value(variable.get_metadata("loaded")(read))
    return {name: values[name] for name in apart}


def _fill_kernels(model, linears, make, seed: int) -> None:
    """Gives kernels that take up adapters, and that no file had, the random values that they had in
    the earlier stage."""
    leaves = named_leaves(model)
    wanted = {n: v for n in linears if (v := leaves.get(f"{n}.kernel")) is not None and is_open(v)}
    if not wanted:
        return

    def init(key):
        modules = {".".join(map(str, p)): m for p, m in nnx.iter_modules(make(rngs(key)))}
        made = [quantized.plain(modules[n]).kernel.get_raw_value() for n in wanted]
        return [x.astype(v.dtype) for x, v in zip(made, wanted.values(), strict=True)]

    where = [v.get_raw_value().sharding for v in wanted.values()]
    values = jax.jit(init, out_shardings=where)(jax.random.key(seed))
    for variable, value in zip(wanted.values(), values, strict=True):
        variable.set_raw_value(value)


def named_leaves(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted name -> variable of the model (not a copy)."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


def _shape(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
    value = variable.get_raw_value()
    return jax.ShapeDtypeStruct(value.shape, jnp.dtype(value.dtype), sharding=value.sharding)
