"""The MiniGPT-5 model: its parts put together, its losses, and what each stage trains."""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import flops, losses
from metamorph_jax.flops import Work
from metamorph_jax.models import lora
from metamorph_jax.models.connectors.qformer import QFormer
from metamorph_jax.models.diffusion import clip_text
from metamorph_jax.models.diffusion.clip_text import CLIPTextModel
from metamorph_jax.models.diffusion.decoder import DiffusionDecoder
from metamorph_jax.models.heads.mapper import Mapper
from metamorph_jax.models.interleave import gather_rows, place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision.encoder import VisionEncoder
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipes.minigpt5.config import Config, llm_config
from metamorph_jax.types import Batch, Conditioning, Drawings, Images


def _always(cfg: Config) -> list[str]:
    """What both stages train."""
    parts = [r"llm\.(embed_tokens|lm_head)\.added"]
    parts += [r"connector\..*"] if cfg.train_connector else []
    return parts + ([r"decoder\.denoiser\..*"] if cfg.train_denoiser else [])


def _uas_stage(cfg: Config) -> str:
    return "|".join([*_always(cfg), r"mapper\..*"])


def _mls_stage(cfg: Config) -> str:
    """Without an encoder-decoder, all of the mapper: nothing else of it would be trained."""
    whole = cfg.train_fc or cfg.mapper.kind != "transformer"
    parts = [*_always(cfg), r"mapper\..*" if whole else r"mapper\.(encoder|decoder)\..*"]
    parts += [r".*\.lora_[ab]"] if cfg.lora is not None else []
    parts += [r"llm\.prefix\..*"] if cfg.prefix is not None else []
    return "|".join(parts)


STAGES = {"uas": _uas_stage, "mls": _mls_stage}


