"""From the tower's grid of tokens to the few that a language model gets.

The reference's names are kept: `interpolation` (what MetaMorph uses), `concat_interpolation`,
`mlpmixer`; `area` averages whole cells (equal to `interpolation` when the side is halved).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.nn.norms import l2_normalize

KINDS = ("interpolation", "concat_interpolation", "mlpmixer", "area")
SOFTMAX_TEMPERATURE = 0.07


@dataclasses.dataclass(frozen=True)
class ReduceConfig:
    """`tokens` per image. Parity options of the reference: 0 takes a side from the caller at
    every call (the reference draws one), -1 sets the features to 0."""

    tokens: int = 64
    kind: str = "interpolation"
    tokens_in: int = 729
    width: int = 1152

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"token reduction {self.kind!r} is none of {', '.join(KINDS)}")
        if self.tokens < -1:
            raise ValueError(f"{self.tokens} tokens per image")
        if self.kind != "mlpmixer" and self.reduces and math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"{self.tokens} tokens don't make a square")

    @property
    def reduces(self) -> bool:
        return self.tokens > 0 and self.tokens != self.tokens_in

    @property
    def tokens_out(self) -> int:
        """Tokens per image; 0 when the caller says so at each call."""
        return self.tokens_in if self.tokens == -1 else self.tokens

    @property
    def width_out(self) -> int:
        return self.width * (4 if self.reduces and self.kind == "concat_interpolation" else 1)


def bilinear_matrix(n: int, m: int) -> np.ndarray:
    """float32[m, n] that resizes n samples to m: half-pixel centres, no antialiasing."""
    centre = np.maximum((np.arange(m) + 0.5) * n / m - 0.5, 0)
    low = np.floor(centre).astype(int)
    part = centre - low
    out = np.zeros((m, n), np.float32)
    np.add.at(out, (np.arange(m), low), 1 - part)
    np.add.at(out, (np.arange(m), np.minimum(low + 1, n - 1)), part)
    return out


def area_matrix(n: int, m: int) -> np.ndarray:
    """float32[m, n] of means over n / m neighbours."""
    if n % m:
        raise ValueError(f"area reduction: a side of {n} doesn't divide into {m}")
    return np.repeat(np.eye(m, dtype=np.float32), n // m, axis=1) * (m / n)


def resize_grid(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """float[B, m, m, C] of x: float[B, n * n, C]; in float32, result in x's dtype."""
    B, n, C = x.shape[0], matrix.shape[1], x.shape[-1]
    if x.shape[1] != n * n:
        raise ValueError(f"{x.shape[1]} tokens are not a grid of {n} x {n}")
    grid = x.reshape(B, n, n * C).astype(jnp.float32)
    rows = jnp.einsum("ai,Bix->Bax", matrix, grid).reshape(B, -1, n, C)
    return jnp.einsum("bj,BajC->BabC", matrix, rows).astype(x.dtype)


def normalize_features(x: jax.Array, normalize: bool = True, softmax: bool = False) -> jax.Array:
    """L2 over the channels, then (parity option) softmax(x / 0.07)."""
    x = x.astype(jnp.float32)
    if normalize:
        x = l2_normalize(x)
    return jax.nn.softmax(x / SOFTMAX_TEMPERATURE, axis=-1) if softmax else x


def draw_side(rng: np.random.Generator) -> int:
    """The side that the reference draws for `tokens = 0`; shapes are static, so on the host."""
    return int(rng.integers(1, 25))


class TokenReducer(nnx.Module):
    def __init__(self, cfg: ReduceConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        if cfg.reduces and cfg.kind == "mlpmixer":
            self.token_mixing = nnx.Linear(cfg.tokens_in, cfg.tokens, rngs=rngs)
            self.channel_mixing = nnx.Linear(cfg.width, cfg.width, rngs=rngs)

    def __call__(self, x: jax.Array, side: int | None = None) -> jax.Array:
        """float[B, P, C'] of tower tokens x: float[B, T, C]; `side` only where `tokens` is 0."""
        cfg = self.cfg
        if cfg.tokens == -1:
            return jnp.zeros_like(x)
        if cfg.tokens == 0 and side is None:
            raise ValueError("tokens = 0: every call must give the side to reduce to")
        if cfg.tokens == x.shape[1]:
            return x
        if cfg.kind == "mlpmixer":
            return self.channel_mixing(self.token_mixing(x.swapaxes(1, 2)).swapaxes(1, 2))
        n, m = math.isqrt(x.shape[1]), side or math.isqrt(cfg.tokens)
        B, C = x.shape[0], x.shape[-1]
        if cfg.kind == "concat_interpolation":
            x = resize_grid(x, bilinear_matrix(n, 2 * m)).reshape(B, m, 2, m, 2, C)
            return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, m * m, 4 * C)
        matrix = area_matrix(n, m) if cfg.kind == "area" else bilinear_matrix(n, m)
        return resize_grid(x, matrix).reshape(B, m * m, C)
