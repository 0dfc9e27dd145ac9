"""Normalisation with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.sharding import one_device, platform


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
    inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if platform() == "cpu" and one_device() and y.size > scale.size:
        return _scaled(y, inverse, scale).astype(x.dtype)
    return (y * inverse * scale).astype(x.dtype)


@jax.custom_vjp
def _scaled(y, inverse, scale):
    """y * inverse * scale; the sums of the backward pass are matrix products, as XLA's CPU backend
    takes 30 times as long for sums."""
    return y * inverse * scale


def _scaled_backward(saved, g):
    y, inverse, scale = saved
    rows = (g * y).reshape(-1, y.shape[-1])
    flat = inverse.reshape(1, -1)
    d_inverse = rows @ scale[:, None]
    return g * (inverse * scale), d_inverse.reshape(inverse.shape), (flat @ rows)[0]


_scaled.defvjp(lambda *given: (_scaled(*given), given), _scaled_backward)


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis, as torch's `normalize`; finite gradient at zero."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))).astype(x.dtype)
