"""Decoders that compile in seconds, and batches for them."""

import jax
import numpy as np
from flax import nnx

from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.dit import DiTConfig
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import decoder
from metamorph_jax.types import DecoderBatch

# Compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VISION = VisionConfig("none", feature_width=6, tokens=4)
PROJECTOR = ProjectorConfig(input_dim=6, hidden_dim=16, output_dim=32)


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def pixel_config(diffusion=None, **kw) -> decoder.Config:
    """A DiT on 8 x 8 pixels; `diffusion` has fields of its DiffusionConfig."""
    parts = dict(denoiser=DiTConfig.tiny(), vae=None) | (diffusion or {})
    made = dict(vision=VISION, projector=PROJECTOR, decoder=DiffusionConfig(**parts))
    return decoder.Config(**(made | dict(context_length=0) | kw))


def latent_config(diffusion=None, **kw) -> decoder.Config:
    """A UNet on latents of 8 x 8; `diffusion` has fields of its DiffusionConfig."""
    parts = dict(denoiser=UNetConfig.tiny(), vae=VAEConfig.tiny()) | (diffusion or {})
    made = dict(vision=VISION, projector=PROJECTOR, decoder=DiffusionConfig(**parts))
    return decoder.Config(**(made | dict(context_length=7) | kw))


def batch_of(cfg: decoder.Config, B=4, seed=0) -> DecoderBatch:
    rng = np.random.default_rng(seed)
    side = cfg.decoder.image_side
    return DecoderBatch(
        image=rng.integers(0, 256, (B, side, side, 3), dtype=np.uint8),
        features=rng.standard_normal((B, 4, 6)).astype(np.float32),
    )


def make(cfg: decoder.Config, seed=0) -> decoder.Decoder:
    return decoder.create(cfg, nnx.Rngs(seed))


def shaken(model):
    """The model with all parameters moved, so that none of its zero starts hides anything."""
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    move = lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(move, params), rest)
