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

"auto" is dense on TPUs and gather elsewhere. On a CPU gather took 0.05 to 0.4 of torch's time at
MM-Interleaved's sizes (`benchmarks/deformable.py`), dense up to a quarter less than gather and up
to four times as long; no GPU was measured. For a v5e the compiler expects gather, not counting the
gathers themselves, to take 25 times as long as dense (benchmarks/deformable_plan.json).

On TPUs a Pallas kernel makes dense's coefficients. Without it, 2048 queries x 8 images of 3 levels
x 16 heads were estimated at 10.5 ms forward and 42 ms with gradients, against some 1 ms for all
other products of such an attention module in the forward pass; nine tenths of that were
coefficients, for which the vector units need 0.9 ms. With it the rest is estimated at 2.9 and
6.0 ms, to which the kernel adds at least 0.9 and 3.7. Neither was timed.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from metamorph_jax import sharding
from metamorph_jax.flops import Work

METHODS = ("auto", "gather", "dense")
_CHUNK_BYTES = {"cpu": 2**22, "gpu": 2**26, "tpu": 2**28}  # a CPU's caches want small chunks
_LANES = 128  # of a TPU, which work on as many queries at a time

Shapes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Group:
    """The same level of all images, whose maps are processed together, and how."""

    height: int
    width: int
    images: int
    method: str

    @property
    def pixels(self) -> int:
        """Of all its maps."""
        return self.images * self.height * self.width


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
    B, Q, h, d, P = _check(value, shapes, locations, weights, method)
    groups = _groups(shapes, method)
    c = chunk_size(value.shape, Q, shapes, P, method)
    k = _shards(B, Q, h)[1]
    n = -(-Q // (k * c))
    c = -(-Q // (k * n))

    def split(x):
        # Each of the k devices that share the queries processes a block of its own after another.
        x = x.reshape(B, k, Q // k, h, groups[0].images, len(groups), P)
        x = jnp.pad(x, [(0, n * c - Q // k if a == 2 else 0) for a in range(7)])
        x = x.reshape(B, k, n, c, *x.shape[3:])
        both = [x[..., i, :].transpose(_ORDER[g.method]) for i, g in enumerate(groups)]
        return [
            x.reshape(*x.shape[:3], k * c, *x.shape[5:])
            if g.method == "gather"
            else x.reshape(*x.shape[:5], k * c)
            for x, g in zip(both, groups, strict=True)
        ]

    xyw = (locations[..., 0], locations[..., 1], weights.astype(jnp.float32))
    points = tuple(zip(*map(split, xyw), strict=True))
    out = _chunks(groups, _maps(value, groups), points).reshape(n, B, h, k, c, d)
    out = out.transpose(1, 3, 0, 4, 2, 5).reshape(B, k, n * c, h * d)
    return out[:, :, : Q // k].reshape(B, Q, h * d)


def choose() -> str:
    """The method that "auto" takes here; the module's docstring says why."""
    return "dense" if sharding.platform() == "tpu" else "gather"


def work(
    part: str, value_shape, queries: int, shapes: Shapes, points: int, method: str = "auto"
) -> Work:
    """The arithmetic of one call, for plans and MFU.

    Model FLOPs are those of reading four neighbours of each point, whatever the method; what the
    products with whole maps compute on top of that, in both passes, counts as recomputed.
    """
    B, S, h, d = value_shape
    needed = 2.0 * 4 * points * len(shapes) * d * B * queries * h
    method = choose() if method == "auto" else method
    computed = 2.0 * S * d * B * queries * h if method == "dense" else needed
    return Work(part, needed, input_gradients=2, recomputed=3 * max(0.0, computed - needed))


def chunk_size(value_shape, queries: int, shapes: Shapes, points: int, method: str) -> int:
    """How many queries a device processes at a time: as many as `_CHUNK_BYTES` allow.

    That is the memory, in float32, of four neighbours of each point for "gather", and for "dense"
    of the coefficients of all pixels and of each point's row and column. Rows and heads that are
    sharded over devices count once per device. On a TPU it is a multiple of 128, which take the
    memory of one, unless there are fewer queries.
    """
    B, _, h, d = value_shape
    per_head = 0
    for g in _groups(shapes, method):
        if g.method == "gather":
            per_head += 4 * points * g.images * d
        else:
            per_head += g.pixels + points * g.images * (g.height + g.width)
    rows, blocks, heads = _shards(B, queries, h)
    platform = sharding.platform()
    size = max(1, _CHUNK_BYTES[platform] // (4 * (B // rows) * (h // heads) * per_head))
    if platform == "tpu":
        size = max(_LANES, size - size % _LANES)
    return min(queries // blocks, size)


def _shards(B: int, Q: int, h: int) -> tuple[int, int, int]:
    """How many devices share the rows, the queries of a row, and the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return 1, 1, 1
    where = sharding.fit(sharding.spec("act_batch", "act_len", "act_heads"), (B, Q, h), mesh)
    count = lambda axes: math.prod(  # noqa: E731
        mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())
    )
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
    return B, Q, h, d, P


def _groups(shapes: Shapes, method: str) -> tuple[_Group, ...]:
    """One for each of the levels that repeat from image to image."""
    method = choose() if method == "auto" else method
    lengths = (k for k in range(1, len(shapes) + 1) if len(shapes) % k == 0)
    levels = next(k for k in lengths if shapes == shapes[:k] * (len(shapes) // k))
    return tuple(_Group(*shape, len(shapes) // levels, method) for shape in shapes[:levels])


def _maps(value, groups):
    """The maps of each group, [B, h, G * H * W, d], G images."""
    B, S, h, d = value.shape
    images = groups[0].images
    ends = itertools.accumulate(g.height * g.width for g in groups)
    levels = jnp.split(value.reshape(B, images, S // images, h, d), [*ends][:-1], axis=2)
    return tuple(
        x.transpose(0, 3, 1, 2, 4).reshape(B, h, g.pixels, d)
        for x, g in zip(levels, groups, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(groups, maps, points):
    """Samples of one chunk of queries after the other.

    Args:
        groups: the levels.
        maps: for each group, [B, h, G * H * W, d].
        points: for each group x, y and weights, float32[n, B, h, q, G, P] ("dense": q is last),
            x and y from 0 to 1.

    Returns:
        [n, B, h, q, d] in the maps' dtype.
    """

    def step(_, points):
        sums = [_STEPS[g.method][0](g, m, *p) for g, m, p in zip(groups, maps, points, strict=True)]
        return None, sum(sums).astype(maps[0].dtype)

    return jax.lax.scan(step, None, points)[1]


def _chunks_forward(groups, maps, points):
    return _chunks(groups, maps, points), (maps, points)


def _chunks_backward(groups, saved, gradient):
    """Adds each chunk's part to the gradient of the maps, in float32 and in place."""
    maps, points = saved

    def step(sums, chunk):
        points, gradient = chunk
        both = [
            _STEPS[g.method][1](g, m, total, gradient, *p)
            for g, m, total, p in zip(groups, maps, sums, points, strict=True)
        ]
        return tuple(b[0] for b in both), tuple(b[1] for b in both)

    zeros = tuple(jnp.zeros(m.shape, jnp.float32) for m in maps)
    sums, by_points = jax.lax.scan(step, zeros, (points, gradient))
    return tuple(s.astype(m.dtype) for s, m in zip(sums, maps, strict=True)), by_points


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _neighbours(group, x, y, w):
    """Places in the maps and coefficients of each point's neighbours, both [B, h, q, G * P * 4]."""
    H, W = group.height, group.width
    x, y = x * W - 0.5, y * H - 0.5
    inside = (x >= -1) & (x < W) & (y >= -1) & (y < H)
    x, y, w = (jnp.where(inside, a, 0) for a in (x, y, w))
    left, top = jnp.floor(x), jnp.floor(y)
    right, bottom = x - left, y - top
    j = jnp.stack([left, left + 1, left, left + 1], -1).astype(jnp.int32)
    i = jnp.stack([top, top, top + 1, top + 1], -1).astype(jnp.int32)
    k = jnp.stack([1 - right, right, 1 - right, right], -1)
    k *= jnp.stack([1 - bottom, 1 - bottom, bottom, bottom], -1) * w[..., None]
    k = jnp.where((i >= 0) & (i < H) & (j >= 0) & (j < W), k, 0)
    level = jnp.arange(group.images)[:, None, None] * (H * W)
    place = level + jnp.clip(i, 0, H - 1) * W + jnp.clip(j, 0, W - 1)
    flat = (*x.shape[:3], -1)
    return place.reshape(flat), k.reshape(flat)


def _read(maps, place):
    """The pixels at these places: [B, h, q, n, d]."""
    B, h, q, n = place.shape
    rows = jnp.take_along_axis(
        maps, place.reshape(B, h, q * n, 1), axis=2, mode="promise_in_bounds"
    )
    return rows.reshape(B, h, q, n, -1)


def _gather(group, maps, x, y, w):
    """float32[B, h, q, d] by reading four neighbours of each point."""
    place, k = _neighbours(group, x, y, w)
    rows, k = _read(maps, place), k.astype(maps.dtype)
    return jnp.einsum("bhqn,bhqnd->bhqd", k, rows, preferred_element_type=jnp.float32)


def _gather_backward(group, maps, sums, gradient, x, y, w):
    """(sums plus the gradient of the maps, gradients of x, y and w)."""
    k, back, place = jax.vjp(lambda *p: _neighbours(group, *p)[::-1], x, y, w, has_aux=True)
    rows = _read(maps, place)
    by_k = jnp.einsum("bhqnd,bhqd->bhqn", rows, gradient, preferred_element_type=jnp.float32)
    B, h, q, n = k.shape
    parts = (k[..., None] * gradient[..., None, :]).reshape(B, h, q * n, -1)
    add = lambda s, at, part: s.at[at].add(part, mode="promise_in_bounds")  # noqa: E731
    sums = jax.vmap(jax.vmap(add))(sums, place.reshape(B, h, -1), parts)
    return sums, back(by_k)


def _coefficients(group, dtype, x, y, w):
    """Each pixel's coefficient: [B, h, G * H * W, q], from [B, h, G, P, q]."""
    B, h, _, _, q = x.shape
    H, W = group.height, group.width
    if sharding.platform() == "tpu":
        from metamorph_jax.nn import deformable_kernel

        pixels = deformable_kernel.coefficients(x, y, w, (H, W), dtype)
    else:
        columns = (_tent(y * H - 0.5, H) * w[..., None, :]).astype(dtype)
        rows = _tent(x * W - 0.5, W).astype(dtype)
        pixels = jnp.einsum("bhgpiq,bhgpjq->bhgijq", columns, rows)
    return pixels.reshape(B, h, group.pixels, q)


def _tent(x: jax.Array, size: int) -> jax.Array:
    """max(0, 1 - |x - i|) for i < size, on a new axis before the last.

    At a pixel's centre the derivative is the one to the right, as that of "gather".
    """
    t = x[..., None, :] - jnp.arange(size, dtype=jnp.float32)[:, None]
    return jnp.where((t >= -1) & (t < 1), jnp.where(t >= 0, 1 - t, 1 + t), 0)


def _dense(group, maps, x, y, w):
    """float32[B, h, q, d] by a product with the whole maps."""
    pixels = _coefficients(group, maps.dtype, x, y, w)
    return jnp.einsum("bhsq,bhsd->bhqd", pixels, maps, preferred_element_type=jnp.float32)


def _dense_backward(group, maps, sums, gradient, x, y, w):
    """(sums plus the gradient of the maps, gradients of x, y and w)."""
    pixels, back = jax.vjp(functools.partial(_coefficients, group, maps.dtype), x, y, w)
    sums += jnp.einsum("bhsq,bhqd->bhsd", pixels, gradient, preferred_element_type=jnp.float32)
    by_pixels = jnp.einsum("bhqd,bhsd->bhsq", gradient, maps, preferred_element_type=jnp.float32)
    return sums, back(by_pixels.astype(maps.dtype))


_STEPS = {"gather": (_gather, _gather_backward), "dense": (_dense, _dense_backward)}
# Of points, from [B, k, n, c, h, G, P].
_ORDER = {"gather": (2, 0, 4, 1, 3, 5, 6), "dense": (2, 0, 4, 5, 6, 1, 3)}
