"""The model families whose published weights come in and go out, by name.

A family is a handful of functions (`Family`). They live in the module that holds the family's key
table, as `FAMILIES = {name: Family(...)}`; a module is imported when one of its families is asked
for. A new family is one line in `MODULES`, one or more in `MODEL_TYPES`.
"""

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of checkpoints is read and written.

    Attributes:
        name: as in `FAMILIES`.
        config_from_hf: fields of config.json -> our config; ValueError for what we don't support.
        config_to_hf: our config -> a config.json that transformers or diffusers reads unchanged.
        create: (cfg, *, rngs) -> module; works under `nnx.eval_shape`.
        load: (module, published name -> array) fills in place; one ValueError lists all keys that
            are missing, left over or of another shape.
        export: module -> published name -> array.
        sizes: name -> config of ours.
        published: fields of config.json -> every key of the published checkpoint, or None.
    """

    name: str
    config_from_hf: Callable[[Mapping], Any]
    config_to_hf: Callable[[Any], dict]
    create: Callable[..., Any]
    load: Callable[[Any, Mapping], None]
    export: Callable[[Any], Mapping]
    sizes: Mapping[str, Any]
    published: Callable[[Mapping], list[str]] | None = None


# Family -> module of this folder that has it in its `FAMILIES`.
MODULES = {
    "llama": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "siglip": "vit",
    "clip-vision": "vit",
    "dinov2": "vit",
    "clip-text": "clip_text",
    "sd-unet": "diffusion",
    "sd-vae": "diffusion",
    "llava": "llava",
    "metamorph": "metamorph",
}

# `model_type` (transformers) or `_class_name` (diffusers) of a config.json -> family.
MODEL_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "clip": "clip-vision",
    "clip_vision_model": "clip-vision",
    "clip_text_model": "clip-text",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "UNet2DConditionModel": "sd-unet",
    "AutoencoderKL": "sd-vae",
    "llava": "llava",
    "llava_llama": "llava",
    "metamorph_llama": "metamorph",
}


class _Registry(Mapping):
    """name -> Family; its module is imported at the first look-up."""

    def __getitem__(self, name: str) -> Family:
        if name not in MODULES:
            raise KeyError(f"no family {name!r}; known: {', '.join(MODULES)}")
        module = importlib.import_module(f"metamorph_jax.convert.{MODULES[name]}")
        return module.FAMILIES[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


FAMILIES: Mapping[str, Family] = _Registry()


def of_fields(fields: Mapping, where: str = "config.json") -> Family:
    """The family that the fields of a config.json name; ValueError if it is none of ours."""
    kind = fields.get("model_type") or fields.get("_class_name")
    if kind is None:
        raise ValueError(f"{where} has neither model_type nor _class_name")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{where}: model type {kind!r} is not supported; known: {', '.join(MODEL_TYPES)}"
        )
    return FAMILIES[MODEL_TYPES[kind]]


def detect(folder: str | pathlib.Path) -> Family:
    """The family of a checkpoint folder, by its config.json.

    Raises:
        FileNotFoundError: without a config.json; for a diffusers pipeline, which has one in each
            of its subfolders, these are listed.
        ValueError: for a model type that is not ours.
    """
    folder = pathlib.Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; name one of its parts: {', '.join(parts)}" if parts else ""
        raise FileNotFoundError(f"no config.json in {folder}{hint}")
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds no table of fields")
    return of_fields(fields, str(file))
