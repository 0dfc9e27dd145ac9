"""CLIP whole: both towers with their projections into one space.

Radford et al. 2021 (arXiv 2103.00020).

    image ─ ViT ─ class token after the final norm ─ visual_projection ─┐
                                                                         cosine
    text ─ causal tower ─ state at the end token ─ text_projection ─────┘
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig, CLIPTextModel
from metamorph_jax.models.vision.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """`vision` gives its last state after the final norm; `width` is that of the common space."""

    vision: ViTConfig
    text: CLIPTextConfig
    width: int

    def __post_init__(self):
        if not self.vision.final_norm or self.vision.depth != self.vision.layers:
            raise ValueError("CLIP's image vector is the last state after the final norm")


class CLIP(nnx.Module):
    def __init__(self, cfg: CLIPConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vision = ViT(cfg.vision, rngs=rngs)
        self.text = CLIPTextModel(cfg.text, rngs)
        project = lambda width: nnx.Linear(width, cfg.width, use_bias=False, rngs=rngs)  # noqa: E731
        self.visual_projection = project(cfg.vision.width)
        self.text_projection = project(cfg.text.hidden_size)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592))  # ln(1 / 0.07)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """float[B, width], not of unit length. pixels: uint8[B, h, w, 3], or normalised floats."""
        return self.visual_projection(self.vision.image_vector(pixels))

    def text_features(self, ids: jax.Array) -> jax.Array:
        """float[B, width], not of unit length.

        ids: int[B, L], filled up on the right with anything: the tower is causal, and the vector is
        the state at the first end token.
        """
        return self.text_projection(self.text(ids).pooled)
