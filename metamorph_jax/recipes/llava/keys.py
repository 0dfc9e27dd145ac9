"""Names of LLaVA's tensors, in all namings that its checkpoints come in.

    part        original                        llava-hf                  transformers >= 4.52
    llm         model.layers.…, model.norm, …   language_model.model.…    model.language_model.…
    table       lm_head.weight                  language_model.lm_head.…  lm_head.weight
    connector   model.mm_projector.{0,2,…}.…,   multi_modal_projector.    model.multi_modal_projector.
                one linear: model.mm_projector.…    linear_{1,2}.…            linear_{1,2}.…
    newline     model.image_newline             image_newline             model.image_newline
    tower       model.vision_tower.             vision_tower.…            model.vision_tower.…
                vision_tower.…

The tower's prefix is followed by `vision_model.` or not. Versions of transformers have written files
in which namings are mixed, so each key is read on its own. The first two namings are written.

Original checkpoints have no row for the image token, which transformers needs: it (and rows that
fill up a multiple of 64) is written as the mean of the others, and the original naming has only the
rows below it.

Dropped on purpose: `rotary_emb.inv_freq`, position ids, and the newline vector where the model has
none (`mm_patch_merge_type` flat).
"""  # noqa: E501

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert import hf, names, vit
from metamorph_jax.convert.llama import EMBED, HEAD, export_llama, load_llama
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown
from metamorph_jax.models.vision.vit import ViT
from metamorph_jax.recipes.llava.fields import TOWERS, is_original, token_rows, tower_name
from metamorph_jax.recipes.llava.model import Llava


@dataclasses.dataclass(frozen=True)
class Naming:
    """Prefixes of one naming; the llm's own names are `model.…` and `lm_head.weight`."""

    llm: str
    table: str
    connector: str
    newline: str
    tower: str


NAMINGS = {
    "original": Naming("model.", "lm_head.weight", "model.mm_projector.", "model.image_newline",
                       "model.vision_tower.vision_tower."),
    "hf": Naming("language_model.model.", "language_model.lm_head.weight",
                 "multi_modal_projector.", "image_newline", "vision_tower."),
    "hf-2025": Naming("model.language_model.", "lm_head.weight", "model.multi_modal_projector.",
                      "model.image_newline", "model.vision_tower."),
}  # fmt: skip
# What keys begin with -> the same in our own naming of parts; the first that fits counts.
_PARTS = {
    **{naming.tower: "tower." for naming in NAMINGS.values()},
    **{naming.connector: "connector." for naming in NAMINGS.values()},
    **{naming.newline: "newline" for naming in NAMINGS.values()},
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
}
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_LINEAR = re.compile(r"(?:(\d+)|linear_(\d+))\.(weight|bias)")


def plain(key: str) -> str:
    """A key of any naming as `model.…`, `lm_head.…` (Llama's names), `connector.linears.…`,
    `tower.…` (CLIP's names without `vision_model.`) or `newline`; others as they are."""
    start = next((start for start in _PARTS if key.startswith(start)), None)
    if start is None:
        return key
    part, rest = _PARTS[start], key.removeprefix(start)
    if part == "tower.":
        rest = rest.removeprefix("vision_model.")
    if part == "connector.":
        found = _LINEAR.fullmatch(rest)
        if found is None:
            rest = f"linears.0.{rest}"
        else:
            place = int(found[1]) // 2 if found[1] else int(found[2]) - 1
            rest = f"linears.{place}.{found[3]}"
    return part + rest


def plainly(tensors: Mapping) -> names.Mapped:
    """The tensors of a checkpoint under the names of `plain`, without buffers.

    Raises:
        WeightError: two tensors have one name, or none belongs to a connector.
    """
    found: dict[str, str] = {}
    twice = []
    for key in tensors:
        if _BUFFERS.search(key):
            continue
        name = plain(key)
        if name in found:
            twice.append(f"{shown(found[name])} and {shown(key)}")
        found[name] = key
    if twice:
        raise WeightError(f"the same tensor under two names: {'; '.join(twice[:8])}")
    changes = {name: (key, np.asarray) for name, key in found.items() if name != key}
    return names.Mapped(tensors, changes, lambda key: found.get(key) == key)


# ---- in


def read(folder: pathlib.Path) -> Mapping:
    """The tensors of a checkpoint; where an original one lacks its tower, those of the tower that
    its config.json names, from the hub."""
    tensors, stated = hf.Tensors(folder), hf.read_config(folder)
    start = NAMINGS["original"].tower
    if not is_original(stated) or any(key.startswith(start) for key in tensors):
        return tensors
    name = tower_name(stated)
    if name not in TOWERS:
        return tensors
    tower = hf.Tensors(hf.fetch(f"openai/{name}"))
    own = names.Mapped(tower, only=lambda key: not key.startswith(vit.OTHER))
    return names.Joined(("", tensors), (start, own))


