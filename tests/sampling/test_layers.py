"""Attention over the cache against the one that training uses."""

import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.nn.attention import attend
from metamorph_jax.sampling.layers import attend_cached


@pytest.mark.parametrize("group", [1, 2, 3])
def test_attention_over_the_cache(group):
    B, S, K, H = 2, 10, 2, 8
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, 1, K * group, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, S, K, H)).astype(np.float32)
    mask = np.arange(S) < np.array([[4], [9]])
    got = attend_cached(
        jnp.asarray(q), jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.swapaxes(1, 2)), mask
    )
    np.testing.assert_allclose(got, attend(q, k, v, mask[:, None]), atol=1e-5)
