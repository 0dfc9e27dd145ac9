"""The mapper (`models/heads/mapper.py`) by the names of MiniGPT-5's checkpoints.

ours                                  published
fc1, fc2                              fc.0, fc.2
queries                               t2i_decoder_prompt
encoder.layers.(stack).…              llm_to_t2i_mapping.encoder.layers.N.…
encoder.norm                          llm_to_t2i_mapping.encoder.norm
decoder.…                             llm_to_t2i_mapping.decoder.…, likewise
spread                                spread: our own

of a layer
self_attn.{q,k,v}_proj                self_attn.in_proj_{weight,bias}, one tensor each
self_attn.out_proj                    self_attn.out_proj
cross_attn.…                          multihead_attn.…
fc1, fc2                              linear1, linear2
self_norm, cross_norm, mlp_norm       norm1, norm2, norm3; in the encoder norm1, norm2
"""

import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import fused, names
from metamorph_jax.models.heads.mapper import Mapper, MapperConfig

FC, TRANSFORMER, QUERIES = "fc.", "llm_to_t2i_mapping.", "t2i_decoder_prompt"
STACKED = ("layers",)
_ATTENTION = {"self_attn": "self_attn", "cross_attn": "multihead_attn"}
_NORMS = {
    "encoder.": ("self_norm", "mlp_norm"),
    "decoder.": ("self_norm", "cross_norm", "mlp_norm"),
}
_LINEARS = {"fc1": "linear1", "fc2": "linear2"}
_LAYER = re.compile(r"((?:en|de)coder\.)layers\.(\d+)\.(\w+)\.(.+)")
_FUSED = re.compile(r"(.*_attn\.)in_proj_(weight|bias)")
_PART = re.compile(r"(.*_attn\.)[qkv]_proj\.(weight|bias)")


def rename(key: str) -> str:
    """The published key of one of our (torch-style) names, before projections are fused."""
    if match := _LAYER.fullmatch(key):
        stack, n, part, rest = match.groups()
        norms = {name: f"norm{k}" for k, name in enumerate(_NORMS[stack], 1)}
        theirs = (_ATTENTION | _LINEARS | norms)[part]
        return f"{TRANSFORMER}{stack}layers.{n}.{theirs}.{rest}"
    if key.startswith(("encoder.", "decoder.")):
        return TRANSFORMER + key
    if key == "queries":
        return QUERIES
    return re.sub(r"^fc([12])\.", lambda m: f"{FC}{2 * int(m[1]) - 2}.", key)


def _parts(key: str) -> tuple[str, str, str] | None:
    found = _FUSED.fullmatch(key)
    return found and tuple(f"{found[1]}{x}_proj.{found[2]}" for x in "qkv")


def _whole(key: str) -> str | None:
    found = _PART.fullmatch(key)
    return found and f"{found[1]}in_proj_{found[2]}"


def load_mapper(mapper: Mapper, tensors: Mapping[str, np.ndarray], whole: bool = True) -> None:
    """Fills the mapper in place.

    Args:
        tensors: published name -> array, of the mapper alone.
        whole: with `fc` and queries; else the transformer alone.

    Raises:
        WeightError: names or shapes don't fit.
    """
    view = fused.split(tensors, _parts)
    names.load_torch_dict(mapper, view, stacked=STACKED, rename=rename, only=_chosen(whole))


def export_mapper(mapper: Mapper, whole: bool = True) -> names.Lazy:
    """Published name -> array; the inverse of `load_mapper`."""
    found = names.lazy_torch_dict(mapper, stacked=STACKED, rename=rename, only=_chosen(whole))
    return fused.joined(found, _whole)


def _chosen(whole: bool):
    """nnx filter: all parameters, or those of the transformer."""
    return nnx.All(nnx.Param, lambda path, _: whole or f"{path[0]}." in _NORMS)


def published(cfg: MapperConfig) -> list[str]:
    """The names of all tensors of a mapper of this config."""
    both = lambda *parts: [f"{p}.{leaf}" for p in parts for leaf in ("weight", "bias")]  # noqa: E731
    found = both("fc.0", "fc.2") + [QUERIES] * cfg.learned_queries
    if cfg.kind == "mlp":
        return found + both("spread")
    stacks = {"encoder.": (cfg.encoder_layers, ("self_attn",)),
              "decoder.": (cfg.decoder_layers, ("self_attn", "multihead_attn"))}  # fmt: skip
    for stack, (layers, attentions) in stacks.items():
        for n in range(layers):
            layer = f"{TRANSFORMER}{stack}layers.{n}."
            for attention in attentions:
                found += [f"{layer}{attention}.in_proj_{leaf}" for leaf in ("weight", "bias")]
                found += both(f"{layer}{attention}.out_proj")
            found += both(f"{layer}linear1", f"{layer}linear2")
            found += both(*(f"{layer}norm{k + 1}" for k in range(len(attentions) + 1)))
        found += both(f"{TRANSFORMER}{stack}norm")
    return found
