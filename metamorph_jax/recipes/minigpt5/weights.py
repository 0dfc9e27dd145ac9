"""What a MiniGPT-5 model starts from: the weights of its parts, or of all of it."""

from collections.abc import Sequence

from metamorph_jax.convert import clip_text, hf, load, specs, stable_diffusion, start
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.recipes.minigpt5.config import Config
from metamorph_jax.recipes.minigpt5.model import MiniGPT5
from metamorph_jax.recipes.minigpt5.published import load_whole
from metamorph_jax.types import Batch


def load_pretrained(model: MiniGPT5, cfg: Config) -> None:
    """Fills the model, in place, with the weights that the config names.

    Raises:
        ConfigError: what lies beside the weights says other things than the config.
    """
    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
    elif cfg.weights:
        load_whole(model, cfg, hf.find(cfg.weights))
    else:
        start.load_llm(model.llm, cfg.llm, cfg.llm_weights)
        load_vision(model.vision, cfg.vision)
        load_stable_diffusion(model, cfg)


def load_stable_diffusion(model: MiniGPT5, cfg: Config) -> None:
    """Fills UNet, autoencoder and, if there is a caption loss, the text encoder."""
    if cfg.sd_weights == specs.RANDOM:
        return
    decoder = model.decoder
    stable_diffusion.load_parts(cfg.sd_weights, decoder.cfg.schedule, decoder.denoiser, decoder.vae)
    if model.text_encoder is not None:
        tensors = hf.Tensors(hf.find(cfg.sd_weights) / "text_encoder")
        clip_text.load_clip_text(model.text_encoder, tensors)


def initialize(model: MiniGPT5, batches: Sequence[Batch]) -> None:
    """Before the first step: standardises the pixels of a decoder without autoencoder."""
    if not model.cfg.weights:
        model.decoder.set_statistics_of(batches)
