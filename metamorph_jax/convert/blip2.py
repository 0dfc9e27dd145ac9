"""The vision side of BLIP-2's checkpoints: EVA's tower, the norm after it, and the Q-Former.

    ours (`models/connectors/qformer.py`)    LAVIS, MiniGPT-4            transformers
    norm                                     ln_vision                   vision_model.post_layernorm
    resampler.queries                        query_tokens                query_tokens
    resampler.norm                           Qformer.bert.embeddings.    qformer.layernorm
                                             LayerNorm
    resampler.layers.N.self_attn.q_proj      Qformer.bert.encoder.layer. qformer.encoder.layer.N.
                                             N.attention.self.query      attention.attention.query
    resampler.layers.N.…                     as in `convert/perceiver.py`, with these two changes
    proj                                     llama_proj                  -

    ours (`models/vision/vit.py`, "eva")     visual_encoder.…            vision_model.…
    patch_embedding                          patch_embed.proj            embeddings.patch_embedding
    position_embedding                       pos_embed [1, T, D]         embeddings.position_embedding
    class_embedding                          cls_token [1, 1, D]         embeddings.class_embedding
    layers.(stack).self_attn.{q,k,v}_proj    blocks.N.attn.qkv.weight,   encoder.layers.N.self_attn.qkv.…
                                             attn.q_bias, attn.v_bias
    layers.(stack).self_attn.out_proj        blocks.N.attn.proj          …self_attn.projection
    layers.(stack).layer_norm1, …            blocks.N.norm1, …           …layer_norm1, …

A tower's own file has the second column's names without `visual_encoder.`. Keys have no bias there;
ours is filled with zeros and not written: it changes no attention, as it adds the same number to
all scores of a query.

Of these files, what belongs to text is dropped on purpose: `OTHERS`. `t5_proj` and
`language_projection` lead to another language model, though one has the shape of `llama_proj`.
"""  # noqa: E501

import re
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert import fused, names, perceiver
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.connectors.qformer import QFormer

TOWER, NORM, QFORMER = "visual_encoder.", "ln_vision.", "Qformer."
QUERIES, PROJ = "query_tokens", "llama_proj."
OTHERS = re.compile(
    r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
    r"|Qformer\.cls\.|qformer\.embeddings\."
    r"|(t5|opt|vision|text)_proj\.|(vision|text)_projection\.|language_projection\.|itm_head\."
    r"|embeddings\.(word_embeddings|position_embeddings|position_ids)|temp$"
    r"|(language|t5|opt|llama)_model\."
)

# transformers' names -> those of LAVIS; the first that fits counts.
_PLAIN = (
    (r"vision_model\.post_layernorm\.", NORM),
    (r"vision_model\.embeddings\.class_embedding", TOWER + "cls_token"),
    (r"vision_model\.embeddings\.position_embedding", TOWER + "pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.", TOWER + "patch_embed.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
     TOWER + r"blocks.\1.attn.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.", TOWER + r"blocks.\1.attn."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", TOWER + r"blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.", TOWER + "blocks."),
    (r"qformer\.layernorm\.", QFORMER + "bert.embeddings.LayerNorm."),
    (r"qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.attention\.",
     QFORMER + r"bert.encoder.layer.\1.\2.self."),
    (r"qformer\.encoder\.", QFORMER + "bert.encoder."),
)  # fmt: skip


def plain(key: str) -> str:
    """LAVIS's name of a tensor that has that of transformers; other names as they are."""
    key = re.sub(r"^model\.(?=vision_model|qformer|query_tokens|language_)", "", key)
    for pattern, replacement in _PLAIN:
        changed, count = re.subn(f"^{pattern}", replacement, key)
        if count:
            return changed
    return key


def plainly(tensors: Mapping[str, np.ndarray]) -> names.Mapped:
    """The tensors under the names of `plain`, without `OTHERS`."""
    found = {key: plain(key) for key in tensors}
    found = {key: name for key, name in found.items() if not OTHERS.match(name)}
    changes = {name: (key, np.asarray) for key, name in found.items() if name != key}
    return names.Mapped(tensors, changes, lambda key: found.get(key) == key)


# ---- the tower


_QKV = re.compile(r"(.*\.attn\.)qkv\.(weight|bias)")
_BIAS = re.compile(r"(.*\.attn\.)([qv])_bias")
_PART = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")


def split_tower(tensors: Mapping[str, np.ndarray]) -> names.Mapped:
    """The tower's tensors of a file, under the names of `plain`, with
    `attn.{q,k,v}_proj.{weight,bias}` in place of what is published."""
    connector = (NORM, QFORMER, QUERIES, PROJ)
    own = names.Mapped(plainly(tensors), only=lambda key: not key.startswith(connector))
    view, changes = fused.split(own, _parts), {}
    for key in view:
        if found := _BIAS.fullmatch(key):
            changes[f"{found[1]}{found[2]}_proj.bias"] = (key, np.asarray)
            if found[2] == "q":
                changes[f"{found[1]}k_proj.bias"] = (key, lambda bias: np.zeros_like(bias))
    return names.Mapped(view, changes, lambda key: not _BIAS.fullmatch(key))


def _parts(key: str) -> tuple[str, str, str] | None:
    found = _QKV.fullmatch(key)
    return found and tuple(f"{found[1]}{x}_proj.{found[2]}" for x in "qkv")


def join_tower(found: names.Lazy) -> names.Lazy:
    """The inverse of `split_tower`, in LAVIS's naming."""
    out = names.Lazy()
    for key in found:
        part, name = _PART.fullmatch(key), key
        if part and part[3] == "bias":
            if part[2] == "k":
                continue
            name = f"{part[1]}{part[2]}_bias"
        out.set(name, found.maker(key), found.shape_of(key), found.dtype_of(key))
    return fused.joined(out, _whole)


def _whole(key: str) -> str | None:
    part = _PART.fullmatch(key)
    return part and f"{part[1]}qkv.weight"


def for_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A tower's tensors by the names of `Blip2VisionModel`, from those of LAVIS."""
    out = {}
    for key, value in tensors.items():
        name = key.removeprefix(TOWER)
        if match := _BIAS.fullmatch(name):
            if match[2] == "q":
                v = tensors[key.replace("q_bias", "v_bias")]
                bias = np.concatenate([value, np.zeros_like(value), v])
                out[_to_transformers(f"{match[1]}qkv.bias")] = bias
        else:
            out[_to_transformers(name)] = value
    return out


_TO_TRANSFORMERS = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.", "encoder.layers."),
)


