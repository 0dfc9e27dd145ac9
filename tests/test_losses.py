"""Losses against the textbook formulas, with gradients, in every layout of targets."""

import os
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax import losses
from tests.devices import virtual

B, L, D, V = 3, 11, 6, 29
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def problem(n=2, density=0.4, seed=0, dtype=np.float32):
    r = np.random.default_rng(seed)
    hidden = r.normal(size=(B, L, D)).astype(dtype)
    table = r.normal(size=(D, V)).astype(np.float32)
    added = r.normal(size=(n, D)).astype(np.float32) if n else None
    targets = r.integers(0, V + n, (B, L)).astype(np.int32)
    targets[r.random((B, L)) > density] = -1
    return hidden, table, added, targets


def plain(hidden, table, added, targets, bias=0.0):
    """The loss with whole logits: (sum, float[B, L])."""
    logits = hidden @ table
    if added is not None:
        logits = jnp.concatenate([logits, hidden @ added.T], -1)
    logits += bias
    log_p = jax.nn.log_softmax(logits)
    each = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    each = jnp.where(targets >= 0, each, 0.0)
    return each.sum(), each, (jnp.argmax(logits, -1) == targets) & (targets >= 0)


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("chunk", [1, 4, 33, 512])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_text_loss_and_gradients(n, chunk, density):
    hidden, table, added, targets = problem(n, density)
    args = (hidden, table, added) if n else (hidden, table)
    which = tuple(range(len(args)))

    def ours(*a):
        total, each, right = losses.text_loss(*a, *([] if n else [None]), targets, chunk)
        return total, (each, right)

    def theirs(*a):
        total, each, right = plain(*a, *([] if n else [None]), targets)
        return total, (each, right)

    grad = jax.jit(jax.value_and_grad(ours, which, has_aux=True), compiler_options=FAST)
    (a, aux_a), grads_a = grad(*args)
    (b, aux_b), grads_b = jax.value_and_grad(theirs, which, has_aux=True)(*args)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(aux_a[0], aux_b[0], atol=1e-5)
    np.testing.assert_array_equal(aux_a[1], aux_b[1])
    for x, y in zip(grads_a, grads_b, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    alone = jax.jit(ours, compiler_options=FAST)(*args)[0]  # without gradients
    np.testing.assert_allclose(alone, b, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 2])
def test_biases_of_the_table_and_of_the_added_rows(n):
    hidden, table, added, targets = problem(n)
    bias = np.random.default_rng(1).normal(size=V + n).astype(np.float32)
    args = (hidden, table, bias) + ((added,) if n else ())

    def ours(hidden, table, bias, added=None):
        both = bias[:V], bias[V:] if n else None
        return losses.text_loss(hidden, table, added, targets, 4, both)[0]

    def theirs(hidden, table, bias, added=None):
        return plain(hidden, table, added, targets, bias)[0]

    which = tuple(range(len(args)))
    a, grads_a = jax.jit(jax.value_and_grad(ours, which), compiler_options=FAST)(*args)
    b, grads_b = jax.value_and_grad(theirs, which)(*args)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(grads_a, grads_b, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_the_gradient_scales_with_what_comes_after():
    hidden, table, added, targets = problem()
    grad = lambda f: jax.grad(lambda h: f(losses.text_loss(h, table, added, targets, 4)[0]))(hidden)  # noqa: E731
    np.testing.assert_allclose(grad(lambda s: 3 * s), 3 * grad(lambda s: s), rtol=1e-6)


def test_large_logits_stay_finite():
    hidden, table, added, targets = problem()
    loss = lambda h: losses.text_loss(h, table, added, targets, 4)[0]  # noqa: E731
    value, grad = jax.value_and_grad(loss)(1e4 * hidden)
    assert np.isfinite(value) and np.isfinite(grad).all()


def products(f, *args) -> list[tuple[int, ...]]:
    """Output shapes of all matrix products of a compiled function."""
    out = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                out.append(eqn.outvars[0].aval.shape)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return out


def test_a_frozen_table_costs_no_gradient():
    hidden, table, added, targets = problem()

    def of_hidden(h, t, a):
        return jax.grad(lambda h: losses.text_loss(h, t, a, targets, 4)[0])(h)

    def of_added(h, t, a):
        return jax.grad(lambda a: losses.text_loss(h, t, a, targets, 4)[0])(a)

    def of_table(h, t, a):
        return jax.grad(lambda t: losses.text_loss(h, t, a, targets, 4)[0])(t)

    assert (D, V) not in products(of_hidden, hidden, table, added)
    assert (D, V) in products(of_table, hidden, table, added)
    assert (4, D) not in products(of_added, hidden, table, added)  # nor one for hidden states
    # Nor is there ever a product for all positions at once.
    assert all(shape[-2] < B * L for shape in products(of_table, hidden, table, added))


def test_a_stopped_table_costs_no_gradient():
    hidden, table, added, targets = problem()

    def f(h, t):
        return losses.text_loss(h, jax.lax.stop_gradient(t), added, targets, 4)[0]

    shapes = products(jax.grad(f, (0, 1)), hidden, table)
    assert (D, V) not in shapes


def test_no_work_for_positions_without_targets():
    """The loop runs once for a batch with one supervised position, and not at all for none."""
    hidden, table, added, _ = problem()
    targets = np.full((B, L), -1, np.int32)
    assert losses.text_loss(hidden, table, added, targets, 4)[0] == 0
    targets[1, 5] = 3
    poisoned = np.full_like(hidden, np.nan)  # whatever else is looked at would show
    poisoned[1, 5] = hidden[1, 5]
    total, each, _ = losses.text_loss(poisoned, table, added, targets, 1)
    np.testing.assert_allclose(total, plain(hidden, table, added, targets)[0], rtol=1e-5)
    assert (np.asarray(each) != 0).sum() == 1


def test_bfloat16_keeps_float32_sums():
    hidden, table, added, targets = problem()
    a = losses.text_loss(hidden.astype(jnp.bfloat16), table, added, targets, 4)[0]
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, plain(hidden, table, added, targets)[0], rtol=2e-2)


