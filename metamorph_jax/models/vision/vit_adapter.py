"""ViT-Adapter: feature maps of four scales from a plain ViT (Chen et al. 2023, arXiv 2205.08534).

A small convolutional network reads the image beside the tower. Its maps, the spatial tokens, and
the tower's patch tokens exchange information in four stages by deformable attention:

    image ─ tower.embed ─ x ─ injector ─ layers ─ x ────── … ─ x4     tokens [class, x4]
                              ↑                   ↓ extractor
    image ─ spatial prior ─── c ───────────────── c ────── … ─ c ─┐
                └ map of stride 4 ─────────────────────────────── + x1..x4 ─ four maps

For a tower of g x g patches the maps have 4g, 2g, g and g/2 (rounded up) patches a side. The
tower may be frozen; gradients flow through it to the injectors. Its final norm is not applied.

Oddity of MM-Interleaved's release: its loader resets the offsets' biases, so that all points
start on the reference point; `star_offsets=False` does the same. The default is the star that the
paper (and Deformable DETR) starts from.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.vision.vit import ViT, ViTConfig, normalize_pixels
from metamorph_jax.nn import deformable, recompute
from metamorph_jax.nn.linear import flat_dot_general
from metamorph_jax.sharding import constrain

STAGES = 4
_zeros, _xavier = nnx.initializers.zeros_init(), nnx.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is built around a tower; widths and grid are the tower's.

    Attributes:
        heads: of the deformable attention; 0: as many as the tower has.
        points: sampled per head and level.
        value_ratio: width of the sampled values over the tower's width.
        mlp_ratio: hidden width of the extractors' MLP over the tower's width.
        prior_width: channels of the spatial prior's first map.
        star_offsets: start with the points spread around the reference point, each head in its own
            direction; False: all on it, as in MM-Interleaved's release.
        norm_eps: of the layer norms beside the attention.
        method: of `nn.deformable.sample`.
        remat: recompute injectors and extractors in the backward pass. The tower's own layers have
            `ViTConfig.remat`.
    """

    heads: int = 0
    points: int = 4
    value_ratio: float = 0.5
    mlp_ratio: float = 0.25
    prior_width: int = 64
    star_offsets: bool = True
    norm_eps: float = 1e-5
    method: str = "auto"
    remat: bool = False

    def __post_init__(self):
        heads = "heads" if self.heads else ""
        check_numbers(self, f"points prior_width {heads}", "value_ratio mlp_ratio norm_eps")

    def value_width(self, width: int, heads: int) -> int:
        """Width of all heads' values together, for a tower of this width."""
        found = int(width * self.value_ratio)
        if found % heads or not found:
            raise ValueError(
                f"value_ratio {self.value_ratio} of a tower {width} wide gives values {found} wide,"
                f" which don't divide over {heads} heads"
            )
        return found


# ---- tables, made while tracing


def sides(grid: int) -> tuple[int, ...]:
    """Side lengths of the four maps, finest first, for a tower of `grid` x `grid` patches."""
    return 4 * grid, 2 * grid, grid, -(-grid // 2)


def centres(*shapes: tuple[int, int]) -> np.ndarray:
    """Pixel centres (x, y) of maps [H, W], one after another, row by row: float32[sum H W, 2] in
    [0, 1]."""
    found = []
    for H, W in shapes:
        y, x = np.meshgrid((np.arange(H) + 0.5) / H, (np.arange(W) + 0.5) / W, indexing="ij")
        found.append(np.stack([x, y], -1).reshape(-1, 2))
    return np.concatenate(found).astype(np.float32)


def star(heads: int, levels: int, points: int) -> np.ndarray:
    """Offsets float32[heads * levels * points * 2] of Deformable DETR: head k looks along the
    angle 2 pi k / heads (largest coordinate 1), point j goes j + 1 steps."""
    angle = 2 * np.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    steps = np.arange(1, points + 1)
    offsets = direction[:, None, None] * steps[:, None]
    return np.broadcast_to(offsets, (heads, levels, points, 2)).astype(np.float32).reshape(-1)


def _bilinear(n: int, m: int) -> np.ndarray:
    """Weights float32[m, n] of torch's bilinear: half-pixel centres, clamped border, no
    antialiasing."""
    centre = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(n))).astype(np.float32)


