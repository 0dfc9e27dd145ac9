"""The LLaVA model: its parts put together, its loss, and what each stage trains."""

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.errors import ConfigError
from metamorph_jax.flops import Work
from metamorph_jax.models import lora
from metamorph_jax.models.connectors.mlp import Connector
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision import encoder
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipes.llava.config import Config, llm_config
from metamorph_jax.types import Batch

_CONNECTOR = [r"(connector|vision\.reducer)\..*", "newline"]


def _connector_stage(cfg: Config) -> str:
    added = [r"llm\.embed_tokens\.added"] if cfg.start_end else []
    return lora.restrict("|".join(_CONNECTOR + added), cfg.lora)


def _instruct_stage(cfg: Config) -> str:
    if cfg.frozen_weights != "none" and cfg.lora is None:
        raise ConfigError("config.model.frozen_weights leaves nothing of the llm to train: set "
                          "config.model.lora, too")  # fmt: skip
    rows = {"none": [], "added": [r"\.added"], "all": [r"\..*"]}[cfg.trained_tokens]
    parts = [*_CONNECTOR, r"llm\.(layers|norm)\..*"]
    parts += [rf"llm\.(embed_tokens|lm_head){row}" for row in rows]
    parts += [r"vision\.tower\..*"] if cfg.train_tower else []
    return lora.restrict("|".join(parts), cfg.lora)


STAGES = {"connector": _connector_stage, "instruct": _instruct_stage}


class Llava(nnx.Module):
    loss_weights = {"text": 1.0}

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llm = llm_config(cfg)
        self.vision = encoder.VisionEncoder(cfg.vision, rngs=rngs)
        width = self.vision.feature_shape[1]
        self.connector = Connector(cfg.connector, width, llm.width, cfg.dtype, rngs=rngs)
        self.llm = llama.Llama(llm, rngs=rngs)
        if cfg.newline:
            init = nnx.initializers.normal(llm.width**-0.5)
            self.newline = nnx.Param(init(rngs.params(), (llm.width,)))

    # ---- pieces that training and sampling share

    def visual_features(self, pixels: jax.Array) -> jax.Array:
        """float32[N, P, C] visual tokens of views uint8[N, h, w, 3]."""
        return self.vision(pixels, train_tower=self.cfg.train_tower)

    def project(self, visual: jax.Array) -> jax.Array:
        """float[..., D] embeddings of visual tokens float[..., C]."""
        return self.connector(visual)

    def batch_features(self, batch: Batch) -> jax.Array:
        """float32[B, I * P, C] visual tokens of a batch, from its cached features or pixels."""
        return self.vision.read(batch.images, train_tower=self.cfg.train_tower)

    def embed(self, batch: Batch) -> jax.Array:
        """float[B, L, D] what the language model reads."""
        text = self.llm.embed_tokens(batch.tokens)
        visual = self.project(self.batch_features(batch))
        newline = self.newline[...] if self.cfg.newline else None
        return place_visual(text, visual, batch.image_slots, newline)

    def hidden(self, batch: Batch) -> jax.Array:
        """float[B, L, D] states after the final norm."""
        mask = row_mask(batch.segments, batch.turns)
        return self.llm(self.embed(batch), batch.positions, mask)

    # ---- training

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """How many positions have a text to predict."""
        return {"text": jnp.sum(batch.text_targets >= 0)}

    def loss_sums(self, batch: Batch, key: jax.Array | None = None):
        """({"text": loss summed over positions}, {metric: (numerator, denominator)})."""
        model = self
        if key is not None and self.cfg.lora is not None and self.cfg.lora.dropout:
            model = lora.with_dropout(self, key)
        hidden, tables = model.hidden(batch), model.llm.head_tables()
        total, metrics = losses.text_loss_of(hidden, *tables, batch, self.cfg.text_chunk)
        return {"text": total}, jax.tree.map(jax.lax.stop_gradient, metrics)

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part of a parameter: tower, connector, newline, llm, tokens (new rows) or lora."""
        path = tuple(map(str, path))
        if lora.is_adapter(path):
            return "lora"
        if path[-1] == "added":
            return "tokens"
        if path[0] == "vision":
            return "tower" if path[1] == "tower" else "connector"
        return path[0]

    def work(self, batch: Batch) -> tuple[Work, ...]:
        """The matrix products of a training step on a batch (shapes are enough)."""
        of_text = llama.work(self.llm.cfg, *batch.tokens.shape)
        return of_text + encoder.work(self, batch.images, self.cfg.train_tower)


def create(cfg: Config, rngs: nnx.Rngs) -> Llava:
    """A model with random weights; works under `nnx.eval_shape`."""
    model = Llava(cfg, rngs=rngs)
    llama.init_added_tokens(model.llm)
    lora.adapt(model, cfg.lora, cfg.frozen_weights, cfg.train_tower, rngs=rngs)
    return model
