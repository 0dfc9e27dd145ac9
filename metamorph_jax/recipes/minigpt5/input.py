"""What a MiniGPT-5 model reads: batches from data files, by way of caches."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert import blip2, hf, specs, stable_diffusion, vision
from metamorph_jax.convert.load import WORKDIR
from metamorph_jax.data import pipeline, tokenizers
from metamorph_jax.data.caption_ids import CaptionIds
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import DataConfig, DrawingSpec, InputSpec, LatentSpec
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import in_answers
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.data.views import Single
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.build import build
from metamorph_jax.models.connectors.qformer import QFormer
from metamorph_jax.models.vision.encoder import VisionEncoder
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.minigpt5 import sources
from metamorph_jax.recipes.minigpt5.config import (
    Config,
    added_names,
    is_trained_part,
    llm_config,
    voken_ids,
)
from metamorph_jax.types import Batch

_WHITE = (1.0, 1.0, 1.0)


def load_tokenizer(cfg: Config):
    """The tokenizer that the config names, or that of its weights; files of what was trained have
    none.

    Raises:
        ConfigError: it has ids that the model's table doesn't have.
    """
    named = [s for s in (cfg.tokenizer, cfg.weights) if s and not is_trained_part(s)]
    named = [s for s in named if not s.startswith(WORKDIR)]
    found = specs.tokenizer((*named, cfg.llm_weights)[0])
    tokenizers.check_ids(found, llm_config(cfg).vocab_size, added_names(cfg))
    return found


def input_spec(cfg: Config, read: bool = True) -> InputSpec:
    """What the model decides about its input: one view per image that is read; images of answers
    are drawn, and vokens stand in their places.

    Unless the tower's weights say otherwise, an image that is read is cut to a square. One that is
    drawn is padded with white.

    Args:
        read: see `vision.input_spec`.
    """
    spec = vision.input_spec(cfg.vision, read)
    inside, process = cfg.qformer.resampler, spec.views.preprocess
    if not read or specs.processor_fields(cfg.vision.weights) is None:
        process = dataclasses.replace(process, mode="crop", resize=None, resample="bilinear")
    identity = f"{spec.tower} | {cfg.qformer} {cfg.qformer_weights}"
    return dataclasses.replace(
        spec,
        views=Single(inside.queries, process),
        feature_width=inside.width,
        tower=identity,
        drawings=_drawings(cfg),
    )


def _drawings(cfg: Config) -> DrawingSpec:
    """Images to draw, with captions if there is a loss for them; `with_captions` reads these."""
    side, latents = cfg.decoder.image_side, None
    if cfg.decoder.vae is not None:
        vae = dataclasses.replace(cfg.decoder.vae, dtype="float32")
        identity = f"{vae} {cfg.sd_weights}"
        latents = LatentSpec(cfg.decoder.sample_shape, vae.scaling_factor, identity)
    captions, length = None, 0
    if cfg.learns_captions and (cfg.caption_tokenizer or cfg.sd_weights != specs.RANDOM):
        length = cfg.text_encoder.max_position_embeddings
        captions = CaptionIds(None, length, cfg.caption_pad)
    return DrawingSpec(
        cfg.max_drawings,
        in_answers,
        Preprocess(side, "pad", resample="bilinear", mean=_WHITE),
        ids=voken_ids(cfg),
        unlearnt=tuple(range(1, cfg.unsupervised_tail + 1)),
        caption=captions,
        caption_length=length,
        latents=latents,
    )


def with_captions(spec: InputSpec, cfg: Config) -> InputSpec:
    """The spec with the tokenizer of captions, if it has captions.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    drawings = spec.drawings
    if drawings.caption is None:
        return spec
    caption = dataclasses.replace(drawings.caption, tokenizer=_caption_tokenizer(cfg))
    return dataclasses.replace(spec, drawings=dataclasses.replace(drawings, caption=caption))


