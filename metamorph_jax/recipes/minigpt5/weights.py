"""What a MiniGPT-5 model starts from: the weights of its parts, or of all of it."""

from collections.abc import Sequence

import jax.numpy as jnp

from metamorph_jax.convert import blip2, clip_text, hf, load, peft, specs, stable_diffusion, start
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.build import is_open
from metamorph_jax.models.llm import llama
from metamorph_jax.recipes.minigpt5.checkpoints import load_stages
from metamorph_jax.recipes.minigpt5.config import Config, is_trained_part
from metamorph_jax.recipes.minigpt5.model import MiniGPT5
from metamorph_jax.recipes.minigpt5.published import load_whole
from metamorph_jax.types import Batch


def load_pretrained(model: MiniGPT5, cfg: Config) -> None:
    """Fills the model, in place, with the weights that the config names: of its parts or of all of
    it, and over them with what was trained.

    Raises:
        ConfigError: what lies beside the weights says other things than the config, or a file is
            of another stage than the one that it is named for.
    """
    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
    elif cfg.weights and not is_trained_part(cfg.weights):
        load_whole(model, cfg, hf.find(cfg.weights))
    else:
        start.load_llm(model.llm, cfg.llm, cfg.llm_weights, cut=True)
        if cfg.old_rows_shrink != 1:
            shrink_old_rows(model.llm, cfg.old_rows_shrink)
        load_vision(model.vision, cfg.vision)
        load_connector(model, cfg)
        load_stable_diffusion(model, cfg)
    load_stages(model, cfg)
    if cfg.lora is not None and cfg.lora.weights and model.cfg.lora == cfg.lora:
        peft.load_peft(model.llm, cfg.lora.weights)


def load_connector(model: MiniGPT5, cfg: Config) -> None:
    """Fills what `cfg.qformer_weights` has: norm and Q-Former, the linear after them, or both."""
    if cfg.qformer_weights == specs.RANDOM:
        return
    for spec in cfg.qformer_weights.split(","):
        tensors = hf.Tensors(hf.find(spec))
        if blip2.QUERIES in blip2.plainly(tensors):
            whole = any(key.startswith(blip2.PROJ) for key in tensors)
            blip2.load_qformer(model.connector, tensors, whole)
        else:
            blip2.load_proj(model.connector, tensors)


def shrink_old_rows(llm: llama.Llama, factor: float) -> None:
    """Multiplies the tables, in place, but for the rows of added tokens; tables of shapes without
    values stay as they are."""
    tables = [llm.embed_tokens.embedding] + ([] if llm.cfg.tied else [llm.lm_head.kernel])
    for table in tables:
        if not is_open(table):
            value = table.get_raw_value()
            table.set_raw_value((value.astype(jnp.float32) * factor).astype(value.dtype))


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
