"""Name and layout mapping between NNX modules and PyTorch checkpoints."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import names
from metamorph_jax.convert.names import load_torch_dict, to_torch_dict
from metamorph_jax.models import build
from tests.devices import virtual


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 3, rngs=rngs)
        self.parts = nnx.List([nnx.Conv(3, 4, (2, 6), rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])
        self.query = nnx.Param(jax.random.normal(rngs.params(), (1, 2, 3)))


def stacked_model():
    """Three layers in one module whose leaves have a leading layer axis."""

    class Stack(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda rngs: Layer(rngs), in_axes=0)
            self.layers = make(nnx.Rngs(0).split(3))

    return Stack()


def test_names_and_layouts():
    out = to_torch_dict(Model(nnx.Rngs(0)), "m.")
    assert {k: v.shape for k, v in out.items()} == {
        "m.embed.weight": (7, 3),
        "m.parts.0.weight": (4, 3, 2, 6), "m.parts.0.bias": (4,),
        "m.parts.1.weight": (3, 4), "m.parts.1.bias": (3,),
        "m.query": (1, 2, 3),
    }  # fmt: skip


def test_linear_and_conv_mean_the_same_as_in_torch():
    torch = pytest.importorskip("torch")
    model = Model(nnx.Rngs(0))
    out = {k: torch.from_numpy(v.copy()) for k, v in to_torch_dict(model).items()}
    x = np.random.default_rng(0).standard_normal((2, 5, 9, 3)).astype(np.float32)
    conv = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), out["parts.0.weight"], out["parts.0.bias"]
    )
    conv = conv.permute(0, 2, 3, 1)
    theirs = torch.nn.functional.linear(conv, out["parts.1.weight"], out["parts.1.bias"])
    kernel = model.parts[0].kernel[...]
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims)
    ours = model.parts[1](y + model.parts[0].bias[...])
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_round_trip_into_an_abstract_module():
    model = Model(nnx.Rngs(0))
    empty = nnx.eval_shape(lambda: Model(build.rngs(1)))
    load_torch_dict(empty, to_torch_dict(model, "p."), "p.")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, empty)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stacked_layers_become_numbered_tensors():
    model = stacked_model()
    out = to_torch_dict(model, stacked=("layers",))
    assert out["layers.2.proj.weight"].shape == (5, 3)
    np.testing.assert_array_equal(out["layers.1.proj.weight"].T, model.layers.proj.kernel[...][1])
    assert len(out) == 3 * 4
    again = stacked_model()
    load_torch_dict(again, {k: v + 1 for k, v in out.items()}, stacked=("layers",))
    np.testing.assert_array_equal(again.layers.norm.scale[...], model.layers.norm.scale[...] + 1)


def test_all_problems_are_reported_at_once_and_nothing_is_changed():
    model = Model(nnx.Rngs(0))
    before = jnp.copy(model.embed.embedding[...])
    tensors = to_torch_dict(model)
    tensors = {k: v + 1 for k, v in tensors.items()}
    tensors["parts.1.weight"] = tensors["parts.1.weight"].T
    tensors["extra.weight"] = tensors.pop("embed.weight")
    tensors["second.bias"] = np.zeros(1)
    del tensors["query"]
    with pytest.raises(ValueError) as error:
        load_torch_dict(model, tensors)
    for word in ("embed.weight", "query", "extra.weight", "second.bias", "parts.1.weight: (4, 3)"):
        assert word in str(error.value)
    np.testing.assert_array_equal(model.embed.embedding[...], before)


def test_rename_and_ignore():
    model = Model(nnx.Rngs(0))
    rename = lambda key: key.replace("parts.", "body.")  # noqa: E731
    tensors = to_torch_dict(model, rename=rename)
    assert "body.0.weight" in tensors
    tensors["position_ids"] = np.arange(3)
    load_torch_dict(model, tensors, rename=rename, ignore=lambda key: key == "position_ids")


def test_nan_and_inf_are_errors_that_name_their_tensors():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        model = Model(nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x, d=dtype: x.astype(d), nnx.state(model)))
        tensors = {k: v.copy() for k, v in to_torch_dict(model).items()}
        tensors["parts.1.bias"][1] = np.nan
        tensors["embed.weight"][6, 2] = -np.inf
        tensors["query"][0, 1, 2] = np.nan
        with pytest.raises(ValueError) as error:
            load_torch_dict(model, tensors)
        assert str(error.value).splitlines() == [
            "NaN in 2 tensors: parts.1.bias; query", "inf in 1 tensors: embed.weight"]  # fmt: skip
        with names.allow_nan():
            load_torch_dict(model, tensors)
        assert jnp.isnan(model.query[...]).sum() == 1
        assert jnp.isinf(model.embed.embedding[...]).sum() == 1


# dtype of the source, its value, dtype of the parameter -> what is wrong
CASTS = {
    "f32 to f16": ("float32", 65520.0, "float16", "numbers too large for float16"),
    "bf16 to f16": ("bfloat16", -1e5, "float16", "numbers too large for float16"),
    "f64 to f32": ("float64", 1e39, "float32", "numbers too large for float32"),
    "f32 to bf16": ("float32", 3.4e38, "bfloat16", "numbers too large for bfloat16"),
    "f32 fits f16": ("float32", 65503.0, "float16", ""),
    "f16 to f32": ("float16", 65503.0, "float32", ""),
    "f8": ("float8_e4m3fn", 448.0, "float16", ""),
    **{kind: (kind, 1, "float32", f"{kind} instead of floating-point numbers")
       for kind in ("int8", "uint8", "int32", "int64", "bool", "complex64")},
}  # fmt: skip


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CASTS)
def test_casts_lose_nothing_in_silence(name, stacked):
    kind, value, dtype, fault = CASTS[name]
    model = stacked_model() if stacked else Model(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    extra = {"stacked": ("layers",)} if stacked else {}
    tensors = {k: np.asarray(v) for k, v in to_torch_dict(model, **extra).items()}
    key = sorted(tensors)[0]
    tensors[key] = np.full(tensors[key].shape, value).astype(np.dtype(kind))
    with names.allow_nan():  # which allows NaN and inf only where the source has them
        if not fault:
            return load_torch_dict(model, tensors, **extra)
        with pytest.raises(ValueError, match=f"{fault} in 1 tensors: {re.escape(key)}"):
            load_torch_dict(model, tensors, **extra)


def test_pieces_of_stacked_layers_make_the_same_leaf(monkeypatch):
    """Far below the bytes of a leaf, so that it is written in several pieces and fetched so."""
    model = stacked_model()
    whole = to_torch_dict(model, stacked=("layers",))
    monkeypatch.setattr(names, "_PIECE", 80)
    again = stacked_model()
    load_torch_dict(again, {k: v + 1 for k, v in whole.items()}, stacked=("layers",))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(a + 1, b)
    for key, value in to_torch_dict(again, stacked=("layers",)).items():
        np.testing.assert_array_equal(value, whole[key] + 1, err_msg=key)


def test_views_change_drop_and_add_tensors_when_asked():
    read = []

    class Source(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    source = Source(a=np.arange(6.0).reshape(3, 2), b=np.ones(2), c=np.zeros(1))
    changes = {"a": lambda x: x[:2], "rest": ("a", lambda x: x[2:]), "absent": np.sqrt}
    view = names.Mapped(source, changes, only=lambda key: key != "c")
    assert list(view) == ["a", "b", "rest"] and len(view) == 3 and "c" not in view and not read
    np.testing.assert_array_equal(view["a"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(view["rest"], [[4, 5]])
    assert view["b"] is source["b"] and names.shape_of(view, "rest") == (1, 2)
    with pytest.raises(KeyError):
        view["c"]


SHARDED = """
import jax, numpy as np
from flax import nnx
from metamorph_jax import sharding
from metamorph_jax.convert import names
from metamorph_jax.convert.llama import export_llama, load_llama
from metamorph_jax.models.llm import llama

