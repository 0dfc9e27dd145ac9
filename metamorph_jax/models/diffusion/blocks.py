"""Blocks that the UNet and the autoencoder share.

Feature maps are channels last, `float[B, h, w, C]`. Attributes carry the names of the published
Stable Diffusion checkpoints, so a weight is found by its path (see `convert.names`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.nn import attention
from metamorph_jax.nn.linear import flat_dot_general
from metamorph_jax.sharding import constrain

zeros = nnx.initializers.zeros_init()


def require(name: str, fields: dict, accepted: dict, read: set[str]) -> None:
    """Raises when a library configuration asks for something that is not implemented.

    Args:
        name: class name for the message.
        fields: the configuration as the library saves it.
        accepted: field -> values that mean what this module does.
        read: fields that the caller reads itself.
    """
    wrong = []
    for field, value in fields.items():
        if field.startswith("_") or field in read:
            continue
        if field not in accepted:
            wrong.append(f"{field}={value!r} (unknown field)")
        elif value not in accepted[field]:
            wrong.append(f"{field}={value!r} (supported: {list(accepted[field])})")
    if wrong:
        raise ValueError(f"{name} config: " + "; ".join(wrong))


def conv(cin, cout, size, rngs, dtype, *, strides=1, padding="SAME", kernel_init=None) -> nnx.Conv:
    """A square 2-D convolution, kernel HWIO."""
    init = kernel_init or nnx.initializers.lecun_normal()
    make = Pointwise if size == 1 else nnx.Conv
    return make(
        cin,
        cout,
        (size, size),
        strides=strides,
        padding=padding,
        dtype=dtype,
        kernel_init=init,
        rngs=rngs,
    )


class Pointwise(nnx.Conv):
    """A 1x1 convolution as a plain product, whose gradients CPUs compute much faster."""

    def __call__(self, x):
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, self.kernel, self.bias))
        return flat_dot_general(x, kernel[0, 0], (((x.ndim - 1,), (0,)), ((), ()))) + bias


def linear(cin, cout, rngs, dtype, *, bias=True, kernel_init=None) -> nnx.Linear:
    init = kernel_init or nnx.initializers.lecun_normal()
    return nnx.Linear(
        cin,
        cout,
        use_bias=bias,
        dtype=dtype,
        kernel_init=init,
        dot_general=flat_dot_general,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Group norm with statistics in float32.

    Sums run per channel first and per group on the small [B, C] result, so the feature map keeps
    its layout and is read twice: for both sums, and for the affine map (and what fuses to it).
    """

    def __init__(self, channels: int, groups: int, eps: float, rngs: nnx.Rngs):
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {groups} norm groups")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x):
        B, h, w, C = x.shape
        x32 = x.astype(jnp.float32)
        sums = jnp.stack([x32.sum((1, 2)), (x32 * x32).sum((1, 2))])
        per_group = sums.reshape(2, B, self.groups, -1).sum(-1) / (h * w * C // self.groups)
        mean, square = jnp.repeat(per_group, C // self.groups, axis=-1)
        inv = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.eps)
        a = inv * self.scale[...]
        b = self.bias[...] - mean * a
        return (x32 * a[:, None, None] + b[:, None, None]).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """Layer norm, eps 1e-5 as everywhere in this stack."""

    def __init__(self, width: int, rngs: nnx.Rngs, dtype=None, eps: float = 1e-5):
        super().__init__(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


class Nothing(nnx.Module):
    """Stands in a list for a part of the published model that has no weights."""


def over_batch(x):
    """Shards a feature map over the batch, so that weights are gathered, not activations."""
    return constrain(x, "act_batch", *(x.ndim - 1) * (None,))


def attend(q, k, v, heads: int, mask=None):
    """Softmax attention: float[B, L, D] of q [B, L, D] and k, v [B, S, D].

    mask: bool[B, S], the keys that all queries see, or None for all. If a row sees no key,
    its queries get the mean of all values.
    """
    B, L, D = q.shape
    q, k, v = (x.reshape(B, -1, heads, D // heads) for x in (q, k, v))
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], (B, L, k.shape[1]))
    return attention.attend(q, k, v, mask).reshape(B, L, D)


class ResnetBlock2D(nnx.Module):
    """norm, silu, conv, (+ time), norm, silu, conv, + (projected) input."""

    def __init__(self, cin, cout, groups, eps, dtype, rngs, temb_channels: int | None = None):
        self.norm1 = GroupNorm(cin, groups, eps, rngs)
        self.conv1 = conv(cin, cout, 3, rngs, dtype)
        if temb_channels:
            self.time_emb_proj = linear(temb_channels, cout, rngs, dtype)
        self.norm2 = GroupNorm(cout, groups, eps, rngs)
        self.conv2 = conv(cout, cout, 3, rngs, dtype, kernel_init=zeros)
        if cin != cout:
            self.conv_shortcut = conv(cin, cout, 1, rngs, dtype)

    def __call__(self, x, temb=None):
        """x: float[B, h, w, cin]; temb: float[B, E] after silu, or None."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        if temb is not None:
            y = y + self.time_emb_proj(temb)[:, None, None]
        y = self.conv2(nnx.silu(self.norm2(y)))
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return over_batch(x + y)


class Downsample2D(nnx.Module):
    """Halves both sides. The UNet pads every side by one, the autoencoder only right and bottom."""

    def __init__(self, channels, dtype, rngs, *, padding=((1, 1), (1, 1))):
        self.conv = conv(channels, channels, 3, rngs, dtype, strides=2, padding=padding)

    def __call__(self, x):
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles both sides (nearest), then a 3x3 convolution."""

    def __init__(self, channels, dtype, rngs):
        self.conv = conv(channels, channels, 3, rngs, dtype)

    def __call__(self, x):
        B, h, w, C = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (B, h, 2, w, 2, C))
        return self.conv(x.reshape(B, 2 * h, 2 * w, C))
