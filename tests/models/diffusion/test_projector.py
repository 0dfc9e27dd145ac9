"""Conditioning projectors against golden/metamorph (visualizer), and the padding of the context."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from metamorph_jax.convert.names import load_torch_dict, to_torch_dict
from metamorph_jax.models import build
from metamorph_jax.models.diffusion.projector import (
    MODES,
    ProjectorConfig,
    make_projector,
    pad_context,
)


def pytest_generate_tests(metafunc):
    root = pathlib.Path(metafunc.config.getoption("--golden-root")) / "metamorph"
    if "case" in metafunc.fixturenames:
        meta = json.loads((root / "meta.json").read_text())
        metafunc.parametrize("case", meta["arrays"]["visualizer.npz"]["cases"])


@pytest.mark.golden
def test_golden(case, golden_root):
    root = golden_root / "metamorph"
    spec = json.loads((root / "meta.json").read_text())["arrays"]["visualizer.npz"]["cases"][case]
    data = np.load(root / "visualizer.npz")
    fields = {k: v for k, v in spec.items() if k != "output_shape"}
    cfg = ProjectorConfig.from_dict(fields)
    model = nnx.eval_shape(lambda: make_projector(cfg, build.rngs(0)))
    tensors = load_file(root / "visualizer.safetensors")
    load_torch_dict(model, tensors, case + "/")
    for key, value in to_torch_dict(model, case + "/").items():
        np.testing.assert_array_equal(value, tensors[key])
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        def loss(x):
            y = nnx.merge(graph, state)(x)
            return (y.ravel() * jnp.linspace(-1, 1, y.size)).sum(), y

        return jax.value_and_grad(loss, has_aux=True)(x)

    with jax.default_matmul_precision("highest"):
        (_, y), grad = run(state, data["input"])
    assert list(y.shape) == spec["output_shape"]
    np.testing.assert_allclose(y, data[f"{case}/output"], atol=1e-4)
    expected = data[f"{case}/input_grad"]
    np.testing.assert_allclose(grad, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.golden
def test_every_array_is_read(golden_root):
    root = golden_root / "metamorph"
    cases = json.loads((root / "meta.json").read_text())["arrays"]["visualizer.npz"]["cases"]
    read = {"input", "lr_steps", "lr_finetune", "lr_scratch_steps", "lr_scratch"}
    read |= {f"{c}/{kind}" for c in cases for kind in ("output", "input_grad")}
    assert set(np.load(root / "visualizer.npz").files) == read
    assert {c["mode"] for c in cases.values()} == set(MODES)


@pytest.mark.parametrize("tokens, padded", [(64, 77), (77, 77), (90, 90)])
def test_context_is_padded_up_to_the_length_only(tokens, padded):
    context = jnp.ones((2, tokens, 3))
    out = pad_context(context, 77)
    assert out.shape == (2, padded, 3)
    assert out[:, :tokens].all() and not out[:, tokens:].any()


def test_unknown_fields_and_modes_are_errors():
    with pytest.raises(ValueError, match="num_token'"):
        ProjectorConfig.from_dict({"num_token": 3})
    with pytest.raises(ValueError, match="mode='mpl'"):
        ProjectorConfig(mode="mpl")
