"""Trained models, from a workdir or from published weights, made ready for use."""

import dataclasses
import inspect
import pathlib
import re
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from metamorph_jax import config as configs
from metamorph_jax import options as options_of
from metamorph_jax import recipe as recipes
from metamorph_jax import sharding
from metamorph_jax.convert import families, hf, load
from metamorph_jax.errors import CheckpointError, UserError
from metamorph_jax.files import shown
from metamorph_jax.models import build
from metamorph_jax.models.llm.llama import Llama
from metamorph_jax.models.lora import LoraLinear
from metamorph_jax.nn.quantized import METHODS
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.llm_weights import kernel_dtype


def load_trained(workdir: str):
    """(recipe module, its Config, model, saved config) of a finished stage, on one device."""
    recipe, cfg, values = load.open_run(workdir)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    try:
        model = load.load_model(recipe, cfg, mesh, workdir=workdir)
    except CheckpointError as error:
        raise UserError(error) from error
    return recipe, cfg, model, values


def load_published(spec: str):
    """The model of files of a public implementation that a recipe knows, on one device; None if the
    spec is not a folder (or "hf:…") with such files."""
    folder = hf.find(spec) if spec.startswith(hf.PREFIX) else pathlib.Path(spec)
    if (folder / "config.json").is_file() or (found := families.published_run(folder)) is None:
        return None
    recipe, cfg = found
    return load.load_model(recipe, cfg, sharding.make_mesh(devices=jax.local_devices()[:1]))


def load_generator(
    workdir: str | None = None,
    *,
    weights_of: str | None = None,
    config: str | None = None,
    overrides: Mapping[str, str] | None = None,
    weights: str = "auto",
    mesh: Mapping[str, int] | None = None,
    **options,
) -> Generator:
    """A trained model that generates; its language model exists once, in the form it decodes in.

    Args:
        workdir: of a finished stage; or
        weights_of, config, overrides: published weights ("hf:OWNER/NAME" or a folder), the config
            file that says what the model is (None: their config.json says it), and changes to it.
        weights: how those of the language model are kept, one of `sampling.WEIGHTS`.
        mesh: axis -> size; default: as many devices on "tensor" as `config.mesh` says, all others
            share the rows.
        options: of the recipe's generator.

    Raises:
        UserError: there is no such model, or it does not generate.
    """
    if workdir:
        recipe, cfg, values = load.open_run(workdir)
    else:
        values = published_values(weights_of, config, overrides or {})
        recipe = recipes.find(values["recipe"])
        cfg = configs.build(recipe.Config, values["model"], "config.model")
        cfg = dataclasses.replace(cfg, weights=weights_of, tokenizer=cfg.tokenizer or weights_of)
    unknown = options.keys() - inspect.signature(recipe.generator).parameters.keys()
    if unknown:
        raise UserError(f"recipe {values['recipe']} has no option {', '.join(sorted(unknown))}")
    devices = generation_mesh(mesh, values.get("mesh") or {})
    dtype, pack = reading(recipe, cfg, weights, values["recipe"])
    try:
        model = load.load_model(
            recipe, cfg, devices, dtype=dtype, workdir=workdir or None, pack=pack
        )
    except (CheckpointError, ValueError) as error:  # the latter lists what does not fit
        raise UserError(error) from error
    data = configs.build(recipe.Data, values["data"], "config.data")
    made = recipe.generator(model, cfg, data, weights=weights, **options)
    if made is None:
        raise UserError(f"the recipe {values['recipe']!r} does not generate text and images")
    return made


def is_published(spec: str) -> bool:
    """Whether a spec names published weights, by their config.json or by their names, and no
    workdir."""
    if spec.startswith(hf.PREFIX):
        return True
    folder = pathlib.Path(spec)
    if not (folder / "config.json").is_file():
        return families.is_whole_without_config(folder)
    return families.kind_of(hf.read_config(folder)) is not None


def published_values(spec: str, config: str | None, overrides: Mapping[str, str]) -> dict:
    """The resolved config of published weights: of a config file, or as their config.json says.

    Raises:
        UserError: there is no config file, and the weights don't say what they are.
    """
    if config is not None:
        return configs.load_config(config, overrides).to_dict()
    name, model, data = families.whole_checkpoint(spec)
    cls = configs.narrowed(_Published, model=type(model), data=type(data))
    parts = {"model": dataclasses.asdict(model), "data": dataclasses.asdict(data)}
    values = {"recipe": name, **parts}
    values = options_of.change(cls, options_of.complete(cls, values), overrides)
    print(f"{shown(spec)}: recipe {name}, as its files say", file=sys.stderr, flush=True)
    return values


@dataclasses.dataclass(frozen=True)
class _Published:
    """The options of published weights: `config.recipe`, and the recipe's `model` and `data`."""

    recipe: str = ""


def generation_mesh(shape: Mapping[str, int] | None, trained: Mapping[str, int]) -> Mesh:
    """The mesh to generate on: `shape`, or what fits the devices that are here.

    Args:
        shape: axis -> size, or None.
        trained: the mesh of the run; of it, only "tensor" is taken over.
    """
    if shape is None:
        tensor = int(trained.get("tensor", 1))
        tensor = tensor if tensor > 0 and jax.device_count() % tensor == 0 else 1
        shape = {"tensor": tensor, "data": -1}
    try:
        return sharding.make_mesh(shape)
    except ValueError as error:
        raise UserError(f"--mesh: {error}") from error


def reading(recipe, cfg, weights: str, name: str):
    """(dtype by name of a weight, `pack` of `load.load_model`).

    Kernels of all other parts are kept in the dtype that they are computed in, which changes no
    number; so they are float32 where a part, or a layer of it, computes in that.

    Raises:
        UserError: the model has no language model.
    """
    outline = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    llms = [(".".join(map(str, p)), m) for p, m in nnx.iter_modules(outline) if type(m) is Llama]
    if not llms:
        raise UserError(f"the recipe {name!r} does not generate text and images")
    prefix, llm = llms[0]
    kept = kernel_dtype(llm.cfg, weights)
    kernels = re.compile(rf"{re.escape(prefix)}\.(layers\..*|lm_head)\.kernel")
    pack = (weights, rf"{re.escape(prefix)}\.layers\..*") if weights in METHODS else None
    others = {} if weights == "float32" else _computed_in(outline, f"{prefix}.layers.")
    return (lambda leaf: kept if kernels.fullmatch(leaf) else others.get(leaf)), pack


def _computed_in(outline: nnx.Module, but: str) -> dict:
    """Name of a kernel -> the dtype that its layer casts it to, where that is the smaller one.

    Args:
        but: beginning of the names of layers that are left out.
    """
    found = {}
    for path, layer in nnx.iter_modules(outline):
        name = ".".join(map(str, (*path, "kernel")))
        if not isinstance(layer, (nnx.Linear, nnx.Conv)) or layer.dtype is None:
            continue
        if isinstance(layer, LoraLinear) or name.startswith(but):
            continue
        if jnp.dtype(layer.dtype).itemsize < jnp.dtype(layer.kernel.dtype).itemsize:
            found[name] = jnp.dtype(layer.dtype)
    return found
