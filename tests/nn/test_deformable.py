"""Deformable sampling: both methods give the reference's numbers and gradients, chunked or not."""

import functools
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.nn import deformable, deformable_kernel
from tests.devices import virtual
from tests.recipes.mm_interleaved import golden

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ("gather", "dense")
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", golden.names(metafunc.config, "msda_core_"))


def close(ours, reference, tolerance=1e-5):
    """Within `tolerance` of the largest value of the reference."""
    reference = np.asarray(reference, np.float32)
    bound = tolerance * max(np.abs(reference).max(initial=0), 1e-6)
    np.testing.assert_allclose(np.asarray(ours, np.float32), reference, rtol=0, atol=bound)


@functools.partial(jax.jit, static_argnames=("shapes", "method"), compiler_options=FAST)
def everything(value, locations, weights, cotangent, *, shapes, method):
    """The output, and the gradients of value, locations and weights."""
    run = lambda *x: deformable.sample(x[0], shapes, *x[1:], method=method)  # noqa: E731
    out, back = jax.vjp(run, value, locations, weights)
    return out, *back(cotangent.astype(out.dtype))


def inputs(shapes, B=2, Q=5, h=2, d=3, P=2, low=-0.4, high=1.4, seed=0):
    r = np.random.default_rng(seed)
    S, n = sum(H * W for H, W in shapes), len(shapes)
    return (
        r.normal(size=(B, S, h, d)).astype(np.float32),
        r.uniform(low, high, size=(B, Q, h, n, P, 2)).astype(np.float32),
        r.normal(size=(B, Q, h, n, P)).astype(np.float32),
        r.normal(size=(B, Q, h * d)).astype(np.float32),
    )


@pytest.mark.golden
@pytest.mark.parametrize("method", METHODS)
def test_reference(case, method, golden_root):
    case = golden.Case(golden_root, case)
    shapes = tuple(map(tuple, case["in/spatial_shapes"].tolist()))
    names = ("value", "sampling_locations", "attention_weights", "grad_output")
    out, *gradients = everything(*(case[f"in/{n}"] for n in names), shapes=shapes, method=method)
    close(out, case["out/output"])
    for name, gradient in zip(names[:3], gradients, strict=True):
        close(gradient, case[f"grad/{name}"])
    case.check_all_read()


