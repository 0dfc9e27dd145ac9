"""CLIP's text tower by its Hugging Face names.

    ours                                            published
    text_model.embeddings.token_embedding.embedding text_model.embeddings.token_embedding.weight
    text_model.encoder.layers.N.…                   the same; matrices transposed
    text_model.final_layer_norm.scale               text_model.final_layer_norm.weight

transformers 5 omits `text_model.`; both are read, the published names are written. Dropped on
purpose: position ids, and of a two-tower checkpoint the vision half and the projections (`OTHER`).
"""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import compare, library, names
from metamorph_jax.convert.families import Family, Reference
from metamorph_jax.convert.vit import encoder_layers
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig, CLIPTextModel

PREFIX = "text_model."
OTHER = ("vision_model.", "text_projection.", "visual_projection.", "logit_scale")
_POSITION_IDS = "embeddings.position_ids"
_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps",
           "eos_token_id")  # fmt: skip


def config_from_hf(fields: Mapping, **overrides) -> CLIPTextConfig:
    """The config of a config.json (of a text model, or the text half of a CLIP model)."""
    kind = fields.get("model_type", "clip_text_model")
    if kind not in ("clip", "clip_text_model"):
        raise ValueError(f"model_type {kind!r} is none of clip, clip_text_model")
    own = fields.get("text_config") or {} if kind == "clip" else fields
    found = library.resolved("clip_text_model", own)
    return CLIPTextConfig(**{**{k: found[k] for k in _FIELDS}, **overrides})


def config_to_hf(cfg: CLIPTextConfig) -> dict:
    """A config.json that `CLIPTextModel.from_pretrained` reads."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **{k: getattr(cfg, k) for k in _FIELDS},
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "projection_dim": cfg.hidden_size,
        "torch_dtype": "float32",
    }


def load_clip_text(model: CLIPTextModel, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `model` in place from tensors by published name; anything else is an error."""
    prefix = any(k.startswith(PREFIX) for k in tensors)
    names.load_torch_dict(
        model,
        names.Mapped(tensors, only=lambda key: not key.startswith(OTHER)),
        rename=lambda key: key if prefix else key.removeprefix(PREFIX),
        ignore=lambda key: key.removeprefix(PREFIX) == _POSITION_IDS,
    )


def export_clip_text(model: CLIPTextModel) -> names.Lazy:
    """Published name -> array."""
    return names.lazy_torch_dict(model)


def published(fields: Mapping) -> list[str]:
    """Every key of the checkpoint of a text model that a config.json belongs to."""
    keys = [f"embeddings.{x}_embedding.weight" for x in ("token", "position")]
    keys += ["final_layer_norm.weight", "final_layer_norm.bias"]
    keys += encoder_layers(config_from_hf(fields).num_hidden_layers)
    return [PREFIX + key for key in keys]


def create(cfg: CLIPTextConfig, *, rngs: nnx.Rngs) -> CLIPTextModel:
    return CLIPTextModel(cfg, rngs)


SIZES = {
    "sd15": CLIPTextConfig.sd15(),
    "sd21": CLIPTextConfig.sd21(),
    "clip-l": CLIPTextConfig(eos_token_id=49407),
    "clip-b": CLIPTextConfig(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, eos_token_id=49407
    ),
    "tiny": CLIPTextConfig.tiny(),
}

FAMILIES = (
    Family(
        "clip-text",
        ("clip_text_model",),
        config_from_hf,
        config_to_hf,
        create,
        load_clip_text,
        export_clip_text,
        SIZES,
        published,
        Reference(compare.transformers_model("CLIPTextModel"), compare.clip_text),
    ),
)
