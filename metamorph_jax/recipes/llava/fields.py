"""LLaVA's config.json in both of its forms, and the files of its image processor.

    original        Llama's fields with mm_… among them       grids as (width, height)
    transformers    text_config and vision_config (llava, llava_next)
                                                              grids as (height, width)

Both forms of 1.6 list the same numbers, so a square image that fits two grids equally well gets the
tall one in the original and the wide one in transformers. The order is kept as it is read.

Fields that a file of transformers' form lacks have the values of its own classes. Original files
say which tower they were trained with by its name only.
"""

import dataclasses
from collections.abc import Mapping

from metamorph_jax.convert import library, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.data.images import Preprocess, preprocess_from_hf, preprocess_to_hf
from metamorph_jax.errors import ConfigError
from metamorph_jax.files import shown
from metamorph_jax.models.llm.llama import LlamaConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.models.vision.vit import SIZES as TOWER_SIZES
from metamorph_jax.models.vision.vit import ViTConfig
from metamorph_jax.recipes.llava.config import GRIDS, Config, llm_config

IMAGE = "<image>"
# Towers that original configs name, by the last part of the name.
TOWERS = {"clip-vit-large-patch14-336": "clip-l-336", "clip-vit-large-patch14": "clip-l-224"}
# The language model of an original checkpoint, by its model type; the other types are Llamas.
_LLMS = {"llava_mistral": "mistral", "llava_qwen": "qwen2"}
# What lies between tower and connector: field of `VisionConfig` -> of our own kind of config.json.
OWN_KIND = "llava_jax"
_BETWEEN = {"tokens": "num_image_tokens", "reduction": "image_token_reduction",
            "normalize": "normalize_vision", "softmax": "apply_softmax"}  # fmt: skip
# `image_aspect_ratio` of original configs -> our image mode.
_MODES = {"square": "crop", "pad": "pad", "anyres": "anyres"}


def is_original(fields: Mapping) -> bool:
    """Whether a config.json is in the original form."""
    return "mm_vision_tower" in fields


def make_config(
    tower: ViTConfig, llm: LlamaConfig, dtype: str = "float32", between=None, **options
) -> Config:
    """The config of a LLaVA that is made of these parts.

    Args:
        between: fields of `VisionConfig` for what lies between tower and connector; None: nothing.
        options: fields of `Config` that differ from its defaults.
    """
    between = {"tokens": tower.tokens, "normalize": False} if between is None else between
    vision = VisionConfig(f"{tower.layout}-tiny", fields_of(tower), dtype=dtype, **between)
    llm_fields = fields_of(llm)  # every one of them takes the place of that of "tiny"
    return Config(llm="tiny", llm_options=llm_fields, vision=vision, dtype=dtype, **options)


def fields_of(cfg) -> dict:
    """The fields of a part's config, for `llm_options` and `vision.tower_options`."""
    return {k: v for k, v in vars(cfg).items() if k not in ("dtype", "remat")}


# ---- in


def config_from_hf(fields: Mapping, dtype: str = "float32", processor=None) -> Config:
    """The config of a config.json in either form.

    Args:
        processor: fields of the preprocessor_config.json beside it, or None: how images become
            squares, where the config.json doesn't say it.

    Raises:
        ValueError: for what we have no counterpart of.
    """
    cfg = (_from_original if is_original(fields) else _from_library)(fields, dtype)
    if processor is None or cfg.image_mode == "anyres":
        return cfg
    if fields.get("image_aspect_ratio") in _MODES:
        return cfg
    return dataclasses.replace(cfg, image_mode=preprocess_from_hf(processor).mode)


