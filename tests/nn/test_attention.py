"""The two ways of attending give the same numbers and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.nn import attention


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_head_by_head_equals_the_batched_products(heads, masked, monkeypatch):
    (N, K), B, L, H = heads, 2, 9, 8
    r = np.random.default_rng(0)
    q = r.normal(size=(B, L, N, H)).astype(np.float32)
    k, v = r.normal(size=(2, B, L, K, H)).astype(np.float32)
    segments = np.array([[1] * 4 + [2] * 4 + [0], [1] * 9])
    turns = np.array([[0] * 9, [0, 0, 1, 1, 1, 2, 2, 3, 3]])
    mask = attention.packed_mask(segments, turns) if masked else None

    def run(q, k, v):
        out = attention.attend(q, k, v, mask)
        return (out**2).sum(), out

    found = {}
    for name, long in (("batched", 1000), ("loop", 1)):
        monkeypatch.setattr(attention, "_LONG", long)
        found[name] = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k, v)
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)  # noqa: E731
    jax.tree.map(same, found["batched"], found["loop"])
    assert np.isfinite(found["loop"][0][1]).all()


def test_bfloat16_queries_of_several_rows_meet_keys_as_the_cache_has_them():
    """A chat's next turn: keys are [B, K, H, S] in memory. XLA's CPU compiler took this product in
    bfloat16 and failed when it ran."""
    rng = np.random.default_rng(0)
    q, keys, values = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((2, 7, 4, 16), (2, 2, 16, 32), (2, 2, 32, 16))
    )
    run = jax.jit(
        lambda q, k, v: attention.attend(q, k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3))
    )
    wide = [x.astype(jnp.float32) for x in (q, keys, values)]
    found = run(q, keys, values)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), run(*wide), atol=0.03)
