"""The resampler (`models/connectors/perceiver.py`) by its published names, those of a Q-Former.

ours                          published
queries                       queries
norm                          blip2qformer.layernorm
layers.N.self_attn.q_proj     blip2qformer.encoder.layer.N.attention.attention.query
layers.N.self_attn.out_proj   blip2qformer.encoder.layer.N.attention.output.dense
layers.N.self_norm            blip2qformer.encoder.layer.N.attention.output.LayerNorm
layers.N.cross_attn, …        the same below crossattention
layers.N.fc1                  blip2qformer.encoder.layer.N.intermediate_query.dense
layers.N.fc2                  blip2qformer.encoder.layer.N.output_query.dense
layers.N.mlp_norm             blip2qformer.encoder.layer.N.output_query.LayerNorm
"""

import re

_ATTENTION = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "out_proj": "output.dense",
}
_LAYER = {
    "self_norm": "attention.output.LayerNorm",
    "cross_norm": "crossattention.output.LayerNorm",
    "fc1": "intermediate_query.dense",
    "fc2": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
    **{f"self_attn.{ours}": f"attention.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"crossattention.{theirs}" for ours, theirs in _ATTENTION.items()},
}


def rename(key: str) -> str:
    """The published key of one of our parameters, for `names.load_torch_dict`."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", key):
        layer, part, leaf = match.groups()
        return f"blip2qformer.encoder.layer.{layer}.{_LAYER[part]}.{leaf}"
    return re.sub(r"^norm\.", "blip2qformer.layernorm.", key)