def _from_library(fields: Mapping, dtype: str) -> Config:
    own = {k: v for k, v in fields.items() if k not in ("text_config", "vision_config")}
    # Early files of 1.6 were saved as `llava`, but with the grids.
    tiled = fields.get("model_type") == "llava_next" or bool(fields.get("image_grid_pinpoints"))
    f = library.resolved("llava_next" if tiled else "llava", own)
    _only(f, "projector_hidden_act", "gelu")
    _only(f, "multimodal_projector_bias", True)
    layer = f["vision_feature_layer"]
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if not isinstance(layer, int):
        raise ConfigError(f"vision_feature_layer {layer!r}: only one layer is supported")
    text, vision = (_part(fields, f, name) for name in ("text_config", "vision_config"))
    if f["tie_word_embeddings"]:
        text["tie_word_embeddings"] = True
    tower = vit.config_from_hf(vision, select_layer=layer, final_norm=False)
    _only(f, "vision_feature_select_strategy", _strategy(tower))
    more = {"image_token": f["image_token_index"]}
    if tiled:
        grids = tuple((w, h) for h, w in _grids(f["image_grid_pinpoints"], tower.size))
        more |= {"image_mode": "anyres", "merge": "spatial_unpad", "grids": grids}
    return make_config(tower, llama_names.config_from_hf(text), dtype, **more)


def _part(fields: Mapping, defaults: Mapping, name: str) -> dict:
    """All fields of one half of a config, with the defaults of its model type."""
    own, usual = _table(fields, name), defaults[name]
    if not own:
        return dict(usual)
    kind = _word(own, "model_type", usual["model_type"])
    if name == "vision_config":
        return dict(own) | {"model_type": kind}
    if kind not in llama_names.KINDS:
        raise ConfigError(f"{name}: model_type {kind!r} is none of {', '.join(llama_names.KINDS)}")
    return library.resolved(kind, own) | {"model_type": kind}


def _strategy(tower: ViTConfig) -> str:
    """`vision_feature_select_strategy` that leaves the patches of a tower: "default" drops the
    first token, which is that of the class where there is one."""
    return "default" if tower.class_token else "full"


def _from_original(fields: Mapping, dtype: str) -> Config:
    _only(fields, "mm_vision_select_feature", "patch")
    merge = _word(fields, "mm_patch_merge_type", "flat")
    mode = _word(fields, "image_aspect_ratio", "square")
    if mode not in _MODES:
        raise ConfigError(f"image_aspect_ratio {mode!r} is none of {', '.join(_MODES)}")
    tower = named_tower(fields)
    mode = _word(fields, "image_mode", _MODES[mode])  # only our files have the former
    more = {"image_mode": mode, "merge": merge, "start_end": False}
    if mode == "anyres":
        grids = fields.get("image_grid_pinpoints") or [list(grid) for grid in GRIDS]
        more["grids"] = _grids(grids, tower.size)
    kind = _LLMS.get(_word(fields, "model_type", "llava"), "llama")
    llm = llama_names.config_from_hf(dict(fields) | {"model_type": kind})
    if fields.get("mm_use_im_start_end"):  # its rows are the last two of the tables
        more["start_end"] = True
        llm = dataclasses.replace(llm, vocab_size=llm.vocab_size - 2, added_tokens=2)
    between = None
    if fields.get("model_type") == OWN_KIND:
        between = {ours: fields[name] for ours, name in _BETWEEN.items() if name in fields}
    connector = _word(fields, "mm_projector_type", "linear")
    return make_config(tower, llm, dtype, between, connector=connector, **more)


def named_tower(fields: Mapping) -> ViTConfig:
    """The tower of an original config: described by a table of ours, or named."""
    layer = fields.get("mm_vision_select_layer", -1)
    if type(layer) is not int:
        raise ConfigError(f"mm_vision_select_layer {shown(repr(layer), 80)} is not a whole number")
    if own := _table(fields, "vision_config"):
        return vit.config_from_hf(own, select_layer=layer, final_norm=False)
    name = tower_name(fields)
    if name not in TOWERS:
        raise ConfigError(f"mm_vision_tower {shown(name)!r} is none of {', '.join(TOWERS)}")
    return dataclasses.replace(TOWER_SIZES[TOWERS[name]], select_layer=layer, whole=True)


def tower_name(fields: Mapping) -> str:
    """The last part of the name of an original checkpoint's tower."""
    return str(fields["mm_vision_tower"]).rstrip("/").rsplit("/", 1)[-1]