class MiniGPT5(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llm = llm_config(cfg)
        self.vision = VisionEncoder(cfg.vision, rngs=rngs)
        self.connector = QFormer(cfg.qformer, llm.width, rngs=rngs)
        self.llm = llama.Llama(llm, rngs=rngs, prefix=cfg.prefix)
        self.mapper = Mapper(cfg.mapper, rngs=rngs)
        self.decoder = DiffusionDecoder(cfg.decoder, rngs=rngs)
        self.text_encoder = CLIPTextModel(cfg.text_encoder, rngs) if cfg.learns_captions else None

    @property
    def loss_weights(self) -> dict[str, float]:
        cfg = self.cfg
        found = {"text": cfg.text_coef}
        found |= {"image": cfg.image_coef} if cfg.image_coef else {}
        return found | ({"caption": cfg.caption_coef} if cfg.learns_captions else {})

    # ---- pieces that training and sampling share

    def visual_features(self, pixels: jax.Array) -> jax.Array:
        """float32[N, P, C] what the Q-Former makes of images uint8[N, h, w, 3]. Where it is frozen,
        as the tower is, these may come from a cache."""
        found = self.connector.features(self.vision(pixels)).astype(jnp.float32)
        return found if self.cfg.train_connector else jax.lax.stop_gradient(found)

    def project(self, features: jax.Array) -> jax.Array:
        """float[..., D] embeddings of visual tokens float[..., C]."""
        return self.connector.proj(features)

    def batch_features(self, batch: Batch) -> jax.Array:
        """float32[B, I * P, C] visual tokens of a batch, from its cached features or pixels."""
        images, width = batch.images, self.cfg.qformer.resampler.width
        B, I = images.valid.shape
        found = images.features
        if found is None and I:
            found = self.visual_features(images.pixels.reshape(B * I, *images.pixels.shape[2:]))
        return jnp.zeros((B, 0, width)) if found is None else found.reshape(B, -1, width)

    def conditions(
        self, states: jax.Array, start: jax.Array, kept: jax.Array | None = None
    ) -> Conditioning:
        """What B * J drawings are made from.

        Args:
            states: float[B, L, D] of the language model, after the final norm.
            start: int32[B, J] column of the state that predicts a drawing's first voken.
            kept: bool[B * J]; the others are null conditions.
        """
        B, J = start.shape
        columns = jnp.minimum(start[..., None] + jnp.arange(self.cfg.vokens), states.shape[1] - 1)
        found = gather_rows(states, columns.reshape(B, -1)).reshape(B * J, -1, states.shape[-1])
        if kept is not None:
            found = jnp.where(kept[:, None, None], found, 0)
        return self.mapper(found)

    # ---- training

    def hidden(self, batch: Batch) -> jax.Array:
        """float[B, L, D] states after the final norm."""
        text = self.llm.embed_tokens(batch.tokens)
        visual = self.project(self.batch_features(batch))
        embeds = place_visual(text, visual, batch.image_slots)
        return self.llm(embeds, batch.positions, row_mask(batch.segments, batch.turns))

    def caption_features(self, captions: jax.Array, kept: jax.Array) -> jax.Array:
        """float32[N, P, C] what the text encoder makes of captions; of the empty one where an image
        is trained without its condition.

        Args:
            captions: int32[N, P] ids, padded behind their end; kept: bool[N].
        """
        cfg = self.cfg.text_encoder
        empty = clip_text.without_text(captions, cfg, self.cfg.caption_pad)
        ids = jnp.where(kept[:, None], captions, empty)
        found = self.text_encoder(ids, clip_text.not_padding(ids, cfg)).last
        return jax.lax.stop_gradient(found.astype(jnp.float32))

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """How many terms the losses are means over: text targets, drawings, those with captions."""
        found = {"text": jnp.sum(batch.text_targets >= 0)}
        drawings = batch.drawings
        if "image" in self.loss_weights:
            found["image"] = jnp.sum(drawings.valid)
        if "caption" in self.loss_weights and drawings.captions is not None:
            found["caption"] = jnp.sum(captioned(drawings))
        return found

    def loss_sums(self, batch: Batch, key: jax.Array):
        """(loss -> sum over its terms, metrics)."""
        keys, model = jax.random.split(key, 3), self
        if self.cfg.lora is not None and self.cfg.lora.dropout:
            model = lora.with_dropout(self, keys[0])
        states, tables = model.hidden(batch), self.llm.head_tables()
        text, metrics = losses.text_loss_of(states, *tables, batch, self.cfg.text_chunk)
        kept = jax.random.uniform(keys[1], (batch.drawings.start.size,)) >= self.cfg.drop_condition
        condition = self.conditions(states, batch.drawings.start, kept)
        sums = {"text": text}
        for name, loss, plain, valid in self._drawing_losses(batch, condition, kept, keys[2]):
            sums[name] = jnp.sum(jnp.where(valid, loss, 0.0))
            weight, plain = valid.astype(jnp.float32), jnp.where(valid, plain, 0.0)
            sources = jnp.take_along_axis(batch.sources, batch.drawings.start, axis=1)
            metrics |= {f"{name}_loss": (plain.sum(), weight.sum())}
            metrics |= losses.by_source(plain, weight, sources, batch.source_names, f"{name}_loss")
        return sums, jax.tree.map(jax.lax.stop_gradient, metrics)

    def _drawing_losses(self, batch: Batch, condition: Conditioning, kept, key):
        """(name, loss, what is logged of it, bool which count), float32[B, J] each, of the losses
        that drawings have."""
        drawings, shape = batch.drawings, batch.drawings.valid.shape
        if "image" in self.loss_weights:
            images = drawings.pixels if drawings.latents is None else drawings.latents
            found = self.decoder.losses(images.reshape(-1, *images.shape[2:]), condition, key)
            yield "image", *(x.reshape(shape) for x in found), drawings.valid
        if "caption" in self.loss_weights and drawings.captions is not None:
            captions = drawings.captions.reshape(kept.size, -1)
            wanted = self.caption_features(captions, kept)
            error = jnp.square(condition.context.astype(jnp.float32) - wanted).mean((1, 2))
            yield "caption", *(error.reshape(shape),) * 2, captioned(drawings)

    def work(self, batch: Batch) -> tuple[Work, ...]:
        """The matrix products of a training step on a batch (shapes are enough)."""
        rows, length = batch.tokens.shape
        of_text = llama.work(self.llm.cfg, rows, length)
        drawing = self._work_of_drawing(batch.drawings)
        return (*of_text, *self._work_of_reading(batch.images), *drawing)

    def _work_of_reading(self, images: Images) -> list[Work]:
        """Of tower and connector, before which nothing is trained."""
        count = images.valid.shape[0] * images.valid.shape[1]
        if not count:
            return []
        run = lambda f, *args: count * flops.of_function(self, f, *args)  # noqa: E731
        inside, found = self.cfg.qformer.resampler, []
        one = jax.ShapeDtypeStruct((1, inside.queries, inside.width), jnp.float32)
        connector = run(lambda m, x: m.project(x), one)
        if images.pixels is not None:
            one = jax.ShapeDtypeStruct((1, *images.pixels.shape[2:]), jnp.uint8)
            tower = run(lambda m, x: m.vision(x), one)
            connector += run(lambda m, x: m.visual_features(x), one) - tower
            found.append(Work("tower", tower, "vision.tower", 0))
        return [*found, Work("connector", connector, "connector", 0)]

    def _work_of_drawing(self, drawings: Drawings) -> list[Work]:
        """Of mapper, denoiser, autoencoder and text encoder; the latter two where there are pixels
        or captions."""
        cfg, shape, count = self.cfg, jax.ShapeDtypeStruct, drawings.valid.size
        run = lambda f, *args: count * flops.of_function(self, f, *args)  # noqa: E731
        again = lambda forward, remat: forward if remat else 0.0  # noqa: E731
        states = shape((1, cfg.vokens, cfg.mapper.width), jnp.float32)
        mapper = run(lambda m, x: m.mapper(x).context, states)
        found = [Work("mapper", mapper, "mapper", 1, again(mapper, cfg.mapper.remat))]
        if "image" in self.loss_weights:
            x, t = shape((1, *cfg.decoder.sample_shape), jnp.float32), shape((1,), jnp.int32)
            context = Conditioning(shape((1, cfg.mapper.queries, cfg.mapper.inner), jnp.float32))
            forward = run(lambda m, *args: m.decoder.denoise(*args), x, t, context)
            forward *= cfg.decoder.noise_draws
            remat = cfg.decoder.denoiser.remat
            found.append(Work("denoiser", forward, "decoder.denoiser", 1, again(forward, remat)))
            if cfg.decoder.vae and drawings.latents is None:
                image = shape((1, cfg.decoder.image_side, cfg.decoder.image_side, 3), jnp.float32)
                encode = run(lambda m, x: m.decoder.vae.encode(x).mean, image)
                found.append(Work("autoencoder", encode, "", 0))
        if "caption" in self.loss_weights and drawings.captions is not None:
            ids = shape((1, cfg.text_encoder.max_position_embeddings), jnp.int32)
            found.append(Work("text encoder", run(lambda m, x: m.text_encoder(x).last, ids), "", 0))
        return found

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part of a parameter: tower, connector, llm, tokens (added rows), lora, prefix, mapper,
        denoiser, vae or text_encoder."""
        path = tuple(map(str, path))
        if lora.is_adapter(path):
            return "lora"
        if path[0] == "llm":
            return {"added": "tokens"}.get(path[-1], "prefix" if path[1] == "prefix" else "llm")
        if path[0] == "decoder":
            return path[1]
        return {"vision": "tower"}.get(path[0], path[0])


def captioned(drawings: Drawings) -> jax.Array:
    """bool[B, J] which drawings have a caption; of those that have none, the first id is below
    0."""
    return drawings.valid & (drawings.captions[..., 0] >= 0)


def _frozen(cfg: Config) -> re.Pattern:
    """Names of the matrices that no stage trains."""
    parts = ["vision", "text_encoder", r"decoder\.vae"]
    parts += [] if cfg.train_connector else ["connector"]
    parts += [] if cfg.train_denoiser else [r"decoder\.denoiser"]
    llm = r"llm\.(layers\..*\.kernel|embed_tokens\.embedding|lm_head\.kernel)"
    return re.compile(rf"({'|'.join(parts)})\..*\.(kernel|embedding)|{llm}")


def create(cfg: Config, rngs: nnx.Rngs) -> MiniGPT5:
    """A model with random weights; works under `nnx.eval_shape`."""
    model = MiniGPT5(cfg, rngs=rngs)
    llama.init_added_tokens(model.llm)
    lora.adapt(model, cfg.lora, "none", False, rngs=rngs)
    dtype = jnp.dtype(cfg.dtype if cfg.frozen_dtype == "auto" else cfg.frozen_dtype)
    frozen = _frozen(cfg)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and frozen.fullmatch(".".join(map(str, path))):
            variable.set_raw_value(variable.get_raw_value().astype(dtype))
    return model
