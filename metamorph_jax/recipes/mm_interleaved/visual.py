"""The visual tokenizer: from images to what the language model reads, and to maps of four scales.

    image ─ tower with adapter ─┬─ tokens ─ linear ─ norm ─ + table ─ norm ─ resampler ─ linear ─ P
                                └─ maps + table     (what MMFS samples)

The tables are 2-D sin-cos codes of a grid of fixed size, resized bicubically for each map.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.models.connectors.perceiver import Perceiver
from metamorph_jax.models.vision.vit_adapter import ViTAdapter
from metamorph_jax.nn import sincos
from metamorph_jax.nn.linear import flat_dot_general
from metamorph_jax.recipes.mm_interleaved.config import VisualConfig


def _norm(width: int, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=rngs)


def _linear(d_in: int, d_out: int, names, dtype, rngs: nnx.Rngs, **init) -> nnx.Linear:
    return nnx.Linear(
        d_in, d_out, dtype=dtype, dot_general=flat_dot_general,
        kernel_metadata={"logical": names}, bias_metadata={"logical": (names[1],)}, rngs=rngs,
        **init,
    )  # fmt: skip


class VisualTokenizer(nnx.Module):
    """See the module docstring.

    Args:
        width: D of the language model.
    """

    def __init__(self, cfg: VisualConfig, width: int, *, rngs: nnx.Rngs):
        tower, dtype = cfg.vit, jnp.dtype(cfg.dtype)
        C, normal = tower.width, nnx.initializers.normal(1e-3)
        self.cfg = cfg
        self.adapter = ViTAdapter(cfg.adapter, tower, rngs=rngs)
        self.key_proj = _linear(C, C, ("embed", "mlp"), dtype, rngs)
        self.key_norm = _norm(C, dtype, rngs)
        self.table_norm = _norm(C, dtype, rngs)
        self.resampler = Perceiver(cfg.resampler, rngs=rngs)
        inner = cfg.resampler.width
        self.proj = _linear(inner, width, ("embed", "mlp"), dtype, rngs, kernel_init=normal)

    def __call__(self, pixels: jax.Array, key: jax.Array | None = None):
        """(float[n, P, D] visual tokens, four maps float[n, side, side, C], finest first).

        Args:
            pixels: uint8[n, h, w, 3].
            key: for the resampler's dropout; None for none.
        """
        tokens, maps = self.adapter(pixels)
        grid = self.cfg.vit.grid
        keys = self.key_norm(self.key_proj(tokens))
        extra = tokens.shape[1] - grid**2  # the class token, which has no position
        table = np.pad(self.table(grid), ((extra, 0), (0, 0)))
        keys = self.table_norm(keys + table.astype(keys.dtype))
        visual = self.proj(self.resampler(keys, key=key))
        return visual, tuple(self._with_table(x) for x in maps)

    def table(self, side: int) -> np.ndarray:
        """float32[side * side, C] positions of a map."""
        table = sincos.table_2d(self.cfg.table_side, self.cfg.vit.width)
        return sincos.resize_table(table, side)

    def _with_table(self, x: jax.Array) -> jax.Array:
        """A map float[n, side, side, C] with its positions added."""
        return x + self.table(x.shape[1]).reshape(1, *x.shape[1:]).astype(x.dtype)
