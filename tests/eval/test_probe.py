"""The judges learn what they are to judge, on made-up data; the report has the real accuracies."""

import jax
import numpy as np
import pytest

from metamorph_jax.eval import probe


def features(n, seed, noise=0.5):
    """Visual tokens whose 4 colours and 3 shapes are a linear code under a large common mean."""
    code, rng = np.random.default_rng(0), np.random.default_rng(seed)
    base, colors, shapes = (code.normal(size=(k, 4, 24)) for k in (1, 4, 3))
    c, s = rng.integers(0, 4, n), rng.integers(0, 3, n)
    c[:4], s[:3] = range(4), range(3)  # every class is there
    x = 5 * base + colors[c] + shapes[s] + noise * rng.normal(size=(n, 4, 24))
    return x.astype(np.float32), [c, s]


@pytest.mark.parametrize("n", [60, 400])  # the dual and the primal solution
def test_probe_reads_a_linear_code(n):
    fitted = probe.fit_probe(*features(n, seed=1))
    x, labels = features(200, seed=2)
    assert probe.agreement(fitted.predict(x), labels)["both"] > 0.95
    assert fitted.sizes == (4, 3)


def test_dual_equals_primal():
    x, labels = features(96, seed=1)  # N == P*C: both forms are defined
    ridge = 1e-2
    dual = probe.fit_probe(x, labels, ridge)
    flat = x.reshape(96, -1) - dual.mean
    gram = flat.T @ flat
    y = np.concatenate([np.eye(k)[v] for k, v in zip((4, 3), labels, strict=True)], 1)
    gram += ridge * np.trace(gram) / 96 * np.eye(96)
    primal = np.linalg.solve(gram, flat.T @ (y - y.mean(0)))
    np.testing.assert_allclose(dual.weight, primal, atol=2e-4)


def test_probe_does_not_depend_on_the_scale_of_features():
    x, labels = features(60, seed=1)
    test, _ = features(50, seed=2)
    a, b = probe.fit_probe(x, labels), probe.fit_probe(1000 * x, labels)
    for p, q in zip(a.predict(test), b.predict(1000 * test), strict=True):
        np.testing.assert_array_equal(p, q)


def images(n, seed):
    """16x16: a red or blue block, or bar, somewhere."""
    rng = np.random.default_rng(seed)
    out = np.full((n, 16, 16, 3), 240, np.uint8)
    c, s = np.arange(n) % 2, np.arange(n) // 2 % 2
    for i in range(n):
        h, w = ((4, 4), (2, 9))[s[i]]
        y, x = rng.integers(0, 16 - h), rng.integers(0, 16 - w)
        out[i, y : y + h, x : x + w] = ((220, 20, 20), (20, 20, 220))[c[i]]
    return out, [c, s]


def test_classifier_learns():
    cfg = probe.ClassifierConfig(widths=(8, 16), hidden=32, steps=150, batch=24)
    train, labels = images(256, 0)
    judge = probe.train_classifier(train, labels, seed=0, cfg=cfg)
    test, truth = images(101, 1)  # not a multiple of the batch
    seen = judge.predict(test, batch=50)
    assert probe.agreement(seen, truth)["both"] > 0.9


def test_classifier_is_deterministic():
    cfg = probe.ClassifierConfig(widths=(4,), hidden=8, steps=3, batch=8)
    train, labels = images(32, 0)
    a, b = (probe.train_classifier(train, labels, seed=5, cfg=cfg) for _ in range(2))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_agreement():
    seen, truth = [np.array([0, 1]), np.array([2, 2])], [np.array([0, 1]), np.array([2, 0])]
    right = probe.agreement(seen, truth)
    assert right == {"color": 1.0, "shape": 0.5, "both": 0.5}
