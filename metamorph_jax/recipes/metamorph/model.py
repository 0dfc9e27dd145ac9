"""The MetaMorph model: its parts put together, its losses, and what each stage trains."""

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.models import lora
from metamorph_jax.models.connectors.mlp import Connector
from metamorph_jax.models.heads.visual_regression import VisualHead
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.reduce import TokenReducer, normalize_features
from metamorph_jax.nn import quantized
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipes.metamorph.config import (
    Config,
    check_known,
    llm_config,
    reduce_config,
    tower_config,
)
from metamorph_jax.types import Batch

STAGES = ("connector", "vpit")


class MetaMorph(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        tower, reduce = tower_config(cfg), reduce_config(cfg)
        width = reduce.width_out
        llm = llm_config(cfg)
        self.tower = None if tower is None else vit.ViT(tower, rngs=rngs)
        self.reducer = TokenReducer(reduce, rngs=rngs)
        self.connector = Connector(cfg.connector, width, llm.width, cfg.dtype, rngs=rngs)
        self.llm = llama.Llama(llm, rngs=rngs)
        has_head = cfg.head != "none"
        head = VisualHead(cfg.head, llm.width, width, cfg.dtype, rngs=rngs) if has_head else None
        self.head = head

    @property
    def image_start(self) -> int:
        """Id of the token before a picture."""
        return self.llm.cfg.vocab_size

    @property
    def image_end(self) -> int:
        return self.llm.cfg.vocab_size + 1

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, C) of one picture."""
        return self.reducer.cfg.tokens_out, self.reducer.cfg.width_out

    # ---- pieces that training and sampling share

    def visual_features(self, pixels: jax.Array, side: int | None = None) -> jax.Array:
        """float32[N, P, C] visual tokens of uint8[N, h, w, 3]; no gradient if the tower is frozen.

        `side` is only for image_tokens = 0.
        """
        if self.tower is None:
            raise ValueError("this model has no tower: give it features in place of pixels")
        x = self.tower(pixels)
        if not self.cfg.train_tower:
            x = jax.lax.stop_gradient(x)
        x = self.reducer(x, side)
        return normalize_features(x, self.cfg.normalize_vision, self.cfg.apply_softmax)

    def project(self, visual: jax.Array) -> jax.Array:
        """float[..., D] embeddings of visual tokens float[..., C]."""
        return self.connector(visual)

    def predict_visual(self, hidden: jax.Array) -> jax.Array:
        """float32[..., C] next visual token from hidden states float[..., D], normalised."""
        if self.head is None:
            raise ValueError('head "none": this model reads pictures and predicts none')
        return normalize_features(
            self.head(hidden), self.cfg.normalize_vision, self.cfg.apply_softmax
        )

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """float[..., D] of ids."""
        return self.llm.embed_tokens(tokens)

    def batch_features(self, batch: Batch) -> jax.Array:
        """float32[B, I * P, C] visual tokens of a batch, from its cached features or pixels."""
        B, I = batch.image_valid.shape
        width = self.reducer.cfg.width_out
        if batch.features is not None:
            x = batch.features.astype(jnp.float32)
            if x.shape[-1] != width:
                raise ValueError(f"features are {x.shape[-1]} wide, the model takes {width}")
        elif batch.pixels is not None and I:
            x = self.visual_features(batch.pixels.reshape(B * I, *batch.pixels.shape[2:]))
        else:
            x = jnp.zeros((B, 0, width), jnp.float32)
        return x.reshape(B, -1, width)

    def embed(self, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(float[B, L, D] what the llm reads, float32[B, I * P, C] the visual tokens in it).

        With a key, some tokens of answer pictures are hidden (`visual_dropout`).
        """
        visual = self.batch_features(batch)
        text = self.embed_text(batch.tokens)
        shown = visual
        if key is not None and self.cfg.visual_dropout and visual.shape[1]:
            hidden = hidden_tokens(key, batch, self.feature_shape[0], self.cfg.visual_dropout)
            shown = jnp.where(hidden[..., None], 0.0, visual)
        return place_visual(text, self.project(shown), batch.image_slots), visual

    def hidden(self, batch: Batch, key=None) -> tuple[jax.Array, jax.Array]:
        """(float[B, L, D] states after the final norm, float32[B, I * P, C])."""
        embeds, visual = self.embed(batch, key)
        mask = row_mask(batch.segments, batch.turns)
        return self.llm(embeds, batch.positions, mask)[0], visual

    # ---- training

    @property
    def loss_coefs(self) -> dict[str, float]:
        if self.head is None:
            return {"text": 1.0}
        return {"text": 1.0, "visual": self.cfg.visual_coef if self.cfg.use_vision_ar else 0.0}

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """How many positions each loss is a sum over."""
        if self.head is None:
            return {"text": jnp.sum(batch.text_targets >= 0)}
        return {
            "text": jnp.sum(batch.text_targets >= 0),
            "visual": jnp.sum(batch.visual_targets >= 0),
        }

    def loss_sums(self, batch: Batch, key: jax.Array | None = None):
        """({"text", "visual"}: loss summed over positions, {metric: (numerator, denominator)})."""
        cfg = self.cfg
        model = self
        if key is not None and cfg.lora is not None and cfg.lora.dropout:
            model = lora.with_dropout(self, jax.random.fold_in(key, 1))
        hidden, visual = model.hidden(batch, key)
        table, added = self.llm.head_tables()
        text, each, right = losses.text_loss(
            hidden, table, added, batch.text_targets, cfg.text_chunk
        )
        has_text = (batch.text_targets >= 0).astype(jnp.float32)
        metrics = {
            "text_loss": (text, has_text.sum()),
            "text_accuracy": (right.sum().astype(jnp.float32), has_text.sum()),
            **losses.by_source(each, has_text, batch.sources, cfg.sources, "text_loss"),
        }

        if self.head is None:
            return {"text": text}, jax.tree.map(jax.lax.stop_gradient, metrics)
        if not self.loss_coefs["visual"]:
            hidden = jax.lax.stop_gradient(hidden)
        at, target, valid, where = losses.take_targets(
            hidden, visual, batch.visual_targets, cfg.max_visual_targets
        )
        predicted = model.predict_visual(at)
        each = losses.visual_loss(predicted, target, valid, cfg.loss_kind)
        wanted = jnp.sum(batch.visual_targets >= 0)
        # Targets that were not evaluated must not go unnoticed.
        total = jnp.where(wanted > valid.sum(), jnp.nan, each.sum())
        if not self.loss_coefs["visual"]:
            total = jax.lax.stop_gradient(total)
        n = valid.sum().astype(jnp.float32)
        metrics["visual_loss"] = (total, n)
        if cfg.loss_kind != "cosine":
            metrics["visual_cosine"] = (jnp.sum(losses.cosine(predicted, target) * valid), n)
        metrics["visual_cosine_floor"] = (losses.constant_cosine(target, valid) * n, n)
        if cfg.sources:
            sources = jnp.take_along_axis(batch.sources, where, axis=1)
            count = valid.astype(jnp.float32)
            metrics |= losses.by_source(each, count, sources, cfg.sources, "visual_loss")
        metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
        return {"text": text, "visual": total}, metrics

    def trainable(self, stage: str):
        """The nnx filter of what a stage trains."""
        check_known("stage", stage, STAGES)
        cfg = self.cfg
        if stage == "vpit" and cfg.frozen_weights != "none" and cfg.lora is None:
            raise ValueError("frozen_weights leaves nothing of the llm to train: set lora, too")
        rows = cfg.connector_tokens if stage == "connector" else cfg.vpit_tokens

        def of_stage(path) -> bool:
            if path[0] == "tower":
                return stage == "vpit" and cfg.train_tower
            if path[0] in ("connector", "reducer"):
                return True
            if path[:2] == ("llm", "embed_tokens"):
                return _row_trained(path, rows)
            if path[:2] == ("llm", "lm_head"):
                return stage == "vpit" and _row_trained(path, rows)
            return stage == "vpit"  # the rest of the llm, and the head

        def chosen(path, variable) -> bool:
            path = tuple(map(str, path))
            if not of_stage(path) or isinstance(variable, quantized.Packed):
                return False
            return cfg.lora is None or lora.trains(cfg.lora, path)

        return nnx.All(nnx.Any(nnx.Param, lora.Adapter), chosen)

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part of a parameter: tower, connector, llm, tokens (new rows), head or lora."""
        path = tuple(map(str, path))
        if lora.is_adapter(path):
            return "lora"
        if path[-1] == "added":
            return "tokens"
        return "connector" if path[0] == "reducer" else path[0]


def hidden_tokens(key: jax.Array, batch: Batch, tokens: int, share: float) -> jax.Array:
    """bool[B, I * P]: visual tokens of answer pictures that the input hides.

    A picture takes part with probability `share`. Half of those are hidden whole, the tokens of the
    others with a probability that is drawn from 0 to 1 for the picture.
    """
    B, I = batch.image_valid.shape
    rows = jnp.arange(B)[:, None]
    # Targets of -1 go to a place behind the last token, which is cut off.
    where = jnp.where(batch.visual_targets < 0, I * tokens, batch.visual_targets)
    answers = jnp.zeros((B, I * tokens + 1), bool).at[rows, where].set(True)[:, :-1]
    taking_part, rate, draw = (
        jax.random.uniform(k, (B, I, n))
        for k, n in zip(jax.random.split(key, 3), (1, 1, tokens), strict=True)
    )
    drop = (taking_part < share) & (draw < 2 * rate)
    return answers & drop.reshape(B, -1)


def _row_trained(path, rows: str) -> bool:
    return rows == "all" or (rows == "added" and path[-1] == "added")


def create(cfg: Config, rngs: nnx.Rngs) -> MetaMorph:
    """A model with random weights; works under `nnx.eval_shape`."""
    model = MetaMorph(cfg, rngs=rngs)
    llama.init_added_tokens(model.llm)
    if cfg.frozen_weights != "none":
        full = "" if cfg.lora is None else cfg.lora.train
        quantized.quantize(model, cfg.frozen_weights, r"llm\.layers\..*", leave=full)
    if cfg.lora is not None:
        names = lora.add(model, cfg.lora, rngs=rngs)
        if not cfg.train_tower and any(n.startswith("tower.") for n in names):
            raise ValueError("lora.target names linears of the tower: set train_tower, too")
    return model
