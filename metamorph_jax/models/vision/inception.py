"""Inception-v3 as FID and the inception score use it: the network of 2015-12-05.

Szegedy et al. 2015 (arXiv 1512.00567). The weights are those that TensorFlow published in 2015,
ported to torch (`pt_inception-2015-12-05-6726825d.pth`). The network differs from torchvision's:
its average pools don't count the padding, the pool of its last block is a maximum, it has 1008
classes, and no auxiliary head.

    299 x 299 x 3 in [-1, 1] ─ stem ─ 3 x InceptionA ─ B ─ 4 x C ─ D ─ 2 x E ─ mean ─ 2048 features

Everything is float32 at full precision: on accelerators, products in bfloat16 or TF32 would move
the distances. Other people's numbers with the same weights are comparable only if images were
resized as in `resize` (bilinear, half-pixel centres, no antialiasing), the rule of pytorch-fid.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SIZE = 299
FEATURES = 2048
CLASSES = 1008
_EPSILON = 1e-3


class BatchNorm(nnx.Module):
    """Batch normalisation with the statistics that training left."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.running_mean = nnx.Param(jnp.zeros(width))
        self.running_var = nnx.Param(jnp.ones(width))

    def __call__(self, x):
        factor = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + _EPSILON)
        return (x - self.running_mean[...]) * factor + self.bias[...]


class Conv(nnx.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, c_in, c_out, size, rngs, stride=1, padding=(0, 0)):
        size = (size, size) if isinstance(size, int) else size
        self.conv = nnx.Conv(
            c_in, c_out, size, strides=stride, padding=[(p, p) for p in padding], use_bias=False,
            precision=jax.lax.Precision.HIGHEST, rngs=rngs,
        )  # fmt: skip
        self.bn = BatchNorm(c_out)

    def __call__(self, x):
        return jax.nn.relu(self.bn(self.conv(x)))


def _same(c_in, c_out, size, rngs):
    """A convolution that keeps height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return Conv(c_in, c_out, (height, width), rngs, padding=(height // 2, width // 2))


def _max_pool(x, stride=2, padding="VALID"):
    return nnx.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(x):
    """Means of the 3 x 3 neighbours that exist."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class InceptionA(nnx.Module):
    def __init__(self, width: int, pool: int, rngs):
        self.branch1x1 = Conv(width, 64, 1, rngs)
        self.branch5x5_1 = Conv(width, 48, 1, rngs)
        self.branch5x5_2 = _same(48, 64, 5, rngs)
        self.branch3x3dbl_1 = Conv(width, 64, 1, rngs)
        self.branch3x3dbl_2 = _same(64, 96, 3, rngs)
        self.branch3x3dbl_3 = _same(96, 96, 3, rngs)
        self.branch_pool = Conv(width, pool, 1, rngs)

    def __call__(self, x):
        small = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(_mean_pool(x))
        return jnp.concatenate([self.branch1x1(x), small, double, pooled], -1)


class InceptionB(nnx.Module):
    """Halves height and width."""

    def __init__(self, width: int, rngs):
        self.branch3x3 = Conv(width, 384, 3, rngs, 2)
        self.branch3x3dbl_1 = Conv(width, 64, 1, rngs)
        self.branch3x3dbl_2 = _same(64, 96, 3, rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, rngs, 2)

    def __call__(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, _max_pool(x)], -1)


