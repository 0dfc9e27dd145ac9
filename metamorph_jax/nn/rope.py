"""Rotary position embedding, half-split layout, with the frequency scalings in use.

Su et al. 2021 (arXiv 2104.09864). Angles are computed in float32 whatever the compute dtype is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """`kind` is "default" (none), "linear" (positions divided) or "llama3" (Llama 3.1)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is none of default, linear, llama3")


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """Radians per position of each pair of channels: float32[H/2]."""
    freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "llama3":
        # Slow waves (few turns in the original context) are stretched, fast ones kept, those
        # between are blended linearly in the number of turns.
        turns = scaling.original_max_position * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return freq * (keep + (1 - keep) / scaling.factor)
    return freq


def angles(positions: jax.Array, freq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for int32[B, L] positions: two float32[B, L, 1, H/2]."""
    phase = positions.astype(jnp.float32)[..., None, None] * freq
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x: float[B, L, N, H]; channel i is paired with channel i + H/2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
