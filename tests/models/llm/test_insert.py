"""Blocks between attention and MLP: the golden model with MMFS, and groups of layers."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert.llama import load_llama
from metamorph_jax.convert.names import load_torch_dict
from metamorph_jax.models import build
from metamorph_jax.models.llm import llama
from metamorph_jax.models.llm.llama import Insert, Llama, LlamaConfig
from metamorph_jax.models.mmfs import LLMBlock, MMFSConfig
from metamorph_jax.nn import rope
from tests.models.test_mmfs import close, split_maps
from tests.recipes.mm_interleaved import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_generate_tests(metafunc):
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", golden.names(metafunc.config, "llama_mmfs"))


def golden_model(case) -> Llama:
    c, weights = case.config, case.weights()
    n = len(weights["text_decoder.head_new.bias"])
    cfg = LlamaConfig(
        c["vocab"] - n, c["dim"], c["inter"], c["layers"], c["heads"], c["heads"],
        c["dim"] // c["heads"], added_tokens=n, norm_eps=c["rms_norm_eps"],
        rope_theta=c["rope_base"], head_bias=True,
    )  # fmt: skip
    inner = weights["layers.0.llama_cross_attn.attn.value_proj.weight"].shape[0]
    block = MMFSConfig(
        c["dim"], c["img_dim"], c["dim"], inner, c["mmfs_heads"], c["mmfs_points"],
        tuple(c["spatial"]), c["mmfs_base"], c["max_num_image"],
    )  # fmt: skip
    insert = Insert(c["freq"], LLMBlock, block)
    llm = nnx.eval_shape(lambda: Llama(cfg, rngs=build.rngs(0), insert=insert))

    def block_name(key):  # "0.norm1.weight"
        number, name = key.split(".", 1)
        return f"layers.{int(number) * c['freq']}.llama_cross_attn.{name}"

    is_block = lambda key: "llama_cross_attn" in key  # noqa: E731
    load_torch_dict(
        nnx.Dict(inserts=llm.inserts), weights, stacked=("inserts",),
        rename=lambda key: block_name(key.removeprefix("inserts.")),
        ignore=lambda key: not is_block(key) or key.endswith("scale_ratios"),
    )  # fmt: skip
    published = {f"model.{k}": v for k, v in weights.items()
                 if not is_block(k) and not k.startswith("text_decoder")}  # fmt: skip
    table = weights["text_decoder.head.weight"].copy()
    table[-n:] += weights["text_decoder.head_new.weight"]
    load_llama(llm, published | {"lm_head.weight": table})
    bias = weights["text_decoder.head.bias"]
    llm.lm_head.bias.set_raw_value(jnp.asarray(bias[:-n]))
    added = bias[-n:] + weights["text_decoder.head_new.bias"]
    llm.lm_head.added_bias.set_raw_value(jnp.asarray(added))
    return llm


@pytest.mark.golden
def test_golden_states_logits_and_gradients(case_name, golden_root):
    case = golden.Case(golden_root, case_name)
    c, llm = case.config, golden_model(case)
    embeds, real = case["in/inputs_embeds"], case["in/attention_mask"] > 0
    L = embeds.shape[1]
    positions = np.tile(np.arange(L), (len(embeds), 1))
    mask = real[:, None] & np.tri(L, dtype=bool)
    visible = case["in/cross_attention_mask"] > 0
    inserts = lambda path, _: path[0] == "inserts"  # noqa: E731
    graph, blocks, rest = nnx.split(llm, inserts, ...)

    @partial(jax.jit, compiler_options=FAST)
    def run(blocks, rest, embeds, flat, d_out):
        def forward(blocks, embeds, flat):
            extra = split_maps(flat, c["spatial"]), visible
            return nnx.merge(graph, blocks, rest)(embeds, positions, mask, extra)

        out, back = jax.vjp(forward, blocks, embeds, flat)
        llm = nnx.merge(graph, blocks, rest)
        states = layer_by_layer(
            llm, embeds, positions, mask, split_maps(flat, c["spatial"]), visible
        )
        return states, out, llm.logits(out), back(d_out)

    with jax.default_matmul_precision("highest"):
        states, out, logits, (d_blocks, d_embeds, d_flat) = run(
            blocks, rest, embeds, case["in/vision_hidden_states"], case["in/grad_last_hidden_state"]
        )
    expected = [case[f"out/hidden_{i}"] for i in range(c["layers"] + 1)]
    for i, (found, wanted) in enumerate(zip(states, expected, strict=True)):
        close(found, wanted, 1e-5, f"hidden {i}")
    close(out, case["out/last_hidden_state"], 1e-5, "last hidden state")
    close(logits, case["out/logits"], 1e-5, "logits")
    close(d_embeds, case["grad/inputs_embeds"], 1e-4, "gradient of embeddings")
    close(d_flat, case["grad/vision_hidden_states"], 1e-4, "gradient of maps")
    gates = np.asarray(d_blocks["inserts"]["gate"][...])
    for key in [k for k in case.arrays if k.startswith("grad/w/")]:
        number = int(key.split(".")[1])
        assert key == f"grad/w/layers.{number}.llama_cross_attn.gate", f"nothing here reads {key}"
        close(gates[number // c["freq"]], case[key], 1e-4, key)
    case.check_all_read()


def layer_by_layer(llm, embeds, positions, mask, maps, visible) -> list:
    """What each layer reads, and what the final norm makes of the last one's states."""
    cfg = llm.cfg
    cos, sin = rope.angles(
        positions, rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    )
    (graph, layers), (block_graph, blocks) = nnx.split(llm.layers), nnx.split(llm.inserts)
    states, take = [embeds], lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    for i in range(cfg.layers):
        insert = None
        if i % llm.insert.every == 0:
            block = nnx.merge(block_graph, take(blocks, i // llm.insert.every))
            insert = lambda x, block=block: block(x, block.project(maps), visible)  # noqa: E731
        layer = nnx.merge(graph, take(layers, i))
        states.append(layer(states[-1], cos, sin, mask, insert))
    return [*states[:-1], llm.norm(states[-1])]


# ---- groups of layers, and what is saved for the backward pass


def small(layers: int, every: int, **options) -> Llama:
    """With random weights in every part."""
    cfg = dataclasses.replace(llama.SIZES["tiny"], layers=layers, **options)
    block = MMFSConfig(64, 8, 64, 16, 2, 3, (4, 2), 4, relative_rows=6)
    insert = Insert(every, LLMBlock, block)
    llm = nnx.eval_shape(lambda: Llama(cfg, rngs=build.rngs(0), insert=insert))
    rng = np.random.default_rng(0)
    fill = lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(llm, jax.tree.map(fill, nnx.state(llm)))
    return llm


def inputs(L=6, M=3):
    rng = np.random.default_rng(0)
    maps = tuple(rng.normal(size=(2, M, s, s, 8)).astype(np.float32) for s in (4, 2))
    positions, mask = np.tile(np.arange(L), (2, 1)), np.tile(np.tri(L, dtype=bool), (2, 1, 1))
    embeds = rng.normal(size=(2, L, 64)).astype(np.float32)
    return embeds, positions, mask, maps, rng.random((2, L, M)) < 0.5


@pytest.mark.parametrize("layers, every", [(4, 2), (3, 4)])
def test_groups_are_the_layers_one_by_one(layers, every):
    llm, (*args, maps, visible) = small(layers, every), inputs()
    assert llm.inserts.gate.shape == (-(-layers // every), 1)
    graph, state = nnx.split(llm)

    @partial(jax.jit, compiler_options=FAST)
    def run(state):
        llm = nnx.merge(graph, state)
        return llm(*args, (maps, visible)), layer_by_layer(llm, *args, maps, visible)[-1]

    np.testing.assert_allclose(*run(state), atol=1e-4)


def test_recomputation_has_the_gradients_of_keeping_all():
    found, (*args, maps, visible) = {}, inputs()
    for remat in ("none", "full"):
        graph, state = nnx.split(small(3, 2, remat=remat))

        def loss(state, graph=graph):
            return jnp.sum(nnx.merge(graph, state)(*args, (maps, visible)) ** 2)

        gradients = jax.jit(jax.grad(loss), compiler_options=FAST)(state)
        found[remat] = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(gradients)}
    for path, expected in found["none"].items():
        assert np.abs(expected).max() > 0 or path[0] == "embed_tokens", f"no gradient in {path}"
        close(found["full"][path], expected, 1e-4, str(path))


def test_without_images_every_position_sees_none():
    llm, (*args, maps, visible) = small(2, 2), inputs()
    graph, state = nnx.split(llm)

    @partial(jax.jit, compiler_options=FAST)
    def run(state):
        llm = nnx.merge(graph, state)
        return llm(*args), llm(*args, (maps, visible & False))

    np.testing.assert_allclose(*run(state), atol=1e-5)


# ---- sizes


def test_size_of_the_published_model():
    """Ten modules of 363 million parameters together, and the work that they are."""
    cfg = dataclasses.replace(llama.SIZES["vicuna-13b"], added_tokens=2, head_bias=True)
    insert = Insert(4, LLMBlock, MMFSConfig())
    llm = nnx.eval_shape(lambda: Llama(cfg, rngs=build.rngs(0), insert=insert))
    count = lambda module: sum(x.size for x in jax.tree.leaves(nnx.state(module)))  # noqa: E731
    assert abs(count(llm.inserts) - 363e6) < 1e6 and llm.inserts.gate.shape == (10, 1)
    plain = nnx.eval_shape(
        lambda: Llama(dataclasses.replace(cfg, head_bias=False), rngs=nnx.Rngs(0))
    )
    assert count(llm) - count(plain) == count(llm.inserts) + 32002
    found = llama.work(cfg, 2, 2048, insert, 8)
    (inserted,) = (w for w in found if w.weights == "llm.inserts")
    weights = count(llm.inserts) - 10 * 1024 * 1024  # of products with the queries
    positions = inserted.forward - 2.0 * 10 * 16 * 1344 * 1024**2
    assert abs(positions / (2 * 4096 * weights) - 1) < 0.05
    assert found[:-1] == llama.work(cfg, 2, 2048)


def test_every_matrix_of_the_published_blocks_is_cut():
    devices = SimpleNamespace(shape=dict.fromkeys(sharding.AXES, 1) | {"fsdp": 8, "tensor": 4})
    block = nnx.eval_shape(lambda: LLMBlock(MMFSConfig(), rngs=build.rngs(0)))
    for path, x in nnx.to_flat_state(nnx.state(block)):
        wanted = sharding.spec(*x.get_metadata()["logical"])
        cut = math.prod(devices.shape[a] for a in sharding.fit(wanted, x.shape, devices) if a)
        assert cut == (32 if path[-1] == "kernel" else cut), f"{path}: {wanted}"
        assert path[-1] != "embedding" or cut == 4