make = lambda seed: llama.Llama(llama.SIZES["tiny"], rngs=nnx.Rngs(seed))
tensors = dict(export_llama(make(0)))
mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
model = nnx.eval_shape(lambda: make(1))
state = nnx.state(model)
where = sharding.state_shardings(state, mesh)
put = lambda x, s: jax.ShapeDtypeStruct(x.shape, jax.numpy.bfloat16, sharding=s)
nnx.update(model, jax.tree.map(put, state, where))
names._PIECE = 10_000  # the layers in two pieces
load_llama(model, tensors)
cut = 0
wanted = jax.tree.leaves(where)
for value, sharding in zip(jax.tree.leaves(nnx.state(model)), wanted, strict=True):
    assert value.sharding == sharding and value.dtype == jax.numpy.bfloat16
    cut += not value.is_fully_replicated
for key, value in export_llama(model).items():
    np.testing.assert_array_equal(value, tensors[key].astype(value.dtype), err_msg=key)
print("cut", cut)
"""


def test_every_tensor_goes_to_its_shards():
    env = {**os.environ, **virtual(8)}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cut 8\n"


@pytest.mark.e2e
def test_nan_in_the_shard_of_one_process_ends_both(tmp_path):
    from tests.train import forked

    cfg = dict(
        recipe="tests.convert.with_nan", stage="all", steps=1, batch_size=8, data_shards=2,
        model={}, data={}, optim={"learning_rate": 0.02}, mesh={"fsdp": 2}, tensorboard=False,
        compilation_cache="",
    )  # fmt: skip
    runs = forked.together(2, cfg, tmp_path / "w")
    forked.finish(runs, 2)
    for run in runs:
        assert ": NaN in 1 tensors: weight" in run.said
