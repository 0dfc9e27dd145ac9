"""Packed kernels: errors, gradients, memory, names and shardings, adapters on top."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert.llama import export_llama, load_llama
from metamorph_jax.models import lora
from metamorph_jax.models.build import rngs
from metamorph_jax.models.llm import llama
from metamorph_jax.nn import quantized
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.train import optim
from metamorph_jax.train import state as states
from metamorph_jax.train.config import OptimConfig
from metamorph_jax.train.step import make_step
from tests.recipes.metamorph.tiny import TINY, make_batch

# Relative error (Frobenius norm) of a normal kernel, with a margin of about a tenth.
ERRORS = {"int8": 0.0075, "nf4": 0.1, "nf4_double": 0.1}
BITS = {"int8": 8, "nf4": 4.5, "nf4_double": 4.125}


def normal(*shape, seed=0):
    return np.asarray(0.02 * jax.random.normal(jax.random.key(seed), shape))


@pytest.mark.parametrize("method", quantized.METHODS)
@pytest.mark.parametrize("d_in", [256, 160, 40])
def test_errors_and_memory(method, d_in):
    w = normal(2, d_in, 48)
    packed = quantized.pack(w, method)
    back = np.asarray(quantized.unpack(packed, d_in))
    assert back.shape == w.shape
    assert np.linalg.norm(back - w) / np.linalg.norm(w) < ERRORS[method]
    # No weight is off by more than half of the widest step (times its scale).
    top = np.abs(w).max(-2, keepdims=True)
    step = 0.5 / 127 if method == "int8" else 0.5 * np.diff(quantized.NF4).max() * 1.02
    assert (np.abs(back - w) <= step * top + 1e-9).all()
    if d_in == 256:
        bits = 8 * sum(np.asarray(x).nbytes for x in packed.values()) / w.size
        assert BITS[method] <= bits < BITS[method] + 0.3
    again = quantized.unpack(quantized.pack(back, method), d_in)
    np.testing.assert_allclose(again, back, atol=1e-4 * top.max() if "double" not in method else 1)


def test_zeros_stay_zeros():
    for method in quantized.METHODS:
        packed = quantized.pack(jnp.zeros((64, 3)), method)
        assert not np.asarray(quantized.unpack(packed, 64)).any()


def test_nf4_equals_qwix():
    qwix = pytest.importorskip("qwix", reason="pip install 'metamorph_jax[oracle]'")
    w = normal(128, 24)
    theirs = qwix.quantize(jnp.asarray(w), "nf4", channelwise_axes=(1,), tiled_axes={0: 64})
    ours = quantized.unpack(quantized.pack(w, "nf4"), 128)
    np.testing.assert_allclose(ours, qwix.dequantize(theirs), atol=1e-6)


@pytest.mark.parametrize("method", quantized.METHODS)
def test_product_and_gradient(method):
    w, x, g = normal(80, 12), normal(2, 3, 80, seed=1), normal(2, 3, 12, seed=2)
    packed = quantized.pack(w, method)
    back = np.asarray(quantized.unpack(packed, 80))
    run = lambda x: quantized.product(80, x, packed)  # noqa: E731
    y, pull = jax.vjp(run, jnp.asarray(x))
    np.testing.assert_allclose(y, x @ back, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], g @ back.T, atol=1e-6)
    low = run(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), x @ back, atol=2e-4)


def make(method="none", rank=2, **options):
    adapters = lora.LoraConfig(rank=rank, alpha=4.0) if rank else None
    cfg = dataclasses.replace(TINY, frozen_weights=method, lora=adapters, **options)
    return cfg, recipe.create(cfg, nnx.Rngs(0))


def test_names_shardings_and_what_is_left():
    model = nnx.eval_shape(lambda: make("nf4", remat="full")[1])
    layers = nnx.to_flat_state(nnx.state(model.llm.layers))
    kinds = {str(p[-1]) for p, _ in layers}
    assert kinds == {"kernel_codes", "kernel_scale", "lora_a", "lora_b", "scale"}
    up = model.llm.layers.mlp.up_proj
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 4, 1), sharding.AXES)
    for leaf in (up.kernel_codes, up.kernel_scale):
        assert leaf.get_metadata()["logical"] == ("embed", "mlp")
    spec = sharding.variable_sharding(up.kernel_codes, mesh).spec
    assert tuple(spec) == (None, "fsdp", "tensor")
    int8 = nnx.eval_shape(lambda: make("int8")[1]).llm.layers.mlp.down_proj
    assert int8.kernel_codes.get_metadata()["logical"] == ("mlp", "embed")
    assert int8.kernel_scale.get_metadata()["logical"] == ("embed",)
    # A linear that is trained in full is not packed.
    adapters = lora.LoraConfig(rank=2, target=r"llm\..*q_proj", train=r"llm\.layers\.mlp\..*")
    cfg = dataclasses.replace(TINY, frozen_weights="int8", lora=adapters)
    model = nnx.eval_shape(lambda: recipe.create(cfg, rngs(0)))
    assert not quantized.is_packed(model.llm.layers.mlp.up_proj)
    with pytest.raises(ValueError, match="set config.model.lora, too"):
        recipe.STAGES["vpit"](dataclasses.replace(TINY, frozen_weights="int8"))


def test_stacked_layers_with_adapters():
    """Gradients flow through packed layers to the adapters; merging gives the same numbers."""

    def build():
        llm = llama.Llama(llama.SIZES["tiny"], rngs=nnx.Rngs(0))
        quantized.quantize(llm, "nf4", r"layers\..*")
        lora.add(llm, lora.LoraConfig(target=".*_proj", rank=2), rngs=nnx.Rngs(1))
        return llm

    graph, trained, rest = nnx.split(nnx.eval_shape(build), lora.Adapter, ...)
    trained, rest = jax.jit(lambda: nnx.split(build(), lora.Adapter, ...)[1:])()
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    embeds = jax.random.normal(jax.random.key(2), (1, 5, 64))
    positions, mask = jnp.arange(5)[None], jnp.tril(jnp.ones((1, 5, 5), bool))

    def loss(trained):
        hidden = nnx.merge(graph, trained, rest)(embeds, positions, mask)[0]
        return jnp.sum(hidden**2), hidden

    grads, hidden = jax.jit(jax.grad(loss, has_aux=True))(trained)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    merged = lora.merged(nnx.merge(graph, trained, rest))
    assert lora.is_plain(merged)
    np.testing.assert_allclose(merged(embeds, positions, mask)[0], hidden, atol=1e-5)


def hidden(model, batch):
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state).hidden(batch)[0])(state)


def test_the_model_is_close_and_merges_exactly():
    batch = make_batch()
    want = hidden(make()[1], batch)
    for method, limit in (("int8", 0.05), ("nf4", 0.5)):
        model = make(method)[1]
        got = hidden(model, batch)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-4 < error < limit
        merged = lora.merged(model)
        assert not quantized.any_packed(merged)
        np.testing.assert_allclose(hidden(merged, batch), got, atol=2e-4)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_training_step(method):
    cfg, _ = make(method, remat="full")
    mesh = sharding.make_mesh({"fsdp": 1})
    parts, params, frozen = states.create(
        lambda r: recipe.create(cfg, r), recipe.STAGES["vpit"](cfg), mesh, 0
    )
    packed = {k: v for k, v in frozen.items() if "kernel_codes" in k}
    assert len(packed) == 7 and all(v.dtype in (jnp.int8, jnp.uint8) for v in packed.values())
    assert not any("codes" in k or "kernel_scale" in k for k in params)
    bits = 8 if method == "int8" else 4
    llm = llama.SIZES["tiny"]
    D, F, kv = llm.width, llm.mlp_width, llm.kv_heads * llm.head_dim
    weights = llm.layers * (2 * D * D + 2 * D * kv + 3 * D * F)
    padded = llm.layers * 32 * D * (bits == 4)  # the 160 inputs of down_proj are 3 blocks of 64
    assert sum(v.nbytes for v in packed.values()) == weights * bits // 8 + padded * bits // 8

    cfg = OptimConfig(learning_rate=1e-2, warmup=0, schedule="constant")
    optimizer = optim.build(cfg, params, 1, 4)
    step = make_step(parts, optimizer, mesh=mesh)
    state = states.start(params, parts, mesh, 0, optimizer, False)
    assert set(state.opt_state[0][0].mu) == set(params)
    batch, losses = make_batch(), []
    with jax.set_mesh(mesh):
        for _ in range(4):
            state, report = step(state, frozen, batch)
            losses.append(float(report["loss"]))
    assert bool(report["finite"]) and losses[-1] < losses[0]
    assert {"lora", "connector", "head", "tokens"} == set(report["norms"])
    b = state.params["llm.layers.mlp.up_proj.lora_b"]
    assert np.abs(b).max() > 0


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_weights_are_packed_while_they_load(method):
    source = llama.Llama(dataclasses.replace(llama.SIZES["tiny"], added_tokens=2), rngs=nnx.Rngs(7))
    tensors = dict(export_llama(source))
    model = make(method)[1]
    before = np.asarray(model.llm.layers.mlp.up_proj.kernel_codes[...])
    with quantized.unpacked(model, empty=True):
        kernel = model.llm.layers.mlp.up_proj.kernel
        assert isinstance(kernel.get_raw_value(), jax.ShapeDtypeStruct)
        load_llama(model.llm, tensors)
        assert set(kernel.get_raw_value()) >= {"kernel_codes", "kernel_scale"}
    up = model.llm.layers.mlp.up_proj
    want = source.layers.mlp.up_proj.kernel[...].astype(jnp.bfloat16)
    packed = quantized.pack(want, method)
    np.testing.assert_array_equal(up.kernel_codes[...], packed["kernel_codes"])
    assert not np.array_equal(up.kernel_codes[...], before)
    np.testing.assert_array_equal(model.llm.norm.scale[...], source.norm.scale[...])
    # What nothing is loaded into stays to the bit.
    with quantized.unpacked(model):
        assert model.llm.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16
    assert not hasattr(model.llm.layers.mlp.up_proj, "kernel")
    np.testing.assert_array_equal(
        model.llm.layers.mlp.up_proj.kernel_codes[...], packed["kernel_codes"]
    )
