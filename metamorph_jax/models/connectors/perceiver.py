"""A resampler: learned queries that read a list of tokens through a small BERT (Q-Former style).

BLIP-2 (Li et al. 2023, arXiv 2301.12597), as MM-Interleaved uses it (Tian et al. 2024, arXiv
2401.10208), once from image features to visual tokens, once from hidden states to the context of
the diffusion decoder.

    x = LayerNorm(queries)
    x = LayerNorm(x + self-attention(x))
    x = LayerNorm(x + cross-attention(x, keys))      layers 0, cross_every, 2 * cross_every, ...
    x = LayerNorm(x + linear(gelu(linear(x))))         exact GELU; next layer

With `qk_norm`, queries and keys are normalised per head, and scores are still divided by
sqrt(H). Dropout acts before each sum and on the first x, and only where a key is given.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.nn import recompute
from metamorph_jax.nn.attention import attend
from metamorph_jax.nn.linear import flat_dot_general
from metamorph_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Defaults: MM-Interleaved's visual resampler.

    Attributes:
        queries: tokens that come out.
        key_width: of the tokens that are read.
        cross_every: every how many layers there is a cross-attention.
        dropout: rate where a key is given; see the module docstring.
        remat: layers are recomputed in the backward pass.
    """

    queries: int = 64
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_width: int = 3072
    key_width: int = 1024
    cross_every: int = 2
    qk_norm: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-12
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_numbers(
            self, "queries width heads layers mlp_width key_width cross_every", "norm_eps"
        )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} doesn't divide over {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: expected a rate from 0 to below 1")


def drop(x, rate: float, key):
    """x with elements set to 0 at this rate, and the others scaled up; x without a key."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _linear(cfg: PerceiverConfig, d_in, d_out, names, rngs):
    return nnx.Linear(
        d_in,
        d_out,
        dtype=jnp.dtype(cfg.dtype),
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"logical": names},
        bias_metadata={"logical": (names[1],)},
        dot_general=flat_dot_general,
        rngs=rngs,
    )


def _norm(cfg: PerceiverConfig, width, rngs):
    return nnx.LayerNorm(
        width,
        epsilon=cfg.norm_eps,
        dtype=jnp.dtype(cfg.dtype),
        use_fast_variance=False,
        scale_metadata={"logical": ("norm",)},
        bias_metadata={"logical": ("norm",)},
        rngs=rngs,
    )


class Attention(nnx.Module):
    """From x to itself, or to keys of another width."""

    def __init__(self, cfg: PerceiverConfig, key_width: int, *, rngs: nnx.Rngs):
        D, self.heads = cfg.width, cfg.heads
        self.q_proj = _linear(cfg, D, D, ("embed", "heads"), rngs)
        self.k_proj = _linear(cfg, key_width, D, ("embed", "heads"), rngs)
        self.v_proj = _linear(cfg, key_width, D, ("embed", "heads"), rngs)
        self.out_proj = _linear(cfg, D, D, ("heads", "embed"), rngs)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm:
            self.q_norm = _norm(cfg, D // cfg.heads, rngs)
            self.k_norm = _norm(cfg, D // cfg.heads, rngs)

    def __call__(self, x, source, mask=None):
        """float[B, L, D] of x: float[B, L, D], source: float[B, S, C], mask: bool[B, S] or None."""
        B, L, D = x.shape
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        q, k, v = (y.reshape(B, -1, self.heads, D // self.heads) for y in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None], (B, L, mask.shape[1]))
        return self.out_proj(attend(q, k, v, mask).reshape(B, L, D))


class Layer(nnx.Module):
    def __init__(self, cfg: PerceiverConfig, crosses: bool, *, rngs: nnx.Rngs):
        D, self.dropout, self.crosses = cfg.width, cfg.dropout, crosses
        self.self_attn = Attention(cfg, D, rngs=rngs)
        self.self_norm = _norm(cfg, D, rngs)
        if crosses:
            self.cross_attn = Attention(cfg, cfg.key_width, rngs=rngs)
            self.cross_norm = _norm(cfg, D, rngs)
        self.fc1 = _linear(cfg, D, cfg.mlp_width, ("embed", "mlp"), rngs)
        self.fc2 = _linear(cfg, cfg.mlp_width, D, ("mlp", "embed"), rngs)
        self.mlp_norm = _norm(cfg, D, rngs)

    def __call__(self, x, source, mask, key):
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.self_norm(x + drop(self.self_attn(x, x), self.dropout, keys[0]))
        if self.crosses:
            read = self.cross_attn(x, source, mask)
            x = self.cross_norm(x + drop(read, self.dropout, keys[1]))
        hidden = nnx.gelu(self.fc1(x), approximate=False)
        x = self.mlp_norm(x + drop(self.fc2(hidden), self.dropout, keys[2]))
        return constrain(x, "act_batch", None, "act_embed")


class Perceiver(nnx.Module):
    def __init__(self, cfg: PerceiverConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        normal = nnx.initializers.normal(0.02)
        self.queries = nnx.Param(
            normal(rngs.params(), (1, cfg.queries, cfg.width)), logical=(None, None, "embed")
        )
        self.norm = _norm(cfg, cfg.width, rngs)
        crosses = [i % cfg.cross_every == 0 for i in range(cfg.layers)]
        self.layers = nnx.List([Layer(cfg, c, rngs=rngs) for c in crosses])

    def __call__(self, tokens, mask=None, *, key=None):
        """float[B, queries, width] of tokens: float[B, S, key_width].

        Args:
            mask: bool[B, S] tokens that are there, or None for all. A row without any gives finite
                numbers.
            key: for dropout; None for none.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        keys = (None,) * (cfg.layers + 1)
        if key is not None and cfg.dropout:
            keys = tuple(jax.random.split(key, cfg.layers + 1))
        x = self.norm(self.queries[...].astype(dtype))
        x = jnp.broadcast_to(x, (len(tokens), cfg.queries, cfg.width))
        x, tokens = drop(x, cfg.dropout, keys[0]), tokens.astype(dtype)
        for layer, own in zip(self.layers, keys[1:], strict=True):
            x = recompute.call(layer, cfg.remat, x, tokens, mask, own)
        return x
