"""Prefix tuning: in training, in packed rows, and in decoding with a cache."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.llm import llama
from metamorph_jax.models.prefix import Prefix, PrefixConfig
from metamorph_jax.nn.attention import Segments, attend, row_mask
from metamorph_jax.sampling.cached_llm import attend_cached
from metamorph_jax.sampling.llm_weights import take_over
from tests.devices import virtual

ROOT = pathlib.Path(__file__).parents[2]

TINY = llama.SIZES["tiny"]
ONE = dataclasses.replace(TINY, layers=1)
CONFIG = PrefixConfig(tokens=3, hidden=8)


def make(cfg=TINY, prefix=CONFIG) -> llama.Llama:
    return llama.Llama(cfg, rngs=nnx.Rngs(0), prefix=prefix)


def ids(rows=2, length=12):
    return np.random.default_rng(0).integers(0, 320, (rows, length))


def states(llm, tokens, segments, positions):
    return np.asarray(llm(llm.embed_tokens(tokens), positions, row_mask(segments)))


def test_attention_equals_keys_that_all_rows_see():
    """Of one layer, written out."""
    llm = make(ONE)
    layer = jax.tree.map(lambda x: x[0], nnx.state(llm.layers))
    attention = nnx.merge(nnx.graphdef(llm.layers), layer).self_attn
    k0, v0 = (x[0] for x in llm.prefix())
    B, L, D = 2, 4, TINY.width
    x = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
    cos, sin = jnp.ones((B, L, 1, 8)), jnp.zeros((B, L, 1, 8))  # no rotation
    split = lambda y: y.reshape(B, L, -1, TINY.head_dim)  # noqa: E731
    q, k, v = (split(f(x)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    join = lambda one, x: jnp.concatenate([jnp.tile(one, (B, 1, 1, 1)), x], 1)  # noqa: E731
    mask = np.tril(np.ones((B, L, L), bool))
    whole = np.concatenate([np.ones((B, L, 3), bool), mask], 2)
    wanted = attention.o_proj(attend(q, join(k0, k), join(v0, v), whole).reshape(B, L, -1))
    np.testing.assert_allclose(attention(x, cos, sin, mask, (k0, v0)), wanted, atol=1e-5)
    assert not np.allclose(attention(x, cos, sin, mask), wanted, atol=1e-3)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_samples_of_a_packed_row_see_it_alike(remat):
    llm, tokens = make(dataclasses.replace(TINY, remat=remat)), ids(1)
    at = np.concatenate([np.arange(5), np.arange(7)])[None]
    packed = states(llm, tokens, np.repeat([1, 2], [5, 7])[None], at)
    for part in (slice(0, 5), slice(5, 12)):
        n = part.stop - part.start
        alone = states(llm, tokens[:, part], np.ones((1, n), int), np.arange(n)[None])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    segments = Segments(jnp.repeat(jnp.array([1, 2]), jnp.array([5, 7]))[None])
    embeds = llm.embed_tokens(tokens)
    np.testing.assert_allclose(llm(embeds, at, segments), packed, atol=1e-5)


def test_all_of_it_has_gradients():
    llm, tokens = make(), ids()
    is_prefix = lambda path, _: path[0] == "prefix"  # noqa: E731
    graph, own, rest = nnx.split(llm, is_prefix, ...)
    at = np.tile(np.arange(12), (2, 1))

    def loss(own):
        return jnp.sum(states_of(nnx.merge(graph, own, rest))[:, -1] ** 3)

    def states_of(llm):
        return llm(llm.embed_tokens(tokens), at, row_mask(jnp.ones((2, 12), int)))

    grads = jax.jit(jax.grad(loss))(own)
    leaves = jax.tree.leaves(grads)
    assert len(leaves) == 5 and all(np.abs(x).max() > 0 for x in leaves)


@pytest.mark.parametrize("hidden", [0, 8])
def test_shapes(hidden):
    prefix = Prefix(PrefixConfig(4, hidden), 16, (3, 2, 5), rngs=nnx.Rngs(0))
    k, v = prefix()
    assert k.shape == v.shape == (3, 4, 2, 5) and not np.allclose(k, v)


def test_published_size():
    """Of a 7B model, as PEFT counts it: 5 virtual tokens, MLP of 1024."""
    made = nnx.eval_shape(lambda: Prefix(PrefixConfig(), 4096, (32, 32, 128), rngs=build.rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(made, nnx.Param)))
    out = 32 * 2 * 4096
    assert count == 5 * 4096 + (4096 + 1) * 1024 + (1024 + 1) * out


# ---- decoding


@pytest.mark.parametrize("group", [1, 3])
def test_attention_over_cache_and_prefix(group):
    B, S, K, H, n = 2, 10, 2, 8, 3
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, 1, K * group, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, S, K, H)).astype(np.float32)
    first = rng.normal(size=(2, n, K, H)).astype(np.float32)
    mask = np.arange(S) < np.array([[4], [9]])
    joined = [
        np.concatenate([np.tile(a, (B, 1, 1, 1)), b], 1) for a, b in zip(first, (k, v), strict=True)
    ]
    seen = np.concatenate([np.ones((B, n), bool), mask], 1)
    wanted = attend(q, *joined, seen[:, None])
    forms = ((B, K), (B * K,))
    for form in forms:
        keys = k.transpose(0, 2, 3, 1).reshape(*form, H, S)
        values = v.swapaxes(1, 2).reshape(*form, S, H)
        got = attend_cached(
            *map(jnp.asarray, (q, keys, values)), mask, tuple(map(jnp.asarray, first))
        )
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_cached_reading_equals_the_whole_row():
    """A prompt, single positions and a block, at other slots in each row."""
    llm, tokens = make(dataclasses.replace(TINY, qkv_bias=True)), ids()
    whole = states(llm, tokens, np.ones((2, 12), int), np.tile(np.arange(12), (2, 1)))
    x = llm.embed_tokens(tokens)
    model, weights = take_over(llm)

    def same(hidden, length):
        for row, n in enumerate(length):
            np.testing.assert_allclose(hidden[:, row], whole[row, n - 1], atol=1e-5)

    length, rows = np.array([5, 3]), np.arange(2)
    keys, values, hidden = model.read_prompts(weights, x[:, :6], length, slots=12)
    same(hidden, length)
    for _ in range(2):
        keys, values, hidden = model.read_token(weights, keys, values, length, x[rows, length])
        length = length + 1
        same(hidden, length)
    block = np.stack([x[0, 7:11], x[1, 5:9]])
    keys, values, hidden = model.read_block(weights, keys, values, length, block, np.array([4, 4]))
    same(hidden, length + 4)


MESH = """
import jax, numpy as np
from tests.models.test_prefix import ONE, ids, make
from metamorph_jax import sharding
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.policy import TextPolicy

prompts = [np.asarray(make(ONE).embed_tokens(ids(1, n)[0])) for n in (5, 3)]
found = []
for axes, count in (({"fsdp": 1}, 1), ({"fsdp": 2, "tensor": 2}, 4)):
    mesh = sharding.make_mesh(axes, devices=jax.devices()[:count])
    llm, weights = take_over(make(ONE), mesh=mesh)
    results = Loop(llm, weights, None, mesh)(prompts, 6, TextPolicy())
    found.append([one.ids.tolist() for one in results])
part = weights["layers"][0]["prefix"]["k"]
assert 2 * part.addressable_shards[0].data.size == part.size
assert found[0] == found[1] and len(found[0][0]) == 6, found
"""


def test_on_a_mesh_with_heads_in_shards():
    """The loop writes the same ids on one device and on four, two of which share the heads."""
    env = os.environ | virtual(4) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MESH], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
