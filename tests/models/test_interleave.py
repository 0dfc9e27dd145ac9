"""Visual embeddings and newline vectors take their places among text embeddings."""

import jax.numpy as jnp
import numpy as np

from metamorph_jax.models.interleave import place_visual
from metamorph_jax.types import NEWLINE, TEXT

SLOTS = jnp.array([[TEXT, 0, 1, NEWLINE, TEXT, 3], [2, NEWLINE, TEXT, TEXT, 0, 0]])
WORDS = jnp.full((2, 6, 1), 9.0)
TOKENS = jnp.arange(8.0).reshape(2, 4, 1)


def test_every_slot_has_its_vector():
    found = place_visual(WORDS, TOKENS, SLOTS, jnp.array([-5.0]))[..., 0]
    np.testing.assert_array_equal(found, [[9, 0, 1, -5, 9, 3], [6, -5, 9, 9, 4, 4]])


def test_without_images_and_without_newlines():
    none = jnp.zeros((2, 0, 1))
    text = jnp.full((2, 6), TEXT)
    np.testing.assert_array_equal(place_visual(WORDS, none, text), WORDS)
    lines = jnp.where(SLOTS == NEWLINE, NEWLINE, TEXT)
    found = place_visual(WORDS, none, lines, jnp.array([-5.0]))[..., 0]
    np.testing.assert_array_equal(found, [[9, 9, 9, -5, 9, 9], [9, -5, 9, 9, 9, 9]])
