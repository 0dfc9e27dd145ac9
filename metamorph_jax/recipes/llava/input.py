"""What a LLaVA model reads: batches from data files, by way of feature caches."""

import dataclasses
import functools
import sys

from metamorph_jax import files
from metamorph_jax.convert import hf, specs, vision
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data import pipeline, tokenizers
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.data.published_templates import template_of
from metamorph_jax.data.views import AnyRes, Single, Views
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.vision.encoder import VisionConfig, VisionEncoder
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.llava import keys
from metamorph_jax.recipes.llava.config import Config, added_names, llm_config, markers
from metamorph_jax.recipes.llava.fields import IMAGE
from metamorph_jax.recipes.llava.sources import KINDS
from metamorph_jax.types import Batch


def load_tokenizer(cfg: Config):
    """The tokenizer that the config names, or that of its weights.

    Raises:
        ConfigError: it has ids that the model's table doesn't have.
    """
    whole = "" if cfg.weights.startswith(WORKDIR) else cfg.weights
    found = specs.tokenizer(cfg.tokenizer or whole or cfg.llm_weights)
    llm, added = llm_config(cfg), added_names(cfg)
    ids = sorted((id, text) for text, id in found.get_vocab().items() if id >= llm.tokens)
    if cfg.image_token < 0 and ids and ids[0][1] == IMAGE:
        added += [text for _, text in ids]  # of transformers' processor; no text becomes these
    tokenizers.check_ids(found, llm.vocab_size, added)
    return found


def make_chat(cfg: Config, data: DataConfig) -> Chat:
    """How conversations are written: template, tokenizer, and what stands around an image.

    Raises:
        ConfigError: the template is "auto", but the weights are no published ones.
    """
    row = data.row
    if row.template == "auto":
        row = dataclasses.replace(row, template=_template(cfg))
    return Chat.of(load_tokenizer(cfg), row, markers(cfg))


def _template(cfg: Config) -> str:
    """The template that the published weights of `cfg` were trained with, which is also said."""
    if not cfg.weights or cfg.weights.startswith(WORKDIR):
        raise ConfigError(
            'config.data.row.template is "auto", which goes by the published weights of '
            f"config.model.weights, here {cfg.weights!r}: name a template"
        )
    fields = files.read_json(hf.find(cfg.weights) / "config.json")
    found = template_of(fields, cfg.weights)
    print(f"chat template of {cfg.weights}: {found}", file=sys.stderr, flush=True)
    return found


def input_spec(cfg: Config, read: bool = True) -> InputSpec:
    """What the model decides about its input.

    Args:
        read: see `vision.input_spec`.
    """
    spec = vision.input_spec(encoder_of(cfg), read)
    return dataclasses.replace(spec, views=_views(cfg, spec.views))


def encoder_of(cfg: Config) -> VisionConfig:
    """The config of the encoder. Its weights, and how images are prepared for them, are those of a
    whole checkpoint where there is one: towers of 1.6 were trained, and are no published ones."""
    whole = cfg.weights and not cfg.weights.startswith(WORKDIR)
    return dataclasses.replace(cfg.vision, weights=cfg.weights) if whole else cfg.vision


def load_tower(cfg: Config, encoder: VisionEncoder, changed: VisionConfig) -> None:
    """Fills the encoder of `encoder_of`, in place."""
    if changed == cfg.vision:
        return vision.load_vision(encoder, changed)
    own = None if cfg.vision.weights == specs.RANDOM else specs.tower_tensors(cfg.vision.weights)
    folder = hf.find(cfg.weights)
    tensors = keys.read(folder) if own is None else hf.Tensors(folder)
    keys.load_tower(encoder.tower, keys.plainly(tensors), own)


def _views(cfg: Config, single: Single) -> Views:
    process, P = single.preprocess, single.tokens
    if cfg.image_mode == "anyres":
        return AnyRes(P, process, cfg.grids, cfg.merge)
    if cfg.image_mode != "tower":
        process = dataclasses.replace(process, mode=cfg.image_mode, resize=None)
    return Single(P, process, newline=cfg.newline)


def open_data(data: DataConfig, cfg: Config, shard: Shard) -> PackedIterator:
    """The batches of one shard; the feature cache is filled first with what is missing in it.

    Raises:
        ConfigError: features of a tower that is trained are to be cached.
    """
    vision.check_cache(data.cache.features, cfg.train_tower)
    spec, sources = input_spec(cfg), pipeline.open_sources(data, KINDS)
    if data.cache.features and spec.tower:
        load = functools.partial(load_tower, cfg)
        tower = functools.partial(vision.feature_function, encoder_of(cfg), load)
        pipeline.fill_feature_cache(data, spec, sources, tower)
    vision.report_changes(data.images, encoder_of(cfg))
    return pipeline.make_pipeline(data, spec, make_chat(cfg, data), sources, shard)


def batch_spec(data: DataConfig, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the configs alone."""
    return pipeline.batch_spec(data, input_spec(cfg, read=False), rows)
