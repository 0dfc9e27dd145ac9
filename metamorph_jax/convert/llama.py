"""Llama-family weights by their Hugging Face names, and their config.

    ours                                   published
    embed_tokens.embedding [V, D]          model.embed_tokens.weight, rows below V
    embed_tokens.added     [n, D]          model.embed_tokens.weight, the rows behind them
    layers.(stack).self_attn.q_proj.kernel model.layers.N.self_attn.q_proj.weight   (transposed)
    norm.scale                             model.norm.weight
    lm_head.kernel / .added                lm_head.weight, cut the same way

A table with V rows leaves `added` as it is. Dropped on purpose: `rotary_emb.inv_freq`, and
`lm_head.weight` where the model ties it.
"""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import names
from metamorph_jax.models.llm.llama import Llama, LlamaConfig
from metamorph_jax.nn.rope import RopeScaling

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def config_from_hf(fields: Mapping, **overrides) -> LlamaConfig:
    """The LlamaConfig of a config.json (model types llama, mistral, qwen2)."""
    kind = fields.get("model_type", "llama")
    if kind not in ("llama", "mistral", "qwen2", "metamorph_llama", "llava_llama"):
        raise ValueError(f"model_type {kind!r} is not of the Llama family")
    heads = fields["num_attention_heads"]
    rope = dict(fields.get("rope_parameters") or {})  # transformers 5 keeps both in one table
    scaling = dict(fields.get("rope_scaling") or rope)
    bias = bool(fields.get("attention_bias", False))
    values = dict(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        mlp_width=fields["intermediate_size"],
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_scaling=_scaling(scaling),
        tied=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )
    return LlamaConfig(**{**values, **overrides})


def _scaling(fields: Mapping) -> RopeScaling:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(fields["factor"]))
    if kind != "llama3":
        raise ValueError(f"RoPE scaling {kind!r} is none of default, linear, llama3")
    return RopeScaling(
        "llama3",
        float(fields["factor"]),
        float(fields["low_freq_factor"]),
        float(fields["high_freq_factor"]),
        int(fields["original_max_position_embeddings"]),
    )


def _rename(key: str) -> str:
    return key if key.startswith("lm_head") else "model." + key


def _stacked(llm: Llama) -> tuple[str, ...]:
    return () if isinstance(llm.layers, nnx.List) else ("layers",)


def _cut_tables(tensors: Mapping, cfg: LlamaConfig, llm: Llama) -> dict:
    """Tables of V + n rows as two tensors; with V rows, the present added rows fill in."""
    out = dict(tensors)
    holders = {EMBED: llm.embed_tokens} | ({} if cfg.tied else {HEAD: llm.lm_head})
    for key, holder in holders.items():
        if key not in out or not cfg.added_tokens:
            continue
        table, V = out[key], cfg.vocab_size
        name = key.replace("weight", "added")
        if len(table) == V + cfg.added_tokens:
            out[key], out[name] = table[:V], table[V:]
        else:  # V rows, or a wrong number that the shape check will name
            out[name] = np.asarray(holder.added[...])
    return out


def load_llama(llm: Llama, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `llm` in place from tensors by Hugging Face name; anything else is an error."""
    tied = llm.cfg.tied
    names.load_torch_dict(
        llm,
        _cut_tables(tensors, llm.cfg, llm),
        stacked=_stacked(llm),
        rename=_rename,
        ignore=lambda key: key.endswith("rotary_emb.inv_freq") or (tied and key == HEAD),
    )


def export_llama(llm: Llama) -> dict[str, np.ndarray]:
    """Tensors by Hugging Face name; added tokens are the last rows of the tables."""
    out = names.to_torch_dict(llm, stacked=_stacked(llm), rename=_rename)
    for key in (EMBED, HEAD):
        added = out.pop(key.replace("weight", "added"), None)
        if added is not None:
            out[key] = np.concatenate([out[key], added])
    return out