def resize(x: jax.Array, side: int) -> jax.Array:
    """x: float[B, h, w, C], resized bilinearly to [B, side, side, C] as torch does without
    antialiasing (halving is a mean of 2 x 2)."""
    _, h, w, _ = x.shape
    if (h, w) == (side, side):
        return x
    rows, columns = (jnp.asarray(_bilinear(n, side), x.dtype) for n in (h, w))
    return jnp.einsum("ah,bhwc,dw->badc", rows, x, columns)


# ---- blocks


def _linear(d_in, d_out, names, dtype, rngs, **init):
    return nnx.Linear(
        d_in,
        d_out,
        dtype=dtype,
        dot_general=flat_dot_general,
        kernel_metadata={"logical": names},
        bias_metadata={"logical": (names[1],)},
        rngs=rngs,
        **init,
    )


def _norm(width, eps, dtype, rngs):
    """Layer norm over the channels, with statistics in float32."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


class DeformableAttention(nnx.Module):
    """Every query samples some points of each level, near its own reference point, and adds them up
    (Zhu et al. 2021, arXiv 2010.04159).

    Args:
        cfg: of the adapter.
        tower: around which it is built.
        queries: [H, W] of the maps that the queries form, one after another.
        levels: [H, W] of the maps that are sampled.
    """

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, queries, levels, *, rngs: nnx.Rngs):
        D, dtype = tower.width, jnp.dtype(tower.dtype)
        self.method = cfg.method
        self.heads, self.points = cfg.heads or tower.heads, cfg.points
        self.queries, self.levels = tuple(queries), tuple(levels)
        V = cfg.value_width(D, self.heads)
        count = self.heads * len(self.levels) * self.points
        offsets = star(self.heads, len(self.levels), self.points) * cfg.star_offsets
        # Where to look, and softmax, are float32 whatever the tower computes in.
        self.sampling_offsets = _linear(
            D, 2 * count, ("embed", "heads"), jnp.float32, rngs, kernel_init=_zeros,
            bias_init=lambda key, shape, dtype, sharding=None: jnp.asarray(offsets, dtype),
        )  # fmt: skip
        self.attention_weights = _linear(
            D, count, ("embed", "heads"), jnp.float32, rngs, kernel_init=_zeros
        )
        self.value_proj = _linear(D, V, ("embed", "heads"), dtype, rngs, kernel_init=_xavier)
        self.output_proj = _linear(V, D, ("heads", "embed"), dtype, rngs, kernel_init=_xavier)

    def sampling(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(locations float32[B, Q, h, levels, P, 2] as (x, y), weights float32[B, Q, h, levels, P])
        of queries: float[B, Q, D]."""
        B, Q, _ = queries.shape
        shape = (B, Q, self.heads, len(self.levels), self.points)
        # An offset of 1 is one pixel of the level that is sampled.
        scale = np.array([(W, H) for H, W in self.levels], np.float32)[:, None]
        offsets = self.sampling_offsets(queries).reshape(*shape, 2) / scale
        logits = self.attention_weights(queries).reshape(*shape[:3], -1)
        return centres(*self.queries)[:, None, None, None] + offsets, nnx.softmax(logits).reshape(
            shape
        )

    def __call__(self, queries, source):
        """float[B, Q, D] of queries: float[B, Q, D] and source: float[B, S, D], the tokens of all
        levels."""
        B, S, _ = source.shape
        values = self.value_proj(source).reshape(B, S, self.heads, -1)
        locations, weights = self.sampling(queries)
        found = deformable.sample(values, self.levels, locations, weights, method=self.method)
        return self.output_proj(found)


class Injector(nnx.Module):
    """Adds to the patch tokens what they find in the spatial tokens; at first nothing (gamma 0)."""

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, *, rngs: nnx.Rngs):
        D, dtype, grid = tower.width, jnp.dtype(tower.dtype), tower.grid
        levels = [(side, side) for side in sides(grid)[1:]]
        self.query_norm = _norm(D, cfg.norm_eps, dtype, rngs)
        self.feat_norm = _norm(D, cfg.norm_eps, dtype, rngs)
        self.attn = DeformableAttention(cfg, tower, [(grid, grid)], levels, rngs=rngs)
        self.gamma = nnx.Param(jnp.zeros(D), logical=("norm",))

    def __call__(self, x, c):
        """Like x: float[B, g * g, D], of x and the spatial tokens c: float[B, S, D]."""
        found = self.attn(self.query_norm(x), self.feat_norm(c))
        return x + self.gamma[...].astype(x.dtype) * found


