"""Names of MM-Interleaved's tensors, those of `OpenGVLab/MM-Interleaved`.

    ours                          published
    vision.adapter                visual_tokenizer.encoder.vision_model.…   convert/vit_adapter.py
    vision.resampler              visual_tokenizer.perceiver_resampler.…    convert/perceiver.py
    vision.{key_proj,key_norm,table_norm,proj}
                                  visual_tokenizer.{pos_proj,pos_ln,post_ln,proj}.…
    llm.{embed_tokens,layers,norm}
                                  mm_decoder.…: Llama's names without `model.`
    llm.inserts.(stack).…         mm_decoder.layers.N.llama_cross_attn.…, of every nth layer
    llm.lm_head                   text_decoder.head.…, text_decoder.head_new.…: see below
    soi                 [D]       soi_token                                 [1, D]
    context.proj                  context_feat_proj.…
    context.resampler             image_decoder.perceiver_resampler.…
    context.null                  image_decoder.neg_prompt_embeds
    decoder.denoiser.unet         image_decoder.decoder.unet.…              diffusers' names
    decoder.denoiser.mmfs_module  image_decoder.decoder.mmfs_module.…
    decoder.vae                   image_decoder.decoder.vae.…               diffusers' names
    decoder.pixel_{mean,scale}    image_decoder.decoder.pixel_…: our own, of models without `vae`

A published model has two output tables: a frozen one with biases over all ids, and a small one
whose result is added to the logits of the two added ids. Here they are one table, whose rows for
these ids are the sums. They are written as published: the frozen rows are zeros with bias -100, and
the small table has the rest.

Buffers are written, but not read: `position_ids`, `inv_freq`, `clip_mean`, `clip_std`. So are the
sin-cos tables (`pos_embed`); those of a file must be the ones that we compute.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import diffusion, names, perceiver
from metamorph_jax.convert.llama import HEAD, export_llama, load_llama
from metamorph_jax.convert.vit_adapter import PREFIX as CLIP
from metamorph_jax.convert.vit_adapter import export_adapter, load_adapter
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown
from metamorph_jax.models.diffusion.decoder import Statistics
from metamorph_jax.nn import sincos
from metamorph_jax.recipes.mm_interleaved.model import MMInterleaved

TOWER, VISUAL = "visual_tokenizer.encoder.", "visual_tokenizer.perceiver_resampler."
LLM, INSERT = "mm_decoder.", "llama_cross_attn."
FROZEN, NEW = "text_decoder.head.", "text_decoder.head_new."
CONTEXT, DRAWING = "image_decoder.perceiver_resampler.", "image_decoder.decoder."
UNET, MMFS, VAE = DRAWING + "unet.", DRAWING + "mmfs_module.", DRAWING + "vae."
PIXELS = DRAWING + "pixel_"
SOI, NULL, TABLE = "soi_token", "image_decoder.neg_prompt_embeds", "visual_tokenizer.pos_embed"
# What belongs to no larger part: ours -> published.
_ALONE = {
    "soi": SOI,
    "context.null": NULL,
    "context.proj": "context_feat_proj",
    "vision.key_proj": "visual_tokenizer.pos_proj",
    "vision.key_norm": "visual_tokenizer.pos_ln",
    "vision.table_norm": "visual_tokenizer.post_ln",
    "vision.proj": "visual_tokenizer.proj",
}
_BUFFERS = re.compile(r"(\.position_ids|rotary_emb\.inv_freq|\.clip_mean|\.clip_std)$")
_IS_TABLE = re.compile(r"\.pos_embed$")
_FROZEN_BIAS = -100.0  # of the frozen table, for added ids
_TABLE_ERROR = 5e-3  # sines and cosines kept in bfloat16 are off by no more


def is_published(keys) -> bool:
    """Whether these are the names of an MM-Interleaved."""
    return SOI in keys and any(key.startswith(LLM) for key in keys)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A module whose tensors begin with `prefix`; `rename`: our name -> what follows it."""

    prefix: str
    module: nnx.Module
    rename: Callable[[str], str] = lambda key: key
    only: type = nnx.Param

    def load(self, tensors: Mapping) -> None:
        names.load_torch_dict(self.module, tensors, self.prefix, rename=self.rename, only=self.only)

    def export(self) -> names.Lazy:
        return names.lazy_torch_dict(self.module, self.prefix, rename=self.rename, only=self.only)


