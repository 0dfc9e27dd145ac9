"""LLaVA 1.5 in all namings that its checkpoints come in. It moves to a recipe of its own.

    part        original                        llava-hf                  llava-hf, transformers >= 4.52
    llm         model.layers.…, model.norm, …   language_model.model.…    model.language_model.…
    table       lm_head.weight                  language_model.lm_head.…  lm_head.weight
    connector   model.mm_projector.{0,2}.…      multi_modal_projector.    model.multi_modal_projector.
                                                linear_{1,2}.…            linear_{1,2}.…
    tower       model.vision_tower.             vision_tower.…            model.vision_tower.…
                vision_tower.…

The tower's prefix is followed by `vision_model.` or not; both are read. The second naming is written,
as llava-hf/llava-1.5-* is published, or the first on request.

A model is a MetaMorph without head: CLIP, its layer -2 without the class token, all patches, no
normalisation. Original checkpoints have no row for the image token, which transformers needs: they
are read with one added row, the mean of the others, which is not written in the original naming.
Their config names the tower; where its weights are not in the checkpoint, `load_llava` takes them as
an argument.

Dropped on purpose: `rotary_emb.inv_freq`, position ids, `image_newline` (1.6 only).
"""  # noqa: E501

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.convert import compare, names, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert.families import Family, Reference
from metamorph_jax.convert.llama import EMBED, HEAD, export_llama, load_llama
from metamorph_jax.models.llm.llama import SIZES as LLM_SIZES
from metamorph_jax.models.llm.llama import LlamaConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.models.vision.vit import SIZES as TOWER_SIZES
from metamorph_jax.models.vision.vit import ViTConfig
from metamorph_jax.recipes.metamorph.config import Config, llm_config
from metamorph_jax.recipes.metamorph.model import MetaMorph
from metamorph_jax.recipes.metamorph.model import create as model_of
from metamorph_jax.recipes.metamorph.published import options


@dataclasses.dataclass(frozen=True)
class Naming:
    """Prefixes of one naming; the llm's own names are `model.…` and `lm_head.weight`."""

    llm: str
    table: str
    connector: str
    tower: str
    linears: tuple[str, str]


NAMINGS = {
    "original": Naming("model.", "lm_head.weight", "model.mm_projector.",
                       "model.vision_tower.vision_tower.", ("0", "2")),
    "hf": Naming("language_model.model.", "language_model.lm_head.weight",
                 "multi_modal_projector.", "vision_tower.", ("linear_1", "linear_2")),
    "hf-2025": Naming("model.language_model.", "lm_head.weight", "model.multi_modal_projector.",
                      "model.vision_tower.", ("linear_1", "linear_2")),
}  # fmt: skip
DROPPED = ("model.image_newline", "image_newline")
# Towers that original configs name, by the last part of the name.
TOWERS = {"clip-vit-large-patch14-336": "clip-l-336", "clip-vit-large-patch14": "clip-l-224"}


def naming_of(tensors: Mapping) -> str:
    """Which of `NAMINGS` a checkpoint has, by its connector."""
    for name, naming in NAMINGS.items():
        if any(key.startswith(naming.connector) for key in tensors):
            return name
    known = ", ".join(naming.connector + "…" for naming in NAMINGS.values())
    raise ValueError(f"not a LLaVA checkpoint: it has none of {known}")


# ---- configs


@dataclasses.dataclass(frozen=True)
class LlavaConfig(Config):
    """A MetaMorph config, and the id of an image in the text."""

    image_token: int = 32000


def make_config(
    tower: ViTConfig, llm: LlamaConfig, image_token: int, dtype: str = "float32"
) -> LlavaConfig:
    """The config of a LLaVA 1.5 made of these parts."""
    return LlavaConfig(
        llm="tiny",  # every field of it is replaced
        llm_options=options(llm),
        vision=VisionConfig(
            f"{tower.layout}-tiny",
            options(tower),
            tokens=tower.tokens,
            normalize=False,
            dtype=dtype,
        ),
        connector="mlp2x_gelu",
        head="none",
        use_vision_ar=False,
        dtype=dtype,
        image_token=image_token,
    )


def config_from_hf(fields: Mapping, dtype: str = "float32") -> LlavaConfig:
    """The config of a config.json in either form: `text_config` and `vision_config` beside each
    other, or the original's Llama fields with `mm_…` among them."""
    if "mm_vision_tower" in fields:
        return _from_original(fields, dtype)
    _only(fields, "projector_hidden_act", "gelu")
    _only(fields, "multimodal_projector_bias", True)
    _only(fields, "vision_feature_select_strategy", "default")
    layer = fields.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer {layer!r}: only one layer is supported")
    # transformers' LlamaConfig, where the file is silent.
    text = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
    } | dict(fields.get("text_config") or {})  # fmt: skip
    if text.get("model_type", "llama") != "llama":
        raise ValueError(f"text_config: model_type {text['model_type']!r}, only 'llama'")
    text.setdefault("tie_word_embeddings", fields.get("tie_word_embeddings", False))
    vision = dict(fields.get("vision_config") or {})
    vision.setdefault("model_type", "clip_vision_model")
    tower = vit.config_from_hf(vision, select_layer=layer, final_norm=False)
    if tower.layout != "clip":
        raise ValueError(f"vision_config: {vision['model_type']!r}, only CLIP is supported")
    token = fields.get("image_token_index", fields.get("image_token_id", 32000))
    return make_config(tower, llama_names.config_from_hf(text), token, dtype)


