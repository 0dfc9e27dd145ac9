"""What a LLaVA model starts from: pretrained weights, and a connector at the right scale."""

from collections.abc import Sequence

from metamorph_jax.convert import hf, load, specs, start
from metamorph_jax.convert.peft import load_peft
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.connectors.mlp import calibrate
from metamorph_jax.models.vision.encoder import features_of
from metamorph_jax.nn import quantized
from metamorph_jax.recipes.llava import published
from metamorph_jax.recipes.llava.config import Config
from metamorph_jax.recipes.llava.model import Llava
from metamorph_jax.recipes.llava.projectors import load_beside_adapters, load_connector
from metamorph_jax.types import Batch


def load_pretrained(model: Llava, cfg: Config) -> None:
    """Fills the model, in place, with the weights that the config names."""
    whole = cfg.weights.startswith(load.WORKDIR)
    known = bool(cfg.weights) or cfg.llm_weights != specs.RANDOM
    with quantized.unpacked(model, empty=known and not whole):
        _fill(model, cfg)
    if cfg.lora is not None and cfg.lora.weights and model.cfg.lora == cfg.lora:
        load_peft(model.llm, cfg.lora.weights)
        load_beside_adapters(model, hf.find(cfg.lora.weights))


def _fill(model: Llava, cfg: Config) -> None:
    if cfg.weights.startswith(load.WORKDIR):
        start.from_earlier_stage(model, cfg.vision, cfg.weights)
        return
    if cfg.weights:
        published.load_whole(model, cfg, hf.find(cfg.weights))
        return
    start.load_llm(model.llm, cfg.llm, cfg.llm_weights)
    load_vision(model.vision, cfg.vision)
    if cfg.connector_weights:
        load_connector(model, cfg.connector_weights)


def initialize(model: Llava, batches: Sequence[Batch]) -> None:
    """Before the first step: fits the connector's start to the images of these batches, if the
    config names no connector to start from."""
    cfg = model.cfg
    if cfg.weights or cfg.connector_weights or (cfg.lora is not None and cfg.lora.weights):
        return
    scale = model.llm.embed_tokens.embedding[...].std()
    calibrate(model.connector, features_of(model, batches), scale)
