"""What a MetaMorph model starts from: pretrained weights, and a connector at the right scale."""

from collections.abc import Sequence

from metamorph_jax.convert import agree, hf, load, specs
from metamorph_jax.convert.llama import disagreements, load_llama
from metamorph_jax.convert.peft import load_peft
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.build import is_open
from metamorph_jax.models.connectors.mlp import calibrate
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision.encoder import features_of
from metamorph_jax.nn import quantized
from metamorph_jax.recipes.metamorph.config import Config
from metamorph_jax.recipes.metamorph.model import MetaMorph
from metamorph_jax.recipes.metamorph.published import check_config, load_metamorph, read
from metamorph_jax.types import Batch


def load_pretrained(model: MetaMorph, cfg: Config) -> None:
    """Fills the model, in place, with the weights that the config names."""
    whole = cfg.weights.startswith(load.WORKDIR)
    known = bool(cfg.weights) or cfg.llm_weights != "random"
    with quantized.unpacked(model, empty=known and not whole):
        _fill(model, cfg)
    if cfg.lora is not None and cfg.lora.weights and model.cfg.lora == cfg.lora:
        load_peft(model.llm, cfg.lora.weights)


def _fill(model: MetaMorph, cfg: Config) -> None:
    if cfg.weights.startswith(load.WORKDIR):
        load.load_workdir(model, cfg.weights.removeprefix(load.WORKDIR))
        if model.vision.tower is not None and is_open(model.vision.tower):
            load_vision(model.vision, cfg.vision)  # the earlier stage had its features cached
        return
    if cfg.weights:
        folder = hf.find(cfg.weights)
        check_config(cfg, folder)
        load_metamorph(model, read(folder))
        return
    if cfg.llm_weights != "random":
        if cfg.llm != "auto" and specs.has_fields(cfg.llm_weights):
            agree.require(
                cfg.llm_weights,
                lambda: disagreements(model.llm.cfg, specs.llm_fields(cfg.llm_weights)),
                advice='config.model.llm="auto" follows the checkpoint',
            )
        load_llama(model.llm, specs.llm_tensors(cfg.llm_weights))
        if not is_open(model.llm.embed_tokens):  # else an earlier stage has trained the table
            llama.init_added_tokens(model.llm)
    load_vision(model.vision, cfg.vision)


def initialize(model: MetaMorph, batches: Sequence[Batch]) -> None:
    """Before the first step: fits the connector's start to the images of these batches."""
    scale = model.llm.embed_tokens.embedding[...].std()
    calibrate(model.connector, features_of(model, batches), scale)
