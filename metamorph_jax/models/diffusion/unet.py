"""The denoising UNet of Stable Diffusion 1.5 and 2.1 (`UNet2DConditionModel`), channels last.

High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al. 2022), appendix E.

    down   conv_in, down_blocks (resnets + cross attention, halving), whose maps are the skips
    mid    mid_block
    up     up_blocks (each takes its skips), conv_norm_out, silu, conv_out

A model that edits the skips or the middle (MM-Interleaved's does) calls the three in turn.
Oddity kept from the published configurations: their `attention_head_dim` is the NUMBER of heads.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.diffusion import blocks
from metamorph_jax.models.diffusion.blocks import (
    Downsample2D,
    GroupNorm,
    LayerNorm,
    Nothing,
    ResnetBlock2D,
    Upsample2D,
    attend,
    conv,
    linear,
    over_batch,
)
from metamorph_jax.nn import recompute
from metamorph_jax.types import Conditioning

_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)

# Fields of the library's config.json with the values that this module supports.
_ACCEPTED = {
    "center_input_sample": (False,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,), "downsample_padding": (1,), "mid_block_scale_factor": (1,),
    "dropout": (0.0,), "act_fn": ("silu",), "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "dual_cross_attention": (False,), "class_embed_type": (None,),
    "addition_embed_type": (None,), "addition_time_embed_dim": (None,), "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,), "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,), "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,), "addition_embed_type_num_heads": (64,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Structure of the UNet; `num_heads` has one entry per level.

    With `remat` the backward pass computes the inner values of every residual block and transformer
    again: slower by a third, with a fraction of the memory.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = _CROSS_DOWN
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    upcast_attention: bool = False  # only for exports: logits are always float32 here
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_numbers(
            self,
            "sample_size in_channels out_channels layers_per_block cross_attention_dim"
            " norm_num_groups block_out_channels num_heads",
            "norm_eps",
        )
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "num_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"UNet config: {name} needs {levels} entries, one per level")
        known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        for name in ("down_block_types", "up_block_types"):
            if odd := set(getattr(self, name)) - known:
                raise ValueError(f"UNet config: {name} has unsupported {sorted(odd)}")

    @classmethod
    def tiny(cls, **kw):
        """Two levels of 32 and 64 channels: for tests."""
        size = dict(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), num_heads=(2, 2),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
        )  # fmt: skip
        return cls(**(size | kw))

    @classmethod
    def small(cls, **kw):
        """92 M parameters for 32x32 latents: the benchmark's size."""
        size = dict(sample_size=32, block_out_channels=(128, 256, 384, 384))
        return cls(**(size | kw))

    @classmethod
    def sd15(cls, **kw):
        return cls(**kw)

    @classmethod
    def sd21(cls, **kw):
        size = dict(
            sample_size=96, cross_attention_dim=1024, num_heads=(5, 10, 20, 20),
            use_linear_projection=True, upcast_attention=True,
        )  # fmt: skip
        return cls(**(size | kw))

    @classmethod
    def from_dict(cls, fields: dict, dtype: str = "float32"):
        """Reads the library's config.json; anything that is not implemented is an error."""
        own = {f.name for f in dataclasses.fields(cls)} - {"num_heads", "dtype", "remat"}
        read = own | {"attention_head_dim", "num_attention_heads"}
        blocks.require("UNet2DConditionModel", fields, _ACCEPTED, read)
        kw = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in own}
        kw["upcast_attention"] = bool(fields.get("upcast_attention"))
        levels = len(kw.get("block_out_channels", cls.block_out_channels))
        heads = fields.get("num_attention_heads") or fields.get("attention_head_dim", 8)
        per_level = tuple(heads) if isinstance(heads, list | tuple) else (heads,) * levels
        return cls(**kw, num_heads=per_level, dtype=dtype)


def _ignore(name, value):
    pass


