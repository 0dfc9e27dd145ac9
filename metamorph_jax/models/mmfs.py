"""MMFS, the multi-image multi-scale feature synchroniser of MM-Interleaved (arXiv 2401.10208).

Deformable attention from any sequence of queries to the feature maps of several images: every query
samples a few points of every level of every image that it may see, and one softmax weighs all of
them together. It stands in the layers of the language model (`LLMBlock`) and on the skips of the
image decoder's UNet.

    mask of a query over images    0  1  1  0  1        hidden images count as absent
    relative index                 0  3  2  0  1        1 is the latest visible image

Oddities, all of the reference, whose weights depend on them:

* The query of an image is `A q + table[relative index]`. Offsets and logits are linear in it, so
  they are computed once per query and once per row of the table, and added.
* Offsets are in cells of a base grid and shared by all levels: where a level has its nominal side,
  all levels are sampled at the same point.
* The last logit of every image and level is overwritten with -ln(images * levels), for hidden
  images, too. Together these slots have the mass e^0 = 1, whatever the number of images: a query
  that sees nothing gives all its weight to the ignore token. The rows of `attention_weights` that
  they come from are never used, and kept because published weights have them.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.nn.deformable import sample
from metamorph_jax.nn.linear import gathering_dot_general
from metamorph_jax.nn.norms import RMSNorm
from metamorph_jax.sharding import constrain, platform

Shapes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class MMFSConfig:
    """Structure of a module; the defaults are those of MM-Interleaved's language model.

    Attributes:
        width: D_q of the queries.
        value_width: D_v channels of the feature maps.
        out_width: of what comes out.
        inner_width: h * d, of the projected values (`ratio * d_model` in the reference).
        heads: h; points: P samples of each level for a head.
        sides: nominal side of each level, finest first.
        base: side of the grid in whose cells offsets are measured.
        relative_rows: R, one more than the most images that a query may see.
        recent: a query samples at most so many of its latest visible images; 0: all of them. The
            same numbers as with 0 where no query sees more, at a share of the reads (the method
            "dense" reads whole maps of all images anyway).
        init: of query map and logits: "normal" with standard deviation 0.02, or "uniform" between
            ± 1 / sqrt(D_q), as in the UNet.
        offset_range: biases of the offsets start uniformly between ± this.
        method: of `nn.deformable.sample`.
        dtype: of the computation; locations and softmax are float32.
    """

    width: int = 5120
    value_width: int = 1024
    out_width: int = 5120
    inner_width: int = 1024
    heads: int = 16
    points: int = 8
    sides: tuple[int, ...] = (32, 16, 8)
    base: int = 16
    relative_rows: int = 50
    recent: int = 0
    init: str = "normal"
    offset_range: float = 3.0
    method: str = "auto"
    dtype: str = "float32"

    def __post_init__(self):
        check_numbers(
            self,
            "width value_width out_width inner_width heads points base relative_rows",
            "offset_range",
        )
        if self.inner_width % self.heads:
            raise ValueError(f"inner_width {self.inner_width} doesn't divide over {self.heads}")
        if self.init not in ("normal", "uniform"):
            raise ValueError(f"init {self.init!r} is none of normal, uniform")
        if not 0 <= self.recent < self.relative_rows:
            raise ValueError(f"recent {self.recent} needs more than {self.relative_rows} rows")

    @property
    def levels(self) -> int:
        return len(self.sides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Values:
    """Projected feature maps of images, computed once per image.

    Attributes:
        array: float[B, M, T, h * d] the levels of an image one after another, row by row.
        shapes: (height, width) of each level; static.
    """

    array: jax.Array
    shapes: Shapes = dataclasses.field(metadata={"static": True})


def relative_index(mask: jax.Array) -> jax.Array:
    """int32[..., M] of bool[..., M]: 1 for the latest visible image, 2 before it; 0 for hidden."""
    seen = mask.astype(jnp.int32)
    return seen * (seen.sum(-1, keepdims=True) + 1 - jnp.cumsum(seen, axis=-1))


def with_ignored(logits: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the samples of all visible images beside ignore slots of mass 1.

    Args:
        logits: float32[B, Q, M, h, levels * P].
        mask: bool[B, Q, M].

    Returns:
        (weights as logits, weight of the ignore slots float32[B, Q, h]).
    """
    logits = jnp.where(mask[..., None, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max((2, 4), keepdims=True, initial=0.0))
    mass, ignored = jnp.exp(logits - top), jnp.exp(-top)
    total = mass.sum((2, 4), keepdims=True) + ignored
    return mass / total, (ignored / total)[:, :, 0, :, 0]


def centres(height: int, width: int) -> np.ndarray:
    """float32[1, h * w, 1, 2] reference points: (x, y) of the pixel centres of a grid."""
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    points = np.stack([(x + 0.5) / width, (y + 0.5) / height], -1)
    return points[None, :, None].astype(np.float32)


class MMFS(nnx.Module):
    """Parameters have their published names and shapes; `scale_ratios`, sides / base, is none."""

    def __init__(self, cfg: MMFSConfig, *, rngs: nnx.Rngs):
        D, inner, h = cfg.width, cfg.inner_width, cfg.heads
        normal = nnx.initializers.normal(0.02)
        query = normal if cfg.init == "normal" else _uniform(D**-0.5)
        xavier = nnx.initializers.xavier_uniform()
        self.cfg = cfg
        make = partial(_linear, jnp.dtype(cfg.dtype), rngs)
        self.dynamic_offset_mask = make(D, D, ("embed", "mlp"), query)  # the query map A
        self.query_relpos = nnx.Embed(
            cfg.relative_rows, D, embedding_init=nnx.initializers.truncated_normal(0.02),
            embedding_metadata={"logical": ("added", "mlp")}, rngs=rngs,
        )  # fmt: skip
        # Their products over "mlp" are summed over the devices, then cut by heads.
        self.sampling_offsets = make(
            D, h * cfg.points * 2, ("mlp", "embed"), nnx.initializers.zeros,
            bias=_uniform(cfg.offset_range),
        )  # fmt: skip
        slots = cfg.levels * (cfg.points + 1)
        self.attention_weights = make(D, h * slots, ("mlp", "embed"), query)
        self.value_proj = make(cfg.value_width, inner, ("embed", "heads"), xavier)
        self.output_proj = make(inner, cfg.out_width, ("heads", "embed"), xavier)
        self.ignore_token = nnx.Param(jnp.zeros((1, 1, 1, inner)), logical=(*[None] * 3, "heads"))

    def project(self, maps: tuple[jax.Array, ...]) -> Values:
        """What queries sample, of the maps of images.

        Args:
            maps: one for each level, finest first, each float[B, M, h, w, D_v].
        """
        if len(maps) != self.cfg.levels:
            raise ValueError(f"{len(maps)} maps, but the module has {self.cfg.levels} levels")
        flat = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in maps]
        array = self.value_proj(jnp.concatenate(flat, axis=2))
        return Values(array, tuple((x.shape[2], x.shape[3]) for x in maps))

    def __call__(self, queries, values: Values | None, mask, reference=None) -> jax.Array:
        """float[B, Q, out] of queries float[B, Q, D_q].

        Args:
            values: of M images a row, in their order; see `project`. None: there are no images.
            mask: bool[B, Q, M] or [B, M], which images a query sees: fewer than R.
            reference: float32[1 or B, 1 or Q, 1 or levels, 2] points (x, y) in [0, 1] that offsets
                start from; None: the middle of the image.
        """
        token = self.ignore_token[0, 0].astype(self.cfg.dtype)
        if values is None or not values.array.shape[1]:
            mixed = jnp.broadcast_to(token, (*queries.shape[:2], token.shape[-1]))
        else:
            mixed, ignored = self._mix(queries, values, mask, reference)
            shares = jnp.repeat(ignored, token.shape[-1] // self.cfg.heads, axis=-1)
            mixed += shares.astype(mixed.dtype) * token
        return self.output_proj(constrain(mixed, "act_batch", "act_len", "act_heads"))

    def _mix(self, queries, values: Values, mask, reference):
        """(float[B, Q, h * d] of what is sampled, weight of the ignore token float32[B, Q, h])."""
        M, K, method = values.array.shape[1], self.cfg.recent, self.cfg.method
        mask, relative = self._seen(queries, mask, M)
        array, shapes, slots = values.array, values.shapes * M, None
        if method == "auto":
            method = "dense" if platform() == "tpu" else "gather"
        if 0 < K < M and method == "gather":  # products with whole maps would save nothing
            slots, mask, relative = latest(mask, relative, K)
        found = self._samples(queries, values.shapes, mask, relative, reference)
        locations, weights, ignored = found
        if slots is not None:
            array, shapes = stacked(values)
            locations = on_stacked(locations, slots, values.shapes, M)
            weights = weights.reshape(*weights.shape[:3], K, -1, weights.shape[-1])
            weights = jnp.moveaxis(weights, 3, 4).reshape(*locations.shape[:-1])
        array = array.reshape(len(queries), -1, self.cfg.heads, array.shape[-1] // self.cfg.heads)
        array = constrain(array, "act_batch", None, "act_heads", None)
        locations = constrain(locations, "act_batch", "act_len", "act_heads", None, None, None)
        return sample(array, shapes, locations, weights, method=method), ignored

    def samples(self, queries, values: Values, mask, reference=None):
        """Where each query samples, and with which weights; arguments as of a call.

        Returns:
            (locations float32[B, Q, h, M * levels, P, 2], an image's levels after one another;
            weights float32[B, Q, h, M * levels, P]; that of the ignore token float32[B, Q, h]).
        """
        mask, relative = self._seen(queries, mask, values.array.shape[1])
        return self._samples(queries, values.shapes, mask, relative, reference)

    def _seen(self, queries, mask, images: int):
        """(which images each query samples bool[B, Q, M], their relative index int32[B, Q, M])."""
        shape = (*queries.shape[:2], images)
        mask = jnp.broadcast_to(mask if mask.ndim == 3 else mask[:, None], shape) != 0
        relative = relative_index(mask)
        return mask & (relative <= self.cfg.recent) if self.cfg.recent else mask, relative

    def _samples(self, queries, shapes: Shapes, mask, relative, reference):
        """`samples` of images with these mask and relative index, [B, Q, M] each."""
        cfg, pairs = self.cfg, relative.shape
        a = self.dynamic_offset_mask(queries)
        offsets = self._of_pairs(self.sampling_offsets, a, relative)
        offsets = offsets.reshape(*pairs, cfg.heads, 1, cfg.points, 2)
        logits = self._of_pairs(self.attention_weights, a, relative)
        logits = logits.reshape(*pairs, cfg.heads, cfg.levels, cfg.points + 1)[..., :-1]
        weights, ignored = with_ignored(logits.reshape(*pairs, cfg.heads, -1), mask)
        locations = self._locations(offsets, shapes, reference)
        return _by_head(locations), _by_head(weights.reshape(logits.shape)), ignored

    def _of_pairs(self, linear, a, relative):
        """float32[B, Q, M, out] of `linear(a + table[relative])`, a: float[B, Q, D_q]."""
        table = self.query_relpos.embedding[...].astype(a.dtype)
        bias = linear.bias[...].astype(jnp.float32)
        if relative.size < len(table):  # few pairs, as in decoding
            return _wide(linear, a[:, :, None] + table[relative]) + bias
        return (_wide(linear, a) + bias)[:, :, None] + _wide(linear, table)[relative]

    def _locations(self, offsets, shapes: Shapes, reference):
        """float32[B, Q, M, h, levels, P, 2] of offsets float32[B, Q, M, h, 1, P, 2]."""
        sizes = np.array([(w, h) for h, w in shapes], np.float32)
        scale = np.array(self.cfg.sides, np.float32)[:, None] / np.float32(self.cfg.base)
        offsets = offsets * (scale / sizes)[:, None]
        if reference is None:
            return 0.5 + offsets
        reference = jnp.asarray(reference, jnp.float32)
        return reference[:, :, None, None, :, None] + offsets


# ---- only the latest images of each query


def latest(mask, relative, count: int):
    """(slots int32, mask, relative index), each [B, Q, count]: a query's latest visible images."""
    age = jnp.where(mask, relative, mask.shape[-1] + 1)
    slots = jnp.argsort(age, axis=-1)[..., :count]
    take = partial(jnp.take_along_axis, indices=slots, axis=-1)
    return slots, take(mask), take(relative)


def stacked(values: Values) -> tuple[jax.Array, Shapes]:
    """The images of a row as one, below each other, so that every query can sample others.

    Returns:
        (float[B, S, h * d], shape of each level): a row of zeros is below each image.
    """
    B, M, _, inner = values.array.shape
    shapes = values.shapes
    ends = np.cumsum([h * w for h, w in shapes])[:-1]
    maps = [
        jnp.pad(x, ((0, 0), (0, 0), (0, w), (0, 0))).reshape(B, -1, inner)
        for x, (h, w) in zip(jnp.split(values.array, ends, axis=2), shapes, strict=True)
    ]
    return jnp.concatenate(maps, axis=1), tuple((M * (h + 1), w) for h, w in shapes)


def on_stacked(locations, slots, shapes: Shapes, images: int):
    """Locations on the maps of `stacked`: float32[B, Q, h, levels, K * P, 2].

    Args:
        locations: float32[B, Q, h, K * levels, P, 2] on the images themselves.
        slots: int32[B, Q, K] which these are, of so many `images`.
    """
    *lead, _, P, _ = locations.shape
    K = slots.shape[-1]
    height = np.array([h for h, _ in shapes], np.float32)[:, None]
    x, y = jnp.moveaxis(locations.reshape(*lead, K, len(shapes), P, 2), -1, 0)
    # One row beyond its image a point reads only zeros, as it would further out.
    pixel = jnp.clip(y * height - 0.5, -1, height) + 0.5
    y = (slots[:, :, None, :, None, None] * (height + 1) + pixel) / (images * (height + 1))
    points = jnp.moveaxis(jnp.stack([x, y], -1), 3, 4)
    return points.reshape(*lead, len(shapes), K * P, 2)


class LLMBlock(nnx.Module):
    """What MMFS adds to the residual stream of a language model's layer, between its attention and
    its MLP: `tanh(gate) * MMFS(norm1(x), norm2(maps))`; the gate starts at 0.

    See `models.llm.llama.Insert`, which it is made for.
    """

    def __init__(self, cfg: MMFSConfig, norm_eps: float = 1e-6, *, rngs: nnx.Rngs):
        self.gate = nnx.Param(jnp.zeros(1), logical=("norm",))
        self.norm1 = RMSNorm(cfg.width, norm_eps, rngs=rngs)
        self.norm2 = RMSNorm(cfg.value_width, norm_eps, rngs=rngs)
        self.attn = MMFS(cfg, rngs=rngs)

    def project(self, maps: tuple[jax.Array, ...]) -> Values:
        """See `MMFS.project`."""
        dtype = jnp.dtype(self.attn.cfg.dtype)
        return self.attn.project(tuple(self.norm2(x.astype(dtype)) for x in maps))

    def __call__(self, x: jax.Array, values: Values | None, visible) -> jax.Array:
        """float[B, L, D] to be added to x: float[B, L, D]; visible: bool[B, L, M]."""
        added = jnp.tanh(self.gate[...]) * self.attn(self.norm1(x), values, visible)
        return added.astype(x.dtype)

    @staticmethod
    def products(cfg: MMFSConfig, positions: int, images: int) -> float:
        """See `products`."""
        return products(cfg, positions, images)


def products(cfg: MMFSConfig, positions: int, images: int) -> float:
    """FLOPs of a module's forward products on so many queries and images.

    Sampling is not counted: its arithmetic depends on the method.
    """
    slots = cfg.heads * (2 * cfg.points + cfg.levels * (cfg.points + 1))
    query = cfg.width * (cfg.width + slots) + cfg.inner_width * cfg.out_width
    value = cfg.value_width * cfg.inner_width * sum(side * side for side in cfg.sides)
    return 2.0 * (positions * query + cfg.relative_rows * cfg.width * slots + images * value)


def _by_head(x):
    """[B, Q, h, M * levels, ...] of [B, Q, M, h, levels, ...]."""
    B, Q, M, h, levels = x.shape[:5]
    return jnp.moveaxis(x, 3, 2).reshape(B, Q, h, M * levels, *x.shape[5:])


def _uniform(scale: float):
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(
        key, shape, dtype, -scale, scale
    )


def _linear(dtype, rngs, d_in, d_out, names, kernel, bias=nnx.initializers.zeros):
    return nnx.Linear(
        d_in, d_out, kernel_init=kernel, bias_init=bias, dtype=dtype,
        dot_general=partial(gathering_dot_general, names),
        kernel_metadata={"logical": names}, bias_metadata={"logical": ("norm",)}, rngs=rngs,
    )  # fmt: skip


def _wide(linear, x):
    """float32[..., out] of x without the bias: locations in bfloat16 would be a pixel off."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    kernel = linear.kernel[...].astype(x.dtype)
    return linear.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)
