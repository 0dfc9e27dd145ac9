"""A BERT encoder whose mean state is the vector of a sentence (Sentence-BERT).

Devlin et al. 2018 (arXiv 1810.04805), Reimers and Gurevych 2019 (arXiv 1908.10084).

    x = LayerNorm(word + position + type)
    x = LayerNorm(x + self-attention(x))
    x = LayerNorm(x + linear(gelu(linear(x))))      exact GELU; for each layer

Modules have the published names, `self` and `LayerNorm` among them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.diffusion.blocks import LayerNorm, linear
from metamorph_jax.nn.attention import attend


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Defaults: all-MiniLM-L6-v2."""

    vocab_size: int = 30522
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        check_numbers(
            self,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
            " max_position_embeddings type_vocab_size",
            "layer_norm_eps",
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} doesn't divide over {self.num_attention_heads} "
                "heads"
            )


class _Block(nnx.Module):
    """Modules under the names of a table."""

    def __init__(self, modules: dict[str, nnx.Module]):
        for name, module in modules.items():
            setattr(self, name, module)


def _norm(cfg: BertConfig, rngs) -> LayerNorm:
    return LayerNorm(cfg.hidden_size, rngs, "float32", cfg.layer_norm_eps)


def _linear(d_in: int, d_out: int, rngs) -> nnx.Module:
    return linear(d_in, d_out, rngs, "float32")


class BertLayer(nnx.Module):
    def __init__(self, cfg: BertConfig, rngs):
        D, F, self.heads = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
        projections = {name: _linear(D, D, rngs) for name in ("query", "key", "value")}
        out = _Block({"dense": _linear(D, D, rngs), "LayerNorm": _norm(cfg, rngs)})
        self.attention = _Block({"self": _Block(projections), "output": out})
        self.intermediate = _Block({"dense": _linear(D, F, rngs)})
        self.output = _Block({"dense": _linear(F, D, rngs), "LayerNorm": _norm(cfg, rngs)})

    def __call__(self, x, mask):
        """float32[B, L, D] of x: float32[B, L, D]. mask: bool[B, L, L], where a query may look."""
        B, L, D = x.shape
        own, out = vars(self.attention)["self"], self.attention.output
        parts = (own.query(x), own.key(x), own.value(x))
        q, k, v = (y.reshape(B, L, self.heads, D // self.heads) for y in parts)
        x = out.LayerNorm(x + out.dense(attend(q, k, v, mask).reshape(B, L, D)))
        hidden = jax.nn.gelu(self.intermediate.dense(x), approximate=False)
        return self.output.LayerNorm(x + self.output.dense(hidden))


class Bert(nnx.Module):
    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.cfg, D = cfg, cfg.hidden_size
        self.embeddings = _Block({
            "word_embeddings": nnx.Embed(cfg.vocab_size, D, rngs=rngs),
            "position_embeddings": nnx.Embed(cfg.max_position_embeddings, D, rngs=rngs),
            "token_type_embeddings": nnx.Embed(cfg.type_vocab_size, D, rngs=rngs),
            "LayerNorm": _norm(cfg, rngs),
        })  # fmt: skip
        layers = [BertLayer(cfg, rngs) for _ in range(cfg.num_hidden_layers)]
        self.encoder = _Block({"layer": nnx.List(layers)})

    def __call__(self, ids: jax.Array) -> jax.Array:
        """float32[B, L, D] last states. ids: int32[B, L], -1 where a row is filled up."""
        there, table = ids >= 0, self.embeddings
        x = table.word_embeddings(jnp.where(there, ids, 0))
        x += table.position_embeddings(jnp.arange(ids.shape[1]))
        x = table.LayerNorm(x + table.token_type_embeddings(jnp.zeros_like(ids)))
        mask = jnp.broadcast_to(there[:, None], (*ids.shape, ids.shape[1]))
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x

    def sentences(self, ids: jax.Array) -> jax.Array:
        """float32[B, D] mean states of the tokens, not of unit length. ids: see `__call__`."""
        there = (ids >= 0)[..., None]
        return jnp.where(there, self(ids), 0).sum(1) / jnp.maximum(there.sum(1), 1)
