import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax import sharding  # noqa: E402
from metamorph_jax.train import optim, state  # noqa: E402
from metamorph_jax.train.config import OptimConfig  # noqa: E402
from metamorph_jax.train.step import cut, make_step  # noqa: E402
from tests.train import toy  # noqa: E402


def begin(stage="all", cfg=None, ema=False, accumulate=1, **changes):
    mesh = sharding.make_mesh()
    cfg = cfg or toy.Config()
    parts, params, frozen = state.create(lambda r: toy.Toy(cfg, r), toy.STAGES[stage](cfg), mesh, 0)
    changes = {"schedule": "constant", "ema_decay": 0.9 if ema else None} | changes
    optimizer = optim.build(OptimConfig(1e-2, warmup=0, **changes), params, 8, 10)
    step = make_step(parts, optimizer, accumulate, mesh=mesh)
    return parts, state.start(params, parts, mesh, 0, optimizer, False), frozen, step


def do(n, batch, steps=3, **kw):
    _, s, frozen, step = begin(accumulate=n, schedule="cosine", **kw)
    for _ in range(steps):
        s, report = step(s, frozen, batch)
    return s, jax.device_get(report)


def adam(s):
    """The state of the transformation "adamw"."""
    return s.opt_state[0][0]


def test_accumulation_equals_one_large_batch():
    """Though the micro-batches have very different numbers of targets."""
    batch = toy.batch(3)
    counts = [(batch.text_targets[i::4] >= 0).sum() for i in range(4)]
    assert max(counts) > 2 * min(counts)
    cfg = toy.Config()
    one, r1 = do(1, batch, cfg=cfg)
    del r1["metrics"]["seen"]  # depends on where in its micro-batch a token stands
    for n in (2, 4, 8):
        many, r2 = do(n, batch, cfg=cfg)
        del r2["metrics"]["seen"]
        for name, p in one.params.items():
            np.testing.assert_allclose(many.params[name], p, rtol=2e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), r1, r2)


def test_every_target_weighs_the_same():
    batch = toy.batch(3)
    parts, s, frozen, _ = begin()
    model = parts.merge(s.params, frozen)
    sums, _ = model.loss_sums(batch, None)
    n = int((batch.text_targets >= 0).sum()), int((batch.visual_targets >= 0).sum())
    expected = sums["text"] / n[0] + 0.5 * sums["visual"] / n[1]
    _, report = do(4, batch, steps=1)
    assert report["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert report["counts"] == {"text": n[0], "visual": n[1]}


def test_a_batch_without_targets_is_no_nan():
    batch = toy.batch(3)
    none = jax.tree.map(lambda x: x, batch)
    none = type(batch)(**{**vars(none), "visual_targets": np.full_like(batch.tokens, -1)})
    s, report = do(1, none, steps=1)
    assert report["finite"] and report["sums"]["visual"] == 0


def test_frozen_parts_have_no_state():
    parts, s, frozen, step = begin("head")
    assert set(s.params) == {"head.kernel", "head.bias"}
    assert set(adam(s).mu) == set(adam(s).nu) == set(s.params)
    assert set(frozen) == {"table.embedding", "llm.kernel", "llm.bias", "mean"}
    assert parts.buffers == ("mean",) and s.ema is None
    before = jax.tree.map(np.array, frozen)
    new, report = step(s, frozen, toy.batch(0))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))
    assert set(report["norms"]) == {"head"} and int(new.step) == 1


def test_state_is_given_away_and_follows_its_parameters():
    parts, s, frozen, compiled = begin(ema=True)
    old = s.params["llm.kernel"]
    lowered = compiled.lower(s, frozen, toy.batch(0)).compile()
    given = sum(x.nbytes for x in jax.tree.leaves(s))
    assert lowered.memory_analysis().alias_size_in_bytes >= 0.9 * given
    new, _ = compiled(s, frozen, toy.batch(0))
    assert old.is_deleted()
    for name, p in new.params.items():
        for other in (adam(new).mu, adam(new).nu, new.ema):
            assert other[name].sharding == p.sharding == parts.shardings[name]


def test_after_a_bad_step_nothing_moves():
    _, s, frozen, step = begin(ema=True)
    s, good = step(s, frozen, toy.batch(0))
    kept = jax.tree.map(np.array, s)
    s, bad = step(s, frozen, toy.batch(1, poison=True))
    s, after = step(s, frozen, toy.batch(2))
    assert good["finite"] and not bad["finite"] and after["finite"] and s.halted
    for a, b in ((kept.params, s.params), (kept.opt_state, s.opt_state), (kept.ema, s.ema)):
        jax.tree.map(np.testing.assert_array_equal, a, jax.tree.map(np.array, b))
    assert int(s.step) == 1


def test_random_numbers_follow_from_the_step():
    cfg = toy.Config(noise=0.5)
    batch = toy.batch(0)
    a, b = do(1, batch, cfg=cfg), do(1, batch, cfg=cfg)
    assert a[1]["loss"] == b[1]["loss"]
    _, one = do(1, batch, steps=1, cfg=cfg)
    _, two = do(2, batch, steps=1, cfg=cfg)
    assert one["loss"] != two["loss"]  # micro-batches don't share theirs


def test_cut_keeps_rows_on_their_device():
    x = jnp.arange(8)
    np.testing.assert_array_equal(cut(x, 2), [[0, 2, 4, 6], [1, 3, 5, 7]])
    with pytest.raises(ValueError, match="8 rows don't divide into 3"):
        cut(x, 3)
