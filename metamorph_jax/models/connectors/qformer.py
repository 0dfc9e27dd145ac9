"""The connector of BLIP-2 and MiniGPT-4: a Q-Former between two spaces of a width of their own.

Li et al. 2023 (arXiv 2301.12597), Zhu et al. 2023 (arXiv 2304.10592).

    tokens of the tower ─ LayerNorm (float32) ─ resampler ─ queries ─ linear ─ language model

The resampler is that of `perceiver.py`, without normalised queries and keys. Dropout is off, as it
is in MiniGPT-4 and MiniGPT-5, which keep all of it frozen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.connectors.mlp import torch_linear
from metamorph_jax.models.connectors.perceiver import Perceiver, PerceiverConfig


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Defaults: BLIP-2's with EVA ViT-g.

    Attributes:
        resampler: its `key_width` is the tower's width, its `queries` are the visual tokens; its
            `dtype` and `remat` are the connector's.
        norm_eps: of the norm over the tower's tokens.
    """

    resampler: PerceiverConfig = PerceiverConfig(queries=32, key_width=1408, qk_norm=False)
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_numbers(self, positive="norm_eps")

    @property
    def tokens(self) -> int:
        """P, visual tokens of an image."""
        return self.resampler.queries


class QFormer(nnx.Module):
    def __init__(self, cfg: QFormerConfig, width: int, *, rngs: nnx.Rngs):
        """width: of the language model."""
        self.cfg, inside = cfg, cfg.resampler
        self.norm = nnx.LayerNorm(
            inside.key_width,
            epsilon=cfg.norm_eps,
            dtype=jnp.float32,
            use_fast_variance=False,
            scale_metadata={"logical": ("norm",)},
            bias_metadata={"logical": ("norm",)},
            rngs=rngs,
        )
        self.resampler = Perceiver(inside, rngs=rngs)
        self.proj = torch_linear(inside.width, width, inside.dtype, rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """float[N, queries, D] of the tower's tokens: float[N, T, C].

        Args:
            mask: bool[N, T] tokens that are there, or None for all.
        """
        return self.proj(self.features(tokens, mask))

    def features(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """float[N, queries, width of the resampler]: what is projected; arguments as above."""
        return self.resampler(self.norm(tokens), mask)
