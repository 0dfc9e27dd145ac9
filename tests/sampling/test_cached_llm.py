"""Attention over the cache against the one that training uses; products with rounded weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.nn.attention import attend
from metamorph_jax.sampling.cached_llm import attend_cached, product


@pytest.mark.parametrize("group", [1, 2, 3])
def test_attention_over_the_cache(group):
    B, S, K, H = 2, 10, 2, 8
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, 1, K * group, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, S, K, H)).astype(np.float32)
    mask = np.arange(S) < np.array([[4], [9]])
    keys = k.transpose(0, 2, 3, 1).reshape(B, K, H, S)
    values = v.swapaxes(1, 2)
    got = attend_cached(jnp.asarray(q), jnp.asarray(keys), jnp.asarray(values), mask)
    np.testing.assert_allclose(got, attend(q, k, v, mask[:, None]), atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_rounded_weights_round_the_columns_too(columns):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(5, 16)), rng.normal(size=(16, columns))
    half = lambda a: jnp.asarray(a, jnp.bfloat16)  # noqa: E731
    wide = lambda a: np.asarray(half(a), np.float64)  # noqa: E731
    got = product(half(w), jnp.asarray(x, jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wide(w) @ wide(x), atol=1e-5)
