"""MetaMorph (Tong et al. 2024, arXiv 2412.14164): a language model that reads and predicts
visual tokens (VPiT, visual-predictive instruction tuning).

    picture ─ tower ─ P tokens ─ L2 norm ─┬─ connector ─┐
                                          │             ├─ llm ─ hidden ─┬─ output table: text loss
    text ─ embedding table ───────────────│─────────────┘                └─ head: next visual token,
                                          └────────── detached target ──────── minus cosine

The state at position p predicts what stands at p + 1, for both kinds of tokens.

Where we differ from the public code (each is an option or a fix): no NaN for batches without
targets, shapes that don't fit raise, every head gives the feature width, the connector stage trains
only the two new rows of the input table (`connector_tokens = "all"` trains all of it).
"""

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.models import lora
from metamorph_jax.models.connectors.mlp import Connector
from metamorph_jax.models.heads.visual_regression import VisualHead
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.models.llm import llama
from metamorph_jax.models.lora import LoraConfig
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.reduce import ReduceConfig, TokenReducer, normalize_features
from metamorph_jax.nn import quantized
from metamorph_jax.nn.attention import row_mask
from metamorph_jax.types import Batch

STAGES = ("connector", "vpit")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model part of a MetaMorph config.

    Attributes:
        llm: a name in `llama.SIZES`, or "auto": as the config beside `llm_weights` says.
        llm_options, tower_options: fields of LlamaConfig / ViTConfig to change.
        llm_weights, tower_weights: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        weights: the whole model from a MetaMorph checkpoint ("hf:…" or a folder) or from an earlier
            stage ("workdir:PATH"); "" for none. Takes the place of the two above.
        tokenizer: "" is the one that belongs to `llm_weights`.
        tower: a name in `vit.SIZES`, or "none": features come from a cache.
        feature_width: width of the features where there is no tower.
        image_tokens: P; 0 and -1 as in `ReduceConfig`.
        reduction, normalize_vision, apply_softmax: see `vision/reduce.py`.
        connector, head: kinds of `connectors/mlp.py` and `heads/visual_regression.py`; head "none"
            for a model that reads pictures only (LLaVA).
        visual_loss: "auto" (cosine; L1 if features aren't normalised; softmax cross-entropy if
            they are distributions) or one of `losses.VISUAL_LOSSES`.
        visual_coef, use_vision_ar: weight of the visual loss; without the latter it is only logged.
        visual_dropout: share of answer pictures whose visual tokens are hidden from the input, all
            of them or some, see `hidden_tokens` (targets stay). Reading true tokens, a model can
            continue a picture without heeding the request; when it draws, there are none.
        text_chunk: positions multiplied with the output table at a time.
        max_visual_targets: most positions of a row that predict visual tokens (more gives NaN);
            the head is evaluated at so many. 0: at all positions.
        connector_tokens, vpit_tokens: which rows of the token tables a stage trains: "added"
            (start and end of a picture), "all" or "none". In the connector stage only input rows.
        train_tower: the VPiT stage trains the tower, too.
        lora: adapters, see `LoraConfig`; a stage then trains, of all that it would train, the
            adapters and what `lora.train` names. None: no adapters.
        frozen_weights: "none", or how the kernels of the llm's layers are packed ("int8", "nf4",
            "nf4_double", see `nn/quantized.py`). They can't be trained then: use it with `lora`.
        sources: names of the data sources, for losses per source.
        dtype: of the computation; remat: see `llama.REMAT`.
    """

    llm: str = "llama3.1-8b"
    llm_options: dict = dataclasses.field(default_factory=dict)
    llm_weights: str = "random"
    tower: str = "siglip-so400m-384"
    tower_options: dict = dataclasses.field(default_factory=dict)
    tower_weights: str = "random"
    weights: str = ""
    tokenizer: str = ""
    feature_width: int = 0
    image_tokens: int = 64
    reduction: str = "interpolation"
    normalize_vision: bool = True
    apply_softmax: bool = False
    connector: str = "mlp2x_gelu"
    head: str = "mlp"
    visual_loss: str = "auto"
    visual_coef: float = 1.0
    use_vision_ar: bool = True
    visual_dropout: float = 0.0
    text_chunk: int = 512
    max_visual_targets: int = 0
    connector_tokens: str = "added"
    vpit_tokens: str = "all"
    train_tower: bool = False
    lora: LoraConfig | None = None
    frozen_weights: str = "none"
    sources: tuple[str, ...] = ()
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        _check("llm", self.llm, ("auto", *llama.SIZES))
        _check("tower", self.tower, ("none", *vit.SIZES))
        _check("visual_loss", self.visual_loss, ("auto", *losses.VISUAL_LOSSES))
        _check("connector_tokens", self.connector_tokens, ("none", "added", "all"))
        _check("vpit_tokens", self.vpit_tokens, ("none", "added", "all"))
        _check("frozen_weights", self.frozen_weights, ("none", *quantized.METHODS))
        if self.tower == "none" and not self.feature_width:
            raise ValueError("without a tower, feature_width must say how wide features are")

    @property
    def loss_kind(self) -> str:
        if self.visual_loss != "auto":
            return self.visual_loss
        if self.apply_softmax:
            return "softmax_ce"
        return "cosine" if self.normalize_vision else "l1"


def _check(name, value, known):
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")


def llm_config(cfg: Config) -> llama.LlamaConfig:
    changes = {"added_tokens": 2, "dtype": cfg.dtype, "remat": cfg.remat, **cfg.llm_options}
    if cfg.llm == "auto":
        from metamorph_jax.convert import specs
        from metamorph_jax.convert.llama import config_from_hf

        return config_from_hf(specs.llm_fields(cfg.llm_weights), **changes)
    return dataclasses.replace(llama.SIZES[cfg.llm], **changes)


def tower_config(cfg: Config) -> vit.ViTConfig | None:
    if cfg.tower == "none":
        return None
    changes = {"dtype": cfg.dtype, "remat": cfg.remat != "none", **cfg.tower_options}
    return dataclasses.replace(vit.SIZES[cfg.tower], **changes)


def reduce_config(cfg: Config) -> ReduceConfig:
    tower = tower_config(cfg)
    if tower is None:  # cached features are reduced already
        kind = "interpolation" if cfg.reduction == "mlpmixer" else cfg.reduction
        return ReduceConfig(cfg.image_tokens, kind, cfg.image_tokens, cfg.feature_width)
    return ReduceConfig(cfg.image_tokens, cfg.reduction, tower.tokens, tower.width)


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
        _check("stage", stage, STAGES)
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


# ---- weights


def load_pretrained(model: MetaMorph, cfg: Config) -> None:
    """Fills the model in place as the weight specs of the config say."""
    whole = cfg.weights.startswith("workdir:")
    known = bool(cfg.weights) or cfg.llm_weights != "random"
    with quantized.unpacked(model, empty=known and not whole):
        _fill(model, cfg)
    if cfg.lora is not None and cfg.lora.weights and model.cfg.lora == cfg.lora:
        from metamorph_jax.convert.peft import load_peft

        load_peft(model.llm, cfg.lora.weights)


def _fill(model: MetaMorph, cfg: Config) -> None:
    if cfg.weights.startswith("workdir:"):
        from metamorph_jax.train import checkpoint

        trained = checkpoint.load_params(model, cfg.weights.removeprefix("workdir:"))
        if not any(name.startswith("tower.") for name in trained):
            _load_tower(model, cfg)  # the earlier stage may have had none, features were cached
        return
    if cfg.weights:
        from metamorph_jax.convert import hf
        from metamorph_jax.convert.metamorph import load_metamorph

        load_metamorph(model, hf.Tensors(hf.find(cfg.weights)))
        return
    if cfg.llm_weights != "random":
        from metamorph_jax.convert import specs
        from metamorph_jax.convert.llama import load_llama

        load_llama(model.llm, specs.llm_tensors(cfg.llm_weights))
        llama.init_added_tokens(model.llm)
    _load_tower(model, cfg)


def _load_tower(model: MetaMorph, cfg: Config) -> None:
    if cfg.tower_weights != "random" and model.tower is not None:
        load_tower(model.tower, cfg.tower_weights)


def load_tower(tower: vit.ViT, spec: str) -> None:
    """Fills a tower in place from a weight spec."""
    from metamorph_jax.convert import specs
    from metamorph_jax.convert.vit import load_vit

    load_vit(tower, specs.tower_tensors(spec))


def load_tokenizer(cfg: Config):
    """The tokenizer that the config names, or that of its weights."""
    from metamorph_jax.convert import specs

    whole = "" if cfg.weights.startswith("workdir:") else cfg.weights
    return specs.tokenizer(cfg.tokenizer or whole or cfg.llm_weights)


def calibrate_connector(model: MetaMorph, features: np.ndarray) -> None:
    """Starts the connector from the statistics of the features; in place.

    Unit-norm features of one tower share a large mean and have small deviations, from which a fresh
    connector makes nearly the same embedding for every picture, at another scale than text. Here
    the first linear takes whitened features (the whitening is folded into its weights), and the
    last one's outputs get mean 0 and the standard deviation of the token embeddings.

    Args:
        features: float[N, C] or [N, P, C], a sample of what the connector will read.
    """
    linears = model.connector.linears
    if not len(linears):
        return
    x = jnp.asarray(features, jnp.float32).reshape(-1, np.shape(features)[-1])
    mean, std = x.mean(0), x.std(0)
    std = jnp.maximum(std, 1e-3 * std.mean() + 1e-12)  # a dead channel must not explode
    first, last = linears[0], linears[len(linears) - 1]
    kernel = first.kernel[...] / std[:, None]
    first.bias[...] = first.bias[...] - mean @ kernel
    first.kernel[...] = kernel
    out = model.connector(x).astype(jnp.float32)
    scale = model.llm.embed_tokens.embedding[...].std() / out.std(0).mean()
    last.kernel[...] = last.kernel[...] * scale
    last.bias[...] = (last.bias[...] - out.mean(0)) * scale


def prepare(model: MetaMorph, batches: Sequence[Batch]) -> None:
    """Before the first step: fits the connector's start to the pictures of these batches."""
    graph, weights = nnx.split(model)
    compute = jax.jit(lambda weights, batch: nnx.merge(graph, weights).batch_features(batch))
    found = []
    for batch in batches:
        x = np.asarray(compute(weights, batch))
        x = x.reshape(*batch.image_valid.shape, -1, x.shape[-1])
        found.append(x[np.asarray(batch.image_valid)].reshape(-1, x.shape[-1]))
    features = np.concatenate(found)
    if len(features):
        calibrate_connector(model, features)


