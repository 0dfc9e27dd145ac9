"""Checkpoints of LLaVA 1.0, 1.5 and 1.6, how our runs are written, and parity with transformers.

Read: original names and those of transformers, with or without the tower, which an original file
only names (`keys.py`); their config.json and image processors (`fields.py`); projector files and
what lies beside adapters (`projectors.py`). Delta weights of v0 are applied first, by `metamorph
convert --delta`.

Written: a folder for `LlavaForConditionalGeneration`, or for anyres for
`LlavaNextForConditionalGeneration`, with its processor; or one in the original layout, which also
has linear and deeper connectors and merges that transformers lacks.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.convert import agree, compare, export, hf, specs, vision, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert.chat_template import recognised
from metamorph_jax.convert.export import Source, Writer, trained_source
from metamorph_jax.convert.families import Family, Reference, RunForm
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.convert.peft import CONFIG as ADAPTERS
from metamorph_jax.data import tokenizers
from metamorph_jax.data.config import DataConfig, ImageConfig, RowConfig
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.views import AnyRes
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.connectors.mlp import linear_widths
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm.llama import SIZES as LLM_SIZES
from metamorph_jax.models.vision.vit import SIZES as TOWER_SIZES
from metamorph_jax.recipes.llava.config import Config, added_names, llm_config
from metamorph_jax.recipes.llava.fields import (
    IMAGE,
    OWN_KIND,
    config_from_hf,
    config_to_hf,
    config_to_original,
    grids_of,
    image_row,
    is_original,
    lacking,
    make_config,
    processor_files,
)
from metamorph_jax.recipes.llava.input import input_spec, make_chat
from metamorph_jax.recipes.llava.keys import (
    NAMINGS,
    connector_names,
    export_llava,
    load_llava,
    read,
)
from metamorph_jax.recipes.llava.model import Llava
from metamorph_jax.recipes.llava.model import create as model_of
from metamorph_jax.recipes.llava.projectors import save_beside_adapters, save_connector
from metamorph_jax.types import TEXT

# ---- in


def load_whole(model: Llava, cfg: Config, folder: pathlib.Path) -> None:
    """Fills the model, in place, from a folder with the whole of it.

    A tower in the folder comes before the one that `cfg.vision.weights` names. Where the config has
    no image token, the rows of the folder's, and those after it, are left out.

    Raises:
        ConfigError: the folder holds adapters only, or a model that is not the config's.
        ValueError: listing all names and shapes that don't fit.
    """
    if (folder / ADAPTERS).is_file():
        raise ConfigError(
            f"{folder} holds adapters: name their base as config.model.llm_weights and the folder "
            "as config.model.lora.weights, or merge them with metamorph convert --lora"
        )
    theirs, tokens = check_config(cfg, folder), llm_config(cfg).tokens
    rows = tokens if cfg.image_token < 0 and theirs.image_token == tokens else None
    if cfg.vision.weights != specs.RANDOM and cfg.vision.vit is not None:
        tower = specs.tower_tensors(cfg.vision.weights)
        return load_llava(model, hf.Tensors(folder), tower, rows)
    load_llava(model, read(folder), rows=rows)


_BETWEEN = ("feature_shape", "reduction", "normalize", "softmax")


def check_config(cfg: Config, folder: pathlib.Path) -> Config:
    """Compares a config with what the files of a whole checkpoint say and shapes don't.

    How images become views may differ from the files; that is printed.

    Returns:
        The config of the files.

    Raises:
        ConfigError: naming all differences, see `agree`.
    """
    process = specs.processor_fields(str(folder))
    found: list[Config] = []

    def differences() -> list[str]:
        theirs = config_from_hf(hf.read_config(folder), processor=process)
        found.append(theirs)
        lines = agree.differences(llm_config(cfg), llm_config(theirs), agree.LLM, "llm.")
        lines += agree.differences(cfg, theirs, ("connector",))
        lines += agree.differences(cfg.vision, theirs.vision, _BETWEEN, "vision.")
        ours, stated = cfg.vision.vit, theirs.vision.vit
        if ours is not None:
            lines += agree.differences(ours, stated, (*agree.TOWER, "depth"), "tower.")
            if process is not None:  # how images become squares is `image_mode`, see below
                pixels = Preprocess(ours.size, mean=tuple(ours.mean), std=tuple(ours.std))
                names = ("mean", "std", "size", "resample")
                lines += vision.pixel_differences(pixels, process, names)
        return lines + _token_differences(theirs, folder)

    advice = "config.model has to say the same; without --config it is as the checkpoint says"
    agree.require(str(folder), differences, advice=advice)
    theirs = found[0]
    if process is not None and (grids := grids_of(process)) and theirs.image_mode == "anyres":
        theirs = dataclasses.replace(theirs, grids=grids)
    changed = ("image_mode", "merge") + ("grids",) * (cfg.image_mode == "anyres")
    for name in changed:
        ours, stated = getattr(cfg, name), getattr(theirs, name)
        if ours != stated:
            print(f"config.model.{name} {ours!r} takes the place of {stated!r} in {folder}",
                  file=sys.stderr, flush=True)  # fmt: skip
    return theirs


def _token_differences(theirs: Config, folder: pathlib.Path) -> list[str]:
    """Where config.json and tokenizer give the image token different ids."""
    if theirs.image_token < 0 or not tokenizers.is_in(folder):
        return []
    id = tokenizers.load(folder).get_vocab().get(IMAGE, theirs.image_token)
    return agree.differences({IMAGE: theirs.image_token}, {IMAGE: id}, [IMAGE], "token ")


def published(fields: Mapping) -> list[str]:
    """Every key of the checkpoint that a config.json belongs to, tower included; in the original
    naming if the fields are."""
    cfg = config_from_hf(fields)
    naming = "original" if is_original(fields) else "hf"
    n, tower = NAMINGS[naming], cfg.vision.vit
    keys = [
        n.table if key == llama_names.HEAD else n.llm + key.removeprefix("model.")
        for key in llama_names.published(llama_names.config_to_hf(llm_config(cfg)))
    ]
    count = len(linear_widths(cfg.connector, 1, 1)) - 1
    keys += connector_names(count, naming) + [n.newline] * cfg.newline
    return keys + [n.tower + key for key in vit.published(vit.config_to_hf(tower))]


def of_checkpoint(spec: str, fields: Mapping) -> tuple[Config, DataConfig] | None:
    """How a published checkpoint is used without a config file; None if it is no LLaVA.

    It computes in bfloat16 unless it was saved in float32. Questions are written as the tokenizer's
    chat template says if we wrote it, else as the checkpoint's kind was trained ("auto").

    Args:
        spec: "hf:OWNER/NAME" or a folder.
        fields: of its config.json.
    """
    if not FAMILY.matches(fields):
        return None
    process, dtype = specs.processor_fields(spec), export.computing_dtype(fields)
    cfg = config_from_hf(fields, dtype, process)
    if process is not None and cfg.image_mode == "anyres" and (grids := grids_of(process)):
        cfg = dataclasses.replace(cfg, grids=grids)
    cfg = dataclasses.replace(cfg, weights=spec, tokenizer=spec)
    written = recognised(specs.tokenizer(spec)) or {"template": "auto"}
    images = ImageConfig(max_frames=int(cfg.image_mode == "anyres"))  # else one fills the context
    row = RowConfig(length=export.context_length(fields), **written)
    return cfg, DataConfig(row=row, images=images)


# ---- out


def save(folder: pathlib.Path, model: Llava, source: Source, writer: Writer) -> int:
    """A folder that transformers loads, with its processor, or in the original layout where
    transformers has no such model, which is printed; returns bytes of all tensors."""
    if found := lacking(model.cfg):
        print(f"transformers' LLaVA has no {'; no '.join(found)}: written in the original layout",
              flush=True)  # fmt: skip
        return save_reference(folder, model, source, writer)
    fields, ids = config_to_hf(model.cfg), export.write_generation(folder, source)
    _write(folder, fields | {"text_config": fields["text_config"] | ids}, writer)
    _with_image(source.tokenizer, model.cfg).save_pretrained(folder)
    _write_processor(folder, model.cfg)
    return writer.weights(folder, export_llava(model, "hf"))


def save_reference(folder: pathlib.Path, model: Llava, source: Source, writer: Writer) -> int:
    """A folder in the layout of the public implementation; returns bytes of all tensors."""
    cfg = model.cfg
    ids = export.write_generation(folder, source)
    _write(folder, config_to_original(cfg) | ids, writer)
    rows, added = llm_config(cfg).vocab_size, added_names(cfg)
    tokenizers.extend(source.tokenizer, rows, added).save_pretrained(folder)
    return writer.weights(folder, export_llava(model, "original"))


def _save_published(family, folder, model: Llava, source: Source, writer: Writer) -> int:
    """What `metamorph convert` makes of a published checkpoint; as `save`."""
    given, cfg = source.fields, model.cfg
    if found := lacking(cfg):
        raise ConfigError(f"transformers' LLaVA has no {'; no '.join(found)}; the checkpoint is "
                          "read as it is: name it as config.model.weights")  # fmt: skip
    fields = family.config_to_hf(cfg)
    ids = export.special_ids(given.get("text_config") or given, source.tokenizer)
    _write(folder, fields | {"text_config": fields["text_config"] | ids}, writer)
    if source.folder is not None:
        export.copy_files(source.folder, folder)
        process = specs.processor_fields(str(source.folder))
        if process is None:
            _write_processor(folder, cfg)
        if tokenizers.is_in(source.folder):
            found = tokenizers.load(source.folder)
            if IMAGE not in found.get_vocab():
                _with_image(found, cfg).save_pretrained(folder)
    return writer.weights(folder, export_llava(model, "hf"))


def _write(folder: pathlib.Path, fields: Mapping, writer: Writer) -> None:
    kind = {"torch_dtype": writer.torch_dtype, "dtype": writer.torch_dtype}
    export.write_json(folder / "config.json", dict(fields) | kind)


def _with_image(tokenizer, cfg: Config):
    """The tokenizer with a token for an image, which transformers' processor asks for."""
    llm, row = llm_config(cfg), image_row(cfg)
    if (id := tokenizer.get_vocab().get(IMAGE)) is not None:
        if id != row:
            raise ConfigError(f"{IMAGE} has id {id} in the tokenizer, {row} in the model")
        return tokenizer
    if cfg.image_token >= 0:
        return tokenizers.extend(tokenizer, row, [IMAGE])
    added = [name for name in added_names(cfg) if name != IMAGE]
    return tokenizers.extend(tokenizer, llm.vocab_size, [*added, IMAGE])


