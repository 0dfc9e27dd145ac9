"""Vision encoders with the weights that their config names."""

from collections.abc import Callable

import jax
from flax import nnx

from metamorph_jax.convert import specs
from metamorph_jax.convert.vit import load_vit
from metamorph_jax.data.config import InputSpec
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.views import Single
from metamorph_jax.models.vision.encoder import VisionConfig, VisionEncoder


def load_vision(encoder: VisionEncoder, cfg: VisionConfig) -> None:
    """Fills the tower of an encoder in place from `cfg.weights`; "random" leaves it as it is.

    Raises:
        ValueError: with a list of all that doesn't fit.
    """
    if encoder.tower is not None and cfg.weights != specs.RANDOM:
        load_vit(encoder.tower, specs.tower_tensors(cfg.weights))


def feature_function(cfg: VisionConfig) -> Callable:
    """pixels uint8[N, h, w, 3] -> float32[N, P, C], compiled, for filling feature caches."""
    encoder = VisionEncoder(cfg, rngs=nnx.Rngs(0))
    load_vision(encoder, cfg)
    graph, weights = nnx.split(encoder)
    compute = jax.jit(lambda weights, pixels: nnx.merge(graph, weights)(pixels))
    return lambda pixels: compute(weights, pixels)


def input_spec(cfg: VisionConfig) -> InputSpec:
    """What the encoder decides about its input: one view per image, features and their identity."""
    tower, (tokens, width) = cfg.vit, cfg.feature_shape
    if tower is None:
        return InputSpec(Single(tokens), width)
    preprocess = Preprocess(tower.size, mean=tuple(tower.mean), std=tuple(tower.std))
    return InputSpec(Single(tokens, preprocess), width, cfg.identity)