def _from_original(fields: Mapping, dtype: str) -> LlavaConfig:
    _only(fields, "mm_projector_type", "mlp2x_gelu", default="linear")
    _only(fields, "mm_vision_select_feature", "patch")
    _only(fields, "mm_patch_merge_type", "flat")
    name = str(fields["mm_vision_tower"]).rstrip("/").rsplit("/", 1)[-1]
    if name not in TOWERS:
        raise ValueError(f"mm_vision_tower {name!r} is none of {', '.join(TOWERS)}")
    layer = fields.get("mm_vision_select_layer", -1)
    tower = dataclasses.replace(TOWER_SIZES[TOWERS[name]], select_layer=layer, whole=True)
    llm = dict(fields) | {"model_type": "llama"}
    cfg = llama_names.config_from_hf(llm, added_tokens=1)
    return make_config(tower, cfg, cfg.vocab_size, dtype)


def _only(fields: Mapping, name: str, accepted, default=None) -> None:
    value = fields.get(name, accepted if default is None else default)
    if value != accepted:
        raise ValueError(f"{name}={value!r} is not supported, only {accepted!r}")


def config_to_hf(cfg: LlavaConfig) -> dict:
    """A config.json that `LlavaForConditionalGeneration` reads."""
    tower, llm = cfg.vision.vit, llm_config(cfg)
    if cfg.connector != "mlp2x_gelu":
        raise ValueError(f"connector {cfg.connector!r}: transformers has only mlp2x_gelu")
    if cfg.image_token >= llm.tokens:
        raise ValueError(f"the tables have {llm.tokens} rows, none for token {cfg.image_token}")
    vision, text = vit.config_to_hf(tower), llama_names.config_to_hf(llm)
    del vision["architectures"], vision["torch_dtype"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": cfg.image_token,
        "image_seq_length": tower.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": tower.select_layer if tower.whole else -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": llm.tied,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "float32",
    }


# ---- weights


def load_llava(model: MetaMorph, tensors: Mapping, tower: Mapping | None = None) -> None:
    """Fills `model` in place, from any naming; reports what doesn't fit in all parts at once.

    Args:
        tensors: published name -> array.
        tower: CLIP's own tensors, for checkpoints without their tower.
    """
    naming = NAMINGS[naming_of(tensors)]
    problems = []

    def attempt(load, *args, **kwargs):
        try:
            load(*args, **kwargs)
        except ValueError as error:
            problems.append(str(error))

    if any(key.startswith(naming.tower) for key in tensors):
        prefix = vit.tower_prefix(model.vision.tower.cfg, tensors, naming.tower)
        inside = names.Mapped(tensors, only=lambda key: key.startswith(naming.tower))
        attempt(vit.load_vit, model.vision.tower, inside, prefix)
    elif tower is not None:
        attempt(vit.load_vit, model.vision.tower, tower)
    else:
        problems.append(
            f"no {naming.tower}… in this checkpoint: it was saved without its tower, whose weights "
            "are a checkpoint of their own (openai/clip-vit-large-patch14-336 for LLaVA 1.5)"
        )
    linears = dict(zip(("linears.0", "linears.1"), naming.linears, strict=True))
    attempt(
        names.load_torch_dict,
        model.connector,
        tensors,
        naming.connector,
        rename=lambda key: _connector_name(key, linears),
    )
    attempt(load_llama, model.llm, _llm_view(tensors, naming))
    if problems:
        raise ValueError("\n".join(problems))


def _connector_name(key: str, linears: Mapping[str, str]) -> str:
    head, _, leaf = key.rpartition(".")
    return f"{linears[head]}.{leaf}" if head in linears else key


def _llm_view(tensors: Mapping, naming: Naming) -> Mapping:
    """The language model's tensors under their plain Llama names; keys of no part stay as they are,
    so that they are reported."""
    others = (naming.connector, naming.tower, *DROPPED)
    mine = [key for key in tensors if not key.startswith(others)]
    if naming.llm == "model.":
        return names.Mapped(tensors, only=set(mine).__contains__)
    renamed = {naming.table: HEAD}
    for key in mine:
        if key.startswith(naming.llm):
            renamed[key] = "model." + key.removeprefix(naming.llm)
    changes = {new: (old, lambda x: x) for old, new in renamed.items() if old in tensors}
    kept = {key for key in mine if renamed.get(key, key) == key}
    return names.Mapped(tensors, changes, kept.__contains__)


