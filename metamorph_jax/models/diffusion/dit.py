"""A small transformer denoiser for small images or latents, conditioned in context.

Scalable Diffusion Models with Transformers (Peebles & Xie 2023), with two changes: the conditioning
tokens precede the patches in one sequence, and their mean joins the time embedding in the
adaptive norms. Matrix products only, which is what CPUs and TPUs are best at.

    [context tokens | patches] -> depth x (attention, MLP; shift, scale and gate from t and context)
                               -> the patches' part -> pixels
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.models.diffusion.blocks import linear, zeros
from metamorph_jax.models.diffusion.unet import time_features
from metamorph_jax.nn.attention import attend
from metamorph_jax.types import Conditioning


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Structure of the denoiser; `sample_size` is the side of its (square) input.

    Attributes:
        grid_context: the context is a square grid of tokens over the image; it is enlarged to the
            patch grid and added there instead of being part of the sequence.
        local: a patch is embedded with its eight neighbours, and every block starts with a
            depthwise 3x3 convolution on the patch grid. Short trainings need it: without it the
            patches of a nearly empty image decide one by one whether something stands there.
    """

    sample_size: int = 64
    in_channels: int = 3
    out_channels: int = 3
    patch: int = 4
    width: int = 384
    depth: int = 8
    num_heads: int = 6
    mlp_ratio: int = 4
    cross_attention_dim: int = 768
    num_context: int = 77
    grid_context: bool = False
    local: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.sample_size % self.patch:
            raise ValueError(f"DiT: sample_size {self.sample_size} is not a multiple of patch "
                             f"{self.patch}")  # fmt: skip
        if self.grid_context:
            side, context = self.sample_size // self.patch, math.isqrt(self.num_context)
            if context**2 != self.num_context or side % context:
                raise ValueError(f"DiT: num_context {self.num_context} is not a square whose side "
                                 f"divides the {side} patches of a side")  # fmt: skip
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"DiT: width {self.width} is not a multiple of 4 and of num_heads "
                             f"{self.num_heads}")  # fmt: skip

    @classmethod
    def tiny(cls, **kw):
        size = dict(
            sample_size=8, patch=2, width=32, depth=2, num_heads=2, cross_attention_dim=32,
            num_context=4,
        )  # fmt: skip
        return cls(**(size | kw))


