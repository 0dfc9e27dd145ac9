"""What a decoder trains on: pairs of images and their visual tokens."""

import functools

import jax
import jax.numpy as jnp

from metamorph_jax.convert.vision import feature_function, input_spec, report_changes
from metamorph_jax.data import images, pipeline
from metamorph_jax.data.decoder_pairs import DecoderPairs
from metamorph_jax.data.predicted import Predicted
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.decoder.config import Config, Data
from metamorph_jax.types import DecoderBatch

KINDS: dict = {}  # no source kinds of its own


def open_data(data: Data, cfg: Config, shard: Shard) -> DecoderPairs:
    """An iterator of `DecoderBatch`; a feature cache is filled first with what is missing in it.

    Raises:
        ConfigError: there is neither a tower nor a feature cache.
    """
    cached = bool(data.cache.features)
    if not (cfg.with_tower or cached):
        raise ConfigError("without config.model.with_tower, config.data.cache.features must be set")
    spec, sources = input_spec(cfg.vision), pipeline.open_sources(data, KINDS)
    if cached and spec.tower:
        tower = functools.partial(feature_function, cfg.vision)
        pipeline.fill_feature_cache(data, spec, sources, tower)
    report_changes(data.images, cfg.vision)
    side = cfg.decoder.image_side
    pairs = DecoderPairs(
        list(pipeline.all_refs(data, sources)),
        images.Preprocess(side, "crop", side, "bilinear"),
        shard,
        data.order.seed,
        pipeline.open_cache(data, spec) if cached else None,
        None if cached else data.images.change(spec.views).preprocess,
        int(data.memory_gib * 2**30),
        data.reading.threads,
        predicted=Predicted(data.predicted) if data.predicted else None,
        predicted_share=data.predicted_share,
        reading=data.images,
    )
    pairs.sources, pairs.skipped = pipeline.source_names(data), pairs.counts
    return pairs


def batch_spec(data: Data, cfg: Config, rows: int) -> DecoderBatch:
    """Shapes of a batch of so many images, from the configs alone."""
    spec, cached = input_spec(cfg.vision, read=False), bool(data.cache.features)
    side, seen = cfg.decoder.image_side, data.images.change(spec.views).preprocess.size
    return DecoderBatch(
        jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rows, *spec.feature_shape), jnp.float32) if cached else None,
        None if cached else jax.ShapeDtypeStruct((rows, seen, seen, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rows,), bool),
    )
