"""Stable Diffusion's autoencoder (`AutoencoderKL`), channels last.

    encode: image in [-1, 1] -> encoder -> quant_conv -> mean, logvar of the latent
    decode: latent           -> post_quant_conv -> decoder -> image

A diffusion model works on `scaling_factor * latent`; `encode` and `decode` do not scale.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.diffusion import blocks
from metamorph_jax.models.diffusion.blocks import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    attend,
    conv,
    linear,
)

_EPS = 1e-6

# Fields of the library's config.json with the values that this module supports.
_ACCEPTED = {
    "act_fn": ("silu",), "shift_factor": (None,), "latents_mean": (None,), "latents_std": (None,),
    "force_upcast": (True, False), "mid_block_add_attention": (True,),
    "use_quant_conv": (True,), "use_post_quant_conv": (True,),
}  # fmt: skip

# Names that older published files use for the attention of the middle block.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Structure of the autoencoder."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    dtype: str = "float32"

    def __post_init__(self):
        check_numbers(
            self,
            "in_channels out_channels latent_channels layers_per_block norm_num_groups sample_size"
            " block_out_channels",
            "scaling_factor",
        )

    @classmethod
    def tiny(cls, **kw):
        """Two levels of 16 and 32 channels: for tests."""
        size = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4)
        return cls(**(size | kw))

    @classmethod
    def sd15(cls, **kw):
        return cls(**kw)

    @classmethod
    def sd21(cls, **kw):
        return cls(**(dict(sample_size=768) | kw))

    @classmethod
    def from_dict(cls, fields: dict, dtype: str = "float32"):
        """Reads the library's config.json; anything that is not implemented is an error."""
        own = {f.name for f in dataclasses.fields(cls)} - {"dtype"}
        kw = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in own}
        levels = len(kw.get("block_out_channels", cls.block_out_channels))
        kinds = {
            "down_block_types": [["DownEncoderBlock2D"] * levels],
            "up_block_types": [["UpDecoderBlock2D"] * levels],
        }
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        blocks.require("AutoencoderKL", listed, _ACCEPTED | kinds, own)
        return cls(**kw, dtype=dtype)

    @property
    def shrink(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Attention(nnx.Module):
    """One head over all pixels, with its own norm and residual."""

    def __init__(self, channels, groups, dtype, rngs):
        self.group_norm = GroupNorm(channels, groups, _EPS, rngs)
        self.to_q = linear(channels, channels, rngs, dtype)
        self.to_k = linear(channels, channels, rngs, dtype)
        self.to_v = linear(channels, channels, rngs, dtype)
        self.to_out = nnx.List([linear(channels, channels, rngs, dtype)])

    def __call__(self, x):
        B, h, w, C = x.shape
        y = self.group_norm(x).reshape(B, h * w, C)
        y = self.to_out[0](attend(self.to_q(y), self.to_k(y), self.to_v(y), heads=1))
        return x + y.reshape(B, h, w, C)


class MidBlock(nnx.Module):
    def __init__(self, channels, cfg: VAEConfig, rngs):
        self.resnets = nnx.List([_resnet(channels, channels, cfg, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, cfg.norm_num_groups, cfg.dtype, rngs)])

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, then a change of resolution unless it is the last."""

    def __init__(self, cin, cout, count, cfg: VAEConfig, rngs, *, down: bool, last: bool):
        widths = [cin] + [cout] * (count - 1)
        self.resnets = nnx.List([_resnet(c, cout, cfg, rngs) for c in widths])
        if down and not last:
            pad = ((0, 1), (0, 1))
            self.downsamplers = nnx.List([Downsample2D(cout, cfg.dtype, rngs, padding=pad)])
        if not down and not last:
            self.upsamplers = nnx.List([Upsample2D(cout, cfg.dtype, rngs)])

    def __call__(self, x):
        for block in self.resnets:
            x = block(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


def _resnet(cin, cout, cfg: VAEConfig, rngs):
    return ResnetBlock2D(cin, cout, cfg.norm_num_groups, _EPS, cfg.dtype, rngs)


class Encoder(nnx.Module):
    def __init__(self, cfg: VAEConfig, rngs):
        chans, top = cfg.block_out_channels, len(cfg.block_out_channels) - 1
        self.conv_in = conv(cfg.in_channels, chans[0], 3, rngs, cfg.dtype)
        self.down_blocks = nnx.List([
            Level(chans[max(i - 1, 0)], chans[i], cfg.layers_per_block, cfg, rngs,
                  down=True, last=i == top)
            for i in range(len(chans))
        ])  # fmt: skip
        self.mid_block = MidBlock(chans[-1], cfg, rngs)
        self.conv_norm_out = GroupNorm(chans[-1], cfg.norm_num_groups, _EPS, rngs)
        self.conv_out = conv(chans[-1], 2 * cfg.latent_channels, 3, rngs, cfg.dtype)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, cfg: VAEConfig, rngs):
        chans = cfg.block_out_channels[::-1]
        self.conv_in = conv(cfg.latent_channels, chans[0], 3, rngs, cfg.dtype)
        self.mid_block = MidBlock(chans[0], cfg, rngs)
        self.up_blocks = nnx.List([
            Level(chans[max(i - 1, 0)], chans[i], cfg.layers_per_block + 1, cfg, rngs,
                  down=False, last=i == len(chans) - 1)
            for i in range(len(chans))
        ])  # fmt: skip
        self.conv_norm_out = GroupNorm(chans[-1], cfg.norm_num_groups, _EPS, rngs)
        self.conv_out = conv(chans[-1], cfg.out_channels, 3, rngs, cfg.dtype)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Diagonal normal over latents. mean, logvar: float32[B, h, w, c]."""

    mean: jnp.ndarray
    logvar: jnp.ndarray

    @property
    def std(self):
        return jnp.exp(0.5 * self.logvar)

    def sample(self, eps):
        """mean + std * eps, with eps drawn from a standard normal by the caller."""
        return self.mean + self.std * eps

    def kl(self):
        """Divergence from the standard normal, summed over the latent: float32[B]."""
        term = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * term.sum((1, 2, 3))


class AutoencoderKL(nnx.Module):
    def __init__(self, cfg: VAEConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs)
        self.decoder = Decoder(cfg, rngs)
        self.quant_conv = conv(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1, rngs, cfg.dtype)
        self.post_quant_conv = conv(cfg.latent_channels, cfg.latent_channels, 1, rngs, cfg.dtype)

    def moments(self, image):
        """image: float[B, h, w, 3] in [-1, 1]; returns float32[B, h', w', 2c]: mean, logvar."""
        return self.quant_conv(self.encoder(image.astype(self.cfg.dtype))).astype(jnp.float32)

    def encode(self, image) -> Posterior:
        mean, logvar = jnp.split(self.moments(image), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z):
        """z: float[B, h', w', c], not scaled; returns float32[B, h, w, 3], roughly in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z.astype(self.cfg.dtype))).astype(jnp.float32)
