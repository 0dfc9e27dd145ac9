"""Prefix tuning: trained keys and values that every position of a language model sees.

Li and Liang 2021, arXiv 2101.00190. Nothing else of the model changes:

    embedding [n, D] ─ fc1 ─ tanh ─ fc2 ─ keys and values [layers, n, K, H]
    position  l of a sample attends to   [ n prefix slots | 0 … l ]

The prefix has no positions: its keys are not rotated, and positions of samples stay as they are, so
that every sample of a packed row sees it alike. Through two linears (with `hidden` 0: none) it
trains more steadily. `models/llm/llama.py` reads it in training, `sampling/cached_llm.py` in
decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """Attributes:
    tokens: n, keys and values of each layer.
    hidden: width between the two linears; 0: keys and values are the parameters themselves.
    """

    tokens: int = 5
    hidden: int = 1024

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"prefix.tokens must be at least 1, not {self.tokens}")
        if self.hidden < 0:
            raise ValueError(f"prefix.hidden must not be negative, not {self.hidden}")


class Prefix(nnx.Module):
    """The prefix of a model with so many layers, key-value heads and channels of each.

    Args:
        cfg: of the prefix.
        width: of its embeddings, D.
        shape: (layers, K, H) of the language model.
    """

    def __init__(self, cfg: PrefixConfig, width: int, shape: tuple[int, int, int], *, rngs):
        self.cfg, self.shape = cfg, shape
        layers, K, H = shape
        out = layers * 2 * K * H
        columns = width if cfg.hidden else out
        normal = jax.random.normal(rngs.params(), (cfg.tokens, columns))
        self.embedding = nnx.Param(normal if cfg.hidden else 0.02 * normal)
        if cfg.hidden:
            self.fc1 = nnx.Linear(width, cfg.hidden, rngs=rngs)
            self.fc2 = nnx.Linear(cfg.hidden, out, rngs=rngs)

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """(keys, values), float32[layers, n, K, H] each."""
        x = self.embedding[...]
        if self.cfg.hidden:
            x = self.fc2(jnp.tanh(self.fc1(x)))
        layers, K, H = self.shape
        x = x.reshape(self.cfg.tokens, layers, 2, K, H).transpose(2, 1, 0, 3, 4)
        return x[0], x[1]


def before(prefix, k, v, mask):
    """Keys, values and mask of attention with a prefix in front.

    Args:
        prefix: (keys, values) of the layer, float[n, K, H] each, or None.
        k, v: float[B, S, K, H].
        mask: bool[B, L, S], or None.
    """
    if prefix is None:
        return k, v, mask
    join = lambda one, x: jnp.concatenate(  # noqa: E731
        [jnp.broadcast_to(one.astype(x.dtype), (len(x), *one.shape)), x], axis=1
    )
    n = len(prefix[0])
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (n, 0)), constant_values=True)
    return join(prefix[0], k), join(prefix[1], v), mask