def _parts(model: MMInterleaved, old_vae: bool = False) -> list[_Part]:
    """Those that are no more than a prefix and a change of names; `old_vae`: the autoencoder's
    attention has the names of older files."""
    denoiser, vae = model.decoder.denoiser, model.decoder.vae
    found = [
        _Part(VISUAL, model.vision.resampler, perceiver.rename),
        _Part(CONTEXT, model.context.resampler, perceiver.rename),
        _Part(UNET, denoiser.unet),
        _Part(MMFS, denoiser.mmfs_module),
    ]
    if vae is not None:
        found.append(_Part(VAE, vae, diffusion.old_vae_name if old_vae else lambda key: key))
    else:
        cut = lambda key: key.removeprefix("pixel_")  # noqa: E731
        found.append(_Part(PIXELS, model.decoder, cut, Statistics))
    return found


def _alone(key: str) -> str | None:
    """The published name of one of our (torch-style) names, where `_ALONE` has it."""
    for ours, theirs in _ALONE.items():
        if key == ours or key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    return None


_ALONE_LEAVES = nnx.All(
    nnx.Param, lambda path, _: _alone(".".join(map(str, path))) is not None
)  # fmt: skip
_INSERT_LEAVES = nnx.All(nnx.Param, lambda path, _: path[0] == "inserts")
_BIASES = nnx.All(nnx.Param, lambda path, _: path[-1] in ("bias", "added_bias"))


def _insert_name(every: int, key: str) -> str:
    """The published name (after `LLM`) of `inserts.k.…`."""
    _, k, rest = key.split(".", 2)
    return f"layers.{int(k) * every}.{INSERT}{rest}"


# ---- in


