"""The MM-Interleaved model: its parts put together, its losses, and what each stage trains."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import flops, losses
from metamorph_jax.flops import Work
from metamorph_jax.models.diffusion.decoder import DiffusionDecoder
from metamorph_jax.models.heads import context
from metamorph_jax.models.heads.context import ContextHead
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.models.mmfs import LLMBlock
from metamorph_jax.models.vision import vit_adapter
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipes.mm_interleaved import documents
from metamorph_jax.recipes.mm_interleaved.config import Config, insert_config, llm_config
from metamorph_jax.recipes.mm_interleaved.visual import VisualTokenizer
from metamorph_jax.types import TEXT, Batch, Conditioning, Drawings

# The ignore tokens of the UNet's MMFS are constants in the reference, those of the LLM's are not.
_DRAWING = [r"context\..*", r"decoder\.denoiser\.(?!.*ignore_token).*"]
_FINEST_MAP = r"up\.|prior\.projections\.0\."  # what makes the map that only the UNet samples


def _trained(cfg: Config) -> list[str]:
    """What both stages train, as patterns. Rows for added tokens: of the output only, where input
    and output are tables of their own. What draws is left out where nothing is drawn: without
    gradients it would only decay."""
    table = "embed_tokens" if llm_config(cfg).tied else "lm_head"
    tower = [r"vision\.adapter\.tower\..*"] if cfg.train_tower else []
    unseen = r"tower\."
    if not cfg.max_drawings and cfg.insert.levels < vit_adapter.STAGES:
        unseen += f"|{_FINEST_MAP}"
    reading = [rf"vision\.(?!adapter\.({unseen})).*", r"llm\.inserts\..*", "soi"]
    drawing = _DRAWING if cfg.max_drawings else []
    return [*reading, *drawing, rf"llm\.{table}\.added.*", *tower]


def _sft_stage(cfg: Config) -> str:
    llm = [r"llm\.(layers|norm)\..*"] if cfg.train_llm else []
    return "|".join([*_trained(cfg), *llm])


def _without_mmfs(cfg: Config) -> str:
    """All but the parts of MMFS. Their gates and last convolutions start at 0, so a model that was
    trained like this from the start is one without them: what it lacks is what MMFS gives."""
    return rf"(?!llm\.inserts\.|decoder\.denoiser\.mmfs_module\.)({'|'.join(_trained(cfg))})"


STAGES = {
    "pretrain": lambda cfg: "|".join(_trained(cfg)),
    "sft": _sft_stage,
    "without_mmfs": _without_mmfs,
}


class Reading(NamedTuple):
    """What a model makes of a batch.

    Attributes:
        visual: float[B, I, P, D] visual tokens.
        maps: float[B, I, side, side, C] each, finest first.
        embeds: float[B, L, D] what the language model reads.
        starts: int32[B, L] column at which the document of each position begins.
        visible: bool[B, L, I] which images a position sees.
        states: float[B, L, D] after the final norm.
    """

    visual: jax.Array
    maps: tuple[jax.Array, ...]
    embeds: jax.Array
    starts: jax.Array
    visible: jax.Array
    states: jax.Array


class MMInterleaved(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llm = llm_config(cfg)
        self.vision = VisualTokenizer(cfg.vision, llm.width, rngs=rngs)
        insert = llama.Insert(cfg.insert.every, LLMBlock, insert_config(cfg))
        self.llm = llama.Llama(llm, rngs=rngs, insert=insert)
        self.soi = nnx.Param(jnp.zeros(llm.width), logical=("embed",))
        self.context = ContextHead(cfg.context, rngs=rngs)
        self.decoder = DiffusionDecoder(cfg.decoder, rngs=rngs)

    @property
    def image_start(self) -> int:
        """Id of the token before an image (`soi`)."""
        return self.llm.cfg.vocab_size

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of the losses; without drawings there is none of images."""
        image = {"image": self.cfg.image_coef} if self.cfg.max_drawings else {}
        return {"text": self.cfg.text_coef} | image

    # ---- pieces that training and sampling share

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """float[..., D] of ids; a learned vector is added to that of `soi`."""
        x = self.llm.embed_tokens(tokens)
        here = (tokens == self.image_start)[..., None]
        return x + jnp.where(here, self.soi[...].astype(x.dtype), 0)

    def read(self, pixels: jax.Array, key: jax.Array | None = None):
        """See `VisualTokenizer`; pixels: uint8[..., h, w, 3], and the results have the same leading
        axes."""
        lead = pixels.shape[:-3]
        visual, maps = self.vision(pixels.reshape(-1, *pixels.shape[-3:]), key)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), (visual, maps))

    def for_llm(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Those maps that the language model samples."""
        return maps[len(maps) - self.cfg.insert.levels :]

    # ---- training

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> "Reading":
        """What the model makes of a batch up to the states; with a key, as in training."""
        starts = documents.document_starts(batch.tokens, batch.segments, self.cfg.document_bos)
        visible = documents.visibility(starts, batch.images)
        visual, maps = self.read(batch.images.pixels, key)
        text = self.embed_text(jnp.where(batch.image_slots == TEXT, batch.tokens, 0))
        flat = visual.reshape(len(visual), -1, visual.shape[-1])
        embeds = place_visual(text, flat, batch.image_slots)
        mask = row_mask(batch.segments, batch.turns)
        states = self.llm(embeds, batch.positions, mask, (self.for_llm(maps), visible))
        return Reading(visual, maps, embeds, starts, visible, states)

    def conditions(
        self, batch: Batch, reading: "Reading", key: jax.Array | None = None
    ) -> tuple[Conditioning, jax.Array]:
        """(what B * J drawings are made from, bool[B, J] those whose context has more than two
        states: BOS and `soi` alone say nothing)."""
        at = batch.drawings.start
        begin = jnp.take_along_axis(reading.starts, at, axis=1)
        index, before = documents.preceding_images(reading.visible, at, self.cfg.images_before)
        condition = dataclasses.replace(
            self.context(reading.states, at, begin, key=key),
            maps=tuple(_take(x, index) for x in reading.maps),
            maps_mask=before.reshape(at.size, -1),
        )
        return condition, batch.drawings.valid & (context.lengths(at, begin) > 2)

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """How many terms the losses are means over: text targets and images, see `image_mean`."""
        counts = {"text": jnp.sum(batch.text_targets >= 0)}
        if not self.cfg.max_drawings:
            return counts
        images = batch.images.valid
        if self.cfg.image_mean == "drawings":
            images = batch.drawings.valid
        return counts | {"image": jnp.sum(images)}

    def loss_sums(self, batch: Batch, key: jax.Array):
        """({"text", "image"}: sums over text targets and drawings, metrics)."""
        keys = jax.random.split(key, 3)
        reading = self.hidden(batch, keys[0])
        tables, bias = self.llm.head_tables(), self.llm.head_bias()
        text, metrics = losses.text_loss_of(
            reading.states, *tables, batch, self.cfg.text_chunk, bias
        )
        sums = {"text": text}
        if self.cfg.max_drawings:
            sums["image"], more = self._image_loss(batch, reading, keys[1:])
            metrics |= more
        return sums, jax.tree.map(jax.lax.stop_gradient, metrics)

    def _image_loss(self, batch: Batch, reading: "Reading", keys) -> tuple[jax.Array, dict]:
        """(sum over drawings, metrics: the plain error, also of each source).

        Args:
            keys: for the context head, and for the decoder.
        """
        condition, counted = self.conditions(batch, reading, keys[0])
        pixels = batch.drawings.pixels
        loss, error = self.decoder.losses(
            pixels.reshape(-1, *pixels.shape[2:]), condition, keys[1],
            null=self.context.null_condition(), drop=self.cfg.drop_context,
        )  # fmt: skip
        loss = jnp.where(counted, loss.reshape(counted.shape), 0.0)
        error = jnp.where(counted, error.reshape(counted.shape), 0.0)
        weight = counted.astype(jnp.float32)
        sources = jnp.take_along_axis(batch.sources, batch.drawings.start, axis=1)
        metrics = {"image_loss": (error.sum(), weight.sum())}
        metrics |= losses.by_source(error, weight, sources, batch.source_names, "image_loss")
        return loss.sum(), metrics

    def work(self, batch: Batch) -> tuple[Work, ...]:
        """The matrix products of a training step on a batch (shapes are enough)."""
        rows, length = batch.tokens.shape
        images = batch.images.valid.shape[1]
        of_text = llama.work(self.llm.cfg, rows, length, self.llm.insert, images)
        seen = self._work_of_reading(rows * images, batch.images.pixels.shape[2:])
        if not self.cfg.max_drawings:
            return (*of_text, *seen)
        return (*of_text, *seen, *self._work_of_drawing(rows, length, batch.drawings))

    def _work_of_reading(self, count: int, image: tuple[int, ...]) -> list[Work]:
        """Of the visual tokenizer on so many images."""
        one, cfg = jax.ShapeDtypeStruct((1, *image), jnp.uint8), self.cfg.vision
        run = lambda f: count * flops.of_function(self, f, one)  # noqa: E731
        tower = run(lambda m, x: m.vision.adapter.tower.states(x))
        adapter = run(lambda m, x: m.vision.adapter(x)) - tower
        rest = run(lambda m, x: m.vision(x)) - adapter - tower
        again = lambda forward, remat: forward if remat else 0.0  # noqa: E731
        return [
            Work("tower", tower, "vision.adapter.tower", 1, again(tower, cfg.remat)),
            Work("adapter", adapter, "vision.adapter.interactions", 1,
                 again(adapter, cfg.adapter.remat)),
            Work("resampler", rest, "vision.resampler", 1, again(rest, cfg.resampler.remat)),
        ]  # fmt: skip

    def _work_of_drawing(self, rows: int, length: int, drawings: Drawings) -> list[Work]:
        """Of context head, autoencoder and denoiser, on the drawings of rows of this length."""
        cfg, shape, drawings = self.cfg.decoder, jax.ShapeDtypeStruct, drawings.valid.shape[1]
        at = shape((1, drawings), jnp.int32)
        states = shape((1, length, self.llm.cfg.width), jnp.float32)
        read = lambda m, x, start, begin: m.context(x, start, begin)  # noqa: E731
        context = rows * flops.of_function(self, read, states, at, at)
        found = [Work("context", context, "context")]
        condition = jax.eval_shape(lambda: self._example())
        x, t = shape((1, *cfg.sample_shape), jnp.float32), shape((1,), jnp.int32)
        denoise = lambda m, *args: m.decoder.denoise(*args)  # noqa: E731
        forward = rows * drawings * flops.of_function(self, denoise, x, t, condition)
        again = forward if cfg.denoiser.unet.remat else 0.0
        found.append(Work("denoiser", forward, "decoder.denoiser", 1, again))
        if cfg.vae:
            encode = lambda m, x: m.decoder.vae.encode(x).mean  # noqa: E731
            image = shape((1, cfg.image_side, cfg.image_side, 3), jnp.float32)
            forward = rows * drawings * flops.of_function(self, encode, image)
            found.append(Work("autoencoder", forward, "", 0))
        return found

    def _example(self) -> Conditioning:
        """A condition of one drawing, all zeros."""
        vision, context = self.cfg.vision, self.cfg.context.resampler
        maps = tuple(
            jnp.zeros((1, self.cfg.images_before, side, side, vision.vit.width))
            for side in vision.sides
        )
        mask = jnp.ones((1, self.cfg.images_before), bool)
        return Conditioning(jnp.zeros((1, context.queries, context.width)), None, maps, mask)

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part of a parameter: tower, adapter, resampler, llm, mmfs, tokens (rows of added ones),
        context, denoiser or vae."""
        path = tuple(map(str, path))
        if path[0] == "vision":
            adapter = "tower" if path[2] == "tower" else "adapter"
            return adapter if path[1] == "adapter" else "resampler"
        if path[0] == "llm":
            return {"inserts": "mmfs"}.get(path[1], "tokens" if "added" in path[-1] else "llm")
        if path[0] == "decoder":
            return path[1]
        return {"soi": "tokens"}.get(path[0], path[0])


def _take(maps: jax.Array, index: jax.Array) -> jax.Array:
    """float[B * J, M, ...] of maps float[B, I, ...] and int32[B, J, M]."""
    B, J, M = index.shape
    rows = jnp.arange(B)[:, None]
    return maps[rows, index.reshape(B, -1)].reshape(B * J, M, *maps.shape[2:])


def added_rows(llm: llama.Llama) -> list[nnx.Variable]:
    """The rows of the language model's tables that belong to added tokens."""
    tables = [llm.embed_tokens] if llm.cfg.tied else [llm.embed_tokens, llm.lm_head]
    return [table.added for table in tables]


_START = -5.0  # logit of an added token at the start; in the reference it is 95 - 100


def create(cfg: Config, rngs: nnx.Rngs) -> MMInterleaved:
    """A model with random weights; works under `nnx.eval_shape`."""
    model = MMInterleaved(cfg, rngs=rngs)
    if not model.llm.cfg.tied:
        head = model.llm.lm_head
        head.added[...] = jnp.zeros_like(head.added[...])
        head.added_bias[...] = jnp.full_like(head.added_bias[...], _START)
    dtype = jnp.dtype(cfg.dtype if cfg.frozen_dtype == "auto" else cfg.frozen_dtype)
    frozen = re.compile(_frozen(cfg))
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and frozen.fullmatch(".".join(map(str, path))):
            variable.set_raw_value(variable.get_raw_value().astype(dtype))
    return model


def _frozen(cfg: Config) -> str:
    """Names of the large weights that no stage trains, as a pattern."""
    parts = [r"llm\.(embed_tokens\.embedding|lm_head\.kernel)"]
    parts += [] if cfg.train_llm else [r"llm\.layers\..*\.kernel"]
    parts += [] if cfg.train_tower else [r"vision\.adapter\.tower\..*\.kernel"]
    return "|".join(parts)
