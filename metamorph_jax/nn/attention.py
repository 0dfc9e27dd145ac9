"""Attention behind one door, and the mask that packed rows need.

A query may see a key when both stand in the same segment (0 is padding, never seen), the key
does not come later, and the key belongs to the shared prefix (turn 0) or to the query's own turn:

    segment  1 1 1 1 1 1 2 2        q\\k  P P a a b b | 2 2
    turn     0 0 1 1 2 2 0 0         b    x x . . x x | . .
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite: a row without any key must give zeros, not NaN
_LONG = 64  # queries from which on a loop over heads beats batched products on a CPU


def packed_mask(segments: jax.Array, turns: jax.Array | None = None) -> jax.Array:
    """Causal mask of packed rows: bool[B, L, L] (query, key) from int32[B, L]."""
    L = segments.shape[1]
    order = jnp.arange(L)
    mask = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    mask &= order[:, None] >= order[None, :]
    if turns is not None:
        mask &= (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    return mask


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, scale=None
) -> jax.Array:
    """Softmax attention with grouped key-value heads.

    cuDNN's kernel runs on GPUs in bfloat16; on one CPU device, long rows go head by head; XLA's
    batched products everywhere else.

    Args:
        q: float[B, L, N, H].
        k, v: float[B, S, K, H] with K dividing N.
        mask: bool[B, L, S], True where the query may look; None for everywhere.
        scale: default H ** -0.5.

    Returns:
        float[B, L, N, H] in q's dtype.
    """
    if q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        wide = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=wide, scale=scale, implementation="cudnn")
    B, L, N, H = q.shape
    K = k.shape[2]
    scale = H**-0.5 if scale is None else scale
    if L >= _LONG and jax.default_backend() == "cpu" and _one_device():
        return _head_by_head(q, k, v, mask, scale)
    q = (q * scale).reshape(B, L, K, N // K, H)
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights, v).reshape(B, L, N, H)


def _one_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _head_by_head(q, k, v, mask, scale):
    """`attend` as a loop of plain matrix products, which CPUs run several times faster."""
    B, L, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    q = (q * scale).reshape(B, L, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * L, H)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k, v))

    def one(head):
        i, q, k, v = head
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask[i // K], scores.reshape(G, L, S), _MASKED).reshape(G * L, S)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
        return weights @ v

    out = jax.lax.map(one, (jnp.arange(B * K), q, k, v))
    return out.reshape(B, K, G, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)
