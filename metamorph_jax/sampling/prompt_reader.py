"""`PromptReader`: rows of prompts as the embeddings that a language model reads.

With P = 2 (`<` and `>` are the markers around an image, `o` its visual tokens):

    tokens          q  <  o  o  >  a       of a row (`data/interleave.py`), as `Prompts` makes it
    image_slots    -1 -1  0  1 -1 -1
    embeds          t  t  v  v  t  t       t: of the table; v: of the image, by tower and connector
    ids             q  < -1 -1  >  a

A recipe whose language model reads something else has a reader of its own.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.data.interleave import Row
from metamorph_jax.sampling.loop import Loop, RowImages, bucket
from metamorph_jax.types import NEWLINE, TEXT


class Prompt(NamedTuple):
    """What a model reads before it answers.

    Attributes:
        embeds: float32[L, D]; ids: int32[L], -1 at visual tokens.
        images: for a model whose layers look at images, else None.
    """

    embeds: np.ndarray
    ids: np.ndarray
    images: RowImages | None = None


class PromptReader:
    """Reads images and prompts for a language model.

    Args:
        loop: over the language model.
        encoder: a module with `visual_features` (uint8[n, h, w, 3] -> float32[n, P, C]) and
            `project` (-> float[n, P, D]); None if the model can't read images.
        width: C.
        newline: float32[D] embedding that stands at `NEWLINE` slots, where there are any.

    Attributes:
        weights: of the encoder.
    """

    def __init__(
        self,
        loop: Loop,
        encoder: nnx.Module | None = None,
        width: int = 0,
        newline: np.ndarray | None = None,
    ):
        self.loop, self.width, self.newline = loop, width, newline
        self._see = self._project = self.weights = None
        if encoder is not None:
            graph, self.weights = nnx.split(encoder)
            merged = lambda weights: nnx.merge(graph, weights)  # noqa: E731
            whole = lambda x: sharding.constrain(x, None, None, None)  # noqa: E731
            self._see = jax.jit(lambda weights, x: whole(merged(weights).visual_features(x)))
            self._project = jax.jit(lambda weights, x: whole(merged(weights).project(x)))

    @property
    def projects(self) -> bool:
        """Whether visual tokens can be read."""
        return self._project is not None

    # ---- prompts

    def embedded(self, row: Row, pixels: np.ndarray | None) -> Prompt:
        """What the language model reads of a row, with images uint8[n, h, w, 3] or None."""
        return self.placed(row, None if pixels is None else self.see(pixels))

    def placed(self, row: Row, features: np.ndarray | None) -> Prompt:
        """As `embedded`, of visual tokens float32[n, P, C], which were seen or predicted."""
        embeds = self.loop.embed(row.tokens)
        visual = row.image_slots >= 0
        if features is not None:
            tokens = self.project(features).reshape(-1, embeds.shape[-1])
            embeds[visual] = tokens[row.image_slots[visual]]
            if self.newline is not None:
                embeds[row.image_slots == NEWLINE] = self.newline
        return Prompt(embeds, np.where(row.image_slots == TEXT, row.tokens, -1))

    # ---- images

    def see(self, pixels: np.ndarray) -> np.ndarray:
        """float32[n, P, C] visual tokens of uint8[n, h, w, 3].

        Compiled at numbers of images that are powers of two.

        Raises:
            ValueError: the model can't read images.
        """
        if self._see is None:
            raise ValueError(
                "this model was trained on cached features and has no tower to read images with"
            )
        n = len(pixels)
        size = 1 << max(n - 1, 0).bit_length()
        padded = np.concatenate([pixels, np.zeros((size - n, *pixels.shape[1:]), np.uint8)])
        return np.asarray(self._run(self._see, padded))[:n]

    def project(self, features: np.ndarray) -> np.ndarray:
        """float32[n, P, D] what the language model reads of visual tokens float32[n, P, C]."""
        return np.asarray(self._run(self._project, features), np.float32)

    def _run(self, function, x):
        with jax.set_mesh(sharding.mesh_of(self.weights)):
            return function(self.weights, x)

    # ---- weights

    def renew(self, other: "PromptReader") -> None:
        """Takes the weights of another reader for the same model; what is compiled stays."""
        self.weights, self.newline = other.weights, other.newline

    def release(self) -> None:
        """Gives up the weights, until `renew` brings others."""
        self.weights = None


def batches(prompts: Iterable[tuple], size: int) -> Iterator[list]:
    """Groups (request, prompt, …) whose prompts fall into the same bucket."""
    waiting = collections.defaultdict(list)
    for item in prompts:
        group = waiting[bucket(len(item[1]))]
        group.append(item)
        if len(group) == size:
            yield list(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield group
