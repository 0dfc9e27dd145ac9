"""What a MetaMorph model reads: batches from data files, by way of feature caches."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.data import pipeline
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.reduce import TokenReducer, normalize_features
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.metamorph.config import Config, llm_config, reduce_config, tower_config
from metamorph_jax.recipes.metamorph.weights import load_tokenizer, load_tower
from metamorph_jax.types import Batch, Images


def complete_data_config(data_cfg, cfg: Config):
    """The data config with all that the model decides: sizes, pixel statistics, feature names.

    Raises:
        ConfigError: if max_visual_targets leaves no room for a single picture.
    """
    tower, reduce = tower_config(cfg), reduce_config(cfg)
    if 0 < cfg.max_visual_targets < reduce.tokens_out:
        raise ConfigError(
            f"config.model.max_visual_targets is {cfg.max_visual_targets}, but a picture has "
            f"{reduce.tokens_out} visual tokens to predict: set it to {reduce.tokens_out} or more, "
            "or to 0 for no limit"
        )
    changes = {
        "tokens_per_image": reduce.tokens_out,
        "feature_width": reduce.width_out,
        "visual_targets_per_row": cfg.max_visual_targets,
    }
    if tower is not None:
        changes |= {"image_size": tower.size, "image_mean": tower.mean, "image_std": tower.std}
        made_by = {
            **dataclasses.asdict(tower),
            **dataclasses.asdict(reduce),
            "weights": cfg.tower_weights,
            "normalize": cfg.normalize_vision,
            "softmax": cfg.apply_softmax,
        }
        del made_by["remat"]  # changes no feature
        changes["tower"] = data_cfg.tower or json.dumps(made_by, sort_keys=True)
    return dataclasses.replace(data_cfg, **changes)


def feature_function(cfg: Config):
    """uint8[n, h, w, 3] -> float32[n, P, C] by the config's tower alone, for feature caches."""
    tower = vit.ViT(tower_config(cfg), rngs=nnx.Rngs(0))
    if cfg.tower_weights != "random":
        load_tower(tower, cfg.tower_weights)
    reducer = TokenReducer(reduce_config(cfg), rngs=nnx.Rngs(0))
    graph, weights = nnx.split((tower, reducer))

    @jax.jit
    def compute(weights, pixels):
        tower, reducer = nnx.merge(graph, weights)
        x = reducer(tower(pixels))
        return normalize_features(x, cfg.normalize_vision, cfg.apply_softmax)

    return lambda pixels: compute(weights, pixels)


def fill_feature_cache(data_cfg, cfg: Config, batch_size: int = 32) -> dict[str, int]:
    """Runs the tower over all pictures of a data set that the cache lacks.

    Returns:
        How many pictures could not be read, by reason.
    """
    from metamorph_jax.data import cache
    from metamorph_jax.data.check import all_refs

    data_cfg = complete_data_config(data_cfg, cfg)
    refs = all_refs(data_cfg, load_tokenizer(cfg))
    spec, preprocess = data_cfg.feature_spec, data_cfg.preprocess
    compute = feature_function(cfg)
    _, bad = cache.build(
        data_cfg.feature_cache, spec, refs, preprocess, compute, batch_size,
        max_pixels=data_cfg.max_pixels,
    )  # fmt: skip
    return dict(bad)


def open_data(data: pipeline.DataConfig, cfg: Config, shard: Shard) -> "Data":
    """The batches of one shard; the feature cache is filled first with what is missing in it."""
    from metamorph_jax.data.chat import Chat

    data = complete_data_config(dataclasses.replace(data, batch_size=shard.rows), cfg)
    if data.feature_cache and cfg.tower != "none":
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
    tower, reduce = tower_config(cfg), reduce_config(cfg)
    line = jax.ShapeDtypeStruct((rows, data.length), jnp.int32)
    views = (rows, data.images_per_row)
    cached = tower is None or data.feature_cache
    width = (reduce.tokens_out, reduce.width_out)
    images = Images(
        valid=jax.ShapeDtypeStruct(views, bool),
        start=jax.ShapeDtypeStruct(views, jnp.int32),
        pixels=None
        if cached
        else jax.ShapeDtypeStruct((*views, tower.size, tower.size, 3), jnp.uint8),
        features=jax.ShapeDtypeStruct((*views, *width), jnp.float32) if cached else None,
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