OVER_A_MESH = """
import re
import jax, numpy as np, jax.numpy as jnp
from metamorph_jax import losses
from metamorph_jax.nn import cross_entropy
from metamorph_jax.sharding import make_mesh
cross_entropy.TILE, cross_entropy.CHUNK = 130, 3
r = np.random.default_rng(0)
y = np.maximum(r.integers(-200, 302, (4, 10)), -1).astype(np.int32)
y[1] = -1
y[2, 5] = 301
h = r.normal(size=(4, 10, 6)).astype(np.float32)
t = r.normal(size=(6, 300)).astype(np.float32)
a = r.normal(size=(2, 6)).astype(np.float32)
b = r.normal(size=300).astype(np.float32), r.normal(size=2).astype(np.float32)
def loss(h, t, a, b):
    total, *rest = losses.text_loss(h, t, a, y, bias=b)
    return 2 * total, rest
f = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
frozen = jax.grad(lambda h: losses.text_loss(h, t, None, y)[0])
one, bare = jax.jit(f)(h, t, a, b), jax.jit(frozen)(h)
for shape in ({"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 8},
              {"slice": 2, "tensor": 2}):
    n = np.prod(list(shape.values()))
    with jax.set_mesh(make_mesh(shape, jax.devices()[:n])):
        many, off = jax.jit(f)(h, t, a, b), jax.jit(frozen)(h)
    for x, z in zip(jax.tree.leaves((one, bare)), jax.tree.leaves((many, off)), strict=True):
        np.testing.assert_allclose(x, z, atol=1e-4)
with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 4}, jax.devices())):
    program = jax.jit(f).lower(h, t, a, b).compile().as_text()
for kind, number in (("all-gather", 2), ("reduce-scatter", 2), ("all-to-all", 0)):
    found = re.findall(rf"= \\S+ {kind}(?:-start)?\\(", program)
    assert len(found) == number, (kind, found)
print("same")
"""