def _grids(given, side: int) -> tuple[tuple[int, int], ...]:
    """Checked pairs of sides, as the file has them; `Config` wants (width, height)."""
    pairs = given if isinstance(given, list) else []
    good = [p for p in pairs if isinstance(p, list | tuple) and len(p) == 2
            and all(type(n) is int and n > 0 and n % side == 0 for n in p)]  # fmt: skip
    if not pairs or len(good) < len(pairs):
        raise ConfigError(f"image_grid_pinpoints {shown(repr(given), 200)}: expected pairs of "
                          f"multiples of {side}")  # fmt: skip
    return tuple((int(a), int(b)) for a, b in pairs)


def _table(fields: Mapping, name: str) -> Mapping:
    """A field that is a table of fields; {} where it is absent, null or empty."""
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is not a table of fields: {shown(repr(value), 80)}")
    return value


def _word(fields: Mapping, name: str, usual: str) -> str:
    """A field that is text; `usual` where it is absent, null or empty."""
    value = fields.get(name) or usual
    if not isinstance(value, str):
        raise ConfigError(f"{name} {shown(repr(value), 80)} is not text")
    return value


def _only(fields: Mapping, name: str, accepted) -> None:
    value = fields.get(name, accepted)
    if value != accepted:
        raise ConfigError(f"{name}={value!r} is not supported, only {accepted!r}")


# ---- out


def config_to_hf(cfg: Config) -> dict:
    """A config.json that transformers reads: `LlavaForConditionalGeneration`, or for anyres
    `LlavaNextForConditionalGeneration`.

    Raises:
        ConfigError: transformers has no such model; the message says in what.
    """
    if found := lacking(cfg):
        raise ConfigError(f"transformers' LLaVA has no {'; no '.join(found)}")
    tower, llm = _tower(cfg), llm_config(cfg)
    tiled = cfg.image_mode == "anyres"
    row, rows = image_row(cfg), token_rows(cfg, "hf")
    vision = vit.config_to_hf(tower)
    text = llama_names.config_to_hf(dataclasses.replace(llm, vocab_size=rows, added_tokens=0))
    del vision["architectures"], vision["torch_dtype"]
    fields = {
        "architectures": [f"Llava{'Next' if tiled else ''}ForConditionalGeneration"],
        "model_type": "llava_next" if tiled else "llava",
        "image_token_index": row,
        "image_seq_length": tower.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": _layer(tower),
        "vision_feature_select_strategy": _strategy(tower),
        "tie_word_embeddings": llm.tied,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "float32",
    }
    if tiled:
        fields["image_grid_pinpoints"] = [[h, w] for w, h in cfg.grids]
    return fields


def image_row(cfg: Config) -> int:
    """The id that stands for an image in transformers: the config's, or that after all others."""
    return cfg.image_token if cfg.image_token >= 0 else llm_config(cfg).tokens


