"""A TPU kernel for the pixels' coefficients of dense deformable sampling, and for their gradient.

As XLA compiles the sum of outer products, each of the P products loads both of its factors for
every eight rows of pixels. Here a map's line is made at once, from rows that stay in registers.
Queries are in the lanes. Outside of a TPU the kernel can only be interpreted: for tests.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from metamorph_jax.sharding import fit, spec

LANES = 128
_BLOCK_BYTES = 2**21  # of coefficients, of which a step of the kernel makes so much


def coefficients(x, y, w, size, dtype, *, interpret=False) -> jax.Array:
    """Each pixel's coefficient: the sum over points of w times both tents.

    Each device makes those of its own rows, heads and queries.

    Args:
        x, y, w: float32[B, h, G, P, q], x and y from 0 to 1.
        size: height and width of the maps.
        dtype: of the result.
        interpret: run without a TPU.

    Returns:
        [B, h, G, H, W, q], differentiable in x, y and w.
    """
    run = functools.partial(_coefficients, tuple(size), jnp.dtype(dtype), interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(x, y, w)
    where = fit(spec("act_batch", "act_heads", None, None, "act_len"), x.shape, mesh)
    whole = jax.sharding.PartitionSpec(*where[:3], None, None, where[4])
    return jax.shard_map(run, in_specs=(where,) * 3, out_specs=whole, check_vma=False)(x, y, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _coefficients(size, dtype, interpret, x, y, w):
    B, h, G, P, q = x.shape
    grid, points, pixels = _blocks(x.shape, size, dtype)
    call = pl.pallas_call(
        _forward_kernel,
        out_shape=jax.ShapeDtypeStruct((B * h, G, *size, q), dtype),
        grid=grid,
        in_specs=[points] * 3,
        out_specs=pixels,
        scratch_shapes=[pltpu.VMEM((P, size[0], min(q, LANES)), jnp.float32)],
        interpret=interpret,
    )
    return call(*(a.reshape(B * h, G, P, q) for a in (x, y, w))).reshape(B, h, G, *size, q)


def _forward(size, dtype, interpret, x, y, w):
    return _coefficients(size, dtype, interpret, x, y, w), (x, y, w)


def _backward(size, dtype, interpret, saved, gradient):
    B, h, G, P, q = saved[0].shape
    grid, points, pixels = _blocks(saved[0].shape, size, dtype)
    scratch = lambda side: pltpu.VMEM((P, side, min(q, LANES)), jnp.float32)  # noqa: E731
    call = pl.pallas_call(
        _backward_kernel,
        out_shape=[jax.ShapeDtypeStruct((B * h, G, P, q), jnp.float32)] * 3,
        grid=grid,
        in_specs=[points] * 3 + [pixels],
        out_specs=[points] * 3,
        scratch_shapes=[scratch(size[0]), scratch(size[0]), scratch(size[1]), scratch(size[1])],
        interpret=interpret,
    )
    flat = [a.reshape(B * h, G, P, q) for a in saved]
    found = call(*flat, gradient.reshape(B * h, G, *size, q))
    return tuple(a.reshape(B, h, G, P, q) for a in found)


_coefficients.defvjp(_forward, _backward)


def _blocks(shape, size, dtype):
    """(grid, block of points, block of pixels): some images, and as many queries as lanes."""
    B, h, G, P, q = shape
    lanes = min(q, LANES)
    one = math.prod(size) * lanes * dtype.itemsize
    images = max(n for n in range(1, G + 1) if G % n == 0 and (n == 1 or n * one <= _BLOCK_BYTES))
    points = pl.BlockSpec((None, images, P, lanes), lambda r, g, j: (r, g, 0, j))
    pixels = pl.BlockSpec((None, images, *size, lanes), lambda r, g, j: (r, g, 0, 0, j))
    return (B * h, G // images, pl.cdiv(q, lanes)), points, pixels


def _distances(ref, image, point, size):
    """From each of `size` pixels to a point: [size, q]."""
    at = ref[image, pl.ds(point, 1)] * size - 0.5
    return at - jax.lax.broadcasted_iota(jnp.int32, (size, at.shape[1]), 0).astype(jnp.float32)


def _tent(t):
    return jnp.where((t >= -1) & (t < 1), jnp.where(t >= 0, 1 - t, 1 + t), 0)


def _slope(t):
    return jnp.where((t >= -1) & (t < 1), jnp.where(t >= 0, -1.0, 1.0), 0)


def _forward_kernel(x, y, w, out, columns):
    images, H, W, _ = out.shape
    P = x.shape[1]

    def image(g, _):
        rows = [_tent(_distances(x, g, p, W)) for p in range(P)]
        for p in range(P):
            columns[p] = _tent(_distances(y, g, p, H)) * w[g, pl.ds(p, 1)]

        def line(i, _):
            made = sum(columns[p, pl.ds(i, 1)] * rows[p] for p in range(P))
            out[g, i] = made.astype(out.dtype)

        jax.lax.fori_loop(0, H, line, None)

    jax.lax.fori_loop(0, images, image, None)


def _backward_kernel(x, y, w, gradient, by_x, by_y, by_w, columns, by_columns, rows, by_rows):
    images, H, W, _ = gradient.shape
    P = x.shape[1]

    def image(g, _):
        for p in range(P):
            rows[p] = _tent(_distances(x, g, p, W))
            columns[p] = _tent(_distances(y, g, p, H)) * w[g, pl.ds(p, 1)]
            by_rows[p] = jnp.zeros_like(by_rows[p])

        def line(i, _):
            made = gradient[g, i].astype(jnp.float32)
            for p in range(P):
                by_rows[p] += columns[p, pl.ds(i, 1)] * made
                by_columns[p, pl.ds(i, 1)] = (rows[p] * made).sum(0, keepdims=True)

        jax.lax.fori_loop(0, H, line, None)
        for p in range(P):
            point = pl.ds(p, 1)
            slope = _slope(_distances(x, g, p, W))
            by_x[g, point] = W * (by_rows[p] * slope).sum(0, keepdims=True)
            t = _distances(y, g, p, H)
            by_w[g, point] = (by_columns[p] * _tent(t)).sum(0, keepdims=True)
            slope = (by_columns[p] * _slope(t)).sum(0, keepdims=True)
            by_y[g, point] = H * w[g, point] * slope

    jax.lax.fori_loop(0, images, image, None)
