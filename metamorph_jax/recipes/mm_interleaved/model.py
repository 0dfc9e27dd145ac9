"""The MM-Interleaved model: its parts put together, its losses, and what each stage trains."""

import dataclasses

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
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipes.mm_interleaved import documents
from metamorph_jax.recipes.mm_interleaved.config import Config, insert_config, llm_config
from metamorph_jax.recipes.mm_interleaved.visual import VisualTokenizer
from metamorph_jax.types import TEXT, Batch, Conditioning

# The ignore tokens of the UNet's MMFS are constants in the reference, those of the LLM's are not.
_PRETRAIN = [
    r"vision\.(?!adapter\.tower\.).*",
    r"llm\.inserts\..*",
    r"soi",
    r"context\..*",
    r"decoder\.denoiser\.(?!.*ignore_token).*",
]


def _trained(cfg: Config) -> list[str]:
    """What both stages train, as patterns. Rows for added tokens: of the output only, where input
    and output are tables of their own."""
    table = "embed_tokens" if llm_config(cfg).tied else "lm_head"
    tower = [r"vision\.adapter\.tower\..*"] if cfg.train_tower else []
    return [*_PRETRAIN, rf"llm\.{table}\.added.*", *tower]


def _sft_stage(cfg: Config) -> str:
    llm = [r"llm\.(layers|norm)\..*"] if cfg.train_llm else []
    return "|".join([*_trained(cfg), *llm])


STAGES = {"pretrain": lambda cfg: "|".join(_trained(cfg)), "sft": _sft_stage}


class MMInterleaved(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llm = llm_config(cfg)
        self.vision = VisualTokenizer(cfg.vision, llm.width, rngs=rngs)
        insert = llama.Insert(cfg.insert.every, lambda rngs: LLMBlock(insert_config(cfg), rngs=rngs))
        self.llm = llama.Llama(llm, insert=insert, rngs=rngs)
        self.soi = nnx.Param(jnp.zeros(llm.width), logical=("embed",))
        self.context = ContextHead(cfg.context, rngs=rngs)
        self.decoder = DiffusionDecoder(cfg.decoder, rngs=rngs)

    @property
    def image_start(self) -> int:
        """Id of the token before an image (`soi`)."""
        return self.llm.cfg.vocab_size

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"text": self.cfg.text_coef, "image": self.cfg.image_coef}

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

    def null_condition(self, condition: Conditioning) -> Conditioning:
        """What stands for no condition: the learned context, and the maps of `condition`."""
        context = jnp.broadcast_to(self.context.null_condition().context, condition.context.shape)
        return dataclasses.replace(condition, context=context)

    # ---- training

    def hidden(self, batch: Batch, key: jax.Array | None = None):
        """(float[B, L, D] states after the final norm, bool[B, L, I] which images a position sees,
        int32[B, L] where its document starts, maps float[B, I, side, side, C])."""
        starts = documents.document_starts(batch.tokens, batch.segments, self.cfg.document_bos)
        seen = documents.visibility(starts, batch.images)
        visual, maps = self.read(batch.images.pixels, key)
        text = self.embed_text(jnp.where(batch.image_slots == TEXT, batch.tokens, 0))
        embeds = place_visual(text, visual.reshape(len(visual), -1, visual.shape[-1]),
                              batch.image_slots)  # fmt: skip
        mask = row_mask(batch.segments, batch.turns)
        states = self.llm(embeds, batch.positions, mask, (self.for_llm(maps), seen))
        return states, seen, starts, maps

    def conditions(self, batch: Batch, key: jax.Array | None = None):
        """(states float[B, L, D], `Conditioning` of B * J drawings, bool[B, J] those whose context
        has more than two states: BOS and `soi` alone say nothing)."""
        keys = (None, None) if key is None else jax.random.split(key)
        states, seen, starts, maps = self.hidden(batch, keys[0])
        at = batch.drawings.start
        begin = jnp.take_along_axis(starts, at, axis=1)
        index, before = documents.preceding_images(seen, at, self.cfg.images_before)
        condition = dataclasses.replace(
            self.context(states, at, begin, key=keys[1]),
            maps=tuple(_take(x, index) for x in maps),
            maps_mask=before.reshape(at.size, -1),
        )
        return states, condition, batch.drawings.valid & (context.lengths(at, begin) > 2)

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """How many terms the losses are means over: text targets and images, see `image_mean`."""
        images = batch.images.valid
        if self.cfg.image_mean == "drawings":
            images = batch.drawings.valid
        return {"text": jnp.sum(batch.text_targets >= 0), "image": jnp.sum(images)}

    def loss_sums(self, batch: Batch, key: jax.Array):
        """({"text", "image"}: sums over text targets and drawings, metrics)."""
        reading, drawing = jax.random.split(key)
        states, condition, counted = self.conditions(batch, reading)
        text, metrics = losses.text_loss_of(states, *self.llm.head_tables(), batch,
                                            self.cfg.text_chunk)  # fmt: skip
        pixels = batch.drawings.pixels
        loss, error = self.decoder.losses(
            pixels.reshape(-1, *pixels.shape[2:]), condition, drawing,
            null=self.null_condition(condition), drop=self.cfg.drop_context,
        )  # fmt: skip
        loss = jnp.where(counted, loss.reshape(counted.shape), 0.0)
        error = jnp.where(counted, error.reshape(counted.shape), 0.0)
        weight = counted.astype(jnp.float32)
        sources = jnp.take_along_axis(batch.sources, batch.drawings.start, axis=1)
        metrics |= {"image_loss": (error.sum(), weight.sum())}
        metrics |= losses.by_source(error, weight, sources, batch.source_names, "image_loss")
        sums = {"text": text, "image": loss.sum()}
        return sums, jax.tree.map(jax.lax.stop_gradient, metrics)

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


def create(cfg: Config, rngs: nnx.Rngs) -> MMInterleaved:
    """A model with random weights; works under `nnx.eval_shape`."""
    model = MMInterleaved(cfg, rngs=rngs)
    return model