def export_llava(model: MetaMorph, naming: str = "hf") -> names.Lazy:
    """Published name -> array, in one of `NAMINGS`."""
    n, out = NAMINGS[naming], names.Lazy()

    def put(key: str, found: names.Lazy, source: str) -> None:
        out.set(key, found.maker(source), found.shape_of(source), found.dtype_of(source))

    llm = export_llama(model.llm)
    for key in llm:
        put(n.table if key == HEAD else n.llm + key.removeprefix("model."), llm, key)
    if naming == "original" and model.llm.cfg.added_tokens:
        rows = model.llm.cfg.vocab_size
        for key in (n.llm + EMBED.removeprefix("model."), n.table):
            if key in out:
                make = functools.partial(_first_rows, out.maker(key), rows)
                out.set(key, make, (rows, out.shape_of(key)[1]), out.dtype_of(key))
    linears = dict(zip(("linears.0", "linears.1"), n.linears, strict=True))
    connector = names.lazy_torch_dict(
        model.connector, n.connector, rename=lambda key: _connector_name(key, linears)
    )
    prefix = n.tower + vit.PREFIXES[model.vision.tower.cfg.layout]
    tower = vit.export_complete(model.vision.tower, prefix)
    for found in (connector, tower):
        for key in found:
            put(key, found, key)
    return out


def _first_rows(make, rows: int) -> np.ndarray:
    return make()[:rows]


def published(fields: Mapping) -> list[str]:
    """Every key of the checkpoint that a config.json belongs to, tower included; in the original
    naming if the fields are."""
    cfg = config_from_hf(fields)
    n = NAMINGS["original" if "mm_vision_tower" in fields else "hf"]
    keys = [
        n.table if key == HEAD else n.llm + key.removeprefix("model.")
        for key in llama_names.published(llama_names.config_to_hf(llm_config(cfg)))
    ]
    keys += [f"{n.connector}{i}.{leaf}" for i in n.linears for leaf in ("weight", "bias")]
    return keys + [
        n.tower + key for key in vit.published(vit.config_to_hf(cfg.vision.vit))
    ]


# ---- family


def create(cfg: LlavaConfig, *, rngs: nnx.Rngs) -> MetaMorph:
    return model_of(cfg, rngs)


def _size(llm: str, rows: int = 32064) -> LlavaConfig:
    """As published by llava-hf: 64 more rows, the first of them for the image token."""
    cfg = dataclasses.replace(LLM_SIZES[llm], vocab_size=rows, max_positions=4096)
    tower = dataclasses.replace(TOWER_SIZES["clip-l-336"], whole=True)
    return make_config(tower, cfg, 32000)


SIZES = {"llava-1.5-7b": _size("llama2-7b"), "llava-1.5-13b": _size("llama2-13b")}

def _compare(model, theirs, rng) -> compare.Rows:
    torch, _ = compare.oracle()
    tower = model.vision.tower
    rows = {f"tower, {k}": v for k, v in compare.vit(tower, theirs.model.vision_tower, rng).items()}
    side, token = tower.cfg.size, theirs.config.image_token_id
    P = model.feature_shape[0]
    pixels = rng.normal(size=(compare.BATCH, side, side, 3)).astype(np.float32)
    ids = rng.integers(0, token, (compare.BATCH, P + compare.LENGTH))
    ids[:, 3 : 3 + P] = token
    with torch.no_grad():
        images = compare.to_torch(pixels.transpose(0, 3, 1, 2))
        projected = theirs.get_image_features(pixel_values=images)
        tokens = compare.to_torch(ids)
        out = theirs(input_ids=tokens, pixel_values=images, output_hidden_states=True)
    projected = getattr(projected, "pooler_output", projected)
    projected = torch.stack(list(projected)) if isinstance(projected, list | tuple) else projected

    def embed(model, pixels, ids):
        visual = model.project(model.visual_features(pixels))
        text = model.embed_text(ids)
        return visual, jax.lax.dynamic_update_slice(text, visual.astype(text.dtype), (0, 3, 0))

    visual, embeds = compare.run(embed, model, jnp.asarray(pixels), jnp.asarray(ids))
    wanted = compare.to_numpy(projected).reshape(visual.shape)
    rows["projected"] = (compare.to_numpy(visual), wanted)
    return rows | compare.llm_rows(*compare.hidden_states(model.llm, embeds), out)


FAMILY = Family(
    "llava",
    ("llava", "llava_llama"),
    config_from_hf,
    config_to_hf,
    create,
    load_llava,
    export_llava,
    SIZES,
    published,
    Reference(compare.transformers_model("LlavaForConditionalGeneration"), _compare),
)