class ConvMLP(nnx.Module):
    """An MLP with a depthwise 3x3 convolution in its middle, the same for all levels."""

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, *, rngs: nnx.Rngs):
        D, dtype = tower.width, jnp.dtype(tower.dtype)
        F = max(1, int(D * cfg.mlp_ratio))
        self.sides = sides(tower.grid)[1:]
        self.fc1 = _linear(D, F, ("embed", "mlp"), dtype, rngs)
        self.conv = nnx.Conv(
            F, F, (3, 3), padding=1, feature_group_count=F, dtype=dtype, rngs=rngs
        )  # fmt: skip
        self.fc2 = _linear(F, D, ("mlp", "embed"), dtype, rngs)

    def __call__(self, c):
        """Like c: float[B, S, D]."""
        maps = split_maps(self.fc1(c), self.sides)
        mixed = jnp.concatenate([_flat(self.conv(x)) for x in maps], axis=1)
        return self.fc2(nnx.gelu(mixed, approximate=False))


class Extractor(nnx.Module):
    """Updates the spatial tokens from the patch tokens, then by a `ConvMLP`."""

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, *, rngs: nnx.Rngs):
        D, dtype, grid = tower.width, jnp.dtype(tower.dtype), tower.grid
        queries = [(side, side) for side in sides(grid)[1:]]
        self.query_norm = _norm(D, cfg.norm_eps, dtype, rngs)
        self.feat_norm = _norm(D, cfg.norm_eps, dtype, rngs)
        self.attn = DeformableAttention(cfg, tower, queries, [(grid, grid)], rngs=rngs)
        self.ffn_norm = _norm(D, cfg.norm_eps, dtype, rngs)
        self.ffn = ConvMLP(cfg, tower, rngs=rngs)

    def __call__(self, x, c):
        """Like c: float[B, S, D], of the patch tokens x: float[B, g * g, D] and c."""
        c = c + self.attn(self.query_norm(c), self.feat_norm(x))
        c = c + self.ffn(self.ffn_norm(c))
        return constrain(c, "act_batch", None, "act_embed")


class Interaction(nnx.Module):
    """What stands around the tower's layers of one stage; the last one has more extractors."""

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, extra: int, *, rngs: nnx.Rngs):
        self.injector = Injector(cfg, tower, rngs=rngs)
        self.extractor = Extractor(cfg, tower, rngs=rngs)
        self.extra_extractors = nnx.List([Extractor(cfg, tower, rngs=rngs) for _ in range(extra)])


class ConvNorm(nnx.Module):
    """A 3x3 convolution, layer norm over the channels, ReLU."""

    def __init__(self, cin, cout, strides, dtype, rngs):
        self.conv = nnx.Conv(
            cin, cout, (3, 3), strides=strides, padding=1, use_bias=False, dtype=dtype,
            kernel_init=nnx.initializers.he_normal(), rngs=rngs,
        )  # fmt: skip
        self.norm = _norm(cout, 1e-6, dtype, rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class SpatialPrior(nnx.Module):
    """The convolutional network beside the tower: maps of strides 4, 8, 16 and 32."""

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, *, rngs: nnx.Rngs):
        c, D, dtype = cfg.prior_width, tower.width, jnp.dtype(tower.dtype)
        self.stem = nnx.List([
            ConvNorm(3, c, 2, dtype, rngs),
            ConvNorm(c, c, 1, dtype, rngs),
            ConvNorm(c, c, 1, dtype, rngs),
        ])  # fmt: skip
        widths = (c, 2 * c, 4 * c, 4 * c)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.halvings = nnx.List([ConvNorm(a, b, 2, dtype, rngs) for a, b in pairs])
        self.projections = nnx.List([
            nnx.Conv(width, D, (1, 1), dtype=dtype, rngs=rngs) for width in widths
        ])  # fmt: skip

    def __call__(self, x):
        """Four maps float[B, h, w, D], finest first, of x: float[B, H, W, 3]."""
        for layer in self.stem:
            x = layer(x)
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        found = [x]
        for layer in self.halvings:
            x = layer(x)
            found.append(x)
        return [project(x) for project, x in zip(self.projections, found, strict=True)]


