"""The matrix product of all linear layers."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from metamorph_jax.sharding import gathered, one_device, platform


def flat_dot_general(lhs, rhs, dimension_numbers, precision=None, **options):
    """`lax.dot_general` of x [..., D] with a kernel [D, F], over rows [-1, D] on one device.

    XLA's CPU backend runs the kernel's gradient of a product with two leading dimensions three
    times slower than with one. On a mesh the leading dimensions keep their own shardings. Under
    `jax.default_matmul_precision("bfloat16")`, float32 products run on a CPU as on a TPU: both
    sides rounded to bfloat16, sums in float32 (see `rounded_product`). That is faster on a CPU with
    matrix units.
    For `nnx.Linear(dot_general=...)`, which passes `precision` and more `options` on.
    """
    plain = dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ()))
    if not plain or not one_device():
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)
    rows = lhs.reshape(-1, lhs.shape[-1])
    few = len(rows) <= _FEW
    if precision is None and lhs.dtype == rhs.dtype == jnp.float32 and not few and in_bfloat16():
        out = rounded_product(rows, rhs)
    else:
        out = jax.lax.dot_general(rows, rhs, (((1,), (0,)), ((), ())), precision, **options)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


def gathering_dot_general(names, lhs, rhs, dimension_numbers, precision=None, **options):
    """`flat_dot_general` with a kernel whose dimensions have these names, gathered over "fsdp".

    Left to itself, XLA gathers some kernels once for the recomputed forward pass and
    once more for the gradient, and others by a sum over all devices. Where there are
    fewer positions than rows of the kernel, as in decoding, positions travel and kernels stay.
    For `nnx.Linear(dot_general=partial(gathering_dot_general, names))`.
    """
    if lhs.size // lhs.shape[-1] >= rhs.shape[0]:
        rhs = gathered(rhs, names)
    return flat_dot_general(lhs, rhs, dimension_numbers, precision, **options)


_FEW = 16  # up to this many rows, reading the kernel dominates, and rounding it would take longer


def in_bfloat16() -> bool:
    """Whether float32 products are to be rounded here, as the running context asks."""
    return jax.config.jax_default_matmul_precision == "bfloat16" and platform() == "cpu"


@jax.custom_vjp
def rounded_product(x, w):
    """float32[T, F] of float32 x [T, D] and w [D, F], both rounded to bfloat16 first.

    XLA's CPU backend uses the matrix units in this one layout only, so the backward pass copies its
    transposed operands into it.
    """
    return _product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward(x, w):
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _product(x, w), (x, w)


def _backward(saved, gradient):
    x, w = saved
    gradient = gradient.astype(jnp.bfloat16)
    laid_out = lambda y: with_layout_constraint(y.T, Layout(major_to_minor=(0, 1)))  # noqa: E731
    return _product(gradient, laid_out(w)), _product(laid_out(x), gradient)


rounded_product.defvjp(_forward, _backward)
