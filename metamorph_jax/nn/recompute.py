"""Blocks whose inner values are recomputed for the gradient instead of kept."""

import jax
from flax import nnx


def call(block: nnx.Module, recompute: bool, *args):
    """block(*args); with `recompute`, the backward pass runs it again (`jax.checkpoint`).

    args: trees of arrays; None is allowed.
    """
    if not recompute:
        return block(*args)
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, *args: nnx.merge(graph, state)(*args))(state, *args)
