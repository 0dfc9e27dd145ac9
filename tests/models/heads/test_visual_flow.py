"""The head that samples: what it learns where regression learns a mean, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

from metamorph_jax.models.heads.visual_flow import FlowConfig, FlowHead
from metamorph_jax.models.heads.visual_regression import VisualHead

TINY = FlowConfig(width=32, depth=2, draws=3, steps=4)
D, C = 6, 4


def head_of(cfg=TINY, width_in=D, width_out=C, scale=1.0, seed=0):
    """A head whose last layers are not zero."""
    head = FlowHead(cfg, width_in, width_out, scale, rngs=nnx.Rngs(seed))
    spread = np.random.default_rng(seed)
    for _, leaf in nnx.iter_graph(head):
        if isinstance(leaf, nnx.Param):
            value = leaf.get_raw_value()
            leaf.set_raw_value(value + 0.2 * spread.standard_normal(value.shape, np.float32))
    return head


def _trained(head, loss, steps, rate=3e-3):
    graph, params = nnx.split(head)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, state, key):
        gradients = jax.grad(lambda p: loss(nnx.merge(graph, p), key))(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for n in range(steps):
        params, state = step(params, state, jax.random.key(n))
    return nnx.merge(graph, params)


def test_both_values_come_in_proportion_where_regression_gives_the_mean():
    """After state a, the next token is (1, 1) in one case of four, and (-1, 1) otherwise; after
    state b it is (0, -1)."""
    states = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    values = jnp.array([[1.0, 1.0], [-1.0, 1.0], [0.0, -1.0]])

    def batch(key):
        of_b = jnp.arange(256) % 2
        rare = jax.random.uniform(key, (256,)) < 0.25
        return states[of_b], values[jnp.where(of_b == 1, 2, jnp.where(rare, 0, 1))]

    cfg = FlowConfig(width=48, depth=2, draws=2, drop_state=0.0, steps=25)
    flow = FlowHead(cfg, 2, 2, 1.0, rngs=nnx.Rngs(0))
    flow = _trained(flow, lambda m, k: m.losses(*batch(k), jax.random.fold_in(k, 1)).mean(), 900)
    keys = jax.random.split(jax.random.key(7), 1000)
    drawn = np.asarray(flow.sample(jnp.repeat(states, 500, 0), keys))
    distance = np.linalg.norm(drawn[:, None] - values[None], axis=-1)
    nearest, how_near = distance.argmin(1), distance.min(1)
    assert (how_near < 0.35).mean() > 0.95
    assert (nearest[500:] == 2).all()
    assert 0.17 < (nearest[:500] == 0).mean() < 0.33 and (nearest[:500] != 2).all()

    def loss(m, key):
        x, z = batch(key)
        return jnp.square(m(x) - z).mean()

    regression = VisualHead("mlp", 2, 2, rngs=nnx.Rngs(0))
    answer = np.asarray(_trained(regression, loss, 600, 1e-2)(states))
    np.testing.assert_allclose(answer, [[-0.5, 1.0], [0.0, -1.0]], atol=0.1)


def test_gradients_are_those_of_finite_differences():
    head = head_of(dataclasses.replace(TINY, drop_state=0.5))
    graph, params = nnx.split(head)
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.standard_normal((2, 3, D)), jnp.float32)
    target = jnp.asarray(rng.standard_normal((2, 3, C)), jnp.float32)

    def loss(params, states):
        return nnx.merge(graph, params).losses(states, target, jax.random.key(1)).mean()

    with jax.default_matmul_precision("highest"):
        check_grads(loss, (params, states), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-3)
        to_null = jax.grad(loss)(params, states)["null"][...]
        to_target = jax.grad(lambda z: head.losses(states, z, jax.random.key(1)).sum())(target)
    assert np.abs(to_null).max() > 0  # half of the states are the learned one
    assert (np.asarray(to_target) == 0).all()


def test_a_token_depends_on_its_own_state_and_key_only():
    head = head_of(dataclasses.replace(TINY, guidance=1.5))
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.standard_normal((5, D)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 5)
    together = np.asarray(jax.jit(head.sample)(states, keys))
    for n in range(5):
        alone = np.asarray(head.sample(states[n : n + 1], keys[n : n + 1]))[0]
        np.testing.assert_allclose(together[n], alone, atol=2e-5)
    assert not np.allclose(together, head.sample(states, keys[::-1]), atol=1e-3)


def test_guidance_moves_away_from_what_comes_without_a_state():
    """At one step, the token is null + guidance * (given - null)."""
    head = head_of(dataclasses.replace(TINY, steps=1))
    states = jnp.ones((1, D))
    keys = jax.random.split(jax.random.key(3), 1)

    def drawn(guidance, states):
        head.cfg = dataclasses.replace(TINY, steps=1, guidance=guidance)
        return np.asarray(head.sample(states, keys))

    given, null = drawn(1.0, states), drawn(1.0, head.null[...][None])
    np.testing.assert_allclose(drawn(3.0, states), null + 3 * (given - null), atol=1e-4)


def test_without_temperature_the_key_does_not_matter():
    head = head_of(dataclasses.replace(TINY, temperature=0.0))
    states = jnp.ones((2, D))
    a, b = (head.sample(states, jax.random.split(jax.random.key(n), 2)) for n in (0, 1))
    np.testing.assert_array_equal(a, b)


def test_scale_is_that_of_the_tokens():
    """The network's answer, here its last bias, is where all noise goes, in the tokens' units."""
    head = FlowHead(TINY, D, C, 10.0, rngs=nnx.Rngs(0))
    head.out.bias[...] = jnp.arange(C, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20)
    drawn = head.sample(jnp.zeros((20, D)), keys)
    np.testing.assert_allclose(drawn, np.tile(np.arange(C) / 10, (20, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"drop_state": 1.0}, "drop_state"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"guidance": float("nan")}, "must be finite"),
        ({"guidance": 2.0, "drop_state": 0.0}, "drop_state is 0"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowConfig(**changes)
