"""CLIP with both towers, by its Hugging Face names: `openai/clip-vit-large-patch14` and its like.

ours                       published
vision.…                   vision_model.…             see `convert/vit.py`
text.…                     text_model.…               see `convert/clip_text.py`
visual_projection.kernel   visual_projection.weight   [width, D]
text_projection.kernel     text_projection.weight     [width, D]
logit_scale                logit_scale
"""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import clip_text, library, names, vit
from metamorph_jax.convert.clip_text import load_clip_text
from metamorph_jax.convert.vit import load_vit
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.models.vision.clip import CLIP, CLIPConfig

_VISION, _TEXT = "vision_model.", "text_model."
_OWN = ("visual_projection.weight", "text_projection.weight", "logit_scale")


def config_from_hf(fields: Mapping) -> CLIPConfig:
    """The config of the config.json of a CLIPModel.

    Raises:
        ConfigError: it is of something else; a SigLIP tower has other text rules.
    """
    if fields.get("model_type") != "clip":
        raise ConfigError(
            f"model_type {fields.get('model_type')!r} is not clip: expected a CLIP model with both "
            "towers, such as openai/clip-vit-large-patch14"
        )
    width = library.resolved("clip", fields)["projection_dim"]
    return CLIPConfig(vit.config_from_hf(fields), clip_text.config_from_hf(fields), width)


def load_clip(model: CLIP, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `model` in place from tensors by published name.

    Raises:
        WeightError: listing every key that is missing, left over or of another shape.
    """
    known = (_VISION, _TEXT, *_OWN)
    unknown = sorted(key for key in tensors if not key.startswith(known))
    if unknown:
        raise WeightError(f"left over ({len(unknown)}): {'; '.join(unknown)}")
    load_vit(model.vision, tensors, _VISION)
    load_clip_text(model.text, names.Mapped(tensors, only=lambda key: key.startswith(_TEXT)))
    own = names.Mapped(tensors, only=lambda key: key in _OWN)
    names.load_torch_dict(model, own, only=_is_own)


def _is_own(path, value) -> bool:
    return isinstance(value, nnx.Param) and path[0] not in ("vision", "text")