def _caption_tokenizer(cfg: Config):
    """The tokenizer of the text encoder."""
    if cfg.caption_tokenizer:
        return specs.tokenizer(cfg.caption_tokenizer)
    folder = hf.find(cfg.sd_weights) / "tokenizer"
    if not folder.is_dir():
        raise ConfigError(
            f"{cfg.sd_weights} has no tokenizer/, which the caption loss needs: name one in "
            "config.model.caption_tokenizer, or set config.model.caption_coef to 0"
        )
    return tokenizers.load(folder)


def open_data(data: DataConfig, cfg: Config, shard: Shard) -> PackedIterator:
    """The batches of one shard; caches are filled first with what is missing in them.

    Raises:
        ConfigError: a cache is asked for of a part that is trained, or whose weights are random; or
            captions are to be learnt without a tokenizer.
    """
    if data.cache.features and cfg.train_connector:
        raise ConfigError(
            "config.model.train_connector has no use for config.data.cache.features, which holds "
            'what a frozen Q-Former gives: set the folder to ""'
        )
    spec = with_captions(input_spec(cfg), cfg)
    chat = Chat.of(load_tokenizer(cfg), data.row)
    found = pipeline.open_sources(data, sources.kinds(chat.encode))
    if data.cache.features:
        pipeline.fill_feature_cache(data, spec, found, lambda: feature_function(cfg))
    if data.cache.drawings:
        pipeline.fill_drawing_cache(data, spec, found, lambda: moment_function(cfg))
    vision.report_changes(data.images, cfg.vision)
    return pipeline.make_pipeline(data, spec, chat, found, shard)


def batch_spec(data: DataConfig, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the configs alone."""
    return pipeline.batch_spec(data, input_spec(cfg, read=False), rows)


# ---- what caches hold


class _Reading(nnx.Module):
    """Tower and Q-Former, by the names that they have in the whole model."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.vision = VisionEncoder(cfg.vision, rngs=rngs)
        self.connector = QFormer(cfg.qformer, llm_config(cfg).width, rngs=rngs)

    def __call__(self, pixels):
        return self.connector.features(self.vision(pixels))


def feature_function(cfg: Config) -> Callable:
    """pixels uint8[N, h, w, 3] -> float32[N, P, C] what tower and Q-Former make of images,
    compiled, for filling caches. It runs on the first device of this process.

    Raises:
        ConfigError: their weights are random.
    """
    random = [
        f"config.model.{name}"
        for name, spec in (("vision.weights", cfg.vision.weights),
                           ("qformer_weights", cfg.qformer_weights))
        if spec == specs.RANDOM
    ]  # fmt: skip
    if random:
        raise ConfigError(
            f"config.data.cache.features holds what tower and Q-Former make of images: name the "
            f'weights in {" and ".join(random)}, or set the folder to ""'
        )

    def fill(model: _Reading) -> None:
        vision.load_vision(model.vision, cfg.vision)
        for spec in cfg.qformer_weights.split(","):
            tensors = hf.Tensors(hf.find(spec))
            if blip2.QUERIES in blip2.plainly(tensors):  # the other one is of the linear after it
                blip2.load_qformer(model.connector, tensors, proj=False)

    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    graph, weights = nnx.split(build(lambda rngs: _Reading(cfg, rngs=rngs), mesh, 0, fill=fill))
    compute = jax.jit(lambda weights, pixels: nnx.merge(graph, weights)(pixels))
    return lambda pixels: compute(weights, pixels)


def moment_function(cfg: Config) -> Callable:
    """See `stable_diffusion.moment_function`.

    Raises:
        ConfigError: there is no autoencoder, or its weights are random.
    """
    if cfg.decoder.vae is None or cfg.sd_weights == specs.RANDOM:
        raise ConfigError(
            "config.data.cache.drawings needs an autoencoder whose weights config.model.sd_weights "
            'names: set the folder to ""'
        )
    return stable_diffusion.moment_function(cfg.sd_weights, cfg.decoder.vae)
