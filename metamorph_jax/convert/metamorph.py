"""Whole MetaMorph checkpoints by the names of the public implementation.

    llm         model.embed_tokens / model.layers / model.norm / lm_head     (convert/llama.py)
    tower       model.vision_tower.vision_tower.[vision_model.]…             (convert/vit.py)
    reducer     model.vision_tower.{token,channel}_mixing.{weight,bias}      mlpmixer only; our names
    connector   model.mm_projector.{0,2,…}.{weight,bias}, one linear: model.mm_projector.…
    head        vision_head.{0,2[,4]}.{weight,bias},      one linear: vision_head.…

Dropped on purpose: `model.vision_proj`, which never had a gradient.

The decoder is three files (`load_decoder`, `save_decoder`):

    unet_checkpoint.{pt,safetensors}      UNet by diffusers' names           (convert/diffusion.py)
    adapter_checkpoint.{pt,safetensors}   conditioning projector, names as in models/diffusion/projector
    model_config.json                     fields of ProjectorConfig
"""  # noqa: E501

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.convert import hf, names, safetensors, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert.families import Family
from metamorph_jax.convert.llama import export_llama, load_llama
from metamorph_jax.convert.vit import export_complete, export_vit, load_vit
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.unet import UNet
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.models.vision.vit import SIZES as TOWER_SIZES
from metamorph_jax.models.vision.vit import ViTConfig
from metamorph_jax.recipes import metamorph as recipe

TOWER, CONNECTOR, HEAD = "model.vision_tower.vision_tower.", "model.mm_projector.", "vision_head."
REDUCER = "model.vision_tower."
DROPPED = ("model.vision_proj.",)
OWN = (REDUCER, CONNECTOR, HEAD, *DROPPED)  # TOWER starts with REDUCER; the rest is the llm's


def sequential(linears) -> Callable[[str], str]:
    """Our `linears.i` are items 0, 2, 4 … of a torch Sequential; a single one stands alone."""
    if len(linears) == 1:
        return lambda key: key.removeprefix("linears.0.")
    return lambda key: re.sub(r"^linears\.(\d+)", lambda m: str(2 * int(m[1])), key)


def _parts(model: nnx.Module):
    """(prefix, module, rename) of what is neither tower nor llm."""
    parts = [(REDUCER, model.vision.reducer, lambda key: key)]
    for prefix, part in ((CONNECTOR, model.connector), (HEAD, model.head)):
        if part is not None:
            parts.append((prefix, part, sequential(part.linears)))
    return parts


def read(folder: pathlib.Path) -> Mapping[str, np.ndarray]:
    """The tensors of a checkpoint by the names above.

    Args:
        folder: of the public implementation, or what `metamorph convert` writes: a language model
            with tower/, connector/ and head/ beside it.
    """
    parts = [("", hf.Tensors(folder))]
    for name, prefix in (("tower", TOWER), ("connector", ""), ("head", "")):
        if (folder / name / "config.json").is_file():
            parts.append((prefix, hf.Tensors(folder / name)))
    return names.Joined(*parts)


