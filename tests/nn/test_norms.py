"""RMSNorm: what it computes, and the gradients that CPUs get from matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.nn import norms


def reference(x, scale, eps):
    y = x.astype(jnp.float32)
    return (y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_values_and_gradients(shape, dtype, scale_dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = (3 * jax.random.normal(keys[0], shape)).astype(dtype)
    scale = (1 + 0.5 * jax.random.normal(keys[1], shape[-1:])).astype(scale_dtype)
    wanted = jax.random.normal(keys[2], shape)

    def loss(f, x, scale):
        return jnp.sum(f(x, scale, 1e-2).astype(jnp.float32) * wanted)

    got, expected = (
        jax.value_and_grad(lambda x, s, f=f: loss(f, x, s), argnums=(0, 1))(x, scale)
        for f in (norms.rms_norm, reference)
    )
    low = "bfloat16" in (dtype, scale_dtype)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(y, np.float32) for y in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-2 if low else 2e-5, atol=5e-2 if low else 1e-5)


def sums(f, *args) -> int:
    """Number of reductions in the program of f."""
    return str(jax.make_jaxpr(f)(*args)).count("reduce_sum")


def test_on_one_cpu_device_the_gradients_are_products(monkeypatch):
    def gradient(x, scale):
        return jax.grad(lambda *p: jnp.vdot(norms.rms_norm(*p, 1e-5), x), argnums=(0, 1))(x, scale)

    x, scale = jnp.ones((4, 8)), jnp.ones(8)
    few = sums(gradient, x, scale)
    monkeypatch.setattr(norms, "one_device", lambda: False)  # on several, XLA chooses
    assert sums(lambda *p: gradient(*p), x, scale) > few
