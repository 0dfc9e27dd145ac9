"""What a decoder starts from: Stable Diffusion's weights, adapters, statistics of the data."""

from collections.abc import Sequence

import numpy as np

from metamorph_jax.convert import diffusion, hf, load
from metamorph_jax.convert.peft import load_peft
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.build import is_open
from metamorph_jax.recipes.decoder.config import Config
from metamorph_jax.recipes.decoder.model import Decoder
from metamorph_jax.types import DecoderBatch


def load_pretrained(model: Decoder, cfg: Config) -> None:
    """Fills the model in place as the weight specs of the config say."""
    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
        if model.vision is not None and is_open(model.vision):
            load_vision(model.vision, cfg.vision)  # the earlier stage had its features cached
    else:
        _load_published(model, cfg)
    if cfg.lora is not None and cfg.lora.weights:
        load_peft(model.decoder.denoiser, cfg.lora.weights)


def _load_published(model: Decoder, cfg: Config) -> None:
    """Tower, UNet and autoencoder."""
    if model.vision is not None:
        load_vision(model.vision, cfg.vision)
    if cfg.sd_weights == "random":
        return
    folder = hf.find(cfg.sd_weights)
    if not cfg.unet_from_scratch:
        _same(cfg.decoder.denoiser, folder / "unet", diffusion.unet_from_hf, "denoiser")
        diffusion.load_unet(model.decoder.denoiser, hf.Tensors(folder / "unet"))
    if cfg.decoder.vae:
        _same(cfg.decoder.vae, folder / "vae", diffusion.vae_from_hf, "vae")
        diffusion.load_vae(model.decoder.vae, hf.Tensors(folder / "vae"))


def _same(ours, folder, read, part: str) -> None:
    """Raises for another structure: another number of heads or groups would fit, and draw nonsense.

    Raises:
        ConfigError: naming every field that differs.
    """
    theirs = vars(read(hf.read_config(folder)))
    free = ("dtype", "sample_size", "upcast_attention")
    wrong = [
        f"{name} is {value!r}, in {folder / 'config.json'} {theirs[name]!r}"
        for name, value in vars(ours).items()
        if name not in free and value != theirs.get(name)
    ]
    if wrong:
        raise ConfigError(f"config.model.decoder.{part}: " + "; ".join(wrong))


def initialize(model: Decoder, batches: Sequence[DecoderBatch]) -> None:
    """Measures the standardisation of features and images before the first step, in place."""
    features = np.concatenate([np.asarray(model.features(b)) for b in batches])
    model.set_statistics(features, np.concatenate([np.asarray(b.image) for b in batches]))