def load_metamorph(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills a MetaMorph model in place; reports what doesn't fit in all parts at once."""
    problems = []

    def attempt(load, *args, **kwargs):
        try:
            load(*args, **kwargs)
        except ValueError as error:
            problems.append(str(error))

    tower = model.vision.tower
    if tower is not None:
        inside = names.Mapped(tensors, only=lambda key: key.startswith(TOWER))
        attempt(load_vit, tower, inside, vit.tower_prefix(tower.cfg, inside, TOWER))
    for prefix, part, rename in _parts(model):
        inside = names.Mapped(
            tensors, only=lambda key, p=prefix: key.startswith(p) and not key.startswith(TOWER)
        )
        attempt(names.load_torch_dict, part, inside, prefix, rename=rename)
    known = OWN if model.head is not None else (REDUCER, CONNECTOR, *DROPPED)
    attempt(load_llama, model.llm, names.Mapped(tensors, only=lambda k: not k.startswith(known)))
    if problems:
        raise ValueError("\n".join(problems))


def export_metamorph(model: nnx.Module, tower=export_vit) -> names.Lazy:
    """Published name -> array of the whole model, fetched when asked for."""
    out = export_llama(model.llm)
    found = [] if model.vision.tower is None else [tower(model.vision.tower, TOWER)]
    for prefix, part, rename in _parts(model):
        found.append(names.lazy_torch_dict(part, prefix, rename=rename))
    for part in found:
        for key in part:
            out.set(key, part.maker(key), part.shape_of(key), part.dtype_of(key))
    return out


# ---- configs

TOWERS = {"CLIP-ViT-SO400M-14-384": "siglip-so400m-384", "CLIP-ViT-SO400M-14": "siglip-so400m-384"}
_ADDED = 2  # start and end of a picture


def options(cfg) -> dict:
    """The fields of a part's config, for `llm_options` and `vision.tower_options`."""
    return {k: v for k, v in vars(cfg).items() if k not in ("dtype", "remat")}


def config_from_hf(fields: Mapping, dtype: str = "float32") -> recipe.Config:
    """The config of a checkpoint's config.json: Llama's fields, and the recipe's among them.

    `vision_config` describes the tower in what we write; the reference only names it, and whatever
    the name, loads SigLIP SO400M at 384 pixels."""
    if not fields.get("mm_use_im_start_end", True):
        raise ValueError("mm_use_im_start_end false: MetaMorph needs both tokens of a picture")
    llm = llama_names.config_from_hf(dict(fields) | {"model_type": "llama"})
    llm = dataclasses.replace(llm, vocab_size=llm.vocab_size - _ADDED, added_tokens=_ADDED)
    tower = _tower(fields)
    if tower is None:
        made_by = {"tower": "none", "feature_width": fields["mm_hidden_size"]}
    else:
        made_by = {"tower": f"{tower.layout}-tiny", "tower_options": options(tower)}
    vision = VisionConfig(
        **made_by,
        tokens=fields.get("num_image_tokens", 64),
        reduction=fields.get("image_token_reduction", "interpolation"),
        normalize=fields.get("normalize_vision", True),
        softmax=fields.get("apply_softmax", False),
        dtype=dtype,
    )
    return recipe.Config(
        llm="tiny",  # every field of it is replaced
        llm_options=options(llm),
        vision=vision,
        connector=fields.get("mm_projector_type", "mlp2x_gelu"),
        head=fields.get("vision_head_type", "mlp"),
        visual_coef=float(fields.get("vision_coef", 1.0)),
        use_vision_ar=fields.get("use_vision_ar", True),
        dtype=dtype,
    )


def _tower(fields: Mapping) -> ViTConfig | None:
    layer = fields.get("mm_vision_select_layer", -2)
    if fields.get("vision_config"):
        return vit.config_from_hf(fields["vision_config"], select_layer=layer, final_norm=False)
    name = str(fields.get("mm_vision_tower") or "none").rsplit("/", 1)[-1]
    if name == "none":
        return None
    size = next((v for k, v in TOWERS.items() if re.match(re.escape(k) + r"($|-)", name)), None)
    if size is None:
        raise ValueError(f"mm_vision_tower {name!r} is none of {', '.join(TOWERS)}")
    return dataclasses.replace(TOWER_SIZES[size], select_layer=layer, whole=True)


def config_to_hf(cfg: recipe.Config) -> dict:
    """config.json of a checkpoint in the reference's names."""
    llm, vision, tower = recipe.llm_config(cfg), cfg.vision, cfg.vision.vit
    if llm.added_tokens != _ADDED:
        raise ValueError(f"{llm.added_tokens} added tokens; MetaMorph's two were expected")
    fields = llama_names.config_to_hf(llm) | {
        "architectures": ["MetaMorphLlamaForCausalLM"],
        "model_type": "metamorph_llama",
        "mm_hidden_size": vision.feature_shape[1],
        "mm_projector_type": cfg.connector,
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": False,
        "vision_head_type": cfg.head,
        "num_image_tokens": vision.tokens,
        "image_token_reduction": vision.reduction,
        "normalize_vision": vision.normalize,
        "apply_softmax": vision.softmax,
        "vision_coef": cfg.visual_coef,
        "use_vision_ar": cfg.use_vision_ar,
    }
    if tower is None:
        return fields | {"mm_vision_tower": "none"}
    fields["mm_vision_tower"] = "siglip/CLIP-ViT-SO400M-14-384"
    # A tower that holds only the layers it runs ends with the one that it gives out.
    fields["mm_vision_select_layer"] = tower.select_layer if tower.whole else -1
    return fields | {"vision_config": vit.config_to_hf(tower)}


def published(fields: Mapping) -> list[str]:
    """Every key of the checkpoint that a config.json belongs to."""
    cfg = config_from_hf(fields)
    llm, tower = recipe.llm_config(cfg), cfg.vision.vit
    keys = llama_names.published(llama_names.config_to_hf(llm))
    kind = cfg.connector
    count = int(kind[3 : kind.index("x_")]) if kind.endswith("x_gelu") else 1
    count = {"identity": 0, "mlpsoftmax": 2}.get(kind, count)
    keys += _sequential_keys(CONNECTOR, count)
    keys += _sequential_keys(HEAD, {"mlp": 2, "mlp2x_gelu": 3}.get(cfg.head, 1))
    if cfg.vision.reduce.reduces and cfg.vision.reduction == "mlpmixer":
        keys += [
            f"{REDUCER}{k}_mixing.{x}" for k in ("token", "channel") for x in ("weight", "bias")
        ]
    if tower is not None:
        own = vit.PREFIXES[tower.layout]
        keys += [TOWER + k.removeprefix(own) for k in vit.published(vit.config_to_hf(tower))]
    return keys


def _sequential_keys(prefix: str, count: int) -> list[str]:
    places = [""] if count == 1 else [f"{2 * i}." for i in range(count)]
    return [f"{prefix}{place}{leaf}" for place in places for leaf in ("weight", "bias")]


# ---- the decoder's files

_FILES = {"unet": "unet_checkpoint", "adapter": "adapter_checkpoint"}
# The first linear of each projector, which standardised features enter.
_FIRST = {"mlp": "layers.0", "xattn": "proj", "xattnffn": "proj", "transformer": "fc"}


def decoder_config(folder: str | pathlib.Path) -> ProjectorConfig:
    """The projector's config, from model_config.json."""
    file = pathlib.Path(folder) / "model_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}")
    return ProjectorConfig.from_dict(json.loads(file.read_text()))


