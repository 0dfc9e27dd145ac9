"""The MetaMorph model: its parts put together, its losses, and what each stage trains."""

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax import flops, losses
from metamorph_jax.errors import ConfigError
from metamorph_jax.flops import Work
from metamorph_jax.models import lora
from metamorph_jax.models.connectors.mlp import Connector
from metamorph_jax.models.heads.visual_flow import FlowHead
from metamorph_jax.models.heads.visual_regression import VisualHead
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision import encoder
from metamorph_jax.models.vision.encoder import VisionEncoder
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.recipes.metamorph.config import Config, llm_config
from metamorph_jax.types import Batch


def _rows(table: str, rows: str) -> list[str]:
    """Names of a token table's rows that a stage trains, as a pattern."""
    return {"none": [], "added": [rf"llm\.{table}\.added"], "all": [rf"llm\.{table}\..*"]}[rows]


def _connector_stage(cfg: Config) -> str:
    parts = [r"(connector|vision\.reducer)\..*", *_rows("embed_tokens", cfg.connector_tokens)]
    return lora.restrict("|".join(parts), cfg.lora)


def _vpit_stage(cfg: Config) -> str:
    if cfg.frozen_weights != "none" and cfg.lora is None:
        raise ConfigError("config.model.frozen_weights leaves nothing of the llm to train: set "
                          "config.model.lora, too")  # fmt: skip
    parts = [r"(connector|vision\.reducer|head)\..*", r"llm\.(layers|norm)\..*"]
    parts += _rows("embed_tokens", cfg.vpit_tokens) + _rows("lm_head", cfg.vpit_tokens)
    parts += [r"vision\.tower\..*"] if cfg.train_tower else []
    return lora.restrict("|".join(parts), cfg.lora)


STAGES = {"connector": _connector_stage, "vpit": _vpit_stage}


def _head(cfg: Config, D: int, C: int, rngs: nnx.Rngs) -> VisualHead | FlowHead | None:
    """The vision head, from states to visual tokens. Channels of unit vectors are 1 / sqrt(C)."""
    if cfg.head == "none":
        return None
    if cfg.head == "flow":
        return FlowHead(cfg.flow, D, C, C**0.5 if cfg.vision.normalize else 1.0, rngs=rngs)
    return VisualHead(cfg.head, D, C, cfg.dtype, rngs=rngs)