def test_rows_and_table_over_a_mesh_give_the_same_numbers():
    """And the table and the added rows are each gathered once, and their gradients reduced once.

    Run in a child process: eight virtual devices have to be asked for before JAX starts.
    """
    env = {**os.environ, **virtual(8),
           "JAX_PLATFORMS": "cpu"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", OVER_A_MESH], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def visual(seed=0, M=7, C=5):
    r = np.random.default_rng(seed)
    p, t = r.normal(size=(2, B, M, C)).astype(np.float32)
    return p, t, r.random((B, M)) > 0.4


def test_visual_losses():
    p, t, ok = visual()
    norm = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    d = np.abs(p - t)
    q, w = jax.nn.softmax(p), jax.nn.softmax(t)
    expected = {
        "cosine": (p, t, -(p * t).sum(-1) / norm(p) / norm(t)),
        "l1": (p, t, d.mean(-1)),
        "smooth_l1": (p, t, np.where(d < 1, d * d / 2, d - 0.5).mean(-1)),
        "softmax_ce": (q, w, -(w * np.log(q + 1e-10)).sum(-1)),
    }
    assert {*expected, "infonce"} == set(losses.VISUAL_LOSSES)
    for kind, (a, b, each) in expected.items():
        found = losses.visual_loss(a, b, ok, kind)
        np.testing.assert_allclose(found, np.where(ok, each, 0), atol=1e-5, err_msg=kind)


def test_infonce_takes_the_valid_tokens_of_the_batch():
    p, t, ok = visual()
    a, b = p[ok], t[ok]
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    each = -np.diag(jax.nn.log_softmax(a @ b.T / 0.03, axis=1))
    found = losses.visual_loss(p, t, ok, "infonce")
    np.testing.assert_allclose(np.asarray(found)[ok], each, rtol=1e-4, atol=1e-4)
    assert not np.any(np.asarray(found)[~ok])


def test_shapes_that_do_not_fit_raise():
    p, t, ok = visual()
    with pytest.raises(ValueError, match="the vision head predicts"):
        losses.visual_loss(p[..., :4], t, ok)
    with pytest.raises(ValueError, match="none of"):
        losses.visual_loss(p, t, ok, "l2")


def test_targets_are_detached_and_no_targets_give_zero():
    p, t, ok = visual()
    for kind in losses.VISUAL_LOSSES:
        f = lambda p, t, ok, k=kind: losses.visual_loss(p, t, ok, k).sum()  # noqa: E731
        assert not np.any(jax.grad(f, 1)(p, t, ok))
        nothing = np.zeros_like(ok)
        assert f(p, t, nothing) == 0 and np.isfinite(jax.grad(f)(p, t, nothing)).all()


@pytest.mark.parametrize("limit", [0, 3, 4, L, 50])
def test_take_targets(limit):
    r = np.random.default_rng(1)
    hidden = r.normal(size=(B, L, D)).astype(np.float32)
    visual = r.normal(size=(B, 8, 5)).astype(np.float32)
    targets = np.full((B, L), -1, np.int32)
    targets[0, [2, 3, 7]] = [4, 5, 1]
    targets[2, 9] = 6
    h, t, ok, where = losses.take_targets(hidden, visual, targets, limit)
    assert h.shape[1] == (limit if 0 < limit < L else L)
    found = {
        (b, int(where[b, m])): (np.asarray(h[b, m]), np.asarray(t[b, m]))
        for b, m in zip(*np.nonzero(np.asarray(ok)), strict=True)
    }
    assert set(found) == {(0, 2), (0, 3), (0, 7), (2, 9)}
    for (b, at), (a, c) in found.items():
        np.testing.assert_array_equal(a, hidden[b, at])
        np.testing.assert_array_equal(c, visual[b, targets[b, at]])


def test_constant_cosine_is_what_the_best_constant_reaches():
    _, t, ok = visual()
    unit = t[ok] / np.linalg.norm(t[ok], axis=-1, keepdims=True)
    best = unit.mean(0) / np.linalg.norm(unit.mean(0))
    np.testing.assert_allclose(losses.constant_cosine(t, ok), (unit @ best).mean(), rtol=1e-5)
    assert losses.constant_cosine(t, np.zeros_like(ok)) == 0


def test_by_source():
    each = np.arange(6.0).reshape(2, 3)
    count = np.array([[1, 1, 0], [1, 0, 1]], np.float32)
    sources = np.array([[0, 1, 1], [0, 0, 1]])
    found = losses.by_source(each * count, count, sources, ("a", "b"), "x")
    assert {k: (float(a), float(n)) for k, (a, n) in found.items()} == {
        "x/a": (0.0 + 3.0, 2.0), "x/b": (1.0 + 5.0, 2.0)
    }  # fmt: skip
    assert losses.by_source(each, count, sources, (), "x") == {}
