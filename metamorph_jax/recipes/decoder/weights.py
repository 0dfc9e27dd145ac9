"""What a decoder starts from: Stable Diffusion's weights, adapters, statistics of the data."""

from collections.abc import Sequence

import numpy as np

from metamorph_jax.convert import hf, load, specs, stable_diffusion
from metamorph_jax.convert.peft import load_peft
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.build import is_open
from metamorph_jax.recipes.decoder.config import Config
from metamorph_jax.recipes.decoder.model import Decoder
from metamorph_jax.recipes.decoder.published import load_reference
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
    """Tower, UNet, autoencoder and projector."""
    if model.vision is not None:
        load_vision(model.vision, cfg.vision)
    if cfg.sd_weights != specs.RANDOM:
        decoder = model.decoder
        unet = None if cfg.unet_from_scratch else decoder.denoiser
        stable_diffusion.load_parts(cfg.sd_weights, decoder.cfg.schedule, unet, decoder.vae)
    if cfg.weights:
        load_reference(model, hf.find(cfg.weights))


def initialize(model: Decoder, batches: Sequence[DecoderBatch]) -> None:
    """Measures the standardisation of features and images before the first step, in place."""
    features = np.concatenate([np.asarray(model.features(b)) for b in batches])
    model.set_statistics(features, np.concatenate([np.asarray(b.image) for b in batches]))
