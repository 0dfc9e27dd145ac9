"""Choosing the next text token from logits: greedy, temperature, top-k, top-p (nucleus)."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn. The default is greedy.

    Attributes:
        temperature: logits are divided by it; 0 takes the best token.
        top_k: only the k best tokens can be drawn; 0 is all of them.
        top_p: only the fewest best tokens that together hold this much probability (Holtzman et
            al. 2020), counted after temperature and top-k. The best one can always be drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, and finite, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """int32[B] tokens from float32[B, V]; `keys[B]` makes each row's draw its own."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scores, ids = self.candidates(logits)
        choice = jax.vmap(jax.random.categorical)(keys, scores)
        return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def candidates(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(float32[B, n] scores, int32[B, n] ids): what is drawn from; -inf is never drawn.

        Of equal logits the lower id counts as the better.
        """
        V = logits.shape[-1]
        scores = logits.astype(jnp.float32) / self.temperature
        if not self.top_k and self.top_p == 1:
            return scores, jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), scores.shape)
        scores, ids = jax.lax.top_k(scores, min(self.top_k or V, V))
        if self.top_p < 1:
            share = jax.nn.softmax(scores, axis=-1)
            before = jnp.cumsum(share, axis=-1) - share
            # The first is kept by name: rounding must never leave a row without candidates.
            keep = (before < self.top_p).at[:, 0].set(True)
            scores = jnp.where(keep, scores, -jnp.inf)
        return scores, ids


def row_keys(seeds: jax.Array) -> jax.Array:
    """One PRNG key a row from int[B] seeds."""
    return jax.vmap(jax.random.key)(seeds)


def step_keys(keys: jax.Array, step: jax.Array) -> jax.Array:
    """The rows' keys of one step, int[] or int[B]; a draw depends on its row's seed and step."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
