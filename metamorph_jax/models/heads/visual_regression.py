"""Vision heads: from hidden states (after the final norm) to the next visual token's features.

`mlp` (what MetaMorph uses) is linear, exact GELU, linear; `mlp2x_gelu` has one more hidden layer;
`linear` and `single` are one linear. In the reference `linear` keeps the width of the language
model, which fits no target; here both give the feature width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

HIDDEN_LAYERS = {"mlp": 1, "mlp2x_gelu": 2, "linear": 0, "single": 0}


class VisualHead(nnx.Module):
    def __init__(self, kind: str, width_in: int, width_out: int, dtype="float32", *, rngs):
        if kind not in HIDDEN_LAYERS:
            raise ValueError(f"vision head {kind!r} is none of {', '.join(HIDDEN_LAYERS)}")
        widths = [width_in] * (1 + HIDDEN_LAYERS[kind]) + [width_out]
        self.linears = nnx.List(
            [
                nnx.Linear(
                    a,
                    b,
                    kernel_init=nnx.initializers.normal(0.02),
                    dtype=jnp.dtype(dtype),
                    rngs=rngs,
                )
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., C] of hidden states x: float[..., D]."""
        for i, linear in enumerate(self.linears):
            x = linear(nnx.gelu(x, approximate=False) if i else x)
        return x
