"""Names of MiniGPT-5's tensors, those of `eric-ai-lab/MiniGPT-5`.

    ours                  public code
    vision.tower          model.visual_encoder.…                          convert/blip2.py
    connector             model.{ln_vision,query_tokens,Qformer,llama_proj}.…   convert/blip2.py
    llm                   model.llama_model.…                             Llama's names
      added rows          the last rows of its two tables
      adapters            model.llama_model.base_model.model.…lora_{A,B}.default.weight   PEFT's
      prefix              model.llama_model.prompt_encoder.default.…      PEFT's
    mapper                fc.…, llm_to_t2i_mapping.…, t2i_decoder_prompt  convert/mapper.py
    decoder.denoiser      unet.…                                          diffusers' names
    decoder.vae           vae.…                                           diffusers' names
    decoder.pixel_…       pixel_…: our own, of models without `vae`
    text_encoder          sd_text_encoder.…                               transformers' names

Nothing was published with all of it: files hold what was trained (`checkpoints.py`), the rest comes
from BLIP-2, MiniGPT-4, Vicuna and Stable Diffusion. We write whole models under these names.

Where the language model has adapters, PEFT puts it into two more modules, and gives its tables the
name of what is saved beside adapters. `plain` undoes all of that: one name for one tensor. Buffers
and PEFT's copies of the old tables are not read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from metamorph_jax.convert import blip2, clip_text, diffusion, mapper, names, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown
from metamorph_jax.models import lora
from metamorph_jax.models.diffusion.decoder import Statistics
from metamorph_jax.models.llm.llama import Llama
from metamorph_jax.recipes.minigpt5.model import MiniGPT5

INSIDE = "model."  # before the names of what MiniGPT-4 has, too
LLM, PREFIX = "llama_model.", "llama_model.prompt_encoder.default."
TABLES = {"embed_tokens": LLM + llama_names.EMBED, "lm_head": LLM + llama_names.HEAD}
UNET, VAE, PIXELS, TEXT = "unet.", "vae.", "pixel_", "sd_text_encoder."
MAPPER = (mapper.FC, mapper.TRANSFORMER, mapper.QUERIES, "spread.")
CONNECTOR = (blip2.NORM, blip2.QFORMER, blip2.QUERIES, blip2.PROJ)
_DEEPER = (blip2.TOWER, *CONNECTOR, LLM)
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|position_ids$|\.original_module\.|_grad_mask$")
_HALF = re.compile(r"(.*)\.lora_([AB])\.weight")


def plain(key: str) -> str:
    """The name of a tensor without `model.` and without what PEFT adds to it."""
    rest = key.removeprefix(INSIDE)
    if not rest.startswith(_DEEPER):
        return key
    if rest.startswith(LLM):
        # Adapters stand around the whole model, a prefix around its layers.
        rest = re.sub(rf"^{re.escape(LLM)}base_model\.(model\.(?=model\.|lm_head\.))?", LLM, rest)
        rest = re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", rest)
        rest = re.sub(r"(\.lora_[AB])\.default(\.weight)$", r"\1\2", rest)
    return rest


def plainly(tensors: Mapping[str, np.ndarray]) -> names.Mapped:
    """The tensors under the names of `plain`, without buffers.

    Raises:
        WeightError: two tensors have one name.
    """
    found, places, twice = {}, {}, []
    for key in tensors:
        if _BUFFERS.search(key):
            continue
        name = plain(key)
        if name in places:
            twice.append(f"{shown(places[name])} and {shown(key)}")
        found[key], places[name] = name, key
    if twice:
        raise WeightError(f"the same tensor under two names: {'; '.join(twice[:8])}")
    changes = {name: (key, np.asarray) for key, name in found.items() if name != key}
    return names.Mapped(tensors, changes, lambda key: found.get(key) == key)


def cut(tensors: Mapping[str, np.ndarray], prefix: str) -> names.Mapped:
    """The tensors that begin with `prefix`, with the rest of their names."""
    changes = {k.removeprefix(prefix): (k, np.asarray) for k in tensors if k.startswith(prefix)}
    return names.Mapped(tensors, changes, lambda key: False)


# ---- a whole model, in


@dataclasses.dataclass(frozen=True)
class _Part:
    """What tensors begin with that belong to a part, and what fills it with them."""

    prefixes: tuple[str, ...]
    load: Callable[[names.Mapped], None]


def _parts(model: MiniGPT5, adapters: bool) -> list[_Part]:
    """Those of a model; `load` gets tensors under the names of `plain`."""
    decoder, llm = model.decoder, model.llm
    without = lambda load, part, prefix: lambda found: load(part, cut(found, prefix))  # noqa: E731
    parts = [
        _Part((blip2.TOWER,), lambda found: vit.load_vit(model.vision.tower, found, blip2.TOWER)),
        _Part(CONNECTOR, functools.partial(blip2.load_qformer, model.connector)),
        _Part((LLM,), lambda found: load_llm(llm, found, adapters)),
        _Part(MAPPER, functools.partial(mapper.load_mapper, model.mapper)),
        _Part((UNET,), without(diffusion.load_unet, decoder.denoiser, UNET)),
    ]
    if decoder.vae is not None:
        parts.append(_Part((VAE,), without(diffusion.load_vae, decoder.vae, VAE)))
    else:
        parts.append(_Part((PIXELS,), functools.partial(_load_pixels, decoder)))
    if model.text_encoder is not None:
        load = without(clip_text.load_clip_text, model.text_encoder, TEXT)
        parts.append(_Part((TEXT,), load))
    return parts


def _load_pixels(decoder: nnx.Module, found: names.Mapped) -> None:
    names.load_torch_dict(decoder, found, only=Statistics)


def load_minigpt5(
    model: MiniGPT5, tensors: Mapping[str, np.ndarray], adapters: bool = True
) -> None:
    """Fills `model` in place; reports what doesn't fit in all parts at once.

    A text encoder, which only the caption loss needs, may be left over.

    Args:
        tensors: name of the public code -> array.
        adapters: adapters of the model must be there, too; else they are left as they are.

    Raises:
        WeightError: names or shapes don't fit.
    """
    found, parts = plainly(tensors), _parts(model, adapters)
    begins = lambda prefixes: names.Mapped(found, only=lambda k: k.startswith(prefixes))  # noqa: E731
    known = tuple(p for part in parts for p in part.prefixes)
    names.load_parts(
        lambda: _refuse_others(found, (*known, TEXT)),
        *(functools.partial(part.load, begins(part.prefixes)) for part in parts),
    )


def _refuse_others(found: Mapping, known: tuple[str, ...]) -> None:
    """Raises WeightError for tensors that belong to no part; parts report those of their own."""
    if left := sorted(key for key in found if not key.startswith(known)):
        listed = "; ".join(map(shown, left[:100]))
        raise WeightError(f"of no part of a MiniGPT-5 ({len(left)}): {listed}")


def load_llm(llm: Llama, found: Mapping[str, np.ndarray], adapters: bool = True) -> None:
    """Fills the language model, its prefix and its adapters, in place, from names of `plain`."""
    own = cut(found, LLM)
    inside = PREFIX.removeprefix(LLM)
    loads = [
        lambda: llama_names.load_llama(
            llm, names.Mapped(own, only=lambda k: not _HALF.fullmatch(k) and inside not in k)
        ),
        lambda: load_prefix(llm, found),
    ]
    names.load_parts(*loads, *([lambda: load_adapters(llm, found)] if adapters else []))


# ---- what may stand beside a language model


def load_adapters(llm: Llama, found: Mapping[str, np.ndarray]) -> None:
    """Fills the adapters of a language model, in place, from names of `plain`.

    Raises:
        WeightError: there are others than the model has.
    """
    changes = {}
    for key in found:
        if key.startswith(LLM) and (half := _HALF.fullmatch(key)):
            ours = f"{half[1].removeprefix(LLM)}.lora_{half[2].lower()}"
            changes[ours] = (key, np.transpose)
    if not changes and next(lora.adapters(llm), None) is None:
        return
    names.load_torch_dict(
        llm,
        names.Mapped(found, changes, lambda key: False),
        stacked=llama_names.STACKED,
        rename=llama_names.published_name,
        only=lora.Adapter,
    )


def export_adapters(llm: Llama) -> names.Lazy:
    """Name in the public code -> float32 array of the adapters of a language model."""
    out, start = names.Lazy(), f"{INSIDE}{LLM}base_model.model."
    for path, variable in nnx.to_flat_state(nnx.state(llm, lora.Adapter)):
        value = variable.get_raw_value()
        for (*module, leaf), index in names._slices(path, value.shape, llama_names.STACKED):
            name = llama_names.published_name(".".join(map(str, module)))
            shape = value.shape if index is None else value.shape[1:]
            key = f"{start}{name}.lora_{leaf[-1].upper()}.default.weight"
            make = functools.partial(_half, value, index)
            out.set(key, make, shape[::-1], np.float32)
    return out


def _half(value, index: int | None) -> np.ndarray:
    array = np.asarray(value if index is None else value[index], np.float32)
    return np.ascontiguousarray(array.T)


def load_prefix(llm: Llama, found: Mapping[str, np.ndarray]) -> None:
    """Fills the prefix of a language model, in place, from names of `plain`.

    Raises:
        WeightError: there is none, or another one than the model has.
    """
    own = cut(found, PREFIX)
    if llm.prefix is not None:
        names.load_torch_dict(llm.prefix, own, rename=_prefix_name)
    elif own:
        raise WeightError(f"a prefix ({PREFIX}…), but the model has none: config.model.prefix")


def export_prefix(llm: Llama) -> names.Lazy:
    """Name in the public code -> array; nothing without a prefix."""
    if llm.prefix is None:
        return names.Lazy()
    return names.lazy_torch_dict(llm.prefix, INSIDE + PREFIX, rename=_prefix_name)


def _prefix_name(key: str) -> str:
    """PEFT's name of one of our (torch-style) names of a prefix."""
    key = "embedding.weight" if key == "weight" else key
    return re.sub(r"^fc([12])\.", lambda m: f"transform.{2 * int(m[1]) - 2}.", key)


# ---- a whole model, out


def export_minigpt5(model: MiniGPT5) -> names.Lazy:
    """Name in the public code -> array of the whole model.

    Raises:
        ValueError: it has adapters, which must be merged first (`models.lora.merged`).
    """
    decoder = model.decoder
    parts = [
        vit.export_vit(model.vision.tower, INSIDE + blip2.TOWER),
        named(blip2.export_qformer(model.connector), INSIDE),
        named(llama_names.export_llama(model.llm), INSIDE + LLM),
        export_prefix(model.llm),
        mapper.export_mapper(model.mapper),
        names.lazy_torch_dict(decoder.denoiser, UNET),
    ]
    if decoder.vae is not None:
        parts.append(names.lazy_torch_dict(decoder.vae, VAE))
    else:
        parts.append(names.lazy_torch_dict(decoder, only=Statistics))
    if model.text_encoder is not None:
        parts.append(named(clip_text.export_clip_text(model.text_encoder), TEXT))
    return names.joined(*parts)


def named(found: names.Lazy, prefix: str) -> names.Lazy:
    """The same arrays, with this before their names."""
    out = names.Lazy()
    for key in found:
        out.set(prefix + key, found.maker(key), found.shape_of(key), found.dtype_of(key))
    return out
