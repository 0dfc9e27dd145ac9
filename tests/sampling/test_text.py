"""Samplers: what can be drawn, and that draws belong to their rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.sampling.text import Sampler, row_keys, step_keys

logits_strategy = st.lists(
    st.floats(-8, 8, width=32).map(lambda x: round(x, 2) + 0.0), min_size=6, max_size=6
)


def _allowed(sampler, logits):
    scores, ids = sampler.candidates(jnp.asarray([logits], jnp.float32))
    return [int(i) for s, i in zip(np.asarray(scores)[0], np.asarray(ids)[0], strict=True)
            if np.isfinite(s)]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(logits_strategy, st.integers(1, 6))
def test_top_k_support(logits, k):
    allowed = _allowed(Sampler(1.0, top_k=k), logits)
    assert sorted(allowed) == sorted(np.argsort(-np.array(logits), kind="stable")[:k].tolist())


@settings(max_examples=40, deadline=None)
@given(logits_strategy, st.floats(0.05, 0.95), st.floats(0.3, 2.0))
def test_top_p_support(logits, p, temperature):
    """The kept tokens hold at least p; without the worst of them they would not."""
    allowed = _allowed(Sampler(temperature, top_p=p), logits)
    x = np.array(logits, np.float64) / temperature
    share = np.exp(x - x.max())
    share /= share.sum()
    assert int(np.argmax(share)) in allowed
    assert share[allowed].sum() >= p - 1e-5
    assert share[allowed[:-1]].sum() < p + 1e-5
    assert min(share[allowed]) >= max([share[i] for i in range(6) if i not in allowed] or [0])


@settings(max_examples=20, deadline=None)
@given(logits_strategy, st.integers(0, 6), st.floats(0.1, 1.0), st.integers(0, 2**31))
def test_draws_come_from_the_support(logits, k, p, seed):
    sampler = Sampler(0.9, top_k=k, top_p=p)
    keys = row_keys(jnp.arange(4, dtype=jnp.uint32) + np.uint32(seed))
    drawn = sampler(jnp.tile(jnp.asarray(logits, jnp.float32), (4, 1)), keys)
    assert set(np.asarray(drawn).tolist()) <= set(_allowed(sampler, logits)) or sampler.greedy


def test_greedy_and_frequencies():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    keys = row_keys(jnp.arange(4000))
    many = jnp.tile(logits, (4000, 1))
    assert (np.asarray(Sampler()(many, keys)) == 1).all()
    assert (np.asarray(Sampler(2.0, top_k=1)(many, keys)) == 1).all()
    share = np.bincount(np.asarray(Sampler(1.0)(many, keys)), minlength=3) / 4000
    np.testing.assert_allclose(share, [0.1, 0.6, 0.3], atol=0.03)
    share = np.bincount(np.asarray(Sampler(1.0, top_p=0.7)(many, keys)), minlength=3) / 4000
    np.testing.assert_allclose(share, [0, 2 / 3, 1 / 3], atol=0.03)


def test_rows_are_independent():
    """A row's draw depends on its seed and the step, not on its neighbours."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 50)), jnp.float32)
    sampler = Sampler(1.0, top_k=30)
    keys = step_keys(row_keys(jnp.arange(5)), 3)
    together = np.asarray(sampler(logits, keys))
    alone = [int(sampler(logits[i : i + 1], keys[i : i + 1])[0]) for i in range(5)]
    assert together.tolist() == alone
    other = np.asarray(sampler(logits, step_keys(row_keys(jnp.arange(5)), 4)))
    assert (together != other).any()


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampler(**bad)
