"""The language model laid out for decoding: its weights, one layer, attention over the cache.

At a few rows a step is bound by reading weights, and products of the form [F, D] @ [D, rows] read
each weight once, in order. Activations are columns therefore, and the tied table needs no
transposed copy. Keys are kept as [B * K, H, S], values as [B * K, S, H], the form in which products
take them: the step writes into the cache in place, and attention streams it.

Where products of float32 are rounded to bfloat16 (`nn/linear.py`), weights are kept rounded; on
request everywhere, or in 8 bits with a scale per output, which a step reads as they are.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from metamorph_jax.nn import quantized, rope
from metamorph_jax.nn.linear import in_bfloat16
from metamorph_jax.nn.norms import rms_norm
from metamorph_jax.sampling import WEIGHTS

_MASKED = -1e30
# XLA would fold small producers into the big loops over weights and cache and compute them again
# for every element; behind a barrier they are computed once.
once = lax.optimization_barrier


def layout(llm, weights: str = "auto") -> dict:
    """The language model's weights as decoding reads them: kernels [out, in], few and large.

    Args:
        llm: `Llama`.
        weights: how kernels and the output table are kept, one of `WEIGHTS`; "auto": as the model
            computes, rounded to bfloat16 where its products are.

    Returns:
        table: [V + n, D]; head: {w: the same, one array when tied and kept alike}; norm; layers:
        one dict each. With "int8" beside each w: int8 there is a scale: float32[out].

    Raises:
        ValueError: on an unknown kind of weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is none of {', '.join(WEIGHTS)}")
    dtype, V = jnp.dtype(llm.cfg.dtype), llm.cfg.vocab_size
    auto = jnp.dtype(jnp.bfloat16) if in_bfloat16() else dtype

    def keep(w):
        if weights == "int8":
            packed = quantized.pack(w.T, "int8")
            return {"w": packed["kernel_codes"].T, "scale": packed["kernel_scale"]}
        return {"w": w.astype(auto if weights == "auto" else weights)}

    def rows(*linears):
        kept = [keep(m.kernel[...].T) for m in linears]
        out = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
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
    graph, stack = nnx.split(llm.layers) if stacked else (None, None)
    for i in range(llm.cfg.layers):
        if stacked:
            layer = nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], stack))
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
    return {"table": embed, "head": keep(head), "norm": llm.norm.scale[...], "layers": layers}


def product(w, x, dtype=None):
    """[out, R] of weights [out, in] and columns [in, R], both in the dtype of the weights.

    Codes of 8 bits are taken in the dtype of the columns. The result is in `dtype`, by default that
    of `x`; sums are float32 anyway.
    """
    R, dtype = x.shape[1], dtype or x.dtype
    if w.dtype == jnp.int8:
        w = w.astype(x.dtype)
    if w.dtype != x.dtype:  # see `nn.linear.rounded_product`; one column alone would go without
        x = jnp.pad(x.astype(w.dtype), ((0, 0), (0, int(R == 1))))
        x = with_layout_constraint(x, Layout(major_to_minor=(0, 1)))
    return jnp.matmul(w, x, preferred_element_type=dtype)[:, :R]


def linear(m, x, dtype=None):
    """float[out, R] of columns float[in, R], in `dtype`, by default that of `x`."""
    dtype = dtype or x.dtype
    if "scale" in m:
        y = (product(m["w"], x, jnp.float32) * m["scale"][:, None]).astype(dtype)
    else:
        y = product(m["w"], x, dtype)
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
    qkv = once(linear(w["qkv"], norm(x, w["norm1"], cfg.norm_eps))).T.reshape(B, L, -1, H)
    q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    mixed = mix(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v)
    x = x + linear(w["o"], once(mixed.reshape(B * L, -1).T))
    hidden = linear(w["gate_up"], norm(x, w["norm2"], cfg.norm_eps))
    gate, up = jnp.split(hidden, 2)
    return x + linear(w["down"], once(nnx.silu(gate) * up))


def attend_cached(q, keys, values, mask):
    """float[B, 1, N, H] of q like it, keys [B * K, H, S], values [B * K, S, H], mask bool[B, S]."""
    B, _, N, H = q.shape
    q = once((q * H**-0.5).reshape(len(keys), -1, H))
    scores = jnp.einsum("nGH,nHS->nGS", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, -1, scores.shape[-1])
    weights = once(_softmax(scores, mask).astype(values.dtype)).reshape(*q.shape[:2], -1)
    return jnp.einsum("nGS,nSH->nGH", weights, values).reshape(B, 1, N, H)


def _softmax(scores, mask):
    """Over the slots that mask: bool[B, S] shows; scores: float32[B, N, S]."""
    scores = jnp.where(mask[:, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
