"""From hidden states to the context of a diffusion decoder (MM-Interleaved).

Tian et al. 2024, arXiv 2401.10208. An image is drawn from all that its document has said before
it, the newest first. A row whose document starts at column 2 and whose `soi` (the token that
announces an image) stands at column 5, with room for 6 states:

    columns    0  1 [2  3  4  5] 6 ...          hidden states after the last norm
    gathered   5  4  3  2  .  .                 distance from `soi` 0 1 2 3; the mask hides the rest
    context    perceiver(linear(state) + sin-cos table of the distance)

A document that is longer than the room loses its oldest states.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.connectors.perceiver import Perceiver, PerceiverConfig
from metamorph_jax.nn.linear import flat_dot_general
from metamorph_jax.nn.sincos import table_1d
from metamorph_jax.sharding import constrain
from metamorph_jax.types import Conditioning


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """Defaults: MM-Interleaved's with Vicuna-13B and Stable Diffusion 2.1.

    Attributes:
        width: of the hidden states.
        max_context: room for this many states; the reference has 2048.
        resampler: reads the states; its `width` is that of the decoder's context.

    Raises:
        ValueError: the resampler reads tokens of another width.
    """

    width: int = 5120
    max_context: int = 512
    resampler: PerceiverConfig = PerceiverConfig(
        queries=77, width=1024, heads=16, layers=1, mlp_width=3072, key_width=5120, cross_every=1,
        qk_norm=False,
    )  # fmt: skip

    def __post_init__(self):
        check_numbers(self, "width max_context")
        if self.resampler.key_width != self.width:
            raise ValueError(
                f"the resampler reads width {self.resampler.key_width}, the hidden states have"
                f" {self.width}"
            )


def lengths(start, begin):
    """How many states an image is drawn from, with the one at `start`: int32[B, J]."""
    return jnp.maximum(start - begin + 1, 0)


def newest_first(states, start, begin, room: int):
    """(states of each drawing float[B, J, room, D], mask bool[B, J, room]), `start` first.

    Args:
        states: float[B, L, D].
        start, begin: int32[B, J] column of a drawing's `soi`, and that of its document's begin.
    """
    B, L, D = states.shape
    columns = start[..., None] - jnp.arange(room)
    mask = (columns >= begin[..., None]) & (columns >= 0)
    place = jnp.clip(columns, 0, L - 1).reshape(B, -1, 1)
    found = jnp.take_along_axis(states, place, axis=1)
    return found.reshape(*columns.shape, D), mask


class ContextHead(nnx.Module):
    """Linear, table and resampler, and the learned null condition."""

    def __init__(self, cfg: ContextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = nnx.Linear(
            cfg.width,
            cfg.width,
            dtype=jnp.dtype(cfg.resampler.dtype),
            kernel_metadata={"logical": ("embed", None)},
            bias_metadata={"logical": ("norm",)},
            dot_general=flat_dot_general,
            rngs=rngs,
        )
        self.resampler = Perceiver(cfg.resampler, rngs=rngs)
        # The reference starts from the text encoder's output for the empty prompt.
        shape = (1, cfg.resampler.queries, cfg.resampler.width)
        self.null = nnx.Param(jnp.zeros(shape), logical=(None, None, "embed"))

    def features(self, hidden, start, begin):
        """What the resampler reads: (float[B, J, room, D], mask bool[B, J, room])."""
        cfg = self.cfg
        # Projected before they are gathered: documents share states, and rows are shorter than
        # all contexts together.
        states = self.proj(hidden.astype(jnp.dtype(cfg.resampler.dtype)))
        room = min(cfg.max_context, hidden.shape[1])
        found, mask = newest_first(states, start, begin, room)
        return found + jnp.asarray(table_1d(room, cfg.width), found.dtype), mask

    def __call__(self, hidden, start, begin, *, key=None) -> Conditioning:
        """The condition of every drawing, rows of B * J (row-major): no maps yet.

        Args:
            hidden: float[B, L, D] after the last norm.
            start, begin: int32[B, J], see `newest_first`; of unused places any column.
            key: for the resampler's dropout.
        """
        found, mask = self.features(hidden, start, begin)
        found = constrain(found.reshape(-1, *found.shape[2:]), "act_batch", None, "act_embed")
        return Conditioning(self.resampler(found, mask.reshape(found.shape[:2]), key=key))

    def null_condition(self) -> Conditioning:
        """The learned one, of a single row."""
        return Conditioning(self.null[...].astype(jnp.dtype(self.cfg.resampler.dtype)))