def load_llava(
    model: Llava, tensors: Mapping, tower: Mapping | None = None, rows: int | None = None
) -> None:
    """Fills `model` in place, from any naming; reports what doesn't fit in all parts at once.

    Args:
        tensors: published name -> array.
        tower: a tower's own tensors, for checkpoints without it.
        rows: of the token tables that are read; those after them are for an image token, and fill
            up the table. None: all.

    Raises:
        ValueError: names or shapes don't fit, or this is no LLaVA checkpoint.
    """
    found = plainly(tensors)
    if not any(key.startswith("connector.") for key in found):
        known = ", ".join(naming.connector + "…" for naming in NAMINGS.values())
        raise WeightError(f"not a LLaVA checkpoint: it has none of {known}")
    problems = []

    def attempt(load, *args, **kwargs):
        try:
            load(*args, **kwargs)
        except ValueError as error:
            problems.append(str(error))

    attempt(load_tower, model.vision.tower, found, tower)
    attempt(names.load_torch_dict, model.connector, found, "connector.")
    if model.cfg.newline:
        attempt(load_newline, model, found)
    mine = lambda key: not key.startswith(("connector.", "tower.")) and key != "newline"  # noqa: E731
    cut = {key: lambda table: table[:rows] for key in (EMBED, HEAD) if rows is not None}
    attempt(load_llama, model.llm, names.Mapped(found, cut, mine))
    if problems:
        raise ValueError("\n".join(problems))


def load_tower(tower: ViT | None, found: Mapping, other: Mapping | None = None) -> None:
    """Fills a tower, in place, from tensors by the names of `plain`, or else from its own."""
    if tower is None:
        return
    if any(key.startswith("tower.") for key in found):
        vit.load_vit(tower, found, "tower.")
    elif other is not None:
        vit.load_vit(tower, other)
    else:
        raise WeightError(
            "no tower in this checkpoint: its weights are a checkpoint of their own "
            "(openai/clip-vit-large-patch14-336 for LLaVA 1.5); name it as vision.weights"
        )


def load_newline(model: Llava, found: Mapping) -> None:
    """Fills the newline vector, in place, from tensors by the names of `plain`."""
    mine = names.Mapped(found, only=lambda key: key == "newline")
    names.load_torch_dict(model, mine, only=lambda path, _: tuple(path) == ("newline",))


# ---- out


def export_llava(model: Llava, naming: str = "hf") -> names.Lazy:
    """Published name -> array, in one of `NAMINGS`."""
    parts = (export_llm, export_connector, export_newline, export_tower)
    return names.joined(*(part(model, naming) for part in parts))


def export_llm(model: Llava, naming: str) -> names.Lazy:
    """The language model, with the rows of token tables that the naming has."""
    n, rows = NAMINGS[naming], token_rows(model.cfg, naming)
    llm, out = export_llama(model.llm), names.Lazy()
    for key in llm:
        make, shape = llm.maker(key), llm.shape_of(key)
        if key in (EMBED, HEAD) and shape[0] != rows:
            make, shape = functools.partial(_resized, make, rows), (rows, shape[1])
        name = n.table if key == HEAD else n.llm + key.removeprefix("model.")
        out.set(name, make, shape, llm.dtype_of(key))
    return out


def _resized(make, rows: int) -> np.ndarray:
    table = make()
    if rows <= len(table):
        return table[:rows]
    mean = np.mean(table, 0, np.float32, keepdims=True).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, rows - len(table), 0)])


def export_connector(model: Llava, naming: str) -> names.Lazy:
    prefix, places = NAMINGS[naming].connector, _places(len(model.connector.linears), naming)
    rename = lambda key: places[int(key.split(".")[1])] + key.rpartition(".")[2]  # noqa: E731
    return names.lazy_torch_dict(model.connector, prefix, rename=rename)


def export_newline(model: Llava, naming: str) -> names.Lazy:
    out = names.Lazy()
    if model.cfg.newline:
        value = model.newline.get_raw_value()
        make = lambda: np.asarray(value)  # noqa: E731
        out.set(NAMINGS[naming].newline, make, value.shape, value.dtype)
    return out


def export_tower(model: Llava, naming: str) -> names.Lazy:
    tower = model.vision.tower
    if tower is None:
        return names.Lazy()
    return vit.export_complete(tower, NAMINGS[naming].tower + vit.PREFIXES[tower.cfg.layout])


def connector_names(count: int, naming: str) -> list[str]:
    """Published names of a connector of so many linears."""
    prefix, leaves = NAMINGS[naming].connector, ("weight", "bias")
    return [prefix + place + leaf for place in _places(count, naming) for leaf in leaves]


def _places(count: int, naming: str) -> list[str]:
    """Of the linears: items 0, 2, 4 … of a torch Sequential; a single one has no number."""
    if naming != "original":
        return [f"linear_{i + 1}." for i in range(count)]
    return [""] if count == 1 else [f"{2 * i}." for i in range(count)]