def time_frequencies(count: int, freq_shift: float = 0) -> np.ndarray:
    """Radians per timestep: float32[count], from 1 down to nearly 1 / 10000.

    A table made while tracing, with every step rounded to float32 as the library does it; the
    exponential is taken in float64 and then rounded. XLA's own float32 `exp` may be off by more
    than a rounding, which shows at timestep 999.
    """
    exponents = np.float32(-math.log(10000.0)) * np.arange(count, dtype=np.float32)
    exponents /= np.float32(count - freq_shift)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def time_features(t, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0):
    """Sinusoidal features of the timestep. t: float[B]; returns float32[B, width]."""
    freq = time_frequencies(width // 2, freq_shift)
    angle = t.astype(jnp.float32)[:, None] * freq
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class Reader:
    """The share of a prepared condition that one part of the UNet reads.

    pairs: iterator of keys and values, a pair for each cross attention in the order of their use.
    mask: bool[B, P] or None.
    """

    def __init__(self, condition: Conditioning, part: str):
        self.pairs, self.mask = iter(condition.context[part]), condition.mask

    def next(self):
        """(keys and values, mask) of the next cross attention."""
        return next(self.pairs), self.mask


class TimestepEmbedding(nnx.Module):
    def __init__(self, width, hidden, dtype, rngs):
        self.linear_1 = linear(width, hidden, rngs, dtype)
        self.linear_2 = linear(hidden, hidden, rngs, dtype)

    def __call__(self, x):
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Attention(nnx.Module):
    """Multi-head attention from x to itself, or to a context by its keys and values."""

    def __init__(self, width, context_width, heads, dtype, rngs):
        self.heads = heads
        self.to_q = linear(width, width, rngs, dtype, bias=False)
        self.to_k = linear(context_width, width, rngs, dtype, bias=False)
        self.to_v = linear(context_width, width, rngs, dtype, bias=False)
        self.to_out = nnx.List([linear(width, width, rngs, dtype)])

    def keys_values(self, context):
        return self.to_k(context), self.to_v(context)

    def __call__(self, x, keys_values=None, mask=None):
        k, v = keys_values or self.keys_values(x)
        return self.to_out[0](attend(self.to_q(x), k, v, self.heads, mask))


class GEGLU(nnx.Module):
    def __init__(self, width, hidden, dtype, rngs):
        self.proj = linear(width, 2 * hidden, rngs, dtype)

    def __call__(self, x):
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * nnx.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, width, dtype, rngs):
        out = linear(4 * width, width, rngs, dtype)
        self.net = nnx.List([GEGLU(width, 4 * width, dtype, rngs), Nothing(), out])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    def __init__(self, width, context_width, heads, dtype, rngs):
        self.norm1 = LayerNorm(width, rngs, dtype)
        self.attn1 = Attention(width, width, heads, dtype, rngs)
        self.norm2 = LayerNorm(width, rngs, dtype)
        self.attn2 = Attention(width, context_width, heads, dtype, rngs)
        self.norm3 = LayerNorm(width, rngs, dtype)
        self.ff = FeedForward(width, dtype, rngs)

    def __call__(self, x, keys_values, mask=None):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), keys_values, mask)
        return x + self.ff(self.norm3(x))


def _pointwise(cin, cout, rngs, dtype, **kw):
    return conv(cin, cout, 1, rngs, dtype, **kw)


class Transformer2DModel(nnx.Module):
    """Norm, projection, one transformer block over the pixels, projection back, residual."""

    def __init__(self, cfg: UNetConfig, width, heads, rngs):
        self.norm = GroupNorm(width, cfg.norm_num_groups, 1e-6, rngs)
        # The 1x1 convolution and the linear projection compute the same; their kernels differ.
        make = linear if cfg.use_linear_projection else _pointwise
        self.proj_in = make(width, width, rngs, cfg.dtype)
        block = BasicTransformerBlock(width, cfg.cross_attention_dim, heads, cfg.dtype, rngs)
        self.transformer_blocks = nnx.List([block])
        self.proj_out = make(width, width, rngs, cfg.dtype, kernel_init=blocks.zeros)

    def __call__(self, x, keys_values, mask=None):
        B, h, w, C = x.shape
        y = self.proj_in(self.norm(x)).reshape(B, h * w, C)
        y = self.transformer_blocks[0](y, keys_values, mask)
        return over_batch(x + self.proj_out(y.reshape(B, h, w, C)))


