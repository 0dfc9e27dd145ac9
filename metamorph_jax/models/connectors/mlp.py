"""Connectors: from visual features to the width of the language model (LLaVA, MetaMorph).

`linear`, `identity`, `mlpNx_gelu` (N linears, exact GELU between them) and `mlpsoftmax` (linear,
softmax over features, linear). Initialised as torch's Linear is: uniform in ±1 / sqrt(fan in).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def linear_widths(kind: str, width_in: int, width_out: int) -> list[int]:
    """Widths before, between and after the linears of a connector; one entry: no linear."""
    if kind == "identity":
        if width_in != width_out:
            raise ValueError(f"an identity connector can't turn width {width_in} into {width_out}")
        return [width_in]
    if kind == "linear":
        return [width_in, width_out]
    if kind == "mlpsoftmax":
        return [width_in, width_out, width_out]
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"connector {kind!r} is none of linear, identity, mlpsoftmax, mlpNx_gelu")
    return [width_in] + [width_out] * int(match[1])


def torch_linear(width_in: int, width_out: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear with torch's default initialisation."""
    bound = width_in**-0.5
    init = lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(  # noqa: E731
        key, shape, dtype, -bound, bound
    )
    return nnx.Linear(
        width_in, width_out, kernel_init=init, bias_init=init, dtype=jnp.dtype(dtype), rngs=rngs
    )


class Connector(nnx.Module):
    def __init__(self, kind: str, width_in: int, width_out: int, dtype="float32", *, rngs):
        self.kind = kind
        self.dtype = dtype
        widths = linear_widths(kind, width_in, width_out)
        self.linears = nnx.List(
            [torch_linear(a, b, dtype, rngs) for a, b in zip(widths, widths[1:], strict=False)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] of x: float[..., C]."""
        x = x.astype(jnp.dtype(self.dtype))
        for i, linear in enumerate(self.linears):
            if i and self.kind == "mlpsoftmax":
                x = jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)
            elif i:
                x = nnx.gelu(x, approximate=False)
            x = linear(x)
        return x


def calibrate(connector: Connector, features: np.ndarray, scale: float) -> None:
    """Starts a connector from the statistics of the features; in place.

    Features of one tower share a large mean and have small deviations, from which a fresh connector
    makes nearly the same embedding for every image, at a scale other than that of text. Here the
    first linear takes whitened features (the whitening is folded into its weights), and the outputs
    of the last one get mean 0 and the deviation `scale`.

    Args:
        features: float[N, C] or [N, P, C], a sample of what the connector will read.
        scale: standard deviation of the token embeddings.
    """
    linears = connector.linears
    if not len(linears) or not np.size(features):
        return
    x = jnp.asarray(features, jnp.float32).reshape(-1, np.shape(features)[-1])
    mean, std = x.mean(0), x.std(0)
    std = jnp.maximum(std, 1e-3 * std.mean() + 1e-12)  # a dead channel must not explode
    first, last = linears[0], linears[len(linears) - 1]
    kernel = first.kernel[...] / std[:, None]
    first.bias[...] = first.bias[...] - mean @ kernel
    first.kernel[...] = kernel
    out = connector(x).astype(jnp.float32)
    scale = scale / out.std(0).mean()
    last.kernel[...] = last.kernel[...] * scale
    last.bias[...] = (last.bias[...] - out.mean(0)) * scale
