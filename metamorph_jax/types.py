"""The contracts between data, models and image decoders, and the letters used for shapes.

    B batch              L query length        S key / cache length    D width
    F hidden of an MLP   V vocabulary          N query heads           K key-value heads
    H head size          I views per row       P tokens per view       C feature width
    h w c pixels or latents, channels last     T diffusion steps       J drawings per row

A row of a `Batch` holds several packed samples. One row with two samples, P = 2, one answer image
(`<` and `>` are the start and end tokens, `o` a visual token):

    tokens          Q  <  o  o  >  A  |  Q  A  <  o  o  >      (tokens under `o` are ignored)
    segments        1  1  1  1  1  1  |  2  2  2  2  2  2
    positions       0  1  2  3  4  5  |  0  1  2  3  4  5
    image_slots    -1 -1  0  1 -1 -1  | -1 -1 -1  2  3 -1
    text_targets   -1 -1 -1 -1  A -1  |  A  < -1 -1  > -1      (id to predict AT this position)
    visual_targets -1 -1 -1 -1 -1 -1  | -1 -1  2  3 -1 -1      (visual token to predict here)
    images.start    2, 9                                       (column of a view's first token)
"""

import dataclasses
from typing import Any

import jax
import numpy as np

Array = Any  # numpy or jax array: the data side makes the former, a step receives the latter

TEXT, NEWLINE = -1, -2  # in `Batch.image_slots`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """The views that a row reads. An image has one view, or several (tiles of a large image).

    Attributes:
        valid: bool[B, I] which places are filled.
        start: int32[B, I] column of the row at which the view's first visual token stands.
        pixels: uint8[B, I, h, w, 3], or None when features are given.
        features: float32[B, I, P, C] reduced and normalised tower features, or None.
    """

    valid: Array
    start: Array
    pixels: Array | None = None
    features: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawings:
    """Images that are to be drawn inside a row, by a diffusion decoder that trains with the model.

    Attributes:
        valid: bool[B, J] which places are filled.
        start: int32[B, J] column of the row whose state the drawing is conditioned on.
        pixels: uint8[B, J, h, w, 3], or None when latents are given.
        latents: float32[B, J, h, w, c] of the autoencoder, scaled, or None.
        captions: int32[B, J, L'] ids of the text encoder for a caption loss, -1 where a drawing has
            none; or None.
    """

    valid: Array
    start: Array
    pixels: Array | None = None
    latents: Array | None = None
    captions: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What the data pipeline hands to a model: packed rows of text and visual tokens.

    Attributes:
        tokens: int32[B, L] text ids; at image slots and padding any valid id.
        positions: int32[B, L] position inside the sample, for RoPE.
        segments: int32[B, L] number of the packed sample from 1; 0 is padding.
        text_targets: int32[B, L] the id to predict at this position (already shifted); -1 none.
        image_slots: int32[B, L] visual token (view * P + token) standing here; `TEXT` (-1) text,
            `NEWLINE` (-2) the model's newline vector.
        visual_targets: int32[B, L] visual token of this row to predict at this position; -1 none.
        sources: int32[B, L] index of the data source of the sample, for losses per source.
        images: what the slots point into.
        drawings: images to be drawn by a decoder that trains with the model, or None.
        turns: int32[B, L] or None. 0 is a prefix that its whole segment sees; turn k > 0 is seen
            by itself only, as if each turn stood alone after the prefix (positions restart).
        source_names: names of the data sources, in the order that `sources` counts them; static.
    """

    tokens: Array
    positions: Array
    segments: Array
    text_targets: Array
    image_slots: Array
    visual_targets: Array
    sources: Array
    images: Images
    drawings: Drawings | None = None
    turns: Array | None = None
    source_names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def counted(self) -> dict[str, int]:
        """How many positions and images of this (numpy) batch are not padding."""
        images = int(np.sum(self.images.valid))
        if self.drawings is not None:
            images += int(np.sum(self.drawings.valid))
        return {"positions": int(np.sum(np.asarray(self.segments) > 0)), "images": images}

    def sources_present(self) -> tuple[str, ...]:
        """Names of the data sources that this (numpy) batch has samples of."""
        found = np.unique(np.asarray(self.sources)[np.asarray(self.segments) > 0])
        return tuple(self.source_names[i] for i in found if i < len(self.source_names))

    def blank(self) -> "Batch":
        """A (numpy) batch of the same shapes in which nothing counts."""
        nothing = {name: np.zeros_like(getattr(self, name)) for name in ("tokens", "segments")}
        for name in ("text_targets", "image_slots", "visual_targets"):
            nothing[name] = np.full_like(getattr(self, name), -1)
        drawings = self.drawings
        if drawings is not None:
            drawings = dataclasses.replace(drawings, valid=np.zeros_like(drawings.valid))
        images = dataclasses.replace(self.images, valid=np.zeros_like(self.images.valid))
        return dataclasses.replace(self, **nothing, images=images, drawings=drawings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderBatch:
    """Images and the visual tokens that describe them, for the decoder stage.

    Attributes:
        image: uint8[B, h, w, 3] images to draw.
        features: float32[B, P, C] visual tokens (reduced, normalised), or None.
        pixels: uint8[B, h, w, 3] tower input the features are to be computed from, or None.
        valid: bool[B] False where a short last batch was filled up; None: all are valid.
    """

    image: Array
    features: Array | None = None
    pixels: Array | None = None
    valid: Array | None = None

    def counted(self) -> dict[str, int]:
        """How many images of this (numpy) batch are not padding; it has no positions."""
        images = len(self.image) if self.valid is None else int(np.sum(self.valid))
        return {"positions": 0, "images": images}

    def sources_present(self) -> tuple[str, ...]:
        """Nothing: images are mixed without regard to their source."""
        return ()

    def blank(self) -> "DecoderBatch":
        """A (numpy) batch of the same shapes in which nothing counts."""
        return dataclasses.replace(self, valid=np.zeros(len(self.image), bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What an image head gives to a diffusion decoder, and all that passes between them.

    Attributes:
        context: float[B, P, D] tokens for cross attention.
        mask: bool[B, P] valid tokens, or None for all.
        maps: feature maps of images that the decoder may look at, finest first, each
            float[B, M, h, w, C] for M images; () for none.
        maps_mask: bool[B, M] which of them are there, or None for all.
    """

    context: Array
    mask: Array | None = None
    maps: tuple[Array, ...] = ()
    maps_mask: Array | None = None