def load_mm_interleaved(model: MMInterleaved, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `model` in place; reports what doesn't fit in all parts at once.

    Args:
        tensors: published name -> array.

    Raises:
        WeightError: names or shapes don't fit, or a sin-cos table is not the one that we compute.
    """
    weights = names.Mapped(
        tensors, only=lambda key: not _BUFFERS.search(key) and not _IS_TABLE.search(key)
    )
    old_vae = any(key.startswith(VAE) and ".attentions.0.query." in key for key in weights)
    parts = _parts(model, old_vae)
    alone = tuple(_ALONE.values())
    single = names.Mapped(weights, {SOI: np.ravel}, lambda key: key.startswith(alone))
    names.load_parts(
        lambda: _refuse_others(weights, [part.prefix for part in parts]),
        lambda: _compare_tables(model, tensors),
        lambda: load_adapter(model.vision.adapter, weights, TOWER),
        lambda: _load_llm(model, weights),
        lambda: _load_inserts(model, weights),
        lambda: names.load_torch_dict(model, single, rename=_alone, only=_ALONE_LEAVES),
        *(functools.partial(part.load, weights) for part in parts),
    )


def _refuse_others(weights: Mapping, prefixes: list[str]) -> None:
    """Raises WeightError for tensors that belong to no part; parts report those of their own."""
    known = (TOWER + CLIP, LLM, FROZEN, NEW, *prefixes, *_ALONE.values())
    if left := sorted(key for key in weights if not key.startswith(known)):
        listed = "; ".join(map(shown, left[:100]))
        raise WeightError(f"of no part of an MM-Interleaved ({len(left)}): {listed}")


def _load_llm(model: MMInterleaved, weights: Mapping) -> None:
    """The language model without its inserts, and its output table."""
    llm = model.llm
    if llm.cfg.tied or not llm.cfg.head_bias:
        raise WeightError(
            "MM-Interleaved's output table is one of its own and has biases: the language model "
            "needs tied=false"
        )
    own = lambda key: key.startswith(LLM) and f".{INSERT}" not in key  # noqa: E731
    made = {"model." + k.removeprefix(LLM): (k, np.asarray) for k in weights if own(k)}
    faults = _head_faults(llm.cfg, weights)
    if not faults:
        V, new = llm.cfg.vocab_size, NEW + "weight"
        table = functools.partial(_summed, V=V, new=lambda: weights[new])
        made[HEAD] = (FROZEN + "weight", table)
    names.load_parts(
        lambda: load_llama(llm, names.Mapped(weights, made, lambda key: False)),
        lambda: _load_biases(llm, weights, faults),
    )


def _head_faults(cfg, weights: Mapping) -> list[str]:
    """What doesn't fit of the two output tables."""
    n, D = cfg.added_tokens, cfg.width
    expected = {FROZEN + "weight": (cfg.tokens, D), FROZEN + "bias": (cfg.tokens,),
                NEW + "weight": (n, D), NEW + "bias": (n,)}  # fmt: skip
    faults = [f"missing: {key}" for key in expected if key not in weights]
    for key, shape in expected.items():
        if key in weights and (found := names.shape_of(weights, key)) != shape:
            faults.append(f"{key}: {found}, expected {shape}")
    left = [k for k in weights if k.startswith((FROZEN, NEW)) and k not in expected]
    return faults + [f"left over: {shown(key)}" for key in left]


def _summed(table: np.ndarray, V: int, new: Callable[[], np.ndarray]) -> np.ndarray:
    """Rows of the frozen table, those from V on with `new` added; in float32 where they are."""
    table, new = np.asarray(table), np.asarray(new(), np.float32)
    rows = (table[V:].astype(np.float32) + new).astype(table.dtype)
    return np.concatenate([table[:V], rows])


def _load_biases(llm: nnx.Module, weights: Mapping, faults: list[str]) -> None:
    if faults:
        raise WeightError("the output tables don't fit: " + "; ".join(faults))
    V, R = llm.cfg.vocab_size, llm.cfg.rows
    frozen = np.asarray(weights[FROZEN + "bias"], np.float32)
    added = frozen[V:] + np.asarray(weights[NEW + "bias"], np.float32)
    biases = {"bias": np.pad(frozen[:V], (0, R - V)), "added_bias": added}
    names.load_torch_dict(llm.lm_head, biases, only=_BIASES)


def _load_inserts(model: MMInterleaved, weights: Mapping) -> None:
    names.load_torch_dict(
        model.llm,
        names.Mapped(weights, only=lambda key: f".{INSERT}" in key),
        LLM,
        stacked=("inserts",),
        rename=functools.partial(_insert_name, model.cfg.insert.every),
        only=_INSERT_LEAVES,
    )


def _compare_tables(model: MMInterleaved, tensors: Mapping) -> None:
    """Raises WeightError for sin-cos tables that are not those of this model."""
    ours, faults = _tables(model), []
    for key in tensors:
        if not _IS_TABLE.search(key):
            continue
        if key not in ours:
            faults.append(f"{shown(key)} is left over")
            continue
        found, (side, width, extra) = np.asarray(tensors[key], np.float32), ours[key]
        if key == TABLE:  # this model may be for images of another size
            side = round(max(len(found) - extra, 1) ** 0.5)
        if found.shape != (expected := (extra + side * side, width)):
            faults.append(f"{key}: {found.shape}, expected {expected}")
        elif (error := np.abs(found - sincos.table_2d(side, width, extra)).max()) > _TABLE_ERROR:
            faults.append(f"{key} is off by up to {error:.3g}")
    if faults:
        raise WeightError("sin-cos tables are not those that we compute: " + "; ".join(faults))


def _tables(model: MMInterleaved) -> dict[str, tuple[int, int, int]]:
    """Published name -> (side, width, extra) of a sin-cos table, see `sincos.table_2d`."""
    tower, net = model.vision.cfg.vit, model.decoder.denoiser.mmfs_module
    found = {TABLE: (model.vision.cfg.table_side, tower.width, int(tower.class_token))}
    blocks = {f"mmfs_down_blocks.{k}.": block for k, block in enumerate(net.mmfs_down_blocks)}
    for name, block in (blocks | {"mmfs_mid_block.": net.mmfs_mid_block}).items():
        found[f"{MMFS}{name}pos_embed"] = (block.grid, block.query_norm.scale.shape[0], 0)
    return found


# ---- out


def export_mm_interleaved(
    model: MMInterleaved, frozen_bias: float = _FROZEN_BIAS
) -> names.Lazy:  # fmt: skip
    """Published name -> array of the whole model, buffers included.

    Args:
        frozen_bias: of the frozen output table for added ids; the small one has the rest. What is
            published has -100 there and about 95 here, where the sum is rounded as numbers around
            100 are: to a quarter in bfloat16. With 0 it is as exact as the model's own.
    """
    every, alone = model.cfg.insert.every, names.Lazy()
    single = names.lazy_torch_dict(model, rename=_alone, only=_ALONE_LEAVES)
    for key in single:
        shape, make = single.shape_of(key), single.maker(key)
        if key == SOI:
            shape, make = (1, *shape), lambda make=make: make()[None]
        alone.set(key, make, shape, single.dtype_of(key))
    rename = functools.partial(_insert_name, every)
    inserts = names.lazy_torch_dict(
        model.llm, LLM, stacked=("inserts",), rename=rename, only=_INSERT_LEAVES
    )
    return names.joined(
        export_adapter(model.vision.adapter, TOWER),
        alone,
        _export_llm(model.llm, frozen_bias),
        inserts,
        *(part.export() for part in _parts(model)),
        _buffers(model),
    )


def _export_llm(llm: nnx.Module, frozen_bias: float) -> names.Lazy:
    """The language model without its inserts, and its output table as two."""
    found, out = export_llama(llm), names.Lazy()
    V, n = llm.cfg.vocab_size, llm.cfg.added_tokens
    for key in found:
        make, name = found.maker(key), LLM + key.removeprefix("model.")
        if key == HEAD:
            make, name = functools.partial(_frozen_rows, make, V), FROZEN + "weight"
        out.set(name, make, found.shape_of(key), found.dtype_of(key))
    head = llm.lm_head
    value = {name: getattr(head, name).get_raw_value() for name in ("bias", "added", "added_bias")}
    pad = np.full(n, frozen_bias, np.float32)
    makers = {
        FROZEN + "bias": ((V + n,), lambda: np.concatenate([np.asarray(value["bias"])[:V], pad])),
        NEW + "weight": ((n, llm.cfg.width), lambda: np.asarray(value["added"])),
        NEW + "bias": ((n,), lambda: np.asarray(value["added_bias"], np.float32) - pad),
    }
    for key, (shape, make) in makers.items():
        dtype = value["added"].dtype if key == NEW + "weight" else np.float32
        out.set(key, make, shape, dtype)
    return out


def _frozen_rows(make: Callable[[], np.ndarray], V: int) -> np.ndarray:
    table = np.array(make())
    table[V:] = 0
    return table


def _buffers(model: MMInterleaved) -> names.Lazy:
    """What the public code keeps beside its weights."""
    tower, llm, out = model.vision.cfg.vit, model.llm.cfg, names.Lazy()
    tokens = tower.grid**2 + int(tower.class_token)
    positions = np.arange(tokens, dtype=np.int64)[None]
    out[f"{TOWER}{CLIP}embeddings.position_ids"] = positions
    for name, values in (("clip_mean", tower.mean), ("clip_std", tower.std)):
        out[f"visual_tokenizer.{name}"] = np.array(values, np.float32).reshape(1, 3, 1, 1)
    exponents = np.arange(0, llm.head_dim, 2, dtype=np.float32) / np.float32(llm.head_dim)
    frequencies = (1.0 / llm.rope_theta**exponents).astype(np.float32)
    for i in range(llm.layers):
        out[f"{LLM}layers.{i}.self_attn.rotary_emb.inv_freq"] = frequencies
    for key, (side, width, extra) in _tables(model).items():
        make = functools.partial(sincos.table_2d, side, width, extra)
        out.set(key, make, (extra + side * side, width), np.float32)
    return out
