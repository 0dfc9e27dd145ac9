"""Cross-entropy of a large vocabulary on a mesh, said device by device.

Every device has its own positions and a piece of the output table. The table is gathered once, in
the dtype of the computation, and gone through twice in tiles of columns: for the log-sum-exp, then
for the gradients `softmax - onehot`. A tile's gradient is summed over the devices once, in the same
dtype, and only a device's own piece of it is kept. So memory is that of one tile and the traffic
that of no tiling at all; the price is a second product with the table.

Positions without a target are moved behind the others, and chunks without any target are skipped.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from metamorph_jax.sharding import fit, spec

TILE = 8192  # columns of the table at a time, about
CHUNK = 2048  # positions at a time
_NOTHING = -1e30


def cross_entropy(hidden, table, added, targets, wants):
    """Loss and gradients, over the mesh that is set.

    Args:
        hidden: float[B, L, D].
        table: float[D, V]; added: float[n, D] tokens behind it.
        targets: int32[B, L], -1 for none.
        wants: which of (hidden, table, added) need gradients.

    Returns:
        ((sum float32[], losses float32[B, L], bool[B, L] target has the highest logit),
        gradients of the sum in (hidden, table, added) or None each).
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_rows = fit(spec("act_batch", "act_len", None), hidden.shape, mesh)
    in_table = fit(spec("embed", "vocab"), table.shape, mesh)
    in_added = fit(spec("added", "embed"), added.shape, mesh)
    rows, everywhere = P(*in_rows[:2]), P()
    grads = (in_rows, in_table, in_added)
    grads = tuple(where if want else everywhere for where, want in zip(grads, wants, strict=True))
    body = partial(
        _local,
        wants=wants,
        over=_axes(in_rows[0]) + _axes(in_rows[1]),
        width=_axes(in_table[0]),
        vocabulary=_axes(in_table[1]),
        added_width=_axes(in_added[1]),
    )
    run = jax.shard_map(
        body,
        in_specs=(in_rows, in_table, in_added, rows),
        out_specs=((everywhere, rows, rows), grads),
        check_vma=False,
    )
    return run(hidden, table, added, targets)


def _axes(entry) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec that have more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(a for a in names if mesh.shape[a] > 1)


