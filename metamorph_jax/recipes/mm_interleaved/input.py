"""What an MM-Interleaved model reads: batches from data files."""

import dataclasses

from metamorph_jax.convert import specs, vision
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data import pipeline, tokenizers
from metamorph_jax.data.chat import Chat, Markers
from metamorph_jax.data.config import DataConfig, DrawingSpec, InputSpec
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import AfterSupervisedStart
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.mm_interleaved.config import PLACEHOLDER, SOI, Config, llm_config
from metamorph_jax.recipes.mm_interleaved.sources import KINDS
from metamorph_jax.types import Batch


def markers(cfg: Config) -> Markers:
    """`soi` before an image, nothing after it."""
    return Markers(before=(llm_config(cfg).vocab_size,))


def load_tokenizer(cfg: Config):
    """The tokenizer that the config names, or that of its weights.

    Raises:
        ConfigError: it has ids that the model's table doesn't have.
    """
    whole = "" if cfg.weights.startswith(WORKDIR) else cfg.weights
    found = specs.tokenizer(cfg.tokenizer or whole or cfg.llm_weights)
    tokenizers.check_ids(found, llm_config(cfg).vocab_size, [SOI, PLACEHOLDER])
    return found


def input_spec(cfg: Config, read: bool = True) -> InputSpec:
    """What the model decides about its input: one view per image, and which images are drawn, if
    any are.

    Args:
        read: see `vision.input_spec`.
    """
    spec = vision.input_spec(cfg.vision.encoder, read)
    views = dataclasses.replace(spec.views, tokens=cfg.vision.tokens)
    spec = dataclasses.replace(spec, views=views)
    if not cfg.max_drawings:
        return spec
    side, (start,) = cfg.decoder.image_side, markers(cfg).before
    drawings = DrawingSpec(cfg.max_drawings, AfterSupervisedStart(start), Preprocess(side, "halve"))
    return dataclasses.replace(spec, drawings=drawings)


def open_data(data: DataConfig, cfg: Config, shard: Shard) -> PackedIterator:
    """The batches of one shard.

    Raises:
        ConfigError: a feature cache is asked for, or rows whose documents the model can't tell
            apart.
    """
    if data.cache.features:
        raise ConfigError(
            "config.data.cache.features holds what a tower gives on its own, but here an adapter "
            'works inside of it: set the folder to ""'
        )
    if data.row.crossing and cfg.document_bos < 0:
        raise ConfigError(
            "config.data.row.crossing puts several documents into a segment: set "
            "config.model.document_bos to the id of the tokenizer's BOS, at which they begin"
        )
    vision.report_changes(data.images, cfg.vision.encoder)
    chat = Chat.of(load_tokenizer(cfg), data.row, markers(cfg))
    sources = pipeline.open_sources(data, KINDS)
    return pipeline.make_pipeline(data, input_spec(cfg), chat, sources, shard)


def batch_spec(data: DataConfig, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the configs alone."""
    return pipeline.batch_spec(data, input_spec(cfg, read=False), rows)
