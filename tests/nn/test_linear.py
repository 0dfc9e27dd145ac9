"""The product of linear layers: any leading dimensions, and rounded where that is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.nn import linear


def problem(*lead):
    r = np.random.default_rng(0)
    x = r.normal(size=(*lead, 40)).astype(np.float32)
    layer = nnx.Linear(40, 24, dot_general=linear.flat_dot_general, rngs=nnx.Rngs(0))
    return x, layer


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 3, 4)])
def test_any_leading_dimensions(lead):
    x, layer = problem(*lead)
    np.testing.assert_allclose(
        layer(x), x @ layer.kernel[...] + layer.bias[...], rtol=1e-5, atol=1e-5
    )


def test_rounded_products_and_their_gradients():
    x, layer = problem(2, 30)
    out = np.random.default_rng(1).normal(size=(2, 30, 24)).astype(np.float32)
    bf16 = lambda a: jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731

    def total(kernel, x):
        product = linear.flat_dot_general(x, kernel, (((2,), (0,)), ((), ())))
        return jnp.sum(product * out), product

    kernel = layer.kernel[...]
    with jax.default_matmul_precision("bfloat16"):
        grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        (d_kernel, d_x), product = grad(kernel, x)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(product, bf16(x) @ bf16(kernel), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_x, bf16(out) @ bf16(kernel).T, rtol=1e-5, atol=1e-5)
        wanted = jnp.einsum("abd,abf->df", bf16(x), bf16(out))
        np.testing.assert_allclose(d_kernel, wanted, rtol=1e-5, atol=1e-4)
    (exact, _), product = jax.grad(total, argnums=(0, 1), has_aux=True)(kernel, x)
    np.testing.assert_allclose(product, x @ kernel, rtol=1e-5, atol=1e-5)
    assert np.any(exact != d_kernel)


@pytest.mark.parametrize("rows", [1, linear._FEW])
def test_few_rows_are_never_rounded(rows):
    x, layer = problem(rows)
    with jax.default_matmul_precision("bfloat16"):
        rounded = jax.jit(lambda x: layer(x))(x)
    np.testing.assert_allclose(rounded, layer(x), rtol=1e-6, atol=1e-6)