def _write_processor(folder: pathlib.Path, cfg: Config) -> None:
    process = input_spec(cfg).views.preprocess
    for name, fields in processor_files(cfg, process).items():
        export.write_json(folder / name, fields)


# ---- runs


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    spec = cfg.weights if whole else cfg.llm_weights
    return "" if spec == specs.RANDOM else spec


def generation_fields(cfg: Config) -> dict:
    """The generation_config.json of the weights that the config names; see `specs`."""
    return specs.generation_fields(base(cfg), llm_config(cfg).vocab_size)


def source(cfg: Config, data: DataConfig) -> Source:
    """What the folder of a run takes over beside its weights."""
    fields = specs.llm_fields(cfg.llm_weights) if cfg.llm == "auto" else {}
    chat = make_chat(cfg, data)
    return trained_source(chat, data.row.single_bos, fields, generation_fields(cfg))


# ---- against transformers


def _theirs(folder: pathlib.Path):
    kind = config_to_hf(config_from_hf(hf.read_config(folder)))["architectures"][0]
    return compare.transformers_model(kind)(folder)


def _compare(model: Llava, theirs, rng) -> compare.Rows:
    """Tower, connector, and the language model on rows with one image each; for anyres, images of
    several sizes."""
    torch, _ = compare.oracle()
    tower, token = model.vision.tower, theirs.config.image_token_id
    rows = {f"tower, {k}": v for k, v in compare.vit(tower, theirs.model.vision_tower, rng).items()}
    side, plans, more = tower.cfg.size, *_plans(model)
    views = max(count for count, _ in plans)
    pixels = rng.normal(size=(len(plans), views, side, side, 3)).astype(np.float32)
    length = 3 + max(len(slots) for _, slots in plans) + compare.LENGTH
    ids = rng.integers(0, token, (len(plans), length))
    slots = np.full(ids.shape, TEXT, np.int32)
    for row, (_, own) in enumerate(plans):
        ids[row, 3 : 3 + len(own)], slots[row, 3 : 3 + len(own)] = token, own
    images = compare.to_torch(np.moveaxis(pixels, -1, 2))
    images = images if more else images[:, 0]
    more = {name: torch.tensor(value) for name, value in more.items()}
    with torch.no_grad():
        projected = theirs.get_image_features(pixel_values=images, **more)
        inputs = dict(input_ids=compare.to_torch(ids), pixel_values=images, **more)
        out = theirs(**inputs, output_hidden_states=True)

    def embed(model, pixels, ids, slots):
        B, I = pixels.shape[:2]
        visual = model.project(model.visual_features(pixels.reshape(B * I, *pixels.shape[2:])))
        newline = model.newline[...] if model.cfg.newline else None
        visual = visual.reshape(B, -1, visual.shape[-1])
        return place_visual(model.llm.embed_tokens(ids), visual, slots, newline)

    embeds = compare.run(embed, model, *map(jnp.asarray, (pixels, ids, slots)))
    features = getattr(projected, "pooler_output", projected)
    wanted = np.concatenate([compare.to_numpy(x).reshape(-1, embeds.shape[-1]) for x in features])
    rows["projected"] = (compare.to_numpy(embeds)[ids == token], wanted)
    return rows | compare.llm_rows(*compare.hidden_states(model.llm, embeds), out)