class MetaMorph(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        llm = llm_config(cfg)
        self.vision = VisionEncoder(cfg.vision, rngs=rngs)
        width = self.vision.feature_shape[1]
        self.connector = Connector(cfg.connector, width, llm.width, cfg.dtype, rngs=rngs)
        self.llm = llama.Llama(llm, rngs=rngs)
        self.head = _head(cfg, llm.width, width, rngs)

    @property
    def image_start(self) -> int:
        """Id of the token before an image."""
        return self.llm.cfg.vocab_size

    @property
    def image_end(self) -> int:
        return self.llm.cfg.vocab_size + 1

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, C) of one image."""
        return self.vision.feature_shape

    # ---- pieces that training and sampling share

    def visual_features(self, pixels: jax.Array, side: int | None = None) -> jax.Array:
        """float32[N, P, C] visual tokens of uint8[N, h, w, 3], see `VisionEncoder`."""
        return self.vision(pixels, side, train_tower=self.cfg.train_tower)

    def project(self, visual: jax.Array) -> jax.Array:
        """float[..., D] embeddings of visual tokens float[..., C]."""
        return self.connector(visual)

    def predict_visual(self, hidden: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """float32[..., C] next visual token from hidden states float[..., D], normalised.

        Args:
            keys: keys[N] for a head that samples, which takes float[N, D].
        """
        if self.head is None:
            raise ValueError('head "none": this model reads images and predicts none')
        flow = isinstance(self.head, FlowHead)
        return self.vision.normalize(self.head.sample(hidden, keys) if flow else self.head(hidden))

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """float[..., D] of ids."""
        return self.llm.embed_tokens(tokens)

    def batch_features(self, batch: Batch) -> jax.Array:
        """float32[B, I * P, C] visual tokens of a batch, from its cached features or pixels."""
        return self.vision.read(batch.images, train_tower=self.cfg.train_tower)

    def embed(self, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(float[B, L, D] what the llm reads, float32[B, I * P, C] the visual tokens in it).

        With a key, some tokens of answer images are hidden (`visual_dropout`).
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
        return self.llm(embeds, batch.positions, mask), visual

    # ---- training

    @property
    def loss_weights(self) -> dict[str, float]:
        """The losses that this model has, and their weights."""
        if self.head is None:
            return {"text": 1.0}
        return {"text": 1.0, "visual": self.cfg.visual_coef if self.cfg.use_vision_ar else 0.0}

    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """How many positions each loss is a sum over."""
        targets = {"text": batch.text_targets, "visual": batch.visual_targets}
        return {name: jnp.sum(targets[name] >= 0) for name in self.loss_weights}

    def loss_sums(self, batch: Batch, key: jax.Array | None = None):
        """({"text", "visual"}: loss summed over positions, {metric: (numerator, denominator)})."""
        model = self
        if key is not None and self.cfg.lora is not None and self.cfg.lora.dropout:
            model = lora.with_dropout(self, jax.random.fold_in(key, 1))
        hidden, visual = model.hidden(batch, key)
        tables = model.llm.head_tables()
        text, metrics = losses.text_loss_of(hidden, *tables, batch, self.cfg.text_chunk)
        sums = {"text": text}
        if "visual" in self.loss_weights:
            sums["visual"], more = model._visual_loss(hidden, visual, batch, key)
            metrics |= more
        return sums, jax.tree.map(jax.lax.stop_gradient, metrics)

    def _visual_loss(self, hidden: jax.Array, visual: jax.Array, batch: Batch, key):
        """(sum over the visual targets, metrics); without gradients where its weight is 0.

        The sum is NaN when a row has more targets than `max_visual_targets`, so that targets
        which were not evaluated don't go unnoticed.

        Args:
            hidden: float[B, L, D]; visual: float32[B, I * P, C].
            key: for a head that samples; None: always the same.
        """
        at, target, valid, where = losses.take_targets(
            hidden, visual, batch.visual_targets, self.cfg.max_visual_targets
        )
        each, predicted = self._visual_losses(at, target, valid, key)
        wanted = jnp.sum(batch.visual_targets >= 0)
        total = jnp.where(wanted > valid.sum(), jnp.nan, each.sum())
        if not self.loss_weights["visual"]:
            total = jax.lax.stop_gradient(total)

        n = valid.sum().astype(jnp.float32)
        metrics = {
            "visual_loss": (total, n),
            "visual_cosine_floor": (losses.constant_cosine(target, valid) * n, n),
        }
        if predicted is not None and self.cfg.loss_kind != "cosine":
            metrics["visual_cosine"] = (jnp.sum(losses.cosine(predicted, target) * valid), n)
        sources = jnp.take_along_axis(batch.sources, where, axis=1)
        counts = valid.astype(jnp.float32)
        by_source = losses.by_source(each, counts, sources, batch.source_names, "visual_loss")
        return total, metrics | by_source

    def _visual_losses(self, states: jax.Array, target: jax.Array, valid: jax.Array, key):
        """(float32[B, M] loss of each visual token, what a head that regresses predicted or None).

        Args:
            states: float[B, M, D]; target: float32[B, M, C]; valid: bool[B, M].
        """
        if isinstance(self.head, FlowHead):
            key = jax.random.fold_in(jax.random.key(0) if key is None else key, 2)
            return jnp.where(valid, self.head.losses(states, target, key), 0.0), None
        predicted = self.predict_visual(states)
        return losses.visual_loss(predicted, target, valid, self.cfg.loss_kind), predicted

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part of a parameter: tower, connector, llm, tokens (new rows), head or lora."""
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
        rows, length = batch.tokens.shape
        found = llama.work(self.llm.cfg, rows, length)
        found += encoder.work(self, batch.images, self.cfg.train_tower)
        if batch.images.valid.size and "visual" in self.loss_weights:
            widths = self.llm.cfg.width, self.feature_shape[1]
            one = [jax.ShapeDtypeStruct((1, 1, width), jnp.float32) for width in widths]
            run = lambda m, x, z: m._visual_losses(x, z, jnp.ones((1, 1), bool), None)[0]  # noqa: E731
            predicting = rows * (self.cfg.max_visual_targets or length)
            forward = predicting * flops.of_function(self, run, *one)
            counts = bool(self.loss_weights["visual"])
            found += (Work("visual head", forward, "head" if counts else "", int(counts)),)
        return found


def hidden_tokens(key: jax.Array, batch: Batch, tokens: int, share: float) -> jax.Array:
    """bool[B, I * P]: visual tokens of answer images that the input hides.

    An image takes part with probability `share`. Half of those are hidden whole, the tokens of the
    others with a probability that is drawn from 0 to 1 for the image.
    """
    B, I = batch.images.valid.shape
    rows = jnp.arange(B)[:, None]
    # Targets of -1 go to one more position after the last token, which is cut off.
    where = jnp.where(batch.visual_targets < 0, I * tokens, batch.visual_targets)
    answers = jnp.zeros((B, I * tokens + 1), bool).at[rows, where].set(True)[:, :-1]
    taking_part, rate, draw = (
        jax.random.uniform(k, (B, I, n))
        for k, n in zip(jax.random.split(key, 3), (1, 1, tokens), strict=True)
    )
    drop = (taking_part < share) & (draw < 2 * rate)
    return answers & drop.reshape(B, -1)


def create(cfg: Config, rngs: nnx.Rngs) -> MetaMorph:
    """A model with random weights; works under `nnx.eval_shape`."""
    model = MetaMorph(cfg, rngs=rngs)
    llama.init_added_tokens(model.llm)
    lora.adapt(model, cfg.lora, cfg.frozen_weights, cfg.train_tower, rngs=rngs)
    return model