SIDES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=4, deadline=None)
@given(
    st.lists(SIDES, min_size=1, max_size=4).map(tuple),
    st.sampled_from([(1, 3, 1, 2, 1), (2, 2, 3, 1, 3)]),
    st.integers(0, 2**16),
)
def test_methods_agree(shapes, sizes, seed):
    """Also where levels repeat, maps are one pixel wide, and points lie on pixel centres."""
    B, Q, h, d, P = sizes
    value, locations, weights, cotangent = inputs(shapes, B, Q, h, d, P, seed=seed)
    size = np.array([(W, H) for H, W in shapes], np.float32)[:, None]
    centre = (np.floor(locations * size) + 0.5) / size
    locations = np.where(np.arange(Q)[:, None, None, None, None] == 0, centre, locations)
    both = [
        everything(value, locations.astype(np.float32), weights, cotangent, shapes=shapes, method=m)
        for m in METHODS
    ]
    for a, b in zip(*both, strict=True):
        close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_chunks(method, monkeypatch):
    """Chunks, a last one that isn't full included, change nothing but the order of sums."""
    shapes, whole = ((3, 4), (2, 2), (3, 4)), inputs(((3, 4), (2, 2), (3, 4)), Q=7)
    plain = everything(*whole, shapes=shapes, method=method)
    sizes = []
    monkeypatch.setattr(deformable, "chunk_size", lambda *a: sizes.append(a) or 3)
    everything.clear_cache()
    chunked = everything(*whole, shapes=shapes, method=method)
    everything.clear_cache()
    assert sizes
    for a, b in zip(chunked, plain, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_bound_memory(method, monkeypatch):
    """Four times the queries need more memory for what is linear in them only."""
    monkeypatch.setattr(deformable, "_CHUNK_BYTES", {jax.default_backend(): 2**18})
    shapes, temporary, linear = ((16, 16), (8, 8)), [], []
    for Q in (2**9, 2**11):
        value, *rest = inputs(shapes, B=1, Q=1, h=4, d=16, P=4)
        rest = [jax.ShapeDtypeStruct((1, Q, *x.shape[2:]), x.dtype) for x in rest]
        compiled = everything.lower(value, *rest, shapes=shapes, method=method).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        linear.append(4 * sum(math.prod(x.shape) for x in rest))
    # An output and a copy of everything that is linear; a chunk needs as much as before.
    assert temporary[1] - temporary[0] < 3 * (linear[1] - linear[0])


def test_chunk_size():
    shapes = ((32, 32),) * 8
    size = functools.partial(deformable.chunk_size, shapes=shapes, points=8)
    value = (2, 8 * 32 * 32, 16, 64)
    for method in METHODS:
        assert 1 < size(value, 4096, method=method) < 4096
        assert size(value, 2, method=method) == 2
        assert size((2**12, *value[1:]), 4096, method=method) == 1


@pytest.mark.parametrize("method", METHODS)
def test_finite_differences(method):
    """Away from pixel centres, where the output is smooth."""
    shapes, step = ((4, 5), (2, 3)), 1e-2
    value, locations, weights, cotangent = inputs(shapes, low=0.1, high=0.9)
    size = np.array([(W, H) for H, W in shapes], np.float32)[:, None]
    pixel = locations * size - 0.5
    locations = ((np.floor(pixel) + np.clip(pixel % 1, 0.2, 0.8) + 0.5) / size).astype(np.float32)
    given = [value, locations, weights]
    gradients = everything(*given, cotangent, shapes=shapes, method=method)[1:]
    for i, gradient in enumerate(gradients):
        way = np.random.default_rng(i).normal(size=given[i].shape).astype(np.float32)
        sums = []
        for sign in (1, -1):
            moved = [x + sign * step * way / 4 if k == i else x for k, x in enumerate(given)]
            out = everything(*moved, cotangent, shapes=shapes, method=method)[0]
            sums.append(float((np.asarray(out, np.float64) * cotangent).sum()))
        slope = (sums[0] - sums[1]) / (step / 2)
        # The second derivative along x and y together makes no odd term, so this is all rounding.
        assert slope == pytest.approx(float((np.asarray(gradient) * way).sum()), rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_from_nowhere(method):
    """Points far outside, infinite or NaN add nothing, and all gradients are finite."""
    shapes = ((3, 4), (2, 2))
    value, locations, weights, cotangent = inputs(shapes, low=0.1, high=0.9)
    kept = weights.copy()
    for k, bad in enumerate((np.nan, np.inf, -np.inf, 1e30, -3e9)):
        locations[:, k, :, :, 0, k % 2] = bad
    kept[:, :, :, :, 0] = 0
    found = everything(value, locations, weights, cotangent, shapes=shapes, method=method)
    clean = np.nan_to_num(locations, nan=0.5, posinf=0.5, neginf=0.5)
    wanted = everything(value, clean, kept, cotangent, shapes=shapes, method=method)
    for a in found:
        assert np.isfinite(np.asarray(a)).all()
    close(found[0], wanted[0])
    close(found[1], wanted[1])
    assert not np.asarray(found[2])[:, :, :, :, 0].any()
    assert not np.asarray(found[3])[:, :, :, :, 0].any()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method, monkeypatch):
    """Products in bfloat16; the gradient of the maps is summed in float32, over chunks, too."""
    shapes = ((3, 4), (2, 2))
    value, locations, weights, cotangent = inputs(shapes, Q=600, low=0.0, high=1.0)
    value, cotangent = (np.asarray(x, jnp.bfloat16) for x in (value, cotangent))
    args = (locations, weights, cotangent)
    monkeypatch.setattr(deformable, "chunk_size", lambda *a: 2)
    everything.clear_cache()
    found = everything(value, *args, shapes=shapes, method=method)
    everything.clear_cache()
    wanted = everything(
        value.astype(np.float32),
        *args[:2],
        cotangent.astype(np.float32),
        shapes=shapes,
        method=method,
    )
    assert [x.dtype for x in found] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 2e-2)


