"""The language model laid out for decoding: its weights, one layer, attention over the cache.

At a few rows a step is bound by reading weights, and products of the form [F, D] @ [D, rows] read
each weight once, in order. Activations are columns therefore, and the tied table needs no
transposed copy. Keys are kept as [B, K, H, S], values as [B, K, S, H], so that attention streams
both, too.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from metamorph_jax.nn import rope
from metamorph_jax.nn.norms import rms_norm
from metamorph_jax.sharding import platform

_MASKED = -1e30
# XLA would fold small producers into the big loops over weights and cache and compute them again
# for every element; behind a barrier they are computed once.
once = lax.optimization_barrier


def layout(llm) -> dict:
    """The language model's weights as decoding reads them: kernels [out, in], few and large.

    Returns:
        table, head: [V + n, D], one array when tied; norm; layers: one dict each.
    """
    dtype, V = jnp.dtype(llm.cfg.dtype), llm.cfg.vocab_size

    def rows(*linears):
        out = {"w": jnp.concatenate([m.kernel[...].T.astype(dtype) for m in linears])}
        if linears[0].bias is not None:
            out["b"] = jnp.concatenate([m.bias[...].astype(dtype) for m in linears])
        return out

    def table(holder, value):
        value = value.astype(dtype)
        if llm.cfg.added_tokens:
            value = jnp.concatenate([value, holder.added[...].astype(dtype)])
        return value

    embed = table(llm.embed_tokens, llm.embed_tokens.embedding[:V])
    head = embed if llm.cfg.tied else table(llm.lm_head, llm.lm_head.kernel[:, :V].T)
    layers = []
    stacked = not isinstance(llm.layers, nnx.List)
    graph, weights = nnx.split(llm.layers) if stacked else (None, None)
    for i in range(llm.cfg.layers):
        if stacked:
            layer = nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], weights))
        else:
            layer = llm.layers[i]
        attn, mlp = layer.self_attn, layer.mlp
        layers.append(
            {
                "norm1": layer.input_layernorm.scale[...],
                "qkv": rows(attn.q_proj, attn.k_proj, attn.v_proj),
                "o": rows(attn.o_proj),
                "norm2": layer.post_attention_layernorm.scale[...],
                "gate_up": rows(mlp.gate_proj, mlp.up_proj),
                "down": rows(mlp.down_proj),
            }
        )
        if llm.cfg.qk_norm:
            layers[-1] |= {"q_norm": attn.q_norm.scale[...], "k_norm": attn.k_norm.scale[...]}
    return {"table": embed, "head": head, "norm": llm.norm.scale[...], "layers": layers}


def _linear(m, x):
    """float[out, R] of columns float[in, R]."""
    y = m["w"] @ x
    return y + m["b"][:, None] if "b" in m else y


def norm(x, scale, eps):
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=0, keepdims=True) + eps)
    return once((y * scale[:, None]).astype(x.dtype))


def run_layer(cfg, w, x, cos, sin, mix):
    """One layer on columns x: float[D, B * L]; cos, sin: [B, L, 1, H/2].

    `mix(q, k, v)` attends with q: [B, L, N, H], k and v: [B, L, K, H] and keeps what it must.
    """
    B, L = cos.shape[:2]
    H = cfg.head_dim
    qkv = once(_linear(w["qkv"], norm(x, w["norm1"], cfg.norm_eps))).T.reshape(B, L, -1, H)
    q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    mixed = mix(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v)
    x = x + _linear(w["o"], once(mixed.reshape(B * L, -1).T))
    hidden = _linear(w["gate_up"], norm(x, w["norm2"], cfg.norm_eps))
    gate, up = jnp.split(hidden, 2)
    return x + _linear(w["down"], once(nnx.silu(gate) * up))


def attend_cached(q, keys, values, mask):
    """float[B, 1, N, H] of q like it, keys [B, K, H, S], values [B, K, S, H], mask bool[B, S]."""
    B, _, N, H = q.shape
    K = keys.shape[1]
    q = once((q * H**-0.5).reshape(B, K, N // K, H))
    if platform() != "cpu":
        scores = jnp.einsum("BKGH,BKHS->BKGS", q, keys, preferred_element_type=jnp.float32)
        weights = _softmax(scores, mask).astype(values.dtype)
        return jnp.einsum("BKGS,BKSH->BKGH", weights, values).reshape(B, 1, N, H)
    # Dots would be one tiny product for every head; sums of products are single loops over the
    # cache. The compiler vectorises them for two queries of a group but not for one, which takes
    # ten times as long.
    out = []
    for g in range(0, N // K, 2):
        pair = once(jnp.stack([q[:, :, g], q[:, :, min(g + 1, N // K - 1)]], axis=2))
        scores = once(jnp.sum(_wide(pair[..., None] * keys[:, :, None]), axis=3))
        weights = once(_softmax(scores, mask).astype(values.dtype))
        out.append(once(jnp.sum(_wide(weights[..., None] * values[:, :, None]), axis=3)))
    out = jnp.concatenate(out, axis=2)[:, :, : N // K]
    return out.astype(q.dtype).reshape(B, 1, N, H)


def _wide(x):
    return x.astype(jnp.float32)


def _softmax(scores, mask):
    """Over the slots that mask: bool[B, S] shows; scores: float32[B, K, G, S]."""
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
