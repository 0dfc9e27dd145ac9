"""The families of published checkpoints: how each is recognised, read, written and compared.

A part (a language model, a tower, a UNet) has its family in the module of this folder that holds
its key table; a whole system has it in its recipe, whose `FAMILIES` also say how its runs are
written (`RunForm`). Nothing in `convert/` knows which recipes there are: it asks those that are
installed.
"""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from metamorph_jax import recipe
from metamorph_jax.convert import export, hf
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.errors import MissingFile, UserError
from metamorph_jax.files import shown

# Modules of this folder with a table `FAMILIES` of parts.
PARTS = ("llama", "vit", "clip_text", "diffusion")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The library that a family's checkpoints were made for, to compare with (extra `oracle`).

    Attributes:
        load: folder -> its model, or whatever else `compare` takes.
        compare: (our module, what `load` gave, numpy Generator) -> name -> (ours, theirs), arrays
            that should be equal.
        library: its name.
    """

    load: Callable[[pathlib.Path], Any]
    compare: Callable[[Any, Any, Any], dict]
    library: str = "transformers"


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: short, unique.
        kinds: values of `model_type` (transformers) or `_class_name` (diffusers) in a config.json;
            "llama+x" is only of this family where the config.json has the field x.
        config_from_hf: fields of config.json -> our config; ValueError for what we don't support.
        config_to_hf: our config -> a config.json that transformers or diffusers reads unchanged.
        create: (cfg, *, rngs) -> module; works under `nnx.eval_shape`.
        load: (module, published name -> array) fills in place; one ValueError lists all keys that
            are missing, left over or of another shape.
        export: module -> published name -> array (`names.Lazy`).
        save: (family, folder, module, source, writer) -> bytes of all tensors: writes a folder that
            the library loads unchanged. `export.save_part` unless there is more to write.
        sizes: name -> config of ours.
        published: fields of config.json -> every key of the published checkpoint.
        reference: the library to compare with.
        read: folder -> published name -> array.
        recognised: folder without a config.json -> the fields that one would have, or None if it
            doesn't hold this family's files; for checkpoints that were published without.
    """

    name: str
    kinds: tuple[str, ...]
    config_from_hf: Callable[..., Any]
    config_to_hf: Callable[[Any], dict]
    create: Callable[..., Any]
    load: Callable[[Any, Mapping], None]
    export: Callable[[Any], Mapping]
    sizes: Mapping[str, Any]
    published: Callable[[Mapping], list[str]]
    reference: Reference
    save: Callable[["Family", pathlib.Path, Any, Source, Writer], int] = export.save_part
    read: Callable[[pathlib.Path], Mapping] = hf.Tensors
    recognised: Callable[[pathlib.Path], dict | None] = lambda folder: None

    def write(self, folder: pathlib.Path, module, source: Source, writer: Writer) -> int:
        """Writes a folder of this family; see `save`."""
        return self.save(self, folder, module, source, writer)

    def matches(self, fields: Mapping) -> bool:
        """Whether the fields of a config.json are of this family."""
        kind = kind_of(fields)
        return any(kind == known and (not field or field in fields)
                   for known, _, field in (name.partition("+") for name in self.kinds))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunForm:
    """How the finished runs of a recipe are written.

    Attributes:
        save: (folder, model, source, writer) -> bytes of all tensors.
        source: the run's `Config` and `Data` -> what goes beside the weights: the tokenizer, chat
            template and generation parameters that it was trained with.
        adapted: path of the part whose adapters are written to the folder itself; those of other
            parts go into folders inside it.
        base: the run's `Config` -> spec of the published weights that it started from, or "".
        reference: as `save`, but in the files of the system's public implementation; None if there
            is none.
        connector: as `save`, but the file of the connector alone; None where there is no such file.
        beside_adapters: (folder, model, source) -> bytes of all tensors: writes what was trained
            whole, and else belongs to the adapters in this folder. None: nothing does.
        beside: folder for an image decoder that is written beside another system; "" for all else.
        published_config: folder with files of the system's public implementation -> the recipe's
            `Config` that loads them, or None if it holds no such files.
        of_checkpoint: (spec of published weights, fields of their config.json, {} if they have
            none) -> the recipe's (`Config`, `Data`) with which they generate, or None if they are
            no whole model of it.
        keeps_adapters: `reference` takes the model with its adapters; else they are merged first.
    """

    save: Callable[[pathlib.Path, Any, Source, Writer], int]
    source: Callable[[Any, Any], Source]
    adapted: tuple[str, ...]
    base: Callable[[Any], str] = lambda cfg: ""
    reference: Callable[[pathlib.Path, Any, Source, Writer], int] | None = None
    connector: Callable[[pathlib.Path, Any, Source, Writer], int] | None = None
    beside_adapters: Callable[[pathlib.Path, Any, Source], int] | None = None
    beside: str = ""
    published_config: Callable[[pathlib.Path], Any] = lambda folder: None
    of_checkpoint: Callable[[str, Mapping], tuple[Any, Any] | None] = lambda spec, fields: None
    keeps_adapters: bool = False