def _to_transformers(key: str) -> str:
    for pattern, replacement in _TO_TRANSFORMERS:
        key = re.sub(pattern, replacement, key)
    return key


def published_tower(layers: int) -> list[str]:
    """The names of a tower with so many layers, without prefix."""
    found = ["cls_token", "pos_embed", *_both("patch_embed.proj")]
    for n in range(layers):
        block = f"blocks.{n}."
        found += [f"{block}attn.{x}" for x in ("qkv.weight", "q_bias", "v_bias")]
        found += _both(*(block + x for x in ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")))
    return found


def _both(*parts: str) -> list[str]:
    return [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]


# ---- the connector


def rename(key: str) -> str:
    """LAVIS's name of one of our (torch-style) names of a `QFormer`."""
    if key == "resampler.queries":
        return QUERIES
    if not key.startswith("resampler."):
        return re.sub(r"^norm\.", NORM, re.sub(r"^proj\.", PROJ, key))
    found = perceiver.rename(key.removeprefix("resampler."))
    found = re.sub(r"^blip2qformer\.layernorm\.", "blip2qformer.embeddings.LayerNorm.", found)
    found = re.sub(r"attention\.attention\.", "attention.self.", found)
    return found.replace("blip2qformer.", QFORMER + "bert.", 1)


def load_qformer(
    connector: QFormer, tensors: Mapping[str, np.ndarray], proj: bool = True
) -> None:  # fmt: skip
    """Fills a connector in place from a file of LAVIS, MiniGPT-4 or transformers; a tower in it is
    left alone.

    Args:
        tensors: published name -> array.
        proj: with `llama_proj`; else only what comes before it, and a `llama_proj` is ignored.

    Raises:
        WeightError: names or shapes don't fit.
    """
    own = lambda key: not key.startswith((TOWER, *(() if proj else (PROJ,))))  # noqa: E731
    names.load_torch_dict(
        connector,
        names.Mapped(plainly(tensors), only=own),
        rename=rename,
        only=lambda path, _: proj or path[0] != "proj",
    )


def load_proj(connector: QFormer, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills the last linear, in place, from a file of MiniGPT-4, and looks at nothing else in it.

    Raises:
        WeightError: it has no such linear, or one of another shape.
    """
    own = names.Mapped(tensors, only=lambda key: key.startswith(PROJ))
    if not own:
        listed = ", ".join(shown(key, 60) for key in list(tensors)[:8])
        raise WeightError(f"not a file of MiniGPT-4: no {PROJ}weight in it, but {listed}")
    names.load_torch_dict(connector, own, rename=rename, only=lambda path, _: path[0] == "proj")


def export_qformer(connector: QFormer) -> names.Lazy:
    """LAVIS's name -> array; the inverse of `load_qformer`."""
    return names.lazy_torch_dict(connector, rename=rename)


def qformer_for_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The Q-Former's tensors by the names of `Blip2QFormerModel`, from those of LAVIS."""
    out = {}
    for key, value in tensors.items():
        name = key.removeprefix(QFORMER + "bert.").replace(
            "attention.self.", "attention.attention."
        )
        out[re.sub(r"^embeddings\.LayerNorm\.", "layernorm.", name)] = value
    return out


def published_qformer(cfg: PerceiverConfig) -> list[str]:
    """The names of a connector's tensors, `llama_proj` included."""
    found = [QUERIES, *_both(NORM[:-1], PROJ[:-1], f"{QFORMER}bert.embeddings.LayerNorm")]
    for n in range(cfg.layers):
        layer = f"{QFORMER}bert.encoder.layer.{n}."
        for part in ("attention", *(() if n % cfg.cross_every else ("crossattention",))):
            inside = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
            found += _both(*(f"{layer}{part}.{x}" for x in inside))
        rest = ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")
        found += _both(*(layer + x for x in rest))
    return found
