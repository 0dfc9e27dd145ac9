"""What a MetaMorph model reads: batches from data files, by way of feature caches."""

import dataclasses

import jax
import jax.numpy as jnp

from metamorph_jax.data import pipeline
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.metamorph.config import Config, llm_config
from metamorph_jax.recipes.metamorph.weights import load_tokenizer
from metamorph_jax.types import Batch, Images


def complete_data_config(data_cfg, cfg: Config):
    """The data config with all that the model decides: sizes, pixel statistics, feature names.

    Raises:
        ConfigError: if max_visual_targets leaves no room for a single image.
    """
    tower, (P, C) = cfg.vision.vit, cfg.vision.feature_shape
    if 0 < cfg.max_visual_targets < P:
        raise ConfigError(
            f"config.model.max_visual_targets is {cfg.max_visual_targets}, but an image has "
            f"{P} visual tokens to predict: set it to {P} or more, "
            "or to 0 for no limit"
        )
    changes = {
        "tokens_per_image": P,
        "feature_width": C,
        "visual_targets_per_row": cfg.max_visual_targets,
    }
    if tower is not None:
        changes |= {"image_size": tower.size, "image_mean": tower.mean, "image_std": tower.std}
        changes["tower"] = data_cfg.tower or cfg.vision.identity
    return dataclasses.replace(data_cfg, **changes)


def fill_feature_cache(data_cfg, cfg: Config, batch_size: int = 32) -> dict[str, int]:
    """Runs the tower over all images of a data set that the cache lacks.

    Returns:
        How many images could not be read, by reason.
    """
    from metamorph_jax.convert.vision import feature_function
    from metamorph_jax.data import cache
    from metamorph_jax.data.check import all_refs

    data_cfg = complete_data_config(data_cfg, cfg)
    refs = all_refs(data_cfg, load_tokenizer(cfg))
    spec, preprocess = data_cfg.feature_spec, data_cfg.preprocess
    compute = feature_function(cfg.vision)
    _, bad = cache.build(
        data_cfg.feature_cache, spec, refs, preprocess, compute, batch_size,
        max_pixels=data_cfg.max_pixels,
    )  # fmt: skip
    return dict(bad)


def open_data(data: pipeline.DataConfig, cfg: Config, shard: Shard) -> "Data":
    """The batches of one shard; the feature cache is filled first with what is missing in it."""
    from metamorph_jax.data.chat import Chat

    data = complete_data_config(dataclasses.replace(data, batch_size=shard.rows), cfg)
    if data.feature_cache and cfg.vision.tower != "none":
        fill_feature_cache(data, cfg)
    llm, tokenizer = llm_config(cfg), load_tokenizer(cfg)
    if len(tokenizer) > llm.tokens:  # it may know the added tokens
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} ids, the language model {llm.tokens}: set "
            "config.model.tokenizer, or vocab_size in config.model.llm_options"
        )
    start = llm.vocab_size
    chat = Chat(
        tokenizer,
        data.template,
        data.system,
        data.single_bos,
        image_start=start,
        image_end=start + 1,
    )
    batches = pipeline.make_pipeline(
        data,
        chat.tokenizer,
        process_index=shard.index,
        process_count=shard.count,
        chat=chat,
    )
    return Data(batches)


def batch_spec(data: pipeline.DataConfig, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the configs alone."""
    tower = cfg.vision.vit
    line = jax.ShapeDtypeStruct((rows, data.length), jnp.int32)
    views = (rows, data.images_per_row)
    cached = tower is None or data.feature_cache
    features = jax.ShapeDtypeStruct((*views, *cfg.vision.feature_shape), jnp.float32)
    images = Images(
        valid=jax.ShapeDtypeStruct(views, bool),
        start=jax.ShapeDtypeStruct(views, jnp.int32),
        pixels=None
        if cached
        else jax.ShapeDtypeStruct((*views, tower.size, tower.size, 3), jnp.uint8),
        features=features if cached else None,
    )
    return Batch(
        *7 * (line,),
        images=images,
        turns=line if data.independent_turns else None,
        source_names=pipeline.source_names(data),
    )


class Data:
    """An iterator of batches as the train loop wants it."""

    def __init__(self, batches):
        self._batches, self.sources = batches, batches.source_names

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self._batches.counts)

    def sample_names(self):
        """A function that names the samples of the batch that came last, for each of its rows."""
        rows, stream = self._batches.last_rows, self._batches._stream
        return lambda: [[stream.name(n) for n in row] for row in rows]

    def get_state(self) -> dict:
        return self._batches.get_state()

    def set_state(self, state: dict) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._batches.close()
