"""From images to the visual tokens that a language model reads.

    uint8 image ─ tower ─ T tokens ─ TokenReducer ─ P tokens ─ normalise ─ float32[P, C]

Training, feature caches, the decoder stage and generation all use this one module, so that the
features they see are the same numbers.
"""

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import flops
from metamorph_jax.config import replaced
from metamorph_jax.flops import Work
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.reduce import ReduceConfig, TokenReducer, normalize_features
from metamorph_jax.types import Batch, Images

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """How images become visual tokens.

    Attributes:
        tower: a name in `vit.SIZES`, or "none": features come from a cache.
        tower_options: fields of `ViTConfig` to change.
        weights: of the tower: "random", "pkg:NAME", "hf:OWNER/NAME", or a folder.
        feature_width: C before the reduction, for a model without a tower.
        tokens: P, visual tokens per image; 0 and -1 as in `ReduceConfig`.
        reduction: how the tower's tokens become P, one of `reduce.KINDS`.
        normalize: scale every visual token to unit length.
        softmax: after that, softmax(x / 0.07) over the channels (parity option).
        dtype: that the tower computes in; visual tokens are float32.
        remat: recompute the tower's layers in the backward pass, where the tower is trained.

    Raises:
        ValueError: options don't exist or don't fit together.
    """

    tower: str = "siglip-so400m-384"
    tower_options: dict = dataclasses.field(default_factory=dict)
    weights: str = "random"
    feature_width: int = 0
    tokens: int = 64
    reduction: str = "interpolation"
    normalize: bool = True
    softmax: bool = False
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        known = ("none", *vit.SIZES)
        if self.tower not in known:
            raise ValueError(f"tower {self.tower!r} is none of {', '.join(known)}")
        if self.tower == "none" and not self.feature_width:
            raise ValueError("without a tower, feature_width must say how wide features are")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        self.reduce  # noqa: B018  checks tower_options, reduction and tokens

    @property
    def vit(self) -> vit.ViTConfig | None:
        """The tower's own config."""
        if self.tower == "none":
            return None
        changes = {"dtype": self.dtype, "remat": self.remat, **self.tower_options}
        return replaced(vit.SIZES[self.tower], changes, "tower_options")

    @property
    def reduce(self) -> ReduceConfig:
        tower = self.vit
        if tower is None:  # cached features are reduced already
            kind = "interpolation" if self.reduction == "mlpmixer" else self.reduction
            return ReduceConfig(self.tokens, kind, self.tokens, self.feature_width)
        return ReduceConfig(self.tokens, self.reduction, tower.tokens, tower.width)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, C) of one image; P is 0 where `tokens` is."""
        reduce = self.reduce
        return reduce.tokens_out, reduce.width_out

    @property
    def identity(self) -> str:
        """Text that differs whenever features differ: it names a feature cache.

        The preprocessing of images is not part of it, see `data.cache.feature_spec`.
        """
        tower = self.vit
        made_by = {} if tower is None else dataclasses.asdict(tower)
        made_by |= dataclasses.asdict(self.reduce)
        made_by |= {"weights": self.weights, "normalize": self.normalize, "softmax": self.softmax}
        made_by.pop("remat", None)  # changes no feature
        if not made_by.get("class_out"):  # so that caches of earlier versions stay valid
            made_by.pop("class_out", None)
        return json.dumps(made_by, sort_keys=True)


class VisionEncoder(nnx.Module):
    """Tower (None where features are cached), reduction and normalisation."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        tower = cfg.vit
        self.tower = None if tower is None else vit.ViT(tower, rngs=rngs)
        self.reducer = TokenReducer(cfg.reduce, rngs=rngs)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, C) of one image."""
        return self.cfg.feature_shape

    def __call__(
        self, pixels: jax.Array, side: int | None = None, *, train_tower: bool = False
    ) -> jax.Array:
        """float32[N, P, C] visual tokens of pixels: uint8[N, h, w, 3].

        Args:
            side: only where `tokens` is 0: the visual tokens form a grid of this side.
            train_tower: let gradients through to the tower; the reducer always has them.

        Raises:
            ValueError: there is no tower.
        """
        if self.tower is None:
            raise ValueError("this model has no tower: give it features in place of pixels")
        x = self.tower(pixels)
        if not train_tower:
            x = jax.lax.stop_gradient(x)
        return self.normalize(self.reducer(x, side))

    def read(self, images: Images, *, train_tower: bool = False) -> jax.Array:
        """float32[B, I * P, C] visual tokens of a batch, from its cached features or pixels."""
        B, I = images.valid.shape
        width = self.feature_shape[1]
        if images.features is not None:
            x = images.features.astype(jnp.float32)
            if x.shape[-1] != width:
                raise ValueError(f"features are {x.shape[-1]} wide, the model takes {width}")
        elif images.pixels is not None and I:
            pixels = images.pixels.reshape(B * I, *images.pixels.shape[2:])
            x = self(pixels, train_tower=train_tower)
        else:
            x = jnp.zeros((B, 0, width), jnp.float32)
        return x.reshape(B, -1, width)

    def normalize(self, features: jax.Array) -> jax.Array:
        """float32[..., C], normalised as visual tokens are, of float[..., C]."""
        return normalize_features(features, self.cfg.normalize, self.cfg.softmax)


def features_of(model: nnx.Module, batches: Sequence[Batch]) -> np.ndarray:
    """float32[N, C] the visual tokens of all images of some batches.

    Args:
        model: has `batch_features` (batch -> float32[B, I * P, C]).
    """
    graph, weights = nnx.split(model)
    compute = jax.jit(lambda weights, batch: nnx.merge(graph, weights).batch_features(batch))
    found = []
    for batch in batches:
        x = np.asarray(compute(weights, batch))
        x = x.reshape(*batch.images.valid.shape, -1, x.shape[-1])
        found.append(x[np.asarray(batch.images.valid)].reshape(-1, x.shape[-1]))
    return np.concatenate(found)


def work(model: nnx.Module, images: Images, train_tower: bool) -> tuple[Work, ...]:
    """The matrix products of tower and connector in a training step on these images.

    Args:
        model: has `visual_features` and `project`, the encoder as `vision` and a `connector`.
    """
    count = images.valid.shape[0] * images.valid.shape[1]
    if not count:
        return ()
    found = []
    if images.pixels is not None:
        one = jax.ShapeDtypeStruct((1, *images.pixels.shape[2:]), jnp.uint8)
        forward = count * flops.of_function(model, lambda m, x: m.visual_features(x), one)
        again = forward if train_tower and model.vision.tower.cfg.remat else 0.0
        found.append(Work("tower", forward, "vision.tower", int(train_tower), again))
    one = jax.ShapeDtypeStruct((1, *model.vision.feature_shape), jnp.float32)
    forward = count * flops.of_function(model, lambda m, x: m.project(x), one)
    return (*found, Work("connector", forward, "connector"))
