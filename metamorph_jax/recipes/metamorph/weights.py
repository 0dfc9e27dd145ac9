"""What a MetaMorph model starts from: pretrained weights, and a connector at the right scale."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.convert import agree, hf, load, specs
from metamorph_jax.convert.llama import disagreements, load_llama
from metamorph_jax.convert.peft import load_peft
from metamorph_jax.convert.vision import load_vision
from metamorph_jax.models.build import is_open
from metamorph_jax.models.llm import llama
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


def calibrate_connector(model: MetaMorph, features: np.ndarray) -> None:
    """Starts the connector from the statistics of the features; in place.

    Unit-norm features of one tower share a large mean and have small deviations, from which a fresh
    connector makes nearly the same embedding for every image, at a scale other than that of text.
    Here the first linear takes whitened features (the whitening is folded into its weights), and
    the outputs of the last one get mean 0 and the standard deviation of the token embeddings.

    Args:
        features: float[N, C] or [N, P, C], a sample of what the connector will read.
    """
    linears = model.connector.linears
    if not len(linears):
        return
    x = jnp.asarray(features, jnp.float32).reshape(-1, np.shape(features)[-1])
    mean, std = x.mean(0), x.std(0)
    std = jnp.maximum(std, 1e-3 * std.mean() + 1e-12)  # a dead channel must not explode
    first, last = linears[0], linears[len(linears) - 1]
    kernel = first.kernel[...] / std[:, None]
    first.bias[...] = first.bias[...] - mean @ kernel
    first.kernel[...] = kernel
    out = model.connector(x).astype(jnp.float32)
    scale = model.llm.embed_tokens.embedding[...].std() / out.std(0).mean()
    last.kernel[...] = last.kernel[...] * scale
    last.bias[...] = (last.bias[...] - out.mean(0)) * scale


def initialize(model: MetaMorph, batches: Sequence[Batch]) -> None:
    """Before the first step: fits the connector's start to the images of these batches."""
    graph, weights = nnx.split(model)
    compute = jax.jit(lambda weights, batch: nnx.merge(graph, weights).batch_features(batch))
    found = []
    for batch in batches:
        x = np.asarray(compute(weights, batch))
        x = x.reshape(*batch.images.valid.shape, -1, x.shape[-1])
        found.append(x[np.asarray(batch.images.valid)].reshape(-1, x.shape[-1]))
    features = np.concatenate(found)
    if len(features):
        calibrate_connector(model, features)
