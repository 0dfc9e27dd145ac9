"""The forward pass with a cache against the one that training uses; products of rounded weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models.llm import llama
from metamorph_jax.nn.attention import attend
from metamorph_jax.sampling.cached_llm import attend_cached, product
from metamorph_jax.sampling.llm_weights import take_over


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


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_reading_equals_the_whole_row(qk_norm):
    """A prompt, single positions and a block, at other slots in each row."""
    cfg = dataclasses.replace(llama.SIZES["tiny"], qk_norm=qk_norm, qkv_bias=not qk_norm)
    llm = llama.Llama(cfg, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 320, (2, 12))
    x = llm.embed_tokens(tokens)
    mask = jnp.tril(jnp.ones((2, 12, 12), bool))
    whole = np.asarray(llm(x, jnp.tile(jnp.arange(12), (2, 1)), mask))
    model, weights = take_over(llm)
    table = np.asarray(model.embed(weights, tokens))
    np.testing.assert_array_equal(table, x)

    def same(hidden, length):
        for row, n in enumerate(length):
            np.testing.assert_allclose(hidden[:, row], whole[row, n - 1], atol=1e-5)

    length = np.array([5, 3])
    keys, values, hidden = model.read_prompts(weights, x[:, :6], length, slots=12)
    same(hidden, length)
    rows = np.arange(2)
    for _ in range(2):
        keys, values, hidden = model.read_token(weights, keys, values, length, x[rows, length])
        length = length + 1
        same(hidden, length)
    block = np.stack([x[0, 7:11], x[1, 5:9]])
    keys, values, hidden = model.read_block(weights, keys, values, length, block, np.array([0, 4]))
    length = length + np.array([0, 4])
    np.testing.assert_allclose(hidden[:, 1], whole[1, length[1] - 1], atol=1e-5)
    # The row that got nothing continues as if nothing had happened.
    keys, values, hidden = model.read_token(weights, keys, values, length, x[rows, length])
    same(hidden, length + 1)
