"""The TPU kernel, interpreted on this host, gives the numbers and gradients of plain attention."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.nn import attention
from tests.devices import virtual

ROOT = pathlib.Path(__file__).parents[2]


def _case(B, L, N, K, H, seed=0):
    r = np.random.default_rng(seed)
    q = r.normal(size=(B, L, N, H)).astype(np.float32)
    k, v = r.normal(size=(2, B, L, K, H)).astype(np.float32)
    cut = np.sort(r.integers(1, L, size=(B, 3)), axis=1)
    segments = 1 + (np.arange(L)[None, :, None] >= cut[:, None]).sum(-1)
    segments = np.where(segments == 4, 0, segments).astype(np.int32)  # the rest is padding
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(segments)


def test_packed_rows():
    q, k, v, segments = _case(2, 256, 4, 2, 16)
    seen = (segments > 0)[..., None, None]

    def run(mask):
        def loss(q, k, v):
            out = jnp.where(seen, attention.attend(q, k, v, mask), 0)
            return (out**2).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3)  # noqa: E731
    kernel, plain = run(attention.Segments(segments)), run(attention.packed_mask(segments))
    jax.tree.map(same, kernel, plain)


def test_rows_without_a_mask(monkeypatch):
    q, k, v, _ = _case(1, 150, 2, 2, 24)
    k, v = k[:, :140], v[:, :140]
    plain = attention.attend(q, k, v)
    from metamorph_jax.nn import splash

    kernel = splash.attend(q * 24**-0.5, k, v, None, interpret=True)
    np.testing.assert_allclose(kernel, plain, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_mask_fits_the_platform(platform, monkeypatch, caplog):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    segments = jnp.ones((1, 128), jnp.int32)
    assert isinstance(attention.row_mask(segments), attention.Segments) == (platform == "tpu")
    assert attention.row_mask(segments[:, :100]).shape == (1, 100, 100)
    assert not caplog.records
    assert attention.row_mask(segments, segments).shape == (1, 128, 128)
    assert ("independent turns" in caplog.text) == (platform == "tpu")


MESH = """
import jax, jax.numpy as jnp, numpy as np, sys
sys.path.insert(0, "tests/nn")
from test_splash import _case
from metamorph_jax import sharding
from metamorph_jax.nn import attention, splash
MESHES = {"fsdp": 2, "tensor": 2, "context": 2}, {"tensor": 4, "fsdp": 2}
for shape in MESHES:
    q, k, v, segments = _case(2, 256, 4, 2, 16)
    seen = np.asarray(segments > 0)
    plain = np.asarray(attention.attend(q, k, v, attention.packed_mask(segments)))
    with jax.set_mesh(sharding.make_mesh(shape)):
        f = jax.jit(lambda *x: splash.attend(*x, interpret=True))
        out = np.asarray(f(q * 16**-0.5, k, v, segments))
    np.testing.assert_allclose(out[seen], plain[seen], atol=1e-5)
"""


def test_on_a_mesh():
    """Rows, heads (more devices than key heads, too) and queries over devices."""
    env = os.environ | {
        **virtual(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", MESH], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
