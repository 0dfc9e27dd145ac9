"""Vision towers by the published names of SigLIP (and SigLIP 2), CLIP, DINOv2 and EVA.

    ours                     siglip, clip                            dinov2
    patch_embedding          embeddings.patch_embedding              embeddings.patch_embeddings.projection
    position_embedding       embeddings.position_embedding.weight    embeddings.position_embeddings [1, T, D]
    class_embedding          embeddings.class_embedding              embeddings.cls_token [1, 1, D]
    register_tokens          -                                       embeddings.register_tokens
    mask_token               -                                       embeddings.mask_token
    pre_layernorm            pre_layrnorm (as published)             -
    layers.(stack).…         encoder.layers.N.…                      encoder.layer.N.…
    post_layernorm           post_layernorm                          layernorm
    head.…                   head.… (siglip)                         -

Keys of siglip and clip start with `vision_model.`; transformers 5 omits it. Both are read,
the former is written.

EVA's names are those of BLIP-2's files, see `convert/blip2.py`; its own file has a layer more than
BLIP-2 runs.

Dropped on purpose: position ids, a classifier, the text half of a two-tower checkpoint (`OTHER`);
and what the tower doesn't hold: layers after the selected one, a final norm it doesn't use, DINOv2's
mask token (unless it is `whole`), SigLIP's pooling head (without `pool`). The position table is
resized to the tower's grid. Configs made by `config_from_hf` keep everything.
"""  # noqa: E501

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import agree, blip2, compare, export, library, names
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.families import Family, Reference
from metamorph_jax.data import images
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.vit import ViT, ViTConfig, resize_positions

_CLIP = (
    (r"^patch_embedding", "embeddings.patch_embedding"),
    (r"^position_embedding$", "embeddings.position_embedding.weight"),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^pre_layernorm", "pre_layrnorm"),
    (r"^layers\.", "encoder.layers."),
)
_DINOV2 = (
    (r"^patch_embedding", "embeddings.patch_embeddings.projection"),
    (r"^position_embedding$", "embeddings.position_embeddings"),
    (r"^class_embedding$", "embeddings.cls_token"),
    (r"^(register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^post_layernorm", "layernorm"),
    (r"^layers\.", "encoder.layer."),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.q_proj", "attention.attention.query"),
    (r"self_attn\.k_proj", "attention.attention.key"),
    (r"self_attn\.v_proj", "attention.attention.value"),
    (r"self_attn\.out_proj", "attention.output.dense"),
    (r"layer_scale([12])$", r"layer_scale\1.lambda1"),
)
_EVA = (
    (r"^patch_embedding", "patch_embed.proj"),
    (r"^position_embedding$", "pos_embed"),
    (r"^class_embedding$", "cls_token"),
    (r"^layers\.", "blocks."),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"self_attn\.", "attn."),
)
RENAMES = {"siglip": _CLIP, "clip": _CLIP, "dinov2": _DINOV2, "eva": _EVA}
PREFIXES = {
    "siglip": "vision_model.", "clip": "vision_model.", "dinov2": "", "eva": blip2.TOWER,
}  # fmt: skip
# The other half of two-tower checkpoints.
OTHER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_NORMS = {
    "siglip": "post_layernorm.", "clip": "post_layernorm.", "dinov2": "layernorm.",
    "eva": ("norm.", "fc_norm."),
}  # fmt: skip
_NEVER = re.compile(r"embeddings\.position_ids$|classifier\.")
_MASK = "embeddings.mask_token"
_LAYER = re.compile(r"(?:encoder\.layers?|blocks)\.(\d+)\.")


def rename(cfg: ViTConfig, key: str) -> str:
    """The published name of one of our (torch-style) names."""
    for pattern, replacement in RENAMES[cfg.layout]:
        key = re.sub(pattern, replacement, key)
    return key


def dropped(cfg: ViTConfig, key: str) -> bool:
    """Whether a published key is left out on purpose."""
    layer, last = _LAYER.match(key), cfg.layers + (cfg.layout == "eva")
    return (
        bool(_NEVER.match(key))
        or (not cfg.pool and key.startswith("head."))
        or (not cfg.whole and key == _MASK)
        or (layer is not None and cfg.held <= int(layer[1]) < last)
        or (not cfg.has_norm and key.startswith(_NORMS[cfg.layout]))
    )


