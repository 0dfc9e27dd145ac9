"""Cross-entropy over a large vocabulary on a mesh, written as what each device computes.

Every device has its own positions and a piece of the output table. The table is gathered once, in
the dtype of the computation, and read twice in tiles of columns: once for the log-sum-exp, once for
the gradients `softmax - onehot`. A tile's gradient is summed over the devices once, in the same
dtype, and a device keeps only its own piece of it. So the memory needed is that of one tile, while
the communication is that of an untiled loss; the price is a second product with the table.

Positions without a target are moved to the end, and chunks without any target are skipped.

optax has no loss that avoids the logits of all positions at once, and tokamax's (0.0.17) is wrong
when V is not a multiple of 2048.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim
from jax.sharding import PartitionSpec as P

from metamorph_jax.sharding import fit, spec

TILE = 8192  # columns of the table in one tile, approximately
CHUNK = 2048  # positions in one chunk
_NO_LOGIT = -1e30

product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def cross_entropy(hidden, table, added, bias, added_bias, targets, wants):
    """Loss and gradients, on the mesh that is set.

    Args:
        hidden: float[B, L, D].
        table: float[D, V].
        added: float[n, D] rows of the ids V, V + 1, …
        bias: float[V], and added_bias: float[n], added to the logits; or empty.
        targets: int32[B, L] ids, -1 for none.
        wants: which of (hidden, table, added, bias, added_bias) need gradients.

    Returns:
        ((sum float32[], losses float32[B, L], bool[B, L] target has the highest logit),
        gradients of the sum in those five, None where not wanted).
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_rows = fit(spec("act_batch", "act_len", None), hidden.shape, mesh)
    in_table = fit(spec("embed", "vocab"), table.shape, mesh)
    in_added = fit(spec("added", "embed"), added.shape, mesh)
    rows, everywhere = P(*in_rows[:2]), P()
    in_bias = P(in_table[1]) if len(bias) else everywhere
    grads = (in_rows, in_table, in_added, in_bias, everywhere)
    grads = tuple(where if want else everywhere for where, want in zip(grads, wants, strict=True))
    axes = _Axes(
        rows=_split(in_rows[0], mesh) + _split(in_rows[1], mesh),
        width=_split(in_table[0], mesh),
        vocabulary=_split(in_table[1], mesh),
        added_width=_split(in_added[1], mesh),
    )
    run = jax.shard_map(
        partial(_on_device, wants=wants, axes=axes),
        in_specs=(in_rows, in_table, in_added, in_bias, everywhere, rows),
        out_specs=((everywhere, rows, rows), grads),
        check_vma=False,
    )
    return run(hidden, table, added, bias, added_bias, targets)


class _Axes(NamedTuple):
    """Mesh axes over which things are split; () for none.

    Attributes:
        rows: the positions.
        width, vocabulary: the rows and the columns of the table.
        added_width: the columns of the added rows.
    """

    rows: tuple[str, ...]
    width: tuple[str, ...]
    vocabulary: tuple[str, ...]
    added_width: tuple[str, ...]


def _split(entry, mesh) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec that have more than one device."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(a for a in names if mesh.shape[a] > 1)


def _on_device(hidden, table, added, bias, added_bias, targets, *, wants, axes: _Axes):
    """`cross_entropy` of one device's pieces."""
    dtype = hidden.dtype
    positions = _supervised_first(hidden, targets)
    head = _gather_head(table, bias, dtype, axes)
    extra = _gather(added.astype(dtype), axes.added_width, 1)

    softmax = _add_up(_read(positions, head), axes.vocabulary)
    if len(extra):
        new = product("tD,nD->tn", positions.hidden, extra)
        new = new + added_bias if len(added_bias) else new
        new_ids = head.vocabulary + jnp.arange(len(extra))
        softmax = softmax.include(new, new_ids, positions.targets)
    valid, lse = positions.valid, softmax.log_sum_exp(positions.valid)
    losses = jnp.where(valid, lse - softmax.target, 0.0)
    right = valid & (softmax.target >= softmax.top)
    total = _sum(jnp.sum(losses), axes.rows)
    result = total, positions.restore(losses), positions.restore(right)
    d_hidden = d_table = d_added = d_bias = d_added_bias = None
    if wants[0] or wants[1] or wants[3]:
        d_hidden, d_table, d_bias = _gradients(positions, head, lse, wants, axes)
    if len(extra) and (wants[0] or wants[2] or wants[4]):
        d_new = softmax_minus_target(new, new_ids, lse, positions.targets, valid).astype(dtype)
        if wants[0]:
            d_hidden += product("tn,nD->tD", d_new, extra)
        if wants[2]:
            d_added = product("tn,tD->nD", d_new, positions.hidden).astype(dtype)
            d_added = _sum_and_keep(d_added, axes.rows, axes.added_width, 1)
        if wants[4]:
            d_added_bias = _sum(jnp.sum(d_new, axis=0, dtype=jnp.float32), axes.rows)
    if wants[0]:
        d_hidden = positions.restore(d_hidden)
    grads = (d_hidden, d_table, d_added, d_bias, d_added_bias)
    parts = (hidden, table, added, bias, added_bias)
    return result, tuple(
        None if d is None else d.astype(x.dtype) for d, x in zip(grads, parts, strict=True)
    )