def grid_features(side: int, width: int) -> np.ndarray:
    """Fixed sine and cosine features of the two coordinates: float32[side * side, width]."""
    freq = 1.0 / 100.0 ** (np.arange(width // 4) / (width // 4))
    angle = np.arange(side)[:, None] * freq
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    row, column = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    return np.concatenate([row, column], axis=1).astype(np.float32)


def _pad(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _shifted(padded, number):
    """One of the nine 3x3 neighbours of every position of float[B, h, w, c], which is padded."""
    B, h, w, c = padded.shape
    return jax.lax.dynamic_slice(padded, (0, number // 3, number % 3, 0), (B, h - 2, w - 2, c))


def with_neighbours(x):
    """float[B, h, w, 9 c]: every position and its eight neighbours, by rows, zeros outside."""
    # A loop, because XLA's CPU backend would compute x anew for each of nine slices.
    padded = _pad(x)
    parts = jax.lax.map(lambda number: _shifted(padded, number), jnp.arange(9))
    return jnp.moveaxis(parts, 0, 3).reshape(*x.shape[:3], -1)


@jax.custom_vjp
def depthwise(x, kernel):
    """Depthwise 3x3 convolution of float[B, h, w, c], zeros outside; kernel: float[9, c], by rows.

    The gradient of x is one, too; left to itself, XLA adds nine padded arrays, which CPUs do
    slowly.
    """
    padded = _pad(x)
    return sum(_shifted(padded, number) * kernel[number] for number in range(9))


def _depthwise_backward(saved, gradient):
    x, kernel = saved
    padded = _pad(x)

    def tap(number):
        return jnp.sum(gradient * _shifted(padded, number), axis=(0, 1, 2))

    return depthwise(gradient, kernel[::-1]), jax.lax.map(tap, jnp.arange(9))


depthwise.defvjp(lambda x, kernel: (depthwise(x, kernel), (x, kernel)), _depthwise_backward)


def _norm(x):
    """Layer norm without weights; the adaptive scale and shift take their place."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    var = jnp.square(x32 - mean).mean(-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(var + 1e-6)).astype(x.dtype)


def _mean(context, mask):
    """float[B, D]: the mean over the valid tokens of float[B, P, D]; 0 where there are none."""
    if mask is None:
        return context.mean(axis=1)
    total = jnp.where(mask[..., None], context, 0.0).sum(axis=1)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(context.dtype)


class Block(nnx.Module):
    def __init__(self, cfg: DiTConfig, rngs):
        width, dtype = cfg.width, cfg.dtype
        self.heads = cfg.num_heads
        self.side = cfg.sample_size // cfg.patch
        if cfg.local:
            init = nnx.initializers.normal(0.1)
            self.depthwise = nnx.Param(init(rngs.params(), (9, width)))
        self.modulation = linear(width, 6 * width, rngs, dtype, kernel_init=zeros)
        self.qkv = linear(width, 3 * width, rngs, dtype)
        self.proj = linear(width, width, rngs, dtype)
        self.fc1 = linear(width, cfg.mlp_ratio * width, rngs, dtype)
        self.fc2 = linear(cfg.mlp_ratio * width, width, rngs, dtype)

    def __call__(self, x, cond, mask=None):
        """x: float[B, L, D]; cond: float[B, D]; mask: bool[B, L, L] or None."""
        B, L, D = x.shape
        if hasattr(self, "depthwise"):
            patches = x[:, L - self.side**2 :].reshape(B, self.side, self.side, D)
            mixed = depthwise(patches, self.depthwise[...].astype(x.dtype)).reshape(B, -1, D)
            x = x + jnp.pad(mixed, ((0, 0), (L - self.side**2, 0), (0, 0)))
        parts = jnp.split(self.modulation(nnx.silu(cond))[:, None], 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = self.qkv(_norm(x) * (1 + scale1) + shift1)
        q, k, v = (y.reshape(B, L, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        q, k = _norm(q), _norm(k)
        y = attend(q, k, v, mask).reshape(B, L, D)
        x = x + (1 + gate1) * self.proj(y)
        y = self.fc2(nnx.gelu(self.fc1(_norm(x) * (1 + scale2) + shift2)))
        return x + (1 + gate2) * y


class DiT(nnx.Module):
    """Called as the UNet is: (x, t, condition) -> prediction."""

    def __init__(self, cfg: DiTConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        D, dtype = cfg.width, cfg.dtype
        pixels = cfg.patch * cfg.patch
        self.embed = linear((9 if cfg.local else 1) * pixels * cfg.in_channels, D, rngs, dtype)
        self.context_embed = linear(cfg.cross_attention_dim, D, rngs, dtype)
        spread = nnx.initializers.normal(0.02)
        if not cfg.grid_context:
            self.context_position = nnx.Param(spread(rngs.params(), (cfg.num_context, D)))
        self.time_1 = linear(D, D, rngs, dtype)
        self.time_2 = linear(D, D, rngs, dtype)
        self.pool = linear(cfg.cross_attention_dim, D, rngs, dtype)
        self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.depth)])
        self.modulation = linear(D, 2 * D, rngs, dtype, kernel_init=zeros)
        self.out = linear(D, pixels * cfg.out_channels, rngs, dtype, kernel_init=zeros)

    def prepare(self, condition: Conditioning) -> Conditioning:
        """The condition itself: nothing here can be computed once for all steps of sampling.

        Raises:
            ValueError: for feature maps, which nothing here reads.
        """
        if condition.maps:
            raise ValueError("DiT reads no feature maps (Conditioning.maps)")
        return condition

    def __call__(self, x, t, condition: Conditioning):
        """The prediction, float32[B, h, w, c].

        Args:
            x: float[B, h, w, c].
            t: [B] or a scalar.
            condition: context float[B, P, D].
        """
        cfg = self.cfg
        condition = self.prepare(condition)
        context, mask = condition.context, condition.mask
        P = context.shape[1]
        if P > cfg.num_context:
            raise ValueError(f"DiT: {P} context tokens, num_context is {cfg.num_context}")
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        context = context.astype(cfg.dtype)
        time = self.time_2(nnx.silu(self.time_1(time_features(t, cfg.width).astype(cfg.dtype))))
        cond = time + self.pool(_mean(context, mask))
        side = cfg.sample_size // cfg.patch
        patches = space_to_depth(x.astype(cfg.dtype), cfg.patch)
        if cfg.local:
            patches = with_neighbours(patches)
        patches = self.embed(patches).reshape(len(x), side * side, cfg.width)
        y = patches + jnp.asarray(grid_features(side, cfg.width), cfg.dtype)
        place = self.context_embed(context)
        if mask is not None:
            place = jnp.where(mask[..., None], place, 0.0)
        if cfg.grid_context:
            grid = math.isqrt(P)
            place = place.reshape(len(x), grid, grid, cfg.width)
            place = jnp.repeat(jnp.repeat(place, side // grid, axis=1), side // grid, axis=2)
            y, P, mask = y + place.reshape(y.shape), 0, None
        else:
            position = self.context_position[...][:P].astype(cfg.dtype)
            y = jnp.concatenate([place + position, y], axis=1)
        if mask is not None:  # over the whole sequence
            seen = jnp.pad(mask, ((0, 0), (0, side * side)), constant_values=True)
            mask = jnp.broadcast_to(seen[:, None], (len(x), P + side * side, P + side * side))
        for block in self.blocks:
            y = block(y, cond, mask)
        shift, scale = jnp.split(self.modulation(nnx.silu(cond))[:, None], 2, axis=-1)
        y = self.out(_norm(y[:, P:]) * (1 + scale) + shift)
        return depth_to_space(y.reshape(len(x), side, side, -1), cfg.patch).astype(jnp.float32)


def space_to_depth(x, p: int):
    """float[B, h, w, c] -> float[B, h/p, w/p, p*p*c]."""
    B, h, w, c = x.shape
    x = x.reshape(B, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h // p, w // p, p * p * c)


def depth_to_space(x, p: int):
    """The inverse of `space_to_depth`."""
    B, h, w, c = x.shape
    x = x.reshape(B, h, w, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * p, w * p, c // (p * p))