def _position_table(cfg: ViTConfig, table) -> np.ndarray:
    """[T, D] for the tower's grid; the given bytes where no resize is needed."""
    table = np.asarray(table).reshape(np.shape(table)[-2:])
    rows = cfg.grid**2 + int(cfg.class_token)
    if len(table) == rows:
        return table
    table = table.astype(np.float32)
    return resize_positions(table, cfg.grid, int(cfg.class_token), bool(cfg.registers))


def tower_prefix(cfg: ViTConfig, tensors: Mapping, start: str) -> str:
    """The prefix of a tower's keys inside a larger checkpoint: `start`, with or without the
    layout's own after it."""
    longer = start + PREFIXES[cfg.layout]
    return longer if any(k.startswith(longer) for k in tensors) else start


def load_vit(tower: ViT, tensors: Mapping[str, np.ndarray], prefix: str | None = None) -> None:
    """Fills `tower` in place.

    Args:
        tensors: published name -> array.
        prefix: of the tower's names; default: the layout's own if any key has it, else none; then
            keys that belong to nothing known are errors, too.
    """
    cfg = tower.cfg
    if cfg.layout == "eva":
        tensors = blip2.split_tower(tensors)
    if prefix is None:
        prefix = PREFIXES[cfg.layout]
        prefix = prefix if any(k.startswith(prefix) for k in tensors) else ""
        unknown = sorted(k for k in tensors if not k.startswith((prefix, *OTHER)))
        if unknown:
            raise ValueError(f"left over ({len(unknown)}): {'; '.join(unknown)}")
    position = prefix + rename(cfg, "position_embedding")
    first = prefix + rename(cfg, "class_embedding")
    changes = {position: lambda table: _position_table(cfg, table), first: np.ravel}
    own = lambda key: key.startswith(prefix) and (prefix or not key.startswith(OTHER))  # noqa: E731
    names.load_torch_dict(
        tower,
        names.Mapped(tensors, changes, own),
        prefix,
        stacked=("layers",),
        rename=lambda key: rename(cfg, key),
        ignore=lambda key: dropped(cfg, key),
    )


def export_vit(tower: ViT, prefix: str | None = None) -> names.Lazy:
    """Published name -> array, of what the tower holds (position table as resized)."""
    cfg = tower.cfg
    prefix = PREFIXES[cfg.layout] if prefix is None else prefix
    found = names.lazy_torch_dict(
        tower, prefix, stacked=("layers",), rename=lambda key: rename(cfg, key)
    )
    if cfg.layout not in ("dinov2", "eva"):
        return found
    out = names.Lazy()
    flat = {prefix + rename(cfg, name) for name in ("position_embedding", "class_embedding")}
    for key in found:
        shape = found.shape_of(key)
        shape = (1, shape[0], cfg.width) if key in flat and len(shape) == 2 else shape
        shape = (1, 1, cfg.width) if key in flat and len(shape) == 1 else shape
        make = lambda key=key, shape=shape: found[key].reshape(shape)  # noqa: E731
        out.set(key, make, shape, found.dtype_of(key))
    return blip2.join_tower(out) if cfg.layout == "eva" else out


def export_complete(tower: ViT, prefix: str | None = None) -> names.Lazy:
    """`export_vit`, plus an identity final norm where the tower has none: transformers expects one,
    though hidden states don't pass through it."""
    cfg, out = tower.cfg, export_vit(tower, prefix)
    if not cfg.has_norm and cfg.layout != "eva":
        norm = (PREFIXES[cfg.layout] if prefix is None else prefix) + _NORMS[cfg.layout]
        out[norm + "weight"] = np.ones(cfg.width, np.float32)
        out[norm + "bias"] = np.zeros(cfg.width, np.float32)
    return out


# ---- configs

_KINDS = {
    "siglip": "siglip", "siglip_vision_model": "siglip",
    "clip": "clip", "clip_vision_model": "clip",
    "dinov2": "dinov2", "dinov2_with_registers": "dinov2",
    "blip-2": "eva", "blip_2_vision_model": "eva",
}  # fmt: skip
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu", "gelu": "gelu",
}  # fmt: skip
_TOWERS = {
    "siglip": "siglip_vision_model", "clip": "clip_vision_model",
    "blip-2": "blip_2_vision_model",
}  # fmt: skip
_INSIDE = ("siglip", "clip", "blip-2")  # models whose config has that of the tower inside


