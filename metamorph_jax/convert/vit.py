"""Vision towers by the Hugging Face names of SigLIP, CLIP and DINOv2.

    ours                     siglip, clip                            dinov2
    patch_embedding          embeddings.patch_embedding              embeddings.patch_embeddings.projection
    position_embedding       embeddings.position_embedding.weight    embeddings.position_embeddings [1, T, D]
    class_embedding          embeddings.class_embedding              embeddings.cls_token [1, 1, D]
    pre_layernorm            pre_layrnorm (as published)             -
    layers.(stack).…         encoder.layers.N.…                      encoder.layer.N.…
    post_layernorm           post_layernorm                          layernorm

Dropped on purpose: layers behind the selected one, a final norm the tower doesn't use, SigLIP's
pooling head, DINOv2's mask token, position ids. The position table is resized to the tower's grid.
"""  # noqa: E501

import re
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert import names
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
    (r"^post_layernorm", "layernorm"),
    (r"^layers\.", "encoder.layer."),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.q_proj", "attention.attention.query"),
    (r"self_attn\.k_proj", "attention.attention.key"),
    (r"self_attn\.v_proj", "attention.attention.value"),
    (r"self_attn\.out_proj", "attention.output.dense"),
    (r"layer_scale([12])$", r"layer_scale\1.lambda1"),
)
RENAMES = {"siglip": _CLIP, "clip": _CLIP, "dinov2": _DINOV2}
PREFIXES = {"siglip": "vision_model.", "clip": "vision_model.", "dinov2": ""}
_NORMS = {"siglip": "post_layernorm.", "clip": "post_layernorm.", "dinov2": "layernorm."}
_NEVER = re.compile(r"head\.|embeddings\.(mask_token|position_ids)$|classifier\.")
_LAYER = re.compile(r"encoder\.layers?\.(\d+)\.")


def rename(cfg: ViTConfig, key: str) -> str:
    """The published name of one of our (torch-style) names."""
    for pattern, replacement in RENAMES[cfg.layout]:
        key = re.sub(pattern, replacement, key)
    return key


def dropped(cfg: ViTConfig, key: str) -> bool:
    """Whether a published key is left out on purpose."""
    layer = _LAYER.match(key)
    return (
        bool(_NEVER.match(key))
        or (layer is not None and cfg.depth <= int(layer[1]) < cfg.layers)
        or (not cfg.final_norm and key.startswith(_NORMS[cfg.layout]))
    )


def load_vit(tower: ViT, tensors: Mapping[str, np.ndarray], prefix: str | None = None) -> None:
    """Fills `tower` in place.

    Args:
        tensors: published name -> array.
        prefix: of the tower's names; default: the layout's own if any key has it, else none.
    """
    cfg = tower.cfg
    if prefix is None:
        prefix = PREFIXES[cfg.layout]
        prefix = prefix if any(k.startswith(prefix) for k in tensors) else ""
    tensors = {k: v for k, v in tensors.items() if k.startswith(prefix)}
    position = prefix + rename(cfg, "position_embedding")
    first = prefix + rename(cfg, "class_embedding")
    if position in tensors:
        table = np.asarray(tensors[position], np.float32)
        table = table.reshape(table.shape[-2:])
        tensors[position] = resize_positions(table, cfg.grid, int(cfg.class_token))
    if first in tensors:
        tensors[first] = np.asarray(tensors[first]).reshape(-1)
    names.load_torch_dict(
        tower,
        tensors,
        prefix,
        stacked=("layers",),
        rename=lambda key: rename(cfg, key),
        ignore=lambda key: dropped(cfg, key),
    )


def export_vit(tower: ViT, prefix: str | None = None) -> dict[str, np.ndarray]:
    """Published name -> array, of what the tower holds (position table as resized)."""
    cfg = tower.cfg
    prefix = PREFIXES[cfg.layout] if prefix is None else prefix
    out = names.to_torch_dict(
        tower, prefix, stacked=("layers",), rename=lambda key: rename(cfg, key)
    )
    if cfg.layout == "dinov2":
        for name, shape in (("position_embedding", (1, -1)), ("class_embedding", (1, 1))):
            key = prefix + rename(cfg, name)
            out[key] = out[key].reshape(*shape, cfg.width)
    return out
