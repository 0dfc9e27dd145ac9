"""What a MetaMorph model starts from: pretrained weights, and a connector at the right scale."""

from collections.abc import Sequence

from metamorph_jax.convert import hf, load, specs, start
from metamorph_jax.convert.peft import load_peft
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.connectors.mlp import calibrate
from metamorph_jax.models.vision.encoder import features_of
from metamorph_jax.nn import quantized
from metamorph_jax.recipes.metamorph.config import Config
from metamorph_jax.recipes.metamorph.model import MetaMorph
from metamorph_jax.recipes.metamorph.published import check_config, load_metamorph, read
from metamorph_jax.types import Batch


def load_pretrained(model: MetaMorph, cfg: Config) -> None:
    """Fills the model, in place, with the weights that the config names."""
    whole = cfg.weights.startswith(load.WORKDIR)
    known = bool(cfg.weights) or cfg.llm_weights != specs.RANDOM
    with quantized.unpacked(model, empty=known and not whole):
        _fill(model, cfg)
    if cfg.lora is not None and cfg.lora.weights and model.cfg.lora == cfg.lora:
        load_peft(model.llm, cfg.lora.weights)


def _fill(model: MetaMorph, cfg: Config) -> None:
    if cfg.weights.startswith(load.WORKDIR):
        start.from_earlier_stage(model, cfg.vision, cfg.weights)
        return
    if cfg.weights:
        folder = hf.find(cfg.weights)
        check_config(cfg, folder)
        load_metamorph(model, read(folder))
        return
    start.load_llm(model.llm, cfg.llm, cfg.llm_weights)
    load_vision(model.vision, cfg.vision)


def initialize(model: MetaMorph, batches: Sequence[Batch]) -> None:
    """Before the first step: fits the connector's start to the images of these batches."""
    scale = model.llm.embed_tokens.embedding[...].std()
    calibrate(model.connector, features_of(model, batches), scale)
