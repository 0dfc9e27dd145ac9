"""The two ways of attending give the same numbers and gradients."""

import jax
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