class DownBlock(nnx.Module):
    def __init__(self, cfg: UNetConfig, level, rngs):
        self.remat = cfg.remat
        cout = cfg.block_out_channels[level]
        cin = cfg.block_out_channels[max(level - 1, 0)]
        widths = [cin] + [cout] * (cfg.layers_per_block - 1)
        self.resnets = nnx.List([resnet(cfg, c, cout, rngs) for c in widths])
        if cfg.down_block_types[level] == "CrossAttnDownBlock2D":
            heads = cfg.num_heads[level]
            self.attentions = nnx.List([Transformer2DModel(cfg, cout, heads, rngs) for _ in widths])
        if level < len(cfg.block_out_channels) - 1:
            self.downsamplers = nnx.List([Downsample2D(cout, cfg.dtype, rngs)])

    def __call__(self, x, temb, read: "Reader"):
        """The output, and the maps that the up blocks take."""
        saved = []
        for i, block in enumerate(self.resnets):
            x = recompute.call(block, self.remat, x, temb)
            if hasattr(self, "attentions"):
                x = recompute.call(self.attentions[i], self.remat, x, *read.next())
            saved.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            saved.append(x)
        return x, saved


class MidBlock(nnx.Module):
    def __init__(self, cfg: UNetConfig, rngs):
        self.remat = cfg.remat
        width, heads = cfg.block_out_channels[-1], cfg.num_heads[-1]
        self.resnets = nnx.List([resnet(cfg, width, width, rngs) for _ in range(2)])
        self.attentions = nnx.List([Transformer2DModel(cfg, width, heads, rngs)])

    def __call__(self, x, temb, read: "Reader"):
        x = recompute.call(self.resnets[0], self.remat, x, temb)
        x = recompute.call(self.attentions[0], self.remat, x, *read.next())
        return recompute.call(self.resnets[1], self.remat, x, temb)


class UpBlock(nnx.Module):
    def __init__(self, cfg: UNetConfig, index, rngs):
        self.remat = cfg.remat
        chans = cfg.block_out_channels
        level = len(chans) - 1 - index
        cout, before = chans[level], chans[min(level + 1, len(chans) - 1)]
        count = cfg.layers_per_block + 1
        # The last resnet of a level takes the map that entered this level on the down path.
        skips = [cout] * cfg.layers_per_block + [chans[max(level - 1, 0)]]
        widths = [before] + [cout] * (count - 1)
        pairs = zip(widths, skips, strict=True)
        self.resnets = nnx.List([resnet(cfg, c + s, cout, rngs) for c, s in pairs])
        if cfg.up_block_types[index] == "CrossAttnUpBlock2D":
            heads = cfg.num_heads[level]
            self.attentions = nnx.List([Transformer2DModel(cfg, cout, heads, rngs) for _ in skips])
        if level > 0:
            self.upsamplers = nnx.List([Upsample2D(cout, cfg.dtype, rngs)])

    def __call__(self, x, skips, temb, read: "Reader"):
        """Takes its maps from the end of the list `skips`."""
        for i, block in enumerate(self.resnets):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = recompute.call(block, self.remat, x, temb)
            if hasattr(self, "attentions"):
                x = recompute.call(self.attentions[i], self.remat, x, *read.next())
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


def resnet(cfg: UNetConfig, cin, cout, rngs) -> ResnetBlock2D:
    temb = 4 * cfg.block_out_channels[0]
    return ResnetBlock2D(cin, cout, cfg.norm_num_groups, cfg.norm_eps, cfg.dtype, rngs, temb)


