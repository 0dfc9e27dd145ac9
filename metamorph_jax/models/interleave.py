"""Visual embeddings take their places among text embeddings."""

import jax
import jax.numpy as jnp

from metamorph_jax.types import NEWLINE


def gather_rows(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, l]]: float[B, L, D] of float[B, S, D] and int32[B, L]; -1 gives row 0."""
    return jnp.take_along_axis(values, jnp.maximum(index, 0)[..., None], axis=1)


def place_visual(
    text: jax.Array, visual: jax.Array, image_slots: jax.Array, newline: jax.Array | None = None
) -> jax.Array:
    """Text embeddings with visual ones at their slots.

    Args:
        text: float[B, L, D].
        visual: float[B, I * P, D] embeddings of the row's views, one after another.
        image_slots: int32[B, L] which of them stands here; `TEXT` for text, `NEWLINE` for the
            newline vector.
        newline: float[D] that vector, for models whose images have rows of tokens.
    """
    if visual.shape[1]:
        here = (image_slots >= 0)[..., None]
        text = jnp.where(here, gather_rows(visual, image_slots).astype(text.dtype), text)
    if newline is not None:
        here = (image_slots == NEWLINE)[..., None]
        text = jnp.where(here, newline.astype(text.dtype), text)
    return text