def vision_fields(fields: Mapping) -> tuple[str, dict]:
    """(layout, all fields of the vision half with transformers' defaults filled in)."""
    kind = fields.get("model_type")
    if kind == "siglip2" or kind == "siglip2_vision_model":
        raise ValueError(
            "SigLIP 2 NaFlex (model_type siglip2: any aspect ratio, linear patches) is not "
            "supported; the SigLIP 2 checkpoints of fixed resolution have model_type siglip"
        )
    if kind not in _KINDS:
        raise ValueError(f"model_type {kind!r} is none of {', '.join(_KINDS)}")
    own = fields.get("vision_config") or {} if kind in _INSIDE else fields
    if not isinstance(own, Mapping):
        raise ConfigError(f"vision_config is not a table of fields: {own!r}")
    return _KINDS[kind], library.resolved(_TOWERS.get(kind, kind), own)


def config_from_hf(fields: Mapping, **overrides) -> ViTConfig:
    """The ViTConfig of a config.json (of a vision model or a two-tower model): the whole tower,
    with its final norm and everything else the checkpoint holds."""
    layout, f = vision_fields(fields)
    if f.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels {f['num_channels']}: towers take RGB")
    if f["hidden_act"] not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"hidden_act {f['hidden_act']!r} is none of {known}")
    values = dict(
        layout=layout,
        image_size=f["image_size"],
        patch=f["patch_size"],
        width=f["hidden_size"],
        mlp_width=f["intermediate_size"]
        if "intermediate_size" in f
        else int(f["hidden_size"] * f["mlp_ratio"]),
        layers=f["num_hidden_layers"],
        heads=f["num_attention_heads"],
        activation=_ACTIVATIONS[f["hidden_act"]],
        norm_eps=f["layer_norm_eps"],
        final_norm=True,
        whole=True,
    )
    if layout == "siglip":
        values["pool"] = bool(f["vision_use_head"])
    else:
        base = vit.SIZES[f"{layout}-tiny"]
        for name in ("class_token", "patch_bias", "pre_norm", "layer_scale", "mean", "std"):
            values[name] = getattr(base, name)
    if layout == "eva":  # what is called its final norm is the connector's
        values |= {"final_norm": False, "whole": False, "class_out": True}
    if layout == "dinov2":
        if f["use_swiglu_ffn"]:
            raise ValueError("use_swiglu_ffn (DINOv2 giant) is not supported; small to large are")
        if not f["qkv_bias"]:
            raise ValueError("qkv_bias false is not supported")
        values["whole"] = bool(f.get("use_mask_token", True))
        if fields["model_type"] == "dinov2_with_registers":
            values["registers"] = f["num_register_tokens"]
    return ViTConfig(**{**values, **overrides})


def disagreements(cfg: ViTConfig, fields: Mapping, where: str = "tower.") -> list[str]:
    """Where a tower is not the one of a config.json, in what shapes don't show; see `agree`."""
    return agree.differences(cfg, config_from_hf(fields), agree.TOWER, where)


def config_to_hf(cfg: ViTConfig) -> dict:
    """config.json of what a tower of this config holds: its layers, its grid."""
    activation = next(k for k, v in _ACTIVATIONS.items() if v == cfg.activation)
    fields = {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.held,
        "num_attention_heads": cfg.heads,
        "num_channels": 3,
        "image_size": cfg.size,
        "patch_size": cfg.patch,
        "hidden_act": activation,
        "layer_norm_eps": cfg.norm_eps,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }
    if cfg.layout == "dinov2":
        del fields["attention_dropout"]
        ratio = cfg.mlp_width / cfg.width
        fields |= {
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "qkv_bias": True,
            "use_swiglu_ffn": False,
            "use_mask_token": cfg.whole,
        }
        name, kind = "Dinov2Model", "dinov2"
        if cfg.registers:
            name, kind = "Dinov2WithRegistersModel", "dinov2_with_registers"
            fields["num_register_tokens"] = cfg.registers
    else:
        fields["intermediate_size"] = cfg.mlp_width
        if cfg.layout == "siglip":
            fields["vision_use_head"] = cfg.pool
        name, kind = {
            "siglip": ("SiglipVisionModel", "siglip_vision_model"),
            "clip": ("CLIPVisionModel", "clip_vision_model"),
            "eva": ("Blip2VisionModel", "blip_2_vision_model"),
        }[cfg.layout]
    return {"architectures": [name], "model_type": kind, **fields}