class UNet(nnx.Module):
    """Predicts noise, velocity or x0 (whatever it was trained for) from a noisy latent."""

    def __init__(self, cfg: UNetConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        chans, levels = cfg.block_out_channels, range(len(cfg.block_out_channels))
        self.conv_in = conv(cfg.in_channels, chans[0], 3, rngs, cfg.dtype)
        self.time_embedding = TimestepEmbedding(chans[0], 4 * chans[0], cfg.dtype, rngs)
        self.down_blocks = nnx.List([DownBlock(cfg, i, rngs) for i in levels])
        self.mid_block = MidBlock(cfg, rngs)
        self.up_blocks = nnx.List([UpBlock(cfg, i, rngs) for i in levels])
        self.conv_norm_out = GroupNorm(chans[0], cfg.norm_num_groups, cfg.norm_eps, rngs)
        out = cfg.out_channels
        self.conv_out = conv(chans[0], out, 3, rngs, cfg.dtype, kernel_init=blocks.zeros)

    def prepare(self, condition: Conditioning) -> Conditioning:
        """The condition with the keys and values of all cross attentions as its context.

        They don't depend on x or t: when sampling, they are computed once for all steps.

        Raises:
            ValueError: for feature maps, which nothing here reads.
        """
        if condition.maps:
            raise ValueError("this UNet reads no feature maps (Conditioning.maps)")
        context = condition.context.astype(self.cfg.dtype)
        parts = {"down": self.down_blocks, "mid": [self.mid_block], "up": self.up_blocks}
        found = {
            name: [
                block.attn2.keys_values(context)
                for part in blocks
                for attention in getattr(part, "attentions", ())
                for block in attention.transformer_blocks
            ]
            for name, blocks in parts.items()
        }
        return dataclasses.replace(condition, context=found)

    def time(self, t, rows: int, note=_ignore):
        """float[rows, E], the embedding of the timestep t: [rows] or scalar for residual blocks."""
        cfg = self.cfg
        t = jnp.broadcast_to(jnp.asarray(t), (rows,))
        features = time_features(t, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift)
        note("time_proj", features)
        temb = self.time_embedding(features.astype(cfg.dtype))
        note("time_embedding", temb)
        return nnx.silu(temb)

    def down(self, x, temb, condition: Conditioning, note=_ignore):
        """(float[B, h', w', C] after the last level, the skips, first one first).

        Args:
            x: float[B, h, w, c].
            temb: from `time`.
            condition: from `prepare`.
        """
        read = Reader(condition, "down")
        x = self.conv_in(x.astype(self.cfg.dtype))
        note("conv_in", x)
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            x, maps = block(x, temb, read)
            skips += maps
            note(f"down_{i}", x)
        return x, skips

    def mid(self, x, temb, condition: Conditioning):
        """Like x, which comes from `down`; temb and condition as there."""
        return self.mid_block(x, temb, Reader(condition, "mid"))

    def up(self, x, skips, temb, condition: Conditioning, note=_ignore):
        """The prediction, float32[B, h, w, c], from what `mid` made and the skips of `down`."""
        read, skips = Reader(condition, "up"), list(skips)
        for i, block in enumerate(self.up_blocks):
            x = block(x, skips, temb, read)
            note(f"up_{i}", x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def __call__(self, x, t, condition: Conditioning, *, probes: dict | None = None):
        """The prediction, float32[B, h, w, c].

        Args:
            x: float[B, h, w, c].
            t: [B] or a scalar.
            condition: context float[B, P, D]; or what `prepare` made of it.
            probes: if given, receives the output of every block under the name of the block.
        """
        note = _ignore if probes is None else probes.__setitem__
        if not isinstance(condition.context, dict):
            condition = self.prepare(condition)
        temb = self.time(t, len(x), note)
        x, skips = self.down(x, temb, condition, note)
        x = self.mid(x, temb, condition)
        note("mid", x)
        return self.up(x, skips, temb, condition, note)
