"""Visual embeddings take their places among text embeddings."""

import jax
import jax.numpy as jnp


def gather_rows(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, l]]: float[B, L, D] of float[B, S, D] and int32[B, L]; -1 gives row 0."""
    return jnp.take_along_axis(values, jnp.maximum(index, 0)[..., None], axis=1)


def place_visual(text: jax.Array, visual: jax.Array, image_slots: jax.Array) -> jax.Array:
    """Text embeddings with visual ones at their slots.

    Args:
        text: float[B, L, D].
        visual: float[B, I * P, D] embeddings of the row's pictures, one after another.
        image_slots: int32[B, L] which of them stands here, -1 for text.
    """
    if visual.shape[1] == 0:
        return text
    here = (image_slots >= 0)[..., None]
    return jnp.where(here, gather_rows(visual, image_slots).astype(text.dtype), text)