def _local(hidden, table, added, targets, *, wants, over, width, vocabulary, added_width):
    """What one device does.

    Args:
        hidden, table, added, targets, wants: this device's pieces.
        over: axes over which positions are spread; width, vocabulary: over which the rows and the
            columns of the table are; added_width: over which the columns of `added` are.
    """
    shape, dtype = hidden.shape, hidden.dtype
    D, V, n = shape[-1], table.shape[1], added.shape[0]
    hidden, targets = hidden.reshape(-1, D), targets.reshape(-1)
    T = len(hidden)
    chunk = min(CHUNK, T)
    order, count = _supervised_first(targets, chunk)
    hidden = hidden[order]
    targets = jnp.where(jnp.arange(len(order)) < count, targets[order], -1)
    used = -(-count // chunk)

    tiles = math.ceil(V / TILE)
    columns = math.ceil(V / tiles / 128) * 128 if tiles > 1 else V
    padded = jnp.pad(table.astype(dtype), ((0, 0), (0, tiles * columns - V)))
    head = _gather(padded, width, 0)
    extra = _gather(added.astype(dtype), added_width, 1)
    first = jax.lax.axis_index(vocabulary) * V if vocabulary else 0
    whole = V * (jax.lax.axis_size(vocabulary) if vocabulary else 1)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def tile_of(j):
        return jax.lax.dynamic_slice_in_dim(head, j * columns, columns, axis=1)

    def logits_of(i, j, tile):
        """(float32[chunk, columns] logits, their ids or -2, states, targets)."""
        h = jax.lax.dynamic_slice_in_dim(hidden, i * chunk, chunk)
        t = jax.lax.dynamic_slice_in_dim(targets, i * chunk, chunk)
        ids = j * columns + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1)
        logits = jnp.where(ids < V, product("tD,DV->tV", h, tile), _NOTHING)
        return logits, jnp.where(ids < V, first + ids, -2), h, t

    # ---- once over the table: log-sum-exp, the target's logit, the highest one
    def look(j, carry):
        tile = tile_of(j)

        def body(i, carry):
            at = lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk)  # noqa: E731
            top, mass, mine = map(at, carry)
            logits, ids, _, t = logits_of(i, j, tile)
            new_top = jnp.maximum(top, logits.max(axis=1))
            mass = mass * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)
            mine += jnp.sum(jnp.where(ids == t[:, None], logits, 0.0), axis=1)
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
            return tuple(map(put, carry, (new_top, mass, mine)))

        return jax.lax.fori_loop(0, used, body, carry)

    zeros = jnp.zeros(len(order), jnp.float32)
    top, mass, mine = jax.lax.fori_loop(0, tiles, look, (zeros + _NOTHING, zeros, zeros))
    if vocabulary:
        highest = jax.lax.pmax(top, vocabulary)
        mass = jax.lax.psum(mass * jnp.exp(top - highest), vocabulary)
        mine, top = jax.lax.psum(mine, vocabulary), highest
    if n:
        new = product("tD,nD->tn", hidden, extra)
        ids = whole + jnp.arange(n)
        highest = jnp.maximum(top, new.max(axis=1))
        mass = mass * jnp.exp(top - highest) + jnp.exp(new - highest[:, None]).sum(axis=1)
        mine += jnp.sum(jnp.where(ids == targets[:, None], new, 0.0), axis=1)
        top = highest
    valid = targets >= 0
    lse = jnp.where(valid, top + jnp.log(jnp.maximum(mass, 1e-37)), 0.0)
    each = jnp.where(valid, lse - mine, 0.0)
    back = jnp.argsort(order[:T])
    lead = shape[:-1]
    losses, right = each[back].reshape(lead), (valid & (mine >= top))[back].reshape(lead)
    total = _sum(jnp.sum(each), over)
    if not any(wants):
        return (total, losses, right), (None, None, None)

    # ---- a second time: gradients
    def minus_target(logits, ids, i):
        at = lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk)  # noqa: E731
        d = jnp.exp(logits - at(lse)[:, None]) - (ids == at(targets)[:, None])
        return jnp.where(at(valid)[:, None], d, 0.0).astype(dtype)

    def pull(d_hidden, j):
        tile = tile_of(j)

        def body(i, carry):
            d_hidden, d_tile = carry
            logits, ids, h, _ = logits_of(i, j, tile)
            d = minus_target(logits, ids, i)
            if wants[0]:
                old = jax.lax.dynamic_slice_in_dim(d_hidden, i * chunk, chunk)
                new = old + product("tV,DV->tD", d, tile)
                d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, new, i * chunk, 0)
            if wants[1]:
                d_tile = d_tile + product("tD,tV->DV", h, d)
            return d_hidden, d_tile

        d_tile = jnp.zeros((D, columns), jnp.float32) if wants[1] else None
        d_hidden, d_tile = jax.lax.fori_loop(0, used, body, (d_hidden, d_tile))
        if wants[1]:
            d_tile = _sum_and_keep(d_tile.astype(dtype), over, width, 0)
        return d_hidden, d_tile

    d_hidden = jnp.zeros(hidden.shape, jnp.float32) if wants[0] else None
    d_table = d_added = None
    if wants[0] or wants[1]:
        d_hidden, d_tiles = jax.lax.scan(pull, d_hidden, jnp.arange(tiles))
        if wants[0]:
            d_hidden = _sum(d_hidden, vocabulary)
        if wants[1]:
            d_table = d_tiles.swapaxes(0, 1).reshape(len(table), -1)[:, :V].astype(table.dtype)
    if n and (wants[0] or wants[2]):
        d = jnp.exp(new - lse[:, None]) - (ids == targets[:, None])
        d = jnp.where(valid[:, None], d, 0.0).astype(dtype)
        if wants[0]:
            d_hidden += product("tn,nD->tD", d, extra)
        if wants[2]:
            d_added = product("tn,tD->nD", d, hidden).astype(dtype)
            d_added = _sum_and_keep(d_added, over, added_width, 1)
    if wants[2]:
        d_added = jnp.zeros(added.shape, added.dtype) if not n else d_added.astype(added.dtype)
    if wants[0]:
        d_hidden = d_hidden[back].reshape(shape).astype(dtype)
    return (total, losses, right), (d_hidden, d_table, d_added)


def _supervised_first(targets, chunk):
    """(int32[whole chunks] positions, those with a target first; int32[] how many these are)."""
    order = jnp.argsort(targets < 0, stable=True)
    return jnp.pad(order, (0, -len(order) % chunk)), jnp.sum(targets >= 0)


def _gather(x, axes, dim):
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
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(cut) * size, size, axis=dim)