class Doubling(nnx.Module):
    """A transposed 2x2 convolution of stride 2, as one product: every pixel becomes 2 x 2.

    The kernel's axes are (row, column, out, in), so that torch's layout is the usual permutation.
    """

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=3, out_axis=2, batch_axis=(0, 1))
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, width, width)))
        self.bias = nnx.Param(jnp.zeros(width))
        self.dtype = dtype

    def __call__(self, x):
        """float[B, 2h, 2w, C] of x: float[B, h, w, C]."""
        B, h, w, C = x.shape
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        x = jnp.einsum("bhwi,yxoi->bhywxo", x.astype(self.dtype), kernel)
        return x.reshape(B, 2 * h, 2 * w, C) + bias


def _flat(x):
    """[B, h * w, C] of a map [B, h, w, C]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def split_maps(tokens: jax.Array, sides: tuple[int, ...]) -> list[jax.Array]:
    """Square maps [B, h, w, C] of these sides from tokens [B, S, C], which hold them one after
    another."""
    B, S, C = tokens.shape
    ends = np.cumsum([side * side for side in sides])
    if S != ends[-1]:
        raise ValueError(f"{S} tokens are not maps of {sides} pixels a side ({ends[-1]})")
    parts = jnp.split(tokens, ends[:-1], axis=1)
    return [x.reshape(B, side, side, C) for x, side in zip(parts, sides, strict=True)]


# ---- the model


class ViTAdapter(nnx.Module):
    """A tower with its adapter.

    Args:
        cfg: of the adapter.
        tower: any tower. A class token stays in front of the patch tokens; registers are dropped.
    """

    def __init__(self, cfg: AdapterConfig, tower: ViTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.tower = ViT(tower, rngs=rngs)
        self.prior = SpatialPrior(cfg, tower, rngs=rngs)
        self.level_embed = nnx.Param(jnp.zeros((STAGES - 1, tower.width)), logical=(None, "embed"))
        extra = [0] * (STAGES - 1) + [2]
        self.interactions = nnx.List([Interaction(cfg, tower, n, rngs=rngs) for n in extra])
        self.up = Doubling(tower.width, jnp.dtype(tower.dtype), rngs)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side lengths of the four maps, finest first."""
        return sides(self.tower.cfg.grid)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(first, last + 1) of the tower's layers in each stage: quarters, as near as can be."""
        depth = self.tower.cfg.depth
        ends = [round(depth * k / STAGES) for k in range(STAGES + 1)]
        return list(zip(ends, ends[1:], strict=False))

    def read_prior(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(map of stride 4: float[B, 4g, 4g, D], spatial tokens float[B, S, D]) of normalised
        images."""
        tower = self.tower.cfg
        shown = tower.grid * tower.patch  # the tower cuts off a border narrower than a patch
        x = resize(pixels[:, :shown, :shown].astype(jnp.float32), 16 * tower.grid)
        finest, *rest = recompute.call(self.prior, self.cfg.remat, x.astype(tower.dtype))
        levels = self.level_embed[...].astype(finest.dtype)
        tokens = [_flat(x) + level for x, level in zip(rest, levels, strict=True)]
        return finest, jnp.concatenate(tokens, axis=1)

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Tokens and maps of images.

        Args:
            pixels: uint8[B, h, w, 3], or floats that are normalised already.

        Returns:
            (float[B, 1 + g * g, D] the class token, if the tower has one, and the patch tokens;
            four maps float[B, side, side, D], finest first), in the tower's dtype.
        """
        tower, remat = self.tower.cfg, self.cfg.remat
        pixels = normalize_pixels(pixels, tower.mean, tower.std)
        finest, c = self.read_prior(pixels)
        x = self.tower.embed(pixels)
        front, x = x[:, : tower.front], x[:, tower.front :]
        seen = []
        for part, (first, last) in zip(self.interactions, self.stages, strict=True):
            x = recompute.call(part.injector, remat, x, c)
            both = self.tower.run(jnp.concatenate([front, x], axis=1), first, last)
            front, x = both[:, : tower.front], both[:, tower.front :]
            for extractor in (part.extractor, *part.extra_extractors):
                c = recompute.call(extractor, remat, x, c)
            seen += split_maps(x, (tower.grid,))
        maps = split_maps(c, self.sides[1:])
        maps = [self.up(maps[0]) + finest, *maps]
        maps = [c + resize(x, side) for c, x, side in zip(maps, seen, self.sides, strict=True)]
        tokens = jnp.concatenate([front[:, : tower.class_token], x], axis=1)
        return tokens, tuple(constrain(x, "act_batch", None, None, "act_embed") for x in maps)
