"""Multi-scale deformable sampling: the core of deformable attention.

For every query, head and level a few points are read from a feature map, bilinearly, and summed
with weights (Deformable DETR, arXiv:2010.04159, equation 3). Pixel centres are at half-integers of
the map, and neighbours outside of it count as zero. Two methods give the same numbers:

    gather   reads the four neighbours of each point; little arithmetic, but its gradient scatters.
    dense    builds, for each query and head, the coefficient of every pixel and multiplies with
             the whole map: a neighbour at distance t along an axis has the coefficient
             max(0, 1 - |t|), so a point's coefficients are the outer product of a column and a row.
             Far more arithmetic, but matrix products only, in both passes.

A NaN or infinite location reads nothing and has no gradient.
"""

import math

import jax
import jax.numpy as jnp

from metamorph_jax import sharding

METHODS = ("auto", "gather", "dense")
_CHUNK_BYTES = 2**25  # of intermediate values that one chunk of queries may need

Shapes = tuple[tuple[int, int], ...]


def sample(
    value: jax.Array,
    shapes: Shapes,
    locations: jax.Array,
    weights: jax.Array,
    *,
    method: str = "auto",
) -> jax.Array:
    """The weighted sum of what each query reads from the maps.

    Queries are processed in chunks, and the backward pass computes a chunk's intermediate values
    again, so memory beyond inputs and outputs does not grow with the number of queries.

    Args:
        value: float[B, S, h, d], one map after another, each row by row.
        shapes: height and width of each map, S = sum of their products. For several images with
            several levels each, an image's levels are consecutive.
        locations: float32[B, Q, h, levels, P, 2], (x, y) with (0, 0) and (1, 1) at the outer
            corners of the map.
        weights: float[B, Q, h, levels, P].
        method: "gather", "dense", or "auto" for what is faster here.

    Returns:
        [B, Q, h * d] in value's dtype, differentiable in value, locations and weights. Products are
        in value's dtype, locations and sums in float32.

    Raises:
        ValueError: shapes or method that don't fit.
        TypeError: locations that are not float32 (bfloat16 has steps of a quarter of a pixel).
    """
    B, Q, h, d = _check(value, shapes, locations, weights, method)
    method = choose(shapes) if method == "auto" else method
    n = -(-Q // chunk_size(value.shape, Q, shapes, locations.shape[4], method))
    run = jax.checkpoint(lambda v, x: _METHODS[method](v, shapes, *x))
    if n == 1:
        return run(value, (locations, weights)).astype(value.dtype)
    c = -(-Q // n)

    def split(x):
        # A chunk takes every nth query, so that queries that are sharded stay where they are.
        x = jnp.pad(x, [(0, n * c - Q if a == 1 else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(B, c, n, *x.shape[2:]), 2, 0)

    # The gradient of `value` is summed over chunks in float32.
    wide = value.astype(jnp.float32)
    step = lambda _, x: (None, run(wide.astype(value.dtype), x).astype(value.dtype))  # noqa: E731
    _, out = jax.lax.scan(step, None, (split(locations), split(weights)))
    return jnp.moveaxis(out, 0, 2).reshape(B, n * c, h * d)[:, :Q]


def choose(shapes: Shapes) -> str:
    """The method that "auto" takes."""
    return "dense" if sharding.platform() == "tpu" else "gather"


def chunk_size(value_shape, queries: int, shapes: Shapes, points: int, method: str) -> int:
    """How many queries are processed at a time: as many as 32 MiB of intermediate values allow.

    Those are, in float32, four neighbours of each point for "gather", and for "dense" the
    coefficients of all pixels and of each point's row and column. Rows and heads that are sharded
    over devices count once per device.
    """
    B, S, h, d = value_shape
    sides = sum(H + W for H, W in shapes)
    per_head = {"gather": 4 * points * len(shapes) * d, "dense": S + points * sides}[method]
    rows, heads = _shards(B, h)
    per_query = 4 * (B // rows) * (h // heads) * per_head
    return max(1, min(queries, _CHUNK_BYTES // per_query))


def _shards(B: int, h: int) -> tuple[int, int]:
    """How many devices share the rows, and the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return 1, 1
    count = lambda axes: math.prod(  # noqa: E731
        mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())
    )
    where = sharding.fit(sharding.spec("act_batch", "act_heads"), (B, h), mesh)
    return tuple(count(axes) for axes in where)


def _check(value, shapes, locations, weights, method):
    B, S, h, d = value.shape
    Q, P = locations.shape[1], locations.shape[-2]
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if S != sum(H * W for H, W in shapes):
        raise ValueError(f"value has {S} positions, but the maps {shapes} have others in total")
    expected = (B, Q, h, len(shapes), P, 2)
    if locations.shape != expected or weights.shape != expected[:-1]:
        raise ValueError(f"locations {locations.shape} and weights {weights.shape}: expected "
                         f"{expected} and {expected[:-1]}")  # fmt: skip
    if locations.dtype != jnp.float32:
        raise TypeError(f"locations are {locations.dtype}, expected float32")
    return B, Q, h, d


def _groups(value, shapes, locations, weights):
    """Levels of one shape together, since they are processed alike.

    Yields:
        (value [B, h, G, H * W, d], (H, W), x, y, weights), the last three [B, h, q, G, P], x and y
        in pixels: 0 is the centre of the first one.
    """
    starts = [0]
    for H, W in shapes:
        starts.append(starts[-1] + H * W)
    for H, W in dict.fromkeys(shapes):
        levels = [i for i, shape in enumerate(shapes) if shape == (H, W)]
        maps = jnp.stack([value[:, starts[i] : starts[i + 1]] for i in levels], 1)
        take = lambda x: x.swapaxes(1, 2)[:, :, :, tuple(levels)]  # noqa: E731, B023
        xy = take(locations)
        x, y = xy[..., 0] * W - 0.5, xy[..., 1] * H - 0.5
        yield maps.transpose(0, 3, 1, 2, 4), (H, W), x, y, take(weights)


def _gather(value, shapes, locations, weights):
    """float32[B, q, h * d] by reading four neighbours of each point."""
    B, q, h = weights.shape[:3]
    out = 0.0
    for maps, (H, W), x, y, w in _groups(value, shapes, locations, weights):
        G, d = maps.shape[2], maps.shape[-1]
        table = maps.reshape(B, h, G * H * W, d)
        inside = (x >= -1) & (x < W) & (y >= -1) & (y < H)
        x, y, w = (jnp.where(inside, a, 0) for a in (x, y, w))
        left, top = jnp.floor(x), jnp.floor(y)
        right, bottom = x - left, y - top
        level = jnp.arange(G)[:, None] * (H * W)
        for dy, ky in ((0, 1 - bottom), (1, bottom)):
            for dx, kx in ((0, 1 - right), (1, right)):
                i, j = top.astype(jnp.int32) + dy, left.astype(jnp.int32) + dx
                k = jnp.where((i >= 0) & (i < H) & (j >= 0) & (j < W), w * ky * kx, 0)
                at = level + jnp.clip(i, 0, H - 1) * W + jnp.clip(j, 0, W - 1)
                rows = jnp.take_along_axis(
                    table, at.reshape(B, h, -1, 1), axis=2, mode="promise_in_bounds"
                )
                rows = rows.reshape(B, h, q, -1, d)
                k = k.reshape(B, h, q, -1).astype(value.dtype)
                out += jnp.einsum("bhqp,bhqpd->bqhd", k, rows, preferred_element_type=jnp.float32)
    return out.reshape(B, q, -1)


def _dense(value, shapes, locations, weights):
    """float32[B, q, h * d] by products with the whole maps."""
    B, q, h = weights.shape[:3]
    out = 0.0
    for maps, (H, W), x, y, w in _groups(value, shapes, locations, weights):
        columns = (_tent(y, H) * w[..., None]).astype(value.dtype)
        rows = _tent(x, W).astype(value.dtype)
        pixels = jnp.einsum("bhqgpi,bhqgpj->bhqgij", columns, rows).reshape(B, h, q, -1)
        flat = maps.reshape(B, h, pixels.shape[-1], -1)
        out += jnp.einsum("bhqs,bhsd->bqhd", pixels, flat, preferred_element_type=jnp.float32)
    return out.reshape(B, q, -1)


def _tent(x: jax.Array, size: int) -> jax.Array:
    """max(0, 1 - |x - i|) for i < size, on a new last axis.

    At a pixel's centre the derivative is the one to the right, as that of "gather".
    """
    t = x[..., None] - jnp.arange(size, dtype=jnp.float32)
    return jnp.where((t >= -1) & (t < 1), jnp.where(t >= 0, 1 - t, 1 + t), 0)


_METHODS = {"gather": _gather, "dense": _dense}
