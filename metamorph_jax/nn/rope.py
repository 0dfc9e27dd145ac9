"""Rotary position embedding, half-split layout, with the frequency scalings in use.

Su et al. 2021 (arXiv 2104.09864). Frequencies are numpy tables, made while tracing; angles are
computed in float32 whatever the compute dtype is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


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


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each pair of channels: float32[H/2].

    In the order of operations of transformers' `modeling_rope_utils.py`, every step rounded to
    float32: at position 131071, one rounding more or less turns a pair by up to 0.008 radians.
    Powers are taken in float64 and rounded, which is what good float32 libraries return, and
    `a / x` is torch's `reciprocal(x) * a`.
    """
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = one / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return freq / factor
    if scaling.kind != "llama3":
        return freq
    # Long waves (few turns in the original context) are stretched, short ones kept, those between
    # are blended linearly in the number of turns.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position
    wave = (one / freq) * np.float32(2 * math.pi)
    stretched = freq / factor
    turns = (one / wave) * np.float32(original)
    blend = (turns - np.float32(low)) / np.float32(high - low)
    blended = (one - blend) * freq / factor + blend * freq
    between = np.where(wave > np.float32(original / low), stretched, blended)
    return np.where(wave < np.float32(original / high), freq, between)


def angles(positions: jax.Array, freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for int32[B, L] positions: two float32[B, L, 1, H/2].

    Positions and frequencies are multiplied in float32, as transformers does.
    """
    phase = positions.astype(jnp.float32)[..., None, None] * freq
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x: float[B, L, N, H]; channel i is paired with channel i + H/2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
