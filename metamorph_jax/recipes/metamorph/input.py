"""What a MetaMorph model reads: batches from data files, by way of feature caches."""

import dataclasses
import functools

from metamorph_jax.convert import vision
from metamorph_jax.data import pipeline
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.data.interleave import AfterSupervisedStart
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.metamorph.config import Config
from metamorph_jax.recipes.metamorph.published import load_tokenizer, markers
from metamorph_jax.recipes.metamorph.sources import KINDS
from metamorph_jax.types import Batch


def input_spec(cfg: Config, read: bool = True) -> InputSpec:
    """What the model decides about its input.

    Raises:
        ConfigError: if max_visual_targets leaves no room for a single image.
    """
    spec = vision.input_spec(cfg.vision, read)
    P = spec.views.tokens
    if 0 < cfg.max_visual_targets < P:
        raise ConfigError(
            f"config.model.max_visual_targets is {cfg.max_visual_targets}, but an image has "
            f"{P} visual tokens to predict: set it to {P} or more, or to 0 for no limit"
        )
    rule = AfterSupervisedStart(*markers(cfg).before)
    return dataclasses.replace(spec, predicted=rule, visual_targets=cfg.max_visual_targets)


def open_data(data: DataConfig, cfg: Config, shard: Shard) -> PackedIterator:
    """The batches of one shard; the feature cache is filled first with what is missing in it.

    Raises:
        ConfigError: features of a tower that is trained are to be cached.
    """
    vision.check_cache(data.cache.features, cfg.train_tower)
    spec, sources = input_spec(cfg), pipeline.open_sources(data, KINDS)
    if data.cache.features and spec.tower:
        tower = functools.partial(vision.feature_function, cfg.vision)
        pipeline.fill_feature_cache(data, spec, sources, tower)
    vision.report_changes(data.images, cfg.vision)
    chat = Chat.of(load_tokenizer(cfg), data.row, markers(cfg))
    return pipeline.make_pipeline(data, spec, chat, sources, shard)


def batch_spec(data: DataConfig, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the configs alone."""
    return pipeline.batch_spec(data, input_spec(cfg, read=False), rows)