class InceptionC(nnx.Module):
    """7 x 7 convolutions as rows and columns, `inner` channels wide."""

    def __init__(self, width: int, inner: int, rngs):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(width, 192, 1, rngs)
        self.branch7x7_1 = Conv(width, inner, 1, rngs)
        self.branch7x7_2 = _same(inner, inner, row, rngs)
        self.branch7x7_3 = _same(inner, 192, column, rngs)
        self.branch7x7dbl_1 = Conv(width, inner, 1, rngs)
        self.branch7x7dbl_2 = _same(inner, inner, column, rngs)
        self.branch7x7dbl_3 = _same(inner, inner, row, rngs)
        self.branch7x7dbl_4 = _same(inner, inner, column, rngs)
        self.branch7x7dbl_5 = _same(inner, 192, row, rngs)
        self.branch_pool = Conv(width, 192, 1, rngs)

    def __call__(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(_mean_pool(x))
        return jnp.concatenate([self.branch1x1(x), single, double, pooled], -1)


class InceptionD(nnx.Module):
    """Halves height and width."""

    def __init__(self, width: int, rngs):
        self.branch3x3_1 = Conv(width, 192, 1, rngs)
        self.branch3x3_2 = Conv(192, 320, 3, rngs, 2)
        self.branch7x7x3_1 = Conv(width, 192, 1, rngs)
        self.branch7x7x3_2 = _same(192, 192, (1, 7), rngs)
        self.branch7x7x3_3 = _same(192, 192, (7, 1), rngs)
        self.branch7x7x3_4 = Conv(192, 192, 3, rngs, 2)

    def __call__(self, x):
        first = self.branch3x3_2(self.branch3x3_1(x))
        second = self.branch7x7x3_2(self.branch7x7x3_1(x))
        second = self.branch7x7x3_4(self.branch7x7x3_3(second))
        return jnp.concatenate([first, second, _max_pool(x)], -1)


class InceptionE(nnx.Module):
    """`pool` is what comes before the last branch: means, and in the last block maxima."""

    def __init__(self, width: int, pool, rngs):
        self.pool = pool
        self.branch1x1 = Conv(width, 320, 1, rngs)
        self.branch3x3_1 = Conv(width, 384, 1, rngs)
        self.branch3x3_2a = _same(384, 384, (1, 3), rngs)
        self.branch3x3_2b = _same(384, 384, (3, 1), rngs)
        self.branch3x3dbl_1 = Conv(width, 448, 1, rngs)
        self.branch3x3dbl_2 = _same(448, 384, 3, rngs)
        self.branch3x3dbl_3a = _same(384, 384, (1, 3), rngs)
        self.branch3x3dbl_3b = _same(384, 384, (3, 1), rngs)
        self.branch_pool = Conv(width, 192, 1, rngs)

    def __call__(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]  # fmt: skip
        return jnp.concatenate(parts, -1)


class InceptionV3(nnx.Module):
    """Names of its parts are those of the published weights."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, rngs, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, rngs)
        self.Conv2d_2b_3x3 = _same(32, 64, 3, rngs)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, rngs)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs)
        self.Mixed_6a = InceptionB(288, rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs)
        self.Mixed_7a = InceptionD(768, rngs)
        self.Mixed_7b = InceptionE(1280, _mean_pool, rngs)
        self.Mixed_7c = InceptionE(2048, functools.partial(_max_pool, stride=1, padding="SAME"),
                                   rngs)  # fmt: skip
        self.fc = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[N, 2048] features of x: float[N, h, w, 3] in [-1, 1], from 75 x 75 on."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x.astype(jnp.float32))))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_max_pool(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        return self.Mixed_7c(self.Mixed_7b(x)).mean((1, 2))

    def logits(self, features: jax.Array) -> jax.Array:
        """float32[N, 1008] of float[N, 2048], without the bias: the inception score's own rule."""
        return jnp.dot(features, self.fc.kernel[...], precision=jax.lax.Precision.HIGHEST)


# ---- pixels


def resize(pixels: np.ndarray, size: int = SIZE) -> np.ndarray:
    """float32[size, size, 3] in [-1, 1] of uint8[h, w, 3]: bilinear with half-pixel centres and
    without antialiasing, as torch's `interpolate` does it."""
    h, w, _ = pixels.shape
    x = pixels.astype(np.float32) / np.float32(255)
    x = np.tensordot(_bilinear(h, size), x, 1)
    x = np.tensordot(_bilinear(w, size), x, (1, 1)).transpose(1, 0, 2)
    return 2 * x - 1


@functools.lru_cache(64)
def _bilinear(n: int, m: int) -> np.ndarray:
    """float32[m, n]: the weights with which n pixels become m."""
    place = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    left = np.minimum(place.astype(int), max(n - 2, 0))
    share = place - left
    out = np.zeros((m, n), np.float32)
    np.add.at(out, (np.arange(m), left), 1 - share)
    np.add.at(out, (np.arange(m), np.minimum(left + 1, n - 1)), share)
    return out