def _decoder_tensors(folder: pathlib.Path, part: str) -> Mapping:
    for ending in ("safetensors", "pt"):
        file = folder / f"{_FILES[part]}.{ending}"
        if file.is_file():
            tensors = hf.Tensors(file)
            if all(key.startswith("module.") for key in tensors):  # saved out of a wrapper
                short = {k.removeprefix("module."): (k, lambda x: x) for k in tensors}
                return names.Mapped(tensors, short, only=lambda key: False)
            return tensors
    raise FileNotFoundError(f"no {_FILES[part]}.safetensors or .pt in {folder}")


def load_decoder(model: nnx.Module, folder: str | pathlib.Path) -> None:
    """Fills projector and UNet of a decoder in place from the reference's three files.

    A folder without a UNet file leaves the UNet as it is (only the projector was trained). The
    standardisation becomes that of the reference: none.
    """
    folder = pathlib.Path(folder)
    cfg = decoder_config(folder)
    if dataclasses.replace(cfg, dtype=model.cfg.projector.dtype) != model.cfg.projector:
        raise ValueError(f"{folder}/model_config.json says {cfg}, the model {model.cfg.projector}")
    names.load_torch_dict(model.projector, _decoder_tensors(folder, "adapter"))
    if any((folder / f"{_FILES['unet']}.{ending}").is_file() for ending in ("safetensors", "pt")):
        names.load_torch_dict(model.decoder.denoiser, _decoder_tensors(folder, "unet"))
    width = (cfg.input_dim,)
    model.feature_mean.set_raw_value(jnp.zeros(width))
    model.feature_scale.set_raw_value(jnp.ones(width))


def save_decoder(model: nnx.Module, folder: str | pathlib.Path, torch_files: bool = False) -> None:
    """Writes the three files; a standardisation of the features is folded into the projector.

    Args:
        torch_files: `.pt` files, which the reference's demo reads (needs torch).
    """
    denoiser = model.decoder.denoiser
    if not isinstance(denoiser, UNet):
        raise ValueError(f"the reference knows no {type(denoiser).__name__}, only the UNet")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = model.cfg.projector
    fields = {k: v for k, v in vars(cfg).items() if k != "dtype"}
    (folder / "model_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    adapter = names.lazy_torch_dict(model.projector)
    mean, scale = (np.asarray(x[...]) for x in (model.feature_mean, model.feature_scale))
    if mean.any() or (scale != 1).any():
        weight, bias = (f"{_FIRST[cfg.mode]}.{leaf}" for leaf in ("weight", "bias"))
        old = adapter[weight]
        adapter[bias] = adapter[bias] - old @ (mean * scale)
        adapter[weight] = old * scale
    _save(adapter, folder / _FILES["adapter"], torch_files)
    _save(names.lazy_torch_dict(denoiser), folder / _FILES["unet"], torch_files)


def _save(tensors: names.Lazy, path: pathlib.Path, torch_file: bool) -> None:
    if torch_file:
        import torch

        state = {key: torch.from_numpy(np.array(tensors[key])) for key in tensors}
        torch.save(state, path.with_suffix(".pt"))
        return
    shapes = {k: tensors.shape_of(k) for k in tensors}
    kinds = {k: tensors.dtype_of(k) for k in tensors}
    file = path.with_suffix(".safetensors")
    safetensors.write(file, tensors, shapes, kinds, tensors.__getitem__)


# ---- family


def export(model: recipe.MetaMorph) -> names.Lazy:
    """As `config_to_hf` says it: with a final norm of the tower in any case."""
    return export_metamorph(model, export_complete)


def create(cfg: recipe.Config, *, rngs: nnx.Rngs) -> recipe.MetaMorph:
    return recipe.create(cfg, rngs)


FAMILIES = {
    "metamorph": Family(
        "metamorph", config_from_hf, config_to_hf, create, load_metamorph, export,
        {"metamorph-8b": recipe.Config(), "metamorph-tiny": recipe.Config(
            llm="tiny", vision=VisionConfig("siglip-tiny", tokens=4))},
        published,
    )
}  # fmt: skip