# ---- data


def complete_data_config(data_cfg, cfg: Config):
    """The data config with all that the model decides: sizes, pixel statistics, feature names."""
    tower, reduce = tower_config(cfg), reduce_config(cfg)
    changes = {"tokens_per_image": reduce.tokens_out, "feature_width": reduce.width_out}
    if tower is not None:
        changes |= {"image_size": tower.size, "image_mean": tower.mean, "image_std": tower.std}
        made_by = dataclasses.asdict(tower) | dataclasses.asdict(reduce) | {
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


def fill_caches(data_cfg, cfg: Config) -> None:
    """Computes the features that `make_data` will want and the cache lacks."""
    data_cfg = _data_config(data_cfg, cfg)
    if data_cfg.feature_cache and cfg.tower != "none":
        fill_feature_cache(data_cfg, cfg)


def _data_config(data_cfg, cfg: Config):
    from metamorph_jax import config
    from metamorph_jax.data import pipeline

    if not isinstance(data_cfg, pipeline.DataConfig):
        data_cfg = config.build(pipeline.DataConfig, data_cfg, "config.data")
    return complete_data_config(data_cfg, cfg)


def make_data(data_cfg, cfg: Config, *, process_index=0, process_count=1, workdir=None):
    """The input pipeline: an iterator of `Batch`, with `get_state`, `set_state`, `sources`,
    `skipped`, `samples` and `close`. `data_cfg` is a `DataConfig` or a table of its fields. A
    feature cache is filled first where pictures are missing in it (where there are several hosts,
    `fill_caches` was called by one of them)."""
    del workdir
    from metamorph_jax.data import pipeline
    from metamorph_jax.data.chat import Chat

    data_cfg = _data_config(data_cfg, cfg)
    if process_index == 0 and jax.process_count() == 1:
        fill_caches(data_cfg, cfg)
    llm, tokenizer = llm_config(cfg), load_tokenizer(cfg)
    if len(tokenizer) > llm.tokens:  # it may know the added tokens
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, the language model {llm.tokens}: set "
            "config.model.tokenizer, or vocab_size in config.model.llm_options"
        )
    start = llm.vocab_size
    chat = Chat(
        tokenizer,
        data_cfg.template,
        data_cfg.system,
        data_cfg.single_bos,
        image_start=start,
        image_end=start + 1,
    )
    batches = pipeline.make_pipeline(
        data_cfg,
        chat.tokenizer,
        process_index=process_index,
        process_count=process_count,
        chat=chat,
    )
    return Data(batches, [s.name for s in batches._stream.sources])