def _plans(model: Llava) -> tuple[list, dict]:
    """((views, slots) of a row each, what the library is told of them besides pixels)."""
    cfg, tower = model.cfg, model.vision.tower.cfg
    if cfg.image_mode != "anyres":
        return [(1, np.arange(tower.tokens, dtype=np.int32))] * compare.BATCH, {}
    side = tower.size
    views = AnyRes(tower.tokens, Preprocess(side), cfg.grids, cfg.merge)
    sizes = [(side // 2, side // 2), (2 * side, side), (side + side // 2, 5 * side)]
    return [views.plan(size) for size in sizes], {"image_sizes": [(h, w) for w, h in sizes]}


# ---- families


def create(cfg: Config, *, rngs: nnx.Rngs) -> Llava:
    return model_of(cfg, rngs)


def _size(llm: str, rows: int, **options) -> Config:
    """As published by llava-hf: with more rows, the first of them for the image token."""
    own = LLM_SIZES[llm]
    tower = dataclasses.replace(TOWER_SIZES["clip-l-336"], whole=True)
    cfg = dataclasses.replace(own, vocab_size=rows)
    return make_config(tower, cfg, image_token=own.vocab_size, **options)


def _next(llm: str, rows: int = 32064) -> Config:
    grids = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
    return _size(llm, rows, image_mode="anyres", merge="spatial_unpad", grids=grids)


SIZES = {
    "llava-1.5-7b": _size("vicuna-7b", 32064),
    "llava-1.5-13b": _size("vicuna-13b", 32064),
    "llava-1.6-vicuna-7b": _next("vicuna-7b"),
    "llava-1.6-vicuna-13b": _next("vicuna-13b"),
    "llava-1.6-mistral-7b": _next("mistral-7b"),
    "llava-1.6-34b": _next("yi-34b", 64064),
}
FAMILY = Family(
    "llava",
    (
        "llava",
        "llava_next",
        "llava_llama",
        "llava_mistral",
        "llava_qwen",
        OWN_KIND,
        "llama+mm_vision_tower",
    ),
    config_from_hf,
    config_to_hf,
    create,
    load_llava,
    export_llava,
    SIZES,
    published,
    Reference(_theirs, _compare),
    _save_published,
    read,
)
RUN = RunForm(
    save, source, ("llm",), base, save_reference, save_connector, save_beside_adapters,
    of_checkpoint=of_checkpoint,
)  # fmt: skip
FAMILIES = (RUN, FAMILY)
