"""What a MiniGPT-5 model reads: batches from data files."""

import dataclasses

from metamorph_jax.convert import specs, vision
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data import pipeline, tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, DrawingSpec, InputSpec
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import in_answers
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.data.views import Single
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.minigpt5.config import Config, added_names, llm_config, voken_ids
from metamorph_jax.recipes.minigpt5.sources import KINDS
from metamorph_jax.types import Batch


def load_tokenizer(cfg: Config):
    """The tokenizer that the config names, or that of its weights.

    Raises:
        ConfigError: it has ids that the model's table doesn't have.
    """
    whole = "" if cfg.weights.startswith(WORKDIR) else cfg.weights
    found = specs.tokenizer(cfg.tokenizer or whole or cfg.llm_weights)
    tokenizers.check_ids(found, llm_config(cfg).vocab_size, added_names(cfg))
    return found


def input_spec(cfg: Config, read: bool = True) -> InputSpec:
    """What the model decides about its input: one view per image that is read; images of answers
    are drawn, and vokens stand in their places.

    Args:
        read: see `vision.input_spec`.
    """
    spec = vision.input_spec(cfg.vision, read)
    inside = cfg.qformer.resampler
    drawings = DrawingSpec(
        cfg.max_drawings, in_answers, Preprocess(cfg.decoder.image_side, "pad"),
        ids=voken_ids(cfg), unlearnt=tuple(range(1, cfg.unsupervised_tail + 1)),
    )  # fmt: skip
    views = Single(inside.queries, spec.views.preprocess)
    return dataclasses.replace(spec, views=views, feature_width=inside.width, drawings=drawings)


def open_data(data: DataConfig, cfg: Config, shard: Shard) -> PackedIterator:
    """The batches of one shard.

    Raises:
        ConfigError: a cache is asked for what the connector gives, which is trained.
    """
    if data.cache.features and cfg.train_connector:
        raise ConfigError(
            "config.data.cache.features holds what the connector makes of images, but "
            'config.model.train_connector trains it: set the folder to ""'
        )
    vision.report_changes(data.images, cfg.vision)
    chat = Chat.of(load_tokenizer(cfg), data.row)
    sources = pipeline.open_sources(data, KINDS)
    return pipeline.make_pipeline(data, input_spec(cfg), chat, sources, shard)


def batch_spec(data: DataConfig, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the configs alone."""
    return pipeline.batch_spec(data, input_spec(cfg, read=False), rows)