def token_rows(cfg: Config, naming: str) -> int:
    """Rows of the token tables, see `keys.NAMINGS`.

    In the original naming those below the image token; in the others one for it, too, and such as
    fill up a multiple of 64, as published: tokenizers of these have a token for padding after it.
    """
    if naming == "original":
        return image_row(cfg)
    tokens = llm_config(cfg).tokens
    return tokens if cfg.image_token >= 0 else -(-(tokens + 1) // 64) * 64


def _layer(tower: ViTConfig) -> int:
    # A tower that holds only the layers it runs ends with the one that it gives out.
    return tower.select_layer if tower.whole else -1


def lacking(cfg: Config) -> list[str]:
    """What of a model transformers' LLaVA does not have; empty if it has all of it."""
    tower, found = cfg.vision.vit, []
    if _is_between(cfg):
        found.append("visual tokens that are reduced or normalised")
    if tower is not None and (tower.registers or tower.final_norm):
        found.append("a tower with registers or a final norm")
    if cfg.connector != "mlp2x_gelu":
        found.append(f"connector {cfg.connector!r} (only mlp2x_gelu)")
    if (cfg.image_mode == "anyres") != (cfg.merge == "spatial_unpad"):
        found.append(f"image_mode {cfg.image_mode!r} with merge {cfg.merge!r} (anyres goes with "
                     "spatial_unpad)")  # fmt: skip
    return found


def _is_between(cfg: Config) -> bool:
    vision = cfg.vision
    return vision.reduce.reduces or vision.normalize or vision.softmax


def _tower(cfg: Config) -> ViTConfig:
    if cfg.vision.vit is None:
        raise ConfigError("this model has no tower (its features come from a cache): it can't be "
                          "written whole")  # fmt: skip
    return cfg.vision.vit


def config_to_original(cfg: Config) -> dict:
    """A config.json in the original form, with `vision_config` beside the tower's name: that alone
    does not describe every tower. Where something lies between tower and connector, which public
    code would leave out, the model type is one of ours."""
    llm, tower = llm_config(cfg), _tower(cfg)
    rows = token_rows(cfg, "original")
    fields = llama_names.config_to_hf(dataclasses.replace(llm, vocab_size=rows, added_tokens=0))
    kind = "Qwen" if llm.qkv_bias or llm.qk_norm else "Llama"
    mode = next((k for k, v in _MODES.items() if v == cfg.image_mode), "square")
    names = {v: k for k, v in TOWERS.items()}
    size = next((k for k in names if _alike(TOWER_SIZES[k], tower)), None)
    own = {}
    if _is_between(cfg):
        if cfg.vision.reduction == "mlpmixer":
            raise ConfigError("the original layout has no names for the mlpmixer's weights")
        own = {"model_type": OWN_KIND, "architectures": ["Llava"]}
        own |= {name: getattr(cfg.vision, ours) for ours, name in _BETWEEN.items()}
    return fields | {
        "architectures": [f"Llava{kind}ForCausalLM"],
        "model_type": f"llava_{kind.lower()}",
        "mm_vision_tower": f"openai/{names[size]}" if size else "vision_config",
        "mm_hidden_size": tower.width,
        "mm_projector_type": cfg.connector,
        "mm_vision_select_layer": _layer(tower),
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": cfg.merge,
        "mm_use_im_start_end": cfg.start_end,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # the public code then keeps the tower of the files
        "image_aspect_ratio": mode,
        "image_mode": cfg.image_mode,
        "image_grid_pinpoints": [list(g) for g in cfg.grids] if mode == "anyres" else None,
        "vision_config": vit.config_to_hf(tower),
        **own,
    }


def _alike(a: ViTConfig, b: ViTConfig) -> bool:
    names = ("layout", "image_size", "patch", "width", "layers", "heads", "mlp_width")
    return all(getattr(a, name) == getattr(b, name) for name in names)


# ---- the image processor


def grids_of(processor: Mapping) -> tuple | None:
    """(width, height) of the grids that a preprocessor_config.json has, or None."""
    given = processor.get("image_grid_pinpoints")
    return tuple((w, h) for h, w in _grids(given, 1)) if given else None


def processor_files(cfg: Config, process: Preprocess) -> dict[str, dict]:
    """File name -> fields of what transformers' processor of the model reads.

    Args:
        process: makes the pixels of one view.
    """
    tower, tiled = cfg.vision.vit, cfg.image_mode == "anyres"
    kind = "LlavaNextProcessor" if tiled else "LlavaProcessor"
    if tiled:  # each view is a square already
        process = dataclasses.replace(process, mode="crop", resize=None)
    fields = preprocess_to_hf(process) | {"processor_class": kind}
    if tiled:
        fields |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [[h, w] for w, h in cfg.grids],
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
        }
    whole = {
        "processor_class": kind,
        "patch_size": tower.patch,
        "vision_feature_select_strategy": _strategy(tower),
        "num_additional_image_tokens": int(tower.class_token),
        "image_token": IMAGE,
    }
    return {"preprocessor_config.json": fields, "processor_config.json": whole}
