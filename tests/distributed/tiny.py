"""The MetaMorph recipe, whose losses also say which batch they saw."""

import jax.numpy as jnp

from metamorph_jax.models.llm.llama import init_added_tokens
from metamorph_jax.recipes import metamorph
from metamorph_jax.recipes.metamorph import *  # noqa: F403


class Tiny(metamorph.MetaMorph):
    def loss_sums(self, batch, key=None):
        sums, metrics = super().loss_sums(batch, key)
        weight = 1 + jnp.arange(batch.tokens.size).reshape(batch.tokens.shape) % 97
        seen = {"tokens": batch.tokens, "slots": batch.image_slots, "segments": batch.segments}
        for name, x in seen.items():  # small enough integers for exact sums
            metrics[f"seen_{name}"] = ((x * weight).sum().astype(jnp.float32), jnp.float32(1))
        pixels = batch.images.pixels.astype(jnp.int32).sum((2, 3, 4)) % 997
        rows = 1 + jnp.arange(pixels.size).reshape(pixels.shape) % 97
        metrics["seen_pixels"] = ((pixels * rows).sum().astype(jnp.float32), jnp.float32(1))
        return sums, metrics


def create(cfg, rngs):
    model = Tiny(cfg, rngs=rngs)
    init_added_tokens(model.llm)
    return model
