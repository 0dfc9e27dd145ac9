"""Normalisation with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019); statistics in float32, result in x's dtype."""

    def __init__(self, width: int, eps: float = 1e-5, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(width), logical=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`RMSNorm` of float[..., D] with scale float[D]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis, as torch's `normalize`; finite gradient at zero."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))).astype(x.dtype)
