"""One function for all attention, and the mask that packed rows need.

A query may see a key when both stand in the same segment (0 is padding, never seen), the key
does not come later, and the key belongs to the shared prefix (turn 0) or to the query's own turn:

    segment  1 1 1 1 1 1 2 2        q\\k  P P a a b b | 2 2
    turn     0 0 1 1 2 2 0 0         b    x x . . x x | . .
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp

from metamorph_jax.sharding import one_device, platform

_MASKED = -1e30  # finite: a row without any key must give zeros, not NaN
_LONG = 128 * 128  # queries x keys from which a loop over heads beats batched products on a CPU
_SPLASH_BLOCK = 128  # packed rows of a multiple of this length take the TPU kernel
_LONG_TPU = 512  # queries or keys from which rows without a mask take the kernel


def packed_mask(segments: jax.Array, turns: jax.Array | None = None) -> jax.Array:
    """Causal mask of packed rows: bool[B, L, L] (query, key) from int32[B, L]."""
    L = segments.shape[1]
    order = jnp.arange(L)
    mask = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    mask &= order[:, None] >= order[None, :]
    if turns is not None:
        mask &= (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    return mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """What `packed_mask` is made from: int32[B, L] sample numbers, for kernels that mask blocks."""

    numbers: jax.Array


def row_mask(segments: jax.Array, turns: jax.Array | None = None) -> jax.Array | Segments:
    """The mask of packed rows, in the form that is fastest for `attend` on this platform."""
    if platform() != "tpu" or segments.shape[1] % _SPLASH_BLOCK:
        return packed_mask(segments, turns)
    if turns is not None:
        logging.getLogger(__name__).warning(
            "rows with independent turns: attention holds all scores of a row (no TPU kernel); "
            "config.data.row.independent_turns=False uses the kernel"
        )
        return packed_mask(segments, turns)
    return Segments(segments)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | Segments | None = None, scale=None
) -> jax.Array:
    """Softmax attention with grouped key-value heads.

    On TPUs, rows whose mask is `Segments` (and long ones without a mask) take the splash kernel; on
    GPUs cuDNN's runs in bfloat16; on one CPU device, long rows go head by head; XLA's batched
    products everywhere else.

    Args:
        q: float[B, L, N, H].
        k, v: float[B, S, K, H] with K dividing N.
        mask: bool[B, L, S], True where the query may look, or from `row_mask`; None: everywhere.
        scale: default H ** -0.5.

    Returns:
        float[B, L, N, H] in q's dtype. Queries that see nothing (padding) get any finite numbers.
    """
    B, L, N, H = q.shape
    S, K = k.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    target = platform()
    if isinstance(mask, Segments) or (mask is None and target == "tpu" and min(L, S) >= _LONG_TPU):
        from metamorph_jax.nn import splash

        numbers = mask.numbers if mask is not None else None
        return splash.attend(q * scale, k, v, numbers, interpret=target != "tpu")
    if q.dtype == jnp.bfloat16 and target == "gpu":
        wide = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=wide, scale=scale, implementation="cudnn")
    if L * S >= _LONG and target == "cpu" and one_device():
        return _head_by_head(q, k, v, mask, scale)
    q = (q * scale).reshape(B, L, K, N // K, H)
    if target == "cpu":  # not all layouts have a product of bfloat16 with float32 sums
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights, v).reshape(B, L, N, H)


def _head_by_head(q, k, v, mask, scale):
    """`attend` as a loop of plain matrix products, which CPUs run several times faster."""
    B, L, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    q = (q * scale).reshape(B, L, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * L, H)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k, v))
    out = _heads(q, k, v, mask)
    return out.reshape(B, K, G, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)


@jax.custom_vjp
def _heads(q, k, v, mask):
    """One key-value head after the other. q: [B*K, G*L, H], scaled; k, v: [B*K, S, H]."""
    return _heads_forward(q, k, v, mask)[0]


def _hide(scores, mask, i, heads):
    """Scores of head number i, where it may look."""
    if mask is None:
        return scores
    mask = mask[i // (heads // len(mask))]
    return jnp.where(mask, scores.reshape(-1, *mask.shape), _MASKED).reshape(scores.shape)


def _heads_forward(q, k, v, mask):
    def head(args):
        i, q, k, v = args
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        scores = _hide(scores, mask, i, heads)
        top = scores.max(axis=1, keepdims=True)
        weights = jnp.exp(scores - top).astype(v.dtype)
        # The column of ones makes the product sum the weights, which XLA's reduction does slowly.
        v = jnp.concatenate([v, jnp.ones_like(v[:, :1])], axis=1)
        both = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
        out, total = both[:, :-1], both[:, -1:]
        return (out / total).astype(q.dtype), top, total

    heads = len(q)
    out, top, total = jax.lax.map(head, (jnp.arange(heads), q, k, v))
    return out, (q, k, v, mask, out, top, total)


def _heads_backward(saved, gradient):
    """Recomputes the weights, so nothing of size L * S is kept between the passes."""
    q, k, v, mask, out, top, total = saved

    def head(args):
        i, q, k, v, out, top, total, g = args
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        weights = jnp.exp(_hide(scores, mask, i, heads) - top)  # times 1 / total, which goes into g
        g = (g / total).astype(g.dtype)
        # A query that sees nothing takes the mean of the values, whatever its scores are.
        seen = jnp.where(top > _MASKED / 2, g, 0)
        inner = (seen * out).astype(jnp.float32).sum(axis=1, keepdims=True)
        scores = (weights * ((seen @ v.T).astype(jnp.float32) - inner)).astype(k.dtype)
        # The gradients of k and v come out as [H, S]: a wide product, twice as fast as a tall one.
        return scores @ k, q.T @ scores, g.T @ weights.astype(g.dtype)

    heads = len(q)
    dq, dk, dv = jax.lax.map(head, (jnp.arange(heads), q, k, v, out, top, total, gradient))
    dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_heads.defvjp(_heads_forward, _heads_backward)