def published_run(folder: pathlib.Path):
    """(recipe, its Config) of a folder with files of a system's public implementation that have no
    config.json; None if no installed recipe knows them."""
    for name in recipe.installed():
        found = recipe.find(name)
        for form in found.FAMILIES:
            if isinstance(form, RunForm) and (cfg := form.published_config(folder)) is not None:
                return found, cfg
    return None


def whole_checkpoint(spec: str) -> tuple[str, Any, Any]:
    """(name of a recipe, its Config, its Data) with which a published checkpoint generates, as its
    config.json says.

    Raises:
        UserError: it has no config.json, or is no whole model of an installed recipe.
    """
    folder = hf.find(spec)
    advice = "give --config FILE[:SIZE], which says what the model is"
    stated = (folder / "config.json").is_file()
    fields = hf.read_config(folder) if stated else {}
    if (found := _whole(spec, fields)) is not None:
        return found
    if not stated:
        raise UserError(f"{spec} has no config.json: {advice}")
    raise UserError(f"{spec} (model type {shown(repr(kind_of(fields)), 60)}) is no whole model of "
                    f"{', '.join(recipe.installed())}: {advice}")  # fmt: skip


def _whole(spec: str, fields: Mapping) -> tuple[str, Any, Any] | None:
    for name in recipe.installed():
        for form in recipe.find(name).FAMILIES:
            try:
                found = form.of_checkpoint(spec, fields) if isinstance(form, RunForm) else None
            except ValueError as error:
                raise UserError(f"{spec}: {shown(error, 1000)}") from error
            if found is not None:
                return name, *found
    return None


def is_whole_without_config(folder: pathlib.Path) -> bool:
    """Whether a folder without a config.json is a whole model of an installed recipe."""
    return folder.is_dir() and _whole(str(folder), {}) is not None


def kind_of(fields: Mapping) -> str | None:
    """`model_type` (transformers) or `_class_name` (diffusers) of a config.json's fields."""
    return fields.get("model_type") or fields.get("_class_name")


@functools.cache
def known() -> dict[str, Family]:
    """name -> family, of all parts and of all installed recipes."""
    groups = [importlib.import_module(f"metamorph_jax.convert.{m}").FAMILIES for m in PARTS]
    groups += [recipe.find(name).FAMILIES for name in recipe.installed()]
    return {f.name: f for group in groups for f in group if isinstance(f, Family)}


def run_form(recipe) -> RunForm:
    """How the runs of a recipe are written; UserError if its `FAMILIES` don't say."""
    for form in recipe.FAMILIES:
        if isinstance(form, RunForm):
            return form
    raise UserError(f"{recipe.__name__} does not say how its runs are written (no RunForm)")


def of_fields(fields: Mapping, where: str = "config.json") -> Family:
    """The family that the fields of a config.json name; ValueError if it is none of ours."""
    kind = kind_of(fields)
    if kind is None:
        raise ValueError(f"{where} has neither model_type nor _class_name")
    found = [family for family in known().values() if family.matches(fields)]
    if found:  # systems come after parts: one that knows more of the fields wins
        return found[-1]
    kinds = sorted(kind for family in known().values() for kind in family.kinds)
    raise ValueError(f"{where}: model type {kind!r} is not supported; known: {', '.join(kinds)}")


def read_config(folder: str | pathlib.Path) -> dict:
    """The fields of a folder's config.json, or those that belong to files published without one.

    Raises:
        MissingFile: it has none, and is not recognised by its files either; for a diffusers
            pipeline, which has one in each of its subfolders, these are listed.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").is_file():
        return hf.read_config(folder)
    for family in known().values():
        if (fields := family.recognised(folder)) is not None:
            return fields
    parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"; name one of its parts: {', '.join(parts)}" if parts else ""
    raise MissingFile(f"no config.json in {folder}{hint}")


def detect(folder: str | pathlib.Path) -> Family:
    """The family of a checkpoint folder, by its config.json.

    Raises:
        MissingFile: as `read_config`.
        ValueError: for a model type that is not ours.
    """
    return of_fields(read_config(folder), str(pathlib.Path(folder) / "config.json"))
