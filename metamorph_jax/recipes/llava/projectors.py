"""Files with a part of a LLaVA: a projector alone, or what was trained whole beside adapters.

    mm_projector.bin           connector; rows of start and end token, where these were trained
    non_lora_trainables.bin    the same beside PEFT's adapters, and whatever else was trained whole

Both are torch files (`.safetensors` is read, too), with the names of the original layout; projector
files are recognised by `mm_projector.` in a name, whatever comes before it. We write the newline
vector into both. Token tables in them may be whole, or have only the rows of start and end token:
the last two are taken.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert import agree, changes, export, hf, names, vit
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.llama import EMBED, HEAD
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.files import shown
from metamorph_jax.models import lora
from metamorph_jax.recipes.llava import fields, keys
from metamorph_jax.recipes.llava.model import Llava

PROJECTOR = "mm_projector"
_INSIDE = f"{PROJECTOR}."
_BASE = "base_model.model."  # before the names of `non_lora_trainables.bin`
_TABLES = {EMBED: "embed_tokens", HEAD: "lm_head"}


# ---- in


def load_connector(model: Llava, spec: str) -> None:
    """Fills connector and, where the file has them, newline and rows of start and end token.

    Args:
        spec: a file, or "hf:OWNER/NAME" or a folder with `mm_projector.bin`; or with a whole
            checkpoint, or adapters, whose connector is taken.

    Raises:
        ConfigError: a config.json beside it names another tower, or layer of it.
        WeightError: it has no connector, or one that doesn't fit.
    """
    where = hf.find(spec)
    _check_tower(model, where)
    tensors = _tensors(where)
    found = _plainly(tensors)
    if not any(name.startswith("connector.") for name in found):
        raise WeightError(f"{spec} has no connector ({_INSIDE}…)")
    known = {"newline", EMBED} | {name for name in found if name.startswith("connector.")}
    alone = found.keys() <= known  # else a whole checkpoint: its tables are none of ours
    if alone and EMBED in found and not model.cfg.start_end:
        raise ConfigError(f"{spec} was trained with start and end tokens around images: set "
                          "config.model.start_end=true")  # fmt: skip
    taken = known if alone else known - {EMBED}
    _fill(model, tensors, {name: key for name, key in found.items() if name in taken})


def load_beside_adapters(model: Llava, folder: pathlib.Path) -> None:
    """Fills what lies beside adapters as trained whole, if there is such a file.

    Raises:
        WeightError: it has tensors that are of no part, or don't fit.
    """
    tensors = changes.read_whole(folder)
    if tensors:
        _fill(model, tensors, _plainly(tensors))


def _tensors(where: pathlib.Path) -> Mapping:
    """Those of a file; of a folder those of its projector file, if it has one."""
    if where.is_dir():
        for ending in ("safetensors", "bin"):
            if (where / f"{PROJECTOR}.{ending}").is_file():
                return hf.Tensors(where / f"{PROJECTOR}.{ending}")
        if whole := changes.read_whole(where):
            return whole
    return hf.Tensors(where)


def _plainly(tensors: Mapping) -> dict[str, str]:
    """Name as `keys.plain` has it -> key; WeightError for empty tensors."""
    found = {}
    for key in tensors:
        inside = key.rpartition(_INSIDE)
        name = keys.plain(_INSIDE_MODEL + inside[2] if inside[1] else key.removeprefix(_BASE))
        if name.startswith("connector.") and 0 in names.shape_of(tensors, key):
            raise WeightError(f"{shown(key)} has no values: the run that saved it did not gather "
                              "its parameters (ZeRO-3)")  # fmt: skip
        found[name] = key
    return found


_INSIDE_MODEL = keys.NAMINGS["original"].connector


def _fill(model: Llava, tensors: Mapping, found: Mapping[str, str]) -> None:
    """Fills the parts that there are tensors of; `found` is name -> key."""
    moved = {name: (key, np.asarray) for name, key in found.items() if name != key}
    view = names.Mapped(tensors, moved, lambda key: found.get(key) == key)
    begins = lambda start: [name for name in found if name.startswith(start)]  # noqa: E731
    known = {*begins("connector."), *begins("tower."), "newline", *_TABLES}
    if left := [key for name, key in found.items() if name not in known]:
        raise WeightError(f"of no part of this model: {', '.join(map(shown, left[:20]))}")
    if begins("connector."):
        names.load_torch_dict(model.connector, view, "connector.")
    if begins("tower.") and model.vision.tower is not None:
        vit.load_vit(model.vision.tower, view, "tower.")
    if "newline" in found and model.cfg.newline:
        keys.load_newline(model, view)
    for name, part in _TABLES.items():
        if name in found and model.llm.cfg.added_tokens:
            rows = model.llm.cfg.added_tokens
            last = names.Mapped(view, {"added": (name, lambda table, n=rows: table[-n:])},
                                lambda key: False)  # fmt: skip
            holder = getattr(model.llm, part)
            names.load_torch_dict(holder, last, only=lambda path, _: tuple(path) == ("added",))


def _check_tower(model: Llava, where: pathlib.Path) -> None:
    """ConfigError where the config.json of a projector was trained on other features."""
    folder = where if where.is_dir() else where.parent
    if model.vision.tower is None or not (folder / "config.json").is_file():
        return
    given = hf.read_config(folder)
    if not fields.is_original(given):
        return
    ours, same = model.cfg.vision.vit, (*agree.TOWER, "depth")
    theirs = lambda: fields.named_tower(given)  # noqa: E731
    agree.require(str(folder), lambda: agree.differences(ours, theirs(), same, "tower."))


# ---- out


def save_connector(folder: pathlib.Path, model: Llava, source: Source, writer: Writer) -> int:
    """Writes `mm_projector.bin` and the config.json of the whole model.

    Returns:
        Bytes of all tensors.
    """
    tensors = _small(model)
    if model.cfg.start_end:
        rows = model.llm.embed_tokens.added.get_raw_value()
        tensors.set(EMBED, lambda: np.asarray(rows), rows.shape, rows.dtype)
    export.write_json(folder / "config.json", fields.config_to_original(model.cfg))
    return writer.torch_file(folder / f"{PROJECTOR}.bin", tensors)


def save_beside_adapters(folder: pathlib.Path, model: Llava, source: Source) -> int:
    """Writes `non_lora_trainables.bin`, and the config.json of the whole model.

    Returns:
        Bytes of all tensors.
    """
    parts = [_small(model)]
    if model.cfg.train_tower:
        parts.append(keys.export_tower(lora.merged(model), "original"))
    if model.cfg.start_end:
        llm = keys.export_llm(lora.merged(model), "original")
        parts.append(llm.only(_TABLES))
    found, tensors = names.joined(*parts), names.Lazy()
    for key in found:
        tensors.set(_BASE + key, found.maker(key), found.shape_of(key), found.dtype_of(key))
    export.write_json(folder / "config.json", fields.config_to_original(model.cfg))
    return export.Writer().torch_file(folder / f"{changes.WHOLE}.bin", tensors)


def _small(model: Llava) -> names.Lazy:
    parts = keys.export_connector(model, "original"), keys.export_newline(model, "original")
    return names.joined(*parts)
