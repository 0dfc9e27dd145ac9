"""Losses over packed rows: sums over positions, not means.

A train step adds sums and counts over all micro-batches and devices and divides once, so that
accumulation and data parallelism weigh every position alike.

`text_loss` never makes float[B, L, V]. Supervised positions are moved to the front and the output
table is multiplied with one chunk of them after another, as many chunks as hold any. Where a
gradient will be asked for, a chunk's own gradient is made while its logits are there (they are
`softmax - onehot`), so that the backward pass has nothing to recompute. Exact for every V. That is
how it goes on one device; over a mesh the table is what counts, see `nn.cross_entropy`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from metamorph_jax.models.interleave import gather_rows
from metamorph_jax.nn.cross_entropy import cross_entropy
from metamorph_jax.nn.norms import l2_normalize

VISUAL_LOSSES = ("cosine", "l1", "smooth_l1", "softmax_ce", "infonce")
INFONCE_TEMPERATURE = 0.03


def text_loss(
    hidden: jax.Array,
    table: jax.Array,
    added: jax.Array | None,
    targets: jax.Array,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy summed over the positions that have a target.

    Args:
        hidden: float[B, L, D] after the final norm.
        table, added: [D, V] and [n, D] or None, see `Llama.head_tables`.
        targets: int32[B, L] ids below V + n; -1 for none.
        chunk: positions per product with the table, on one device.

    Returns:
        (sum float32[], loss of each position float32[B, L], bool[B, L] whether the target has the
        highest logit). Only the sum has gradients.
    """
    if added is None:
        added = jnp.zeros((0, hidden.shape[-1]), hidden.dtype)
    return _cross_entropy(chunk, *map(jnp.asarray, (hidden, table, added, targets)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk, hidden, table, added, targets):
    """(sum, float32[B, L], bool[B, L]) of hidden: float[B, L, D] and targets: int32[B, L]."""
    out, _ = _with_gradients(chunk, hidden, table, added, targets, wants=(False, False, False))
    return out


def _forward(chunk, hidden, table, added, targets):
    wants = (hidden.perturbed, table.perturbed, added.perturbed)
    values = (hidden.value, table.value, added.value, targets.value)
    return _with_gradients(chunk, *values, wants)


def _backward(chunk, grads, cotangents):
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    scaled = [None if d is None else (d * g).astype(d.dtype) for d in grads]
    return (*scaled, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _with_gradients(chunk, hidden, table, added, targets, wants):
    """Loss and, as `wants` says, the gradients of its sum in (hidden, table, added)."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return cross_entropy(hidden, table, added, targets, wants)
    shape = hidden.shape
    flat = hidden.reshape(-1, shape[-1])
    out, grads = _chunked(chunk, flat, table, added, targets.reshape(-1), wants)
    total, losses, right = out
    if wants[0]:
        grads = (grads[0].reshape(shape), *grads[1:])
    return (total, losses.reshape(shape[:-1]), right.reshape(shape[:-1])), grads


def _chunked(chunk, hidden, table, added, targets, wants):
    """The loop over chunks. hidden: float[T, D]; targets: int32[T]."""
    T, D = hidden.shape
    V, n = table.shape[1], added.shape[0]
    size = min(chunk, T)
    steps = -(-T // size)
    # Supervised positions first, in order; filled up to whole chunks.
    order = jnp.argsort(targets < 0, stable=True)
    order = jnp.pad(order, (0, steps * size - T))
    count = jnp.sum(targets >= 0)
    used = -(-count // size)
    head = table.astype(hidden.dtype)  # cast once, not in every chunk
    extra = added.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(i, carry):
        losses, right, grads = carry
        at = i * size
        index = jax.lax.dynamic_slice_in_dim(order, at, size)
        valid = (at + jnp.arange(size)) < count
        h = hidden[index]
        t = jnp.where(valid, targets[index], -1)
        logits = product("tD,DV->tV", h, head)
        top = jnp.max(logits, axis=-1)
        mine = jnp.take_along_axis(logits, jnp.clip(t, 0, V - 1)[..., None], axis=-1)[..., 0]
        if n:
            new = product("tD,nD->tn", h, extra)
            top = jnp.maximum(top, jnp.max(new, axis=-1))
            one = jnp.take_along_axis(new, jnp.clip(t - V, 0, n - 1)[..., None], axis=-1)
            mine = jnp.where(t >= V, one[..., 0], mine)
        mass = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
        if n:
            mass += jnp.sum(jnp.exp(new - top[..., None]), axis=-1)
        lse = top + jnp.log(mass)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
        losses = put(losses, jnp.where(valid, lse - mine, 0.0))
        right = put(right, valid & (mine >= top))
        if any(wants):
            d_hidden, d_table, d_added = grads
            d = _softmax_minus_target(logits, lse, t, valid, 0).astype(h.dtype)
            d_new = _softmax_minus_target(new, lse, t, valid, V).astype(h.dtype) if n else None
            if wants[0]:
                dh = product("tV,DV->tD", d, head)
                if n:
                    dh += product("tn,nD->tD", d_new, extra)
                d_hidden = put(d_hidden, dh.astype(hidden.dtype))
            if wants[1]:
                d_table = d_table + product("tD,tV->DV", h, d)
            if wants[2] and n:
                d_added = d_added + product("tn,tD->nD", d_new, h)
            grads = (d_hidden, d_table, d_added)
        return losses, right, grads

    blank = lambda want, shape, dtype: jnp.zeros(shape, dtype) if want else None  # noqa: E731
    start = (
        jnp.zeros(steps * size, jnp.float32),
        jnp.zeros(steps * size, bool),
        (
            blank(wants[0], (steps * size, D), hidden.dtype),
            blank(wants[1], (D, V), jnp.float32),
            blank(wants[2], (n, D), jnp.float32),
        ),
    )
    losses, right, (d_hidden, d_table, d_added) = jax.lax.fori_loop(0, used, body, start)
    # Back to the order of the rows: position order[j] was worked on as number j.
    back = jnp.argsort(order[:T])
    if wants[0]:
        d_hidden = d_hidden[back]
    if wants[1]:
        d_table = d_table.astype(table.dtype)
    if wants[2]:
        d_added = d_added.astype(added.dtype)
    return (jnp.sum(losses), losses[back], right[back]), (d_hidden, d_table, d_added)


def _softmax_minus_target(logits, lse, targets, valid, first):
    """Gradient of the loss in the logits of ids `first`, `first + 1`, …; 0 at invalid rows."""
    ids = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    d = jnp.exp(logits - lse[..., None]) - (ids == targets[..., None])
    return jnp.where(valid[..., None], d, 0.0)


def take_targets(
    hidden: jax.Array, visual: jax.Array, targets: jax.Array, limit: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states at the positions that predict visual tokens, and what they must predict.

    Args:
        hidden: float[B, L, D].
        visual: float[B, S, C] visual tokens of each row.
        targets: int32[B, L] index into them, -1 for none.
        limit: most such positions of a row; only these are gathered. 0: all positions.

    Returns:
        (float[B, M, D], float[B, M, C], bool[B, M] which of these count, int32[B, M] where they
        are in the row); M = limit or L.
    """
    B, L = targets.shape
    index = jnp.broadcast_to(jnp.arange(L), (B, L))
    if 0 < limit < L:
        index = jnp.argsort(targets < 0, axis=1, stable=True)[:, :limit]
        hidden = gather_rows(hidden, index)
        targets = jnp.take_along_axis(targets, index, axis=1)
    if visual.shape[1] == 0:  # a batch without pictures
        blank = jnp.zeros((*targets.shape, visual.shape[-1]), visual.dtype)
        return hidden, blank, jnp.zeros(targets.shape, bool), index
    return hidden, gather_rows(visual, targets), targets >= 0, index


def visual_loss(
    predicted: jax.Array, target: jax.Array, valid: jax.Array, kind: str = "cosine"
) -> jax.Array:
    """Loss of each visual token: float32[B, M], 0 where not valid.

    Args:
        predicted, target: float[B, M, C]; for "cosine" and "infonce" any length, for "softmax_ce"
            distributions.
        valid: bool[B, M].
        kind: "cosine" is minus the cosine similarity; "l1" and "smooth_l1" are means over the
            channels; "infonce" takes the other valid tokens of the batch as negatives.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"the vision head predicts {predicted.shape}, the targets are {target.shape}"
        )
    if kind not in VISUAL_LOSSES:
        raise ValueError(f"visual loss {kind!r} is none of {', '.join(VISUAL_LOSSES)}")
    p = predicted.astype(jnp.float32)
    t = jax.lax.stop_gradient(target.astype(jnp.float32))
    if kind == "cosine":
        loss = -cosine(p, t)
    elif kind == "l1":
        loss = jnp.mean(jnp.abs(p - t), axis=-1)
    elif kind == "smooth_l1":
        d = jnp.abs(p - t)
        loss = jnp.mean(jnp.where(d < 1, 0.5 * d * d, d - 0.5), axis=-1)
    elif kind == "softmax_ce":
        loss = -jnp.sum(t * jnp.log(p + 1e-10), axis=-1)
    else:
        C = p.shape[-1]
        a, b, ok = l2_normalize(p).reshape(-1, C), l2_normalize(t).reshape(-1, C), valid.reshape(-1)
        scores = jnp.where(ok[None], a @ b.T / INFONCE_TEMPERATURE, -1e30)
        loss = (jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)).reshape(valid.shape)
    return jnp.where(valid, loss, 0.0)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine similarity over the last axis."""
    return jnp.sum(l2_normalize(a) * l2_normalize(b), axis=-1)


def constant_cosine(target: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean cosine that the best constant prediction would reach: the floor of a cosine loss."""
    unit = l2_normalize(target.astype(jnp.float32)) * valid[..., None]
    total = unit.reshape(-1, unit.shape[-1]).sum(0)
    return jnp.sqrt(jnp.sum(total * total)) / jnp.maximum(valid.sum(), 1)


def by_source(
    losses: jax.Array, counts: jax.Array, sources: jax.Array, names: tuple[str, ...], label: str
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{"label/name": (sum, count)} for each data source; float[B, M] each, int32[B, M]."""
    if not names:
        return {}
    hot = sources[..., None] == np.arange(len(names))
    # `where`, not a product: a NaN belongs to its own source alone.
    sums = jnp.sum(jnp.where(hot, losses[..., None], 0.0), axis=(0, 1))
    total = jnp.sum(counts[..., None] * hot, axis=(0, 1)).astype(jnp.float32)
    return {f"{label}/{name}": (sums[i], total[i]) for i, name in enumerate(names)}
