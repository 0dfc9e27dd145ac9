"""Which document of a row a position belongs to, and what follows from it.

    column       0   1   2   3   4   5   6  |  7   8   9  10  11  12      < soi, o visual token
    tokens      BOS  a   <   o   o   b   <     o   o EOS BOS  c   <  …
    document     0   0   0   0   0   0   0     0   0   0  10  10  10
    sees         -   -   -   A   A   A   A    AB  AB  AB   -   -   -      images A and B

    drawing B: its context are the states from column 0 to 6 (`models/heads/context.py`), and the
               image before it is A

A position sees the images of its document from their first visual token on: their own tokens do,
their `soi` does not. All shapes are static, so everything is computed inside the step.
"""

import jax
import jax.numpy as jnp
from jax import lax

from metamorph_jax.types import Images


def document_starts(tokens: jax.Array, segments: jax.Array, bos: int = -1) -> jax.Array:
    """int32[B, L] the column at which the document of each position begins.

    Args:
        tokens, segments: int32[B, L], see `Batch`.
        bos: id that begins a document inside of a segment; -1: a segment is one document.
    """
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = segments != before
    if bos >= 0:
        begins |= tokens == bos
    return lax.cummax(jnp.where(begins, columns, 0), axis=1)


def visibility(starts: jax.Array, images: Images) -> jax.Array:
    """bool[B, L, I]: which images a position sees.

    Args:
        starts: int32[B, L], see `document_starts`.
        images: of the row, one view each.
    """
    columns = jnp.arange(starts.shape[1], dtype=jnp.int32)
    first = images.start[:, None, :]
    seen = (starts[:, :, None] < first) & (first <= columns[None, :, None])
    return seen & images.valid[:, None, :]


def preceding_images(seen: jax.Array, at: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(int32[B, J, count] images, bool[B, J, count] which are there): the last before drawings.

    Args:
        seen: bool[B, L, I], see `visibility`.
        at: int32[B, J] column of each drawing's `soi`.
        count: of images; the nearest comes last.
    """
    visible = jnp.take_along_axis(seen, at[:, :, None], axis=1)
    order = jnp.arange(seen.shape[2], dtype=jnp.int32)
    last = jnp.max(jnp.where(visible, order, -1), axis=2, keepdims=True)
    index = last + jnp.arange(1 - count, 1, dtype=jnp.int32)
    there = jnp.take_along_axis(visible, jnp.maximum(index, 0), axis=2) & (index >= 0)
    return jnp.maximum(index, 0), there
