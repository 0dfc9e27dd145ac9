import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metamorph_jax.errors import ConfigError
from metamorph_jax.train import optim
from metamorph_jax.train.config import OptimConfig

SHAPES = {
    "llm.layers.q.kernel": (3, 8, 8),
    "llm.layers.q.bias": (3, 8),
    "llm.layers.input_layernorm.scale": (3, 8),
    "connector.linears.0.kernel": (4, 8),
    "llm.embed_tokens.added": (2, 8),
}
PART = {k: k.split(".")[0] for k in SHAPES}


def tree(seed, scale=1.0):
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(seed), len(SHAPES)), strict=True))
    return {n: scale * jax.random.normal(keys[n], s) for n, s in SHAPES.items()}


def run(cfg, steps, grads_of, schedule, ema=None):
    params = tree(0)
    moments = optim.init(params)

    @jax.jit
    def step(params, moments, ema, grads, t):
        norm = jnp.sqrt(sum(optim.squared_norms(grads, PART).values()))
        return optim.update(
            cfg, params, moments, grads, step=t, rate=schedule(t),
            factor=optim.clip_factor(norm, cfg.clip_norm), apply=jnp.isfinite(norm),
            part_of=PART, ema=ema,
        )  # fmt: skip

    ema = params if ema else None
    for t in range(steps):
        params, moments, ema = step(params, moments, ema, grads_of(t), jnp.int32(t))
    return params, moments, ema


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_optax(clip, decay):
    cfg = OptimConfig(1e-2, clip_norm=clip, weight_decay=decay, warmup=2)
    schedule = optim.make_schedule(cfg, 1, 8)
    grads_of = lambda t: tree(10 + t, 10.0 ** (t % 3 - 1))  # noqa: E731
    ours, moments, _ = run(cfg, 8, grads_of, schedule)

    mask = {n: optim.is_decayed(n, len(s)) for n, s in SHAPES.items()}
    assert [n for n in mask if not mask[n]] == [
        "llm.layers.q.bias", "llm.layers.input_layernorm.scale"
    ]  # fmt: skip
    tx = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(schedule, weight_decay=decay, mask=mask),
    )
    params = tree(0)
    state = tx.init(params)
    for t in range(8):
        updates, state = tx.update(grads_of(t), state, params)
        params = optax.apply_updates(params, updates)
    for n in SHAPES:
        np.testing.assert_allclose(ours[n], params[n], rtol=1e-6, atol=1e-6)
    adam = state[1][0]
    for n in SHAPES:
        np.testing.assert_allclose(moments.second[n], adam.nu[n], rtol=1e-5)


def test_multiplier_is_a_learning_rate_of_its_own():
    grads_of = lambda t: tree(20 + t)  # noqa: E731
    plain = OptimConfig(1e-2, clip_norm=None)
    fast, _, _ = run(OptimConfig(1e-2, clip_norm=None, multipliers={"connector": 3.0}), 3,
                     grads_of, lambda t: 1e-2)  # fmt: skip
    one, _, _ = run(plain, 3, grads_of, lambda t: 1e-2)
    three, _, _ = run(plain, 3, grads_of, lambda t: 3e-2)
    for n in SHAPES:
        expected = three if n.startswith("connector") else one
        np.testing.assert_allclose(fast[n], expected[n], rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="names lm; this stage trains connector, llm"):
        optim.check_multipliers(OptimConfig(1.0, multipliers={"lm": 1.0}), set(PART.values()))


def test_non_finite_changes_nothing():
    bad = lambda t: {n: g.at[(0,) * g.ndim].set(jnp.nan) for n, g in tree(3).items()}  # noqa: E731
    params, moments, ema = run(OptimConfig(1e-2, ema_decay=0.9), 1, bad, lambda t: 1e-2, ema=True)
    for n, p in tree(0).items():
        np.testing.assert_array_equal(params[n], p)
        np.testing.assert_array_equal(ema[n], p)
        assert not moments.first[n].any() and not moments.second[n].any()


def test_ema():
    cfg = OptimConfig(1e-2, ema_decay=0.5, clip_norm=None)
    params, _, ema = run(cfg, 1, lambda t: tree(5), lambda t: 1e-2, ema=True)
    keep = 2 / 11  # min(0.5, (1 + t) / (10 + t)) at t = 1
    for n, p in tree(0).items():
        np.testing.assert_allclose(ema[n], keep * p + (1 - keep) * params[n], rtol=1e-6)


def test_norms_by_part():
    grads = tree(7)
    squares = optim.squared_norms(grads, PART)
    assert set(squares) == {"llm", "connector"}
    total = np.sqrt(sum(float(s) for s in squares.values()))
    assert total == pytest.approx(float(optax.global_norm(grads)), rel=1e-6)


def test_square_root_rule_and_schedules():
    cfg = OptimConfig(6.93e-5, base_batch=1536)
    assert optim.peak_rate(cfg, 48) == pytest.approx(6.93e-5 * (48 / 1536) ** 0.5)
    assert optim.peak_rate(OptimConfig(1.0, base_batch=100, batch=400), 7) == 2.0
    assert optim.peak_rate(OptimConfig(1e-4), 9999) == 1e-4
    assert optim.warmup_steps(OptimConfig(1.0, warmup=0.03), 1000) == 30
    assert optim.warmup_steps(OptimConfig(1.0, warmup=7), 1000) == 7
    rate = optim.make_schedule(OptimConfig(1.0, warmup=10), 1, 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)],
                               [0, 0.5, 1, 0.5, 0], atol=1e-6)  # fmt: skip
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="rsqrt"), 1, 100)
    np.testing.assert_allclose([rate(2), rate(4), rate(16)], [1, 2, 1], rtol=1e-6)
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="wsd"), 1, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 80, 90, 100)], [0, 1, 2, 2, 1, 0])
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="constant"), 1, 100)
    np.testing.assert_allclose([rate(2), rate(4), rate(99)], [1, 2, 2], rtol=1e-6)
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="finetune"), 1, 14)
    np.testing.assert_allclose([rate(4), rate(9), rate(14)], [2, 1, 0], atol=1e-6)
    rate = optim.make_schedule(OptimConfig(2.0, warmup=4, schedule="scratch"), 1, 14)
    np.testing.assert_allclose([rate(2), rate(9)], [1, 2], atol=1e-6)


def test_first_moment_in_bfloat16():
    """Half as large, and the same road but for its rounding; the second moment stays as it is."""
    cfg = OptimConfig(1e-2, clip_norm=None, warmup=2, momentum_dtype="bfloat16")
    params = tree(0)
    moments = optim.init(params, cfg.momentum_dtype)
    assert {m.dtype for m in moments.first.values()} == {jnp.dtype("bfloat16")}
    assert {m.dtype for m in moments.second.values()} == {jnp.dtype("float32")}
    exact, exact_moments = params, optim.init(params)
    for t in range(8):
        options = dict(step=jnp.int32(t), rate=1e-2, factor=1.0, apply=True, part_of=PART)
        grads = tree(10 + t)
        params, moments, _ = optim.update(cfg, params, moments, grads, **options)
        exact, exact_moments, _ = optim.update(cfg, exact, exact_moments, grads, **options)
    for name, start in tree(0).items():
        assert moments.first[name].dtype == jnp.bfloat16
        off, moved = np.abs(params[name] - exact[name]), np.abs(exact[name] - start)
        assert 0 < off.max() < 0.02 * moved.max()
    with pytest.raises(ValueError, match="neither float32 nor bfloat16"):
        OptimConfig(1e-2, momentum_dtype="float16")
