"""Losses over packed rows: sums over positions, not means.

A train step adds up sums and counts over all micro-batches and devices and divides once, so every
position has the same weight, whatever the accumulation and the data parallelism.

`text_loss` never makes float[B, L, V]. On one device, supervised positions are moved to the front
and the output table is multiplied with one chunk of them at a time, skipping chunks without any.
Where a gradient will be needed, a chunk's share of it is computed while its logits exist (their
gradient is `softmax - onehot`), so the backward pass recomputes nothing. Exact for every V. On a
mesh, the cost of moving the table decides: see `nn.cross_entropy`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from metamorph_jax.models.interleave import gather_rows
from metamorph_jax.nn.cross_entropy import cross_entropy, product, softmax_minus_target
from metamorph_jax.nn.norms import l2_normalize
from metamorph_jax.types import Batch

VISUAL_LOSSES = ("cosine", "l1", "smooth_l1", "softmax_ce", "infonce")
INFONCE_TEMPERATURE = 0.03

# Of the rows of the output table, float[V], and of those of added tokens, float[n].
Biases = tuple[jax.Array, jax.Array | None]


def text_loss(
    hidden: jax.Array,
    table: jax.Array,
    added: jax.Array | None,
    targets: jax.Array,
    chunk: int = 512,
    bias: Biases | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy summed over the positions that have a target.

    Args:
        hidden: float[B, L, D] after the final norm.
        table, added: [D, V] and [n, D] or None, see `Llama.head_tables`.
        targets: int32[B, L] ids below V + n; -1 for none.
        chunk: positions per product with the table, on one device.
        bias: what is added to the logits, see `Llama.head_bias`; None: nothing.

    Returns:
        (sum float32[], loss of each position float32[B, L], bool[B, L] whether the target has the
        highest logit). Only the sum has gradients.
    """
    if added is None:
        added = jnp.zeros((0, hidden.shape[-1]), hidden.dtype)
    bias, added_bias = bias or (None, None)
    nothing = jnp.zeros(0, jnp.float32)
    biases = tuple(nothing if b is None else b for b in (bias, added_bias))
    return _cross_entropy(chunk, *map(jnp.asarray, (hidden, table, added, *biases, targets)))


def text_loss_of(
    hidden: jax.Array,
    table: jax.Array,
    added: jax.Array | None,
    batch: Batch,
    chunk: int = 512,
    bias: Biases | None = None,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """(`text_loss` of a batch, metrics: loss and accuracy, and the loss of each source)."""
    total, each, right = text_loss(hidden, table, added, batch.text_targets, chunk, bias)
    counts = (batch.text_targets >= 0).astype(jnp.float32)
    metrics = {
        "text_loss": (total, counts.sum()),
        "text_accuracy": (right.sum().astype(jnp.float32), counts.sum()),
    }
    return total, metrics | by_source(each, counts, batch.sources, batch.source_names, "text_loss")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk, hidden, table, added, bias, added_bias, targets):
    """(sum, float32[B, L], bool[B, L]) of hidden: float[B, L, D] and targets: int32[B, L].

    Biases that are not there are empty.
    """
    parts = hidden, table, added, bias, added_bias
    out, _ = _with_gradients(chunk, parts, targets, wants=(False,) * len(parts))
    return out


def _forward(chunk, *arguments):
    *parts, targets = arguments
    wants = tuple(x.perturbed and x.value.size > 0 for x in parts)
    return _with_gradients(chunk, tuple(x.value for x in parts), targets.value, wants)