def test_what_does_not_fit():
    shapes = ((3, 4), (2, 2))
    value, locations, weights, _ = inputs(shapes)
    with pytest.raises(ValueError, match="16 positions"):
        deformable.sample(value, shapes[:1], locations, weights)
    with pytest.raises(ValueError, match="expected one of auto, gather, dense"):
        deformable.sample(value, shapes, locations, weights, method="fast")
    with pytest.raises(ValueError, match="expected"):
        deformable.sample(value, shapes, locations[:, :, :, :1], weights)
    with pytest.raises(TypeError, match="bfloat16, expected float32"):
        deformable.sample(value, shapes, jnp.asarray(locations, jnp.bfloat16), weights)


@pytest.mark.parametrize("shape, size", [((1, 2, 2, 3, 5), (3, 4)), ((2, 1, 3, 1, 130), (2, 3))])
def test_kernel(shape, size, monkeypatch):
    """The TPU kernel, interpreted, in one block and in several; one image at a time, too."""
    if shape[-1] > 5:
        monkeypatch.setattr(deformable_kernel, "_BLOCK_BYTES", 1)
    B, h, G, _, q = shape
    r = np.random.default_rng(0)
    x, y = r.uniform(-0.4, 1.4, size=(2, *shape)).astype(np.float32)
    x[0, 0, 0, 0, :2] = np.nan, np.inf
    w, cotangent = (r.normal(size=s).astype(np.float32) for s in (shape, (B, h, G, *size, q)))
    group = deformable._Group(*size, G, "dense")
    plain = lambda *p: deformable._coefficients(group, jnp.float32, *p)  # noqa: E731
    kernel = lambda *p: deformable_kernel.coefficients(  # noqa: E731
        *p, size, jnp.float32, interpret=True
    )

    def both(run):
        out, back = jax.vjp(lambda *p: run(*p).reshape(cotangent.shape), x, y, w)
        return out, *back(cotangent)

    found, wanted = (
        jax.jit(both, static_argnums=0, compiler_options=FAST)(f) for f in (kernel, plain)
    )
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


def test_kernel_is_what_tpus_run(monkeypatch):
    asked = []
    monkeypatch.setattr(deformable.sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(
        deformable_kernel,
        "coefficients",
        lambda x, y, w, size, dtype: asked.append(size) or jnp.zeros((2, 2, 1, *size, 5), dtype),
    )
    value, locations, weights, _ = inputs(((3, 4), (2, 2)))
    deformable.sample(value, ((3, 4), (2, 2)), locations, weights)
    assert set(asked) == {(3, 4), (2, 2)}


MESH = """
import functools, re
import jax, numpy as np
from metamorph_jax import sharding
from metamorph_jax.nn import deformable, deformable_kernel
from tests.nn.test_deformable import METHODS, everything, inputs

shapes = ((3, 4), (2, 2)) * 2
whole = inputs(shapes, B=2, Q=24, h=4, d=4)
plain = everything(*whole, shapes=shapes, method="gather")
deformable._CHUNK_BYTES = {"cpu": 2**11}
interpret = functools.partial(deformable_kernel.coefficients, interpret=True)
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
with jax.set_mesh(mesh):
    names = ("act_batch", None, "act_heads"), *[("act_batch", "act_len", "act_heads")] * 3
    places = [jax.sharding.NamedSharding(mesh, sharding.spec(*n)) for n in names]
    args = [jax.device_put(x, s) for x, s in zip(whole, places)]
    for method in METHODS:
        assert deformable.chunk_size(args[0].shape, 24, shapes, 2, method) < 12
        compiled = everything.lower(*args, shapes=shapes, method=method).compile()
        moved = set(re.findall(r" (all-[a-z]+|collective-[a-z]+)\\(", compiled.as_text()))
        assert moved <= {"all-reduce"}, moved
        for a, b in zip(compiled(*args), plain, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    x, y, w = (args[1][..., k % 2].transpose(0, 2, 3, 4, 1) for k in range(3))
    found = jax.jit(lambda *p: interpret(*p, (3, 4), np.float32))(x, y, w)
x, y, w = map(np.asarray, (x, y, w))
np.testing.assert_allclose(found, interpret(x, y, w, (3, 4), np.float32), atol=1e-6)
"""


def test_on_a_mesh():
    """Rows, heads and queries stay on their devices; only the maps' gradient is summed."""
    env = os.environ | virtual(8) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MESH], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
