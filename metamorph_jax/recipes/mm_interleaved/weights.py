"""What an MM-Interleaved model starts from: the weights of its parts, or of all of it."""

from collections.abc import Sequence

import jax

from metamorph_jax.convert import hf, load, names, specs, stable_diffusion, start
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipes.mm_interleaved.config import Config
from metamorph_jax.recipes.mm_interleaved.model import MMInterleaved, added_rows
from metamorph_jax.recipes.mm_interleaved.published import load_whole
from metamorph_jax.types import Batch


def load_pretrained(model: MMInterleaved, cfg: Config) -> None:
    """Fills the model, in place, with the weights that the config names.

    Raises:
        ConfigError: what lies beside the weights says other things than the config.
    """
    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
    elif cfg.weights:
        load_whole(model, cfg, hf.find(cfg.weights))
    else:
        # Rows of added tokens start as `create` makes them, not as the mean of the others.
        with names.passing_over(added_rows(model.llm)):
            start.load_llm(model.llm, cfg.llm, cfg.llm_weights)
        load_vision(model.vision.adapter, cfg.vision.encoder)
        load_decoder(model, cfg)


def load_decoder(model: MMInterleaved, cfg: Config) -> None:
    """Fills UNet and autoencoder from `cfg.sd_weights`, and the null condition from the empty
    prompt; MMFS is left as it is."""
    if cfg.sd_weights == specs.RANDOM:
        return
    decoder = model.decoder
    stable_diffusion.load_parts(
        cfg.sd_weights, decoder.cfg.schedule, decoder.denoiser.unet, decoder.vae
    )
    null = stable_diffusion.empty_prompt(cfg.sd_weights)
    if null is None:
        return
    leaf = model.context.null
    if leaf.shape != (1, *null.shape):
        raise ConfigError(
            f"the text encoder of {cfg.sd_weights} gives {null.shape[0]} tokens, {null.shape[1]} "
            f"wide, but config.model.context has {leaf.shape[1]} and {leaf.shape[2]}"
        )
    old = leaf.get_raw_value()
    leaf.set_raw_value(jax.device_put(null[None].astype(old.dtype), old.sharding))


def initialize(model: MMInterleaved, batches: Sequence[Batch]) -> None:
    """Before the first step: standardises the pixels of a decoder without autoencoder."""
    if not model.cfg.weights:
        model.decoder.set_statistics_of(batches)