# ---- the complete lists of published keys


def _both(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def published(fields: Mapping) -> list[str]:
    """Every key of the checkpoint that a config.json belongs to, text half included."""
    layout, f = vision_fields(fields)
    if layout == "dinov2":
        return _published_dinov2(fields["model_type"], f)
    keys = [
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        *_both("post_layernorm"),
    ]
    if layout == "siglip":
        keys += ["embeddings.patch_embedding.bias"]
    else:
        keys += ["embeddings.class_embedding", *_both("pre_layrnorm")]
    if layout == "siglip" and f["vision_use_head"]:
        keys += ["head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"]
        for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2"):
            keys += _both(f"head.{part}")
    keys += encoder_layers(f["num_hidden_layers"])
    keys = ["vision_model." + key for key in keys]
    if fields["model_type"] not in ("siglip", "clip"):
        return keys
    text = fields.get("text_config") or {}
    keys += [f"text_model.embeddings.{x}_embedding.weight" for x in ("token", "position")]
    keys += _both("text_model.final_layer_norm")
    keys += ["text_model." + k for k in encoder_layers(text.get("num_hidden_layers", 12))]
    if layout == "siglip":
        return keys + [*_both("text_model.head"), "logit_scale", "logit_bias"]
    return keys + ["logit_scale", "visual_projection.weight", "text_projection.weight"]


def encoder_layers(count: int) -> list[str]:
    """Keys of the transformer layers that SigLIP's and CLIP's towers share."""
    parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    parts += [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    return [k for i in range(count) for part in parts for k in _both(f"encoder.layers.{i}.{part}")]


def _published_dinov2(kind: str, f: Mapping) -> list[str]:
    keys = ["embeddings.cls_token", "embeddings.position_embeddings", *_both("layernorm")]
    keys += _both("embeddings.patch_embeddings.projection")
    keys += ["embeddings.mask_token"] if f.get("use_mask_token", True) else []
    keys += ["embeddings.register_tokens"] if kind == "dinov2_with_registers" else []
    parts = ["norm1", "norm2", "mlp.fc1", "mlp.fc2", "attention.output.dense"]
    parts += [f"attention.attention.{x}" for x in ("query", "key", "value")]
    for i in range(f["num_hidden_layers"]):
        keys += [k for part in parts for k in _both(f"encoder.layer.{i}.{part}")]
        keys += [f"encoder.layer.{i}.layer_scale{j}.lambda1" for j in (1, 2)]
    return keys


# ---- families


def create(cfg: ViTConfig, *, rngs: nnx.Rngs) -> ViT:
    return ViT(cfg, rngs=rngs)


def _family(name: str, layout: str, library: str) -> Family:
    # As published: with the layers after the one that recipes take, and with the pooling head.
    whole = dict(whole=True, final_norm=True, pool=layout == "siglip")
    sizes = {
        size: dataclasses.replace(cfg, **whole)
        for size, cfg in vit.SIZES.items()
        if cfg.layout == layout
    }
    return Family(
        name,
        tuple(kind for kind, its in _KINDS.items() if its == layout),
        config_from_hf,
        config_to_hf,
        create,
        load_vit,
        export_complete,
        sizes,
        published,
        Reference(compare.transformers_model(library), compare.vit),
    )


FAMILIES = (
    _family("siglip", "siglip", "SiglipVisionModel"),
    _family("clip-vision", "clip", "CLIPVisionModel"),
    _family("dinov2", "dinov2", "AutoModel"),
)


def save_tower(folder: pathlib.Path, tower: ViT, writer: Writer) -> int:
    """Writes a folder for transformers' vision model of the tower's family, with its processor.

    Returns:
        Bytes of all tensors.
    """
    cfg = tower.cfg
    family = next(f for f in FAMILIES if f.matches(config_to_hf(cfg)))
    total = family.write(folder, tower, Source(), writer)
    mean, std = (tuple(float(x) for x in np.broadcast_to(v, 3)) for v in (cfg.mean, cfg.std))
    process = images.Preprocess(cfg.size, mean=mean, std=std)
    export.write_json(folder / "preprocessor_config.json", images.preprocess_to_hf(process))
    return total