# ---- positions


@dataclasses.dataclass(frozen=True)
class _Positions:
    """This device's positions, those with a target first, filled up to whole chunks.

    Attributes:
        hidden: float[T, D]; targets: int32[T], -1 for none.
        chunk: positions in a chunk.
        used: int32[] number of chunks that hold a target.
        back: int32[t] where each of the given positions is now.
        shape: (B, L) that was given.
    """

    hidden: jax.Array
    targets: jax.Array
    chunk: int
    used: jax.Array
    back: jax.Array
    shape: tuple[int, ...]

    @property
    def valid(self) -> jax.Array:
        return self.targets >= 0

    def part(self, x: jax.Array, i) -> jax.Array:
        """Chunk i of x: [T, ...]."""
        return dynamic_slice_in_dim(x, i * self.chunk, self.chunk)

    def put(self, x: jax.Array, new: jax.Array, i) -> jax.Array:
        """x with chunk i replaced."""
        return dynamic_update_slice_in_dim(x, new, i * self.chunk, 0)

    def restore(self, x: jax.Array) -> jax.Array:
        """[B, L, ...] in the order that was given, of x: [T, ...]."""
        return x[self.back].reshape(*self.shape, *x.shape[1:])


def _supervised_first(hidden, targets) -> _Positions:
    """Sorts hidden: float[B, L, D] and targets: int32[B, L]."""
    shape, flat = targets.shape, targets.reshape(-1)
    T = len(flat)
    chunk = min(CHUNK, T)
    order = jnp.argsort(flat < 0, stable=True)
    order = jnp.pad(order, (0, -T % chunk))
    count = jnp.sum(flat >= 0)
    return _Positions(
        hidden=hidden.reshape(T, -1)[order],
        targets=jnp.where(jnp.arange(len(order)) < count, flat[order], -1),
        chunk=chunk,
        used=-(-count // chunk),
        back=jnp.argsort(order[:T]),
        shape=shape,
    )


# ---- the table


@dataclasses.dataclass(frozen=True)
class _Head:
    """The columns of the table that this device multiplies with, in tiles of equal size.

    Attributes:
        padded: float[D, tiles * columns].
        bias: float32[tiles * columns], or empty.
        size: columns that are not padding.
        first: id of the first column.
        vocabulary: columns of the table on all devices together.
    """

    padded: jax.Array
    bias: jax.Array
    tiles: int
    columns: int
    size: int
    first: jax.Array | int
    vocabulary: int

    def tile(self, j) -> jax.Array:
        """float[D, columns]"""
        return dynamic_slice_in_dim(self.padded, j * self.columns, self.columns, axis=1)

    def logits(self, hidden, tile, j) -> tuple[jax.Array, jax.Array]:
        """(float32[t, columns], their ids int32[1, columns], -2 in the padding)."""
        column = j * self.columns + jax.lax.broadcasted_iota(jnp.int32, (1, self.columns), 1)
        logits = product("tD,DV->tV", hidden, tile)
        if len(self.bias):
            logits += dynamic_slice_in_dim(self.bias, j * self.columns, self.columns)
        logits = jnp.where(column < self.size, logits, _NO_LOGIT)
        return logits, jnp.where(column < self.size, self.first + column, -2)


def _gather_head(table, bias, dtype, axes: _Axes) -> _Head:
    """Pads table: [D piece, V] to whole tiles and gathers its rows; bias: [V] or empty."""
    V = table.shape[1]
    tiles = math.ceil(V / TILE)
    columns = math.ceil(V / tiles / 128) * 128 if tiles > 1 else V
    padded = jnp.pad(table.astype(dtype), ((0, 0), (0, tiles * columns - V)))
    index, devices = 0, 1
    if axes.vocabulary:
        index, devices = jax.lax.axis_index(axes.vocabulary), jax.lax.axis_size(axes.vocabulary)
    if len(bias):
        bias = jnp.pad(bias.astype(jnp.float32), (0, tiles * columns - V))
    padded = _gather(padded, axes.width, 0)
    return _Head(padded, bias, tiles, columns, V, index * V, V * devices)


# ---- first reading: softmax


class _Softmax(NamedTuple):
    """The softmax of each position over the logits included so far.

    Attributes:
        top: float32[t] highest logit.
        mass: float32[t] sum of exp(logit - top).
        target: float32[t] logit of the target; 0 if not among them.
    """

    top: jax.Array
    mass: jax.Array
    target: jax.Array

    def include(self, logits, ids, targets) -> "_Softmax":
        """With more logits. logits: float32[t, n]; ids: int32 that broadcast to them."""
        top = jnp.maximum(self.top, logits.max(axis=1))
        mass = self.mass * jnp.exp(self.top - top) + jnp.exp(logits - top[:, None]).sum(axis=1)
        mine = jnp.sum(jnp.where(ids == targets[:, None], logits, 0.0), axis=1)
        return _Softmax(top, mass, self.target + mine)

    def log_sum_exp(self, valid) -> jax.Array:
        """float32[t], 0 where not valid."""
        return jnp.where(valid, self.top + jnp.log(jnp.maximum(self.mass, 1e-37)), 0.0)


def _read(positions: _Positions, head: _Head) -> _Softmax:
    """The softmax over this device's columns of the table."""

    def tile_step(j, softmax):
        tile = head.tile(j)

        def chunk_step(i, softmax):
            hidden, targets = (positions.part(x, i) for x in (positions.hidden, positions.targets))
            logits, ids = head.logits(hidden, tile, j)
            before = _Softmax(*(positions.part(x, i) for x in softmax))
            after = before.include(logits, ids, targets)
            return _Softmax(
                *(positions.put(x, new, i) for x, new in zip(softmax, after, strict=True))
            )

        return jax.lax.fori_loop(0, positions.used, chunk_step, softmax)

    zeros = jnp.zeros(len(positions.targets), jnp.float32)
    return jax.lax.fori_loop(0, head.tiles, tile_step, _Softmax(zeros + _NO_LOGIT, zeros, zeros))


def _add_up(softmax: _Softmax, vocabulary) -> _Softmax:
    """The softmax over the columns of all devices."""
    if not vocabulary:
        return softmax
    top = jax.lax.pmax(softmax.top, vocabulary)
    mass = jax.lax.psum(softmax.mass * jnp.exp(softmax.top - top), vocabulary)
    return _Softmax(top, mass, jax.lax.psum(softmax.target, vocabulary))


# ---- second reading: gradients


def softmax_minus_target(logits, ids, lse, targets, valid) -> jax.Array:
    """Gradient of the summed loss in the logits: float32[t, n], 0 where not valid.

    Args:
        logits: float32[t, n]; ids: int32 that broadcast to them.
        lse: float32[t] log-sum-exp over all logits.
        targets: int32[t]; valid: bool[t].
    """
    d = jnp.exp(logits - lse[:, None]) - (ids == targets[:, None])
    return jnp.where(valid[:, None], d, 0.0)


def _gradients(positions: _Positions, head: _Head, lse, wants, axes: _Axes):
    """(float32[T, D] in the states, float[D piece, V] in the table, float32[V] in the bias), None
    where not wanted."""
    dtype = positions.hidden.dtype

    def tile_step(d_hidden, j):
        tile = head.tile(j)

        def chunk_step(i, carry):
            d_hidden, d_tile, d_bias = carry
            hidden, targets, sums, valid = (
                positions.part(x, i)
                for x in (positions.hidden, positions.targets, lse, positions.valid)
            )
            logits, ids = head.logits(hidden, tile, j)
            d = softmax_minus_target(logits, ids, sums, targets, valid).astype(dtype)
            if wants[0]:
                new = positions.part(d_hidden, i) + product("tV,DV->tD", d, tile)
                d_hidden = positions.put(d_hidden, new, i)
            if wants[1]:
                d_tile = d_tile + product("tD,tV->DV", hidden, d)
            if wants[3]:
                d_bias = d_bias + jnp.sum(d, axis=0, dtype=jnp.float32)
            return d_hidden, d_tile, d_bias

        d_tile = jnp.zeros(tile.shape, jnp.float32) if wants[1] else None
        d_bias = jnp.zeros(head.columns, jnp.float32) if wants[3] else None
        carry = d_hidden, d_tile, d_bias
        d_hidden, d_tile, d_bias = jax.lax.fori_loop(0, positions.used, chunk_step, carry)
        if wants[1]:
            d_tile = _sum_and_keep(d_tile.astype(dtype), axes.rows, axes.width, 0)
        return d_hidden, (d_tile, d_bias)

    d_hidden = jnp.zeros(positions.hidden.shape, jnp.float32) if wants[0] else None
    d_hidden, (d_tiles, d_biases) = jax.lax.scan(tile_step, d_hidden, jnp.arange(head.tiles))
    if wants[0]:
        d_hidden = _sum(d_hidden, axes.vocabulary)
    if wants[1]:
        d_tiles = d_tiles.swapaxes(0, 1)
        d_tiles = d_tiles.reshape(len(d_tiles), -1)[:, : head.size]
    if wants[3]:
        d_biases = _sum(d_biases.reshape(-1)[: head.size], axes.rows)
    return d_hidden, d_tiles, d_biases


# ---- communication


def _gather(x, axes, dim):
    """All pieces of x along a dimension that is split over these axes."""
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def _sum(x, axes):
    return jax.lax.psum(x, axes) if axes else x


def _sum_and_keep(x, over, cut, dim):
    """Sum over the axes `over`, of which a device keeps its piece along the axes `cut`."""
    both = tuple(a for a in cut if a in over)
    if both == cut and cut:
        x = _sum(x, tuple(a for a in over if a not in cut))
        return jax.lax.psum_scatter(x, cut, scatter_dimension=dim, tiled=True)
    x = _sum(x, over)
    if not cut:
        return x
    size = x.shape[dim] // jax.lax.axis_size(cut)
    return dynamic_slice_in_dim(x, jax.lax.axis_index(cut) * size, size, axis=dim)