def input_spec(data_cfg: dict, cfg: Config, rows: int) -> Batch:
    """Shapes of a batch of so many rows, from the config alone; `data_cfg` is a table."""
    from metamorph_jax import config
    from metamorph_jax.data import pipeline

    data = config.build(pipeline.DataConfig, data_cfg, "config.data")
    tower, reduce = tower_config(cfg), reduce_config(cfg)
    line = jax.ShapeDtypeStruct((rows, data.length), jnp.int32)
    pictures = (rows, data.images_per_row)
    cached = tower is None or data.feature_cache
    width = (reduce.tokens_out, reduce.width_out)
    return Batch(
        *7 * (line,),
        image_valid=jax.ShapeDtypeStruct(pictures, bool),
        pixels=None
        if cached
        else jax.ShapeDtypeStruct((*pictures, tower.size, tower.size, 3), jnp.uint8),
        features=jax.ShapeDtypeStruct((*pictures, *width), jnp.float32) if cached else None,
        turns=line if data.independent_turns else None,
    )


class Data:
    """An iterator of batches as the train loop wants it."""

    def __init__(self, batches, sources: list[str]):
        self._batches, self.sources = batches, sources

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self._batches.counts)

    def samples(self):
        """A function that names the samples of the batch that came last, for each of its rows."""
        rows, stream = self._batches.last_rows, self._batches._stream
        return lambda: [[stream.name(n) for n in row] for row in rows]

    def get_state(self) -> dict:
        return self._batches.get_state()

    def set_state(self, state: dict) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._batches.close()