def _backward(chunk, grads, cotangents):
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return (None,) * (len(grads) + 1)
    scaled = [None if d is None else (d * g).astype(d.dtype) for d in grads]
    return (*scaled, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _with_gradients(chunk, parts, targets, wants):
    """The loss and, as `wants` says, the gradients of its sum in the parts: (hidden, table, added,
    bias, bias of the added)."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return cross_entropy(*parts, targets, wants)
    hidden, *tables = parts
    shape = hidden.shape
    flat = hidden.reshape(-1, shape[-1])
    out, grads = _chunked(chunk, flat, tables, targets.reshape(-1), wants)
    total, losses, right = out
    if wants[0]:
        grads = (grads[0].reshape(shape), *grads[1:])
    return (total, losses.reshape(shape[:-1]), right.reshape(shape[:-1])), grads


def _chunked(chunk, hidden, tables, targets, wants):
    """The loss on one device, chunk by chunk. hidden: float[T, D]; targets: int32[T]."""
    table, added, *biases = tables
    T, D = hidden.shape
    size = min(chunk, T)
    whole = -(-T // size) * size
    # Supervised positions first, in order; filled up to whole chunks.
    order = jnp.pad(jnp.argsort(targets < 0, stable=True), (0, whole - T))
    count = jnp.sum(targets >= 0)
    head = table.astype(hidden.dtype)  # cast once, not in every chunk
    extra = added.astype(hidden.dtype)

    def step(i, carry):
        losses, right, grads = carry
        index = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        valid = (i * size + jnp.arange(size)) < count
        h, t = hidden[index], jnp.where(valid, targets[index], -1)
        logits = _logits(h, head, extra, biases)
        lse, top, mine = _softmax(logits, t)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        losses = put(losses, jnp.where(valid, lse - mine, 0.0))
        right = put(right, valid & (mine >= top))
        if any(wants):
            d = _logit_gradients(logits, lse, t, valid, h.dtype)
            grads = _add_gradients(grads, d, h, head, extra, wants, put)
        return losses, right, grads

    zeros = (jnp.zeros(whole, jnp.float32), jnp.zeros(whole, bool))
    sizes = ((whole, D), *(x.shape for x in tables))
    dtypes = (hidden.dtype, *(jnp.float32 for _ in tables))
    zero_grads = tuple(
        jnp.zeros(shape, dtype) if want else None
        for shape, dtype, want in zip(sizes, dtypes, wants, strict=True)
    )
    used = -(-count // size)
    losses, right, grads = jax.lax.fori_loop(0, used, step, (*zeros, zero_grads))
    back = jnp.argsort(order[:T])  # position order[j] was computed as number j
    d_hidden = grads[0][back] if wants[0] else None
    d_tables = (
        None if d is None else d.astype(x.dtype) for d, x in zip(grads[1:], tables, strict=True)
    )
    return (jnp.sum(losses), losses[back], right[back]), (d_hidden, *d_tables)


def _logits(h, head, extra, biases):
    """(float32[t, V], float32[t, n] of the added ids, or None where there are none)."""
    new = product("tD,nD->tn", h, extra) if len(extra) else None
    logits = product("tD,DV->tV", h, head)
    bias, added_bias = biases
    return logits + bias if len(bias) else logits, new + added_bias if len(added_bias) else new


def _softmax(logits, targets):
    """(log-sum-exp, highest logit, the target's logit), float32[t] each."""
    logits, new = logits
    V = logits.shape[-1]
    top = jnp.max(logits, axis=-1)
    mine = _pick(logits, targets)
    if new is not None:
        top = jnp.maximum(top, jnp.max(new, axis=-1))
        mine = jnp.where(targets >= V, _pick(new, targets - V), mine)
    mass = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    if new is not None:
        mass += jnp.sum(jnp.exp(new - top[..., None]), axis=-1)
    return top + jnp.log(mass), top, mine


def _pick(logits, index):
    """float32[t]: of each row of float32[t, n] the entry int32[t], or the nearest there is."""
    index = jnp.clip(index, 0, logits.shape[-1] - 1)
    return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]


def _logit_gradients(logits, lse, targets, valid, dtype):
    """Gradients in the two parts of the logits, see `_logits`."""
    logits, new = logits
    V = logits.shape[-1]
    ids = jnp.arange(V)[None]
    d = softmax_minus_target(logits, ids, lse, targets, valid).astype(dtype)
    if new is None:
        return d, None
    ids = V + jnp.arange(new.shape[-1])[None]
    return d, softmax_minus_target(new, ids, lse, targets, valid).astype(dtype)


def _add_gradients(grads, d, h, head, extra, wants, put):
    """The gradients in all parts with those of one chunk: `put` writes its rows of the hidden."""
    d_hidden, d_table, d_added, d_bias, d_added_bias = grads
    d, d_new = d
    if wants[0]:
        dh = product("tV,DV->tD", d, head)
        if d_new is not None:
            dh += product("tn,nD->tD", d_new, extra)
        d_hidden = put(d_hidden, dh.astype(d_hidden.dtype))
    if wants[1]:
        d_table = d_table + product("tD,tV->DV", h, d)
    if wants[2] and d_new is not None:
        d_added = d_added + product("tn,tD->nD", d_new, h)
    if wants[3]:
        d_bias = d_bias + jnp.sum(d, axis=0, dtype=jnp.float32)
    if wants[4]:
        d_added_bias = d_added_bias + jnp.sum(d_new, axis=0, dtype=jnp.float32)
    return d_hidden, d_table, d_added, d_bias, d_added_bias


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
    if visual.shape[1] == 0:  # a batch without images
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
