"""The contracts between the parts, and the letters used for shapes everywhere.

    B batch              L query length        S key / cache length    D width
    F hidden of an MLP   V vocabulary          N query heads           K key-value heads
    H head size          I pictures per row    P tokens per picture    C feature width
    h w c pixels or latents, channels last     T diffusion steps

A row of a `Batch` holds several packed samples. One row with two samples, P = 2, one answer picture
(`<` and `>` are the start and end tokens, `o` a visual token):

    tokens          Q  <  o  o  >  A  |  Q  A  <  o  o  >      (tokens under `o` are ignored)
    segments        1  1  1  1  1  1  |  2  2  2  2  2  2
    positions       0  1  2  3  4  5  |  0  1  2  3  4  5
    image_slots    -1 -1  0  1 -1 -1  | -1 -1 -1  2  3 -1
    text_targets   -1 -1 -1 -1  A -1  |  A  < -1 -1  > -1      (id to predict AT this position)
    visual_targets -1 -1 -1 -1 -1 -1  | -1 -1  2  3 -1 -1      (visual token to predict here)
"""

import dataclasses
from typing import Any

import jax

Array = Any  # numpy or jax array: the data side makes the former, a step receives the latter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What the data pipeline hands to a model: packed rows of text and visual tokens.

    Attributes:
        tokens: int32[B, L] text ids; at picture slots and padding any valid id.
        positions: int32[B, L] position inside the sample, for RoPE.
        segments: int32[B, L] number of the packed sample from 1; 0 is padding.
        text_targets: int32[B, L] the id to predict at this position (already shifted); -1 none.
        image_slots: int32[B, L] visual token (picture * P + token) standing here; -1 text.
        visual_targets: int32[B, L] visual token of this row to predict at this position; -1 none.
        sources: int32[B, L] index of the data source of the sample, for losses per source.
        image_valid: bool[B, I] which picture places of the row are filled.
        pixels: uint8[B, I, h, w, 3], or None when features are given.
        features: float32[B, I, P, C] reduced and normalised tower features, or None.
        turns: int32[B, L] or None. 0 is a prefix that its whole segment sees; turn k > 0 is seen
            by itself only, as if each turn stood alone behind the prefix (positions restart).
    """

    tokens: Array
    positions: Array
    segments: Array
    text_targets: Array
    image_slots: Array
    visual_targets: Array
    sources: Array
    image_valid: Array
    pixels: Array | None = None
    features: Array | None = None
    turns: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderBatch:
    """Pictures and the visual tokens that describe them, for the decoder stage.

    Attributes:
        image: uint8[B, h, w, 3] pictures to draw.
        features: float32[B, P, C] visual tokens (reduced, normalised), or None.
        pixels: uint8[B, h, w, 3] tower input the features are to be computed from, or None.
        valid: bool[B] False where a short last batch was filled up.
    """

    image: Array
    features: Array | None = None
    pixels: Array | None = None
    valid: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What an image head gives to a decoder.

    Attributes:
        context: float[B, P, D] tokens for cross attention.
        mask: bool[B, P] valid tokens, or None for all.
    """

    context: Array
    mask: Array | None = None
