"""The resampler against the reference, and what its options do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import perceiver as published
from metamorph_jax.convert.names import load_torch_dict
from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import Perceiver, PerceiverConfig, drop
from tests.recipes.mm_interleaved import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TINY = PerceiverConfig(queries=3, width=8, heads=2, layers=2, mlp_width=12, key_width=6)


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", golden.names(metafunc.config, "perceiver_"))


def config_of(fields: dict) -> PerceiverConfig:
    """Of a case; fields that have no meaning here must say what this module does."""
    assert fields["hidden_act"] == "gelu"
    return PerceiverConfig(
        queries=fields["num_queries"],
        width=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        layers=fields["num_hidden_layers"],
        mlp_width=fields["intermediate_size"],
        key_width=fields["encoder_hidden_size"],
        cross_every=fields["cross_attention_frequency"],
        qk_norm=fields.get("qk_normalization", False),
        norm_eps=fields["layer_norm_eps"],
    )


def load(model, weights):
    load_torch_dict(model, weights, rename=published.rename)
    return model


def make(cfg: PerceiverConfig):
    """Graph and random state, without the compilation of every initialiser."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Perceiver(cfg, rngs=build.rngs(0))))
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype)  # noqa: E731
    return graph, jax.tree.map(fill, shapes)


@pytest.mark.golden
def test_equals_the_reference_with_gradients(name, golden_root):
    case = golden.Case(golden_root, name)
    cfg = config_of(case.config)
    model = load(nnx.eval_shape(lambda: Perceiver(cfg, rngs=build.rngs(0))), case.weights())
    graph, state = nnx.split(model)
    tokens, mask = case["in/encoder_hidden_states"], None
    if "in/encoder_attention_mask" in case.arrays:
        mask = case["in/encoder_attention_mask"] > 0

    def forward(state, tokens):
        return nnx.merge(graph, state)(tokens, mask)

    def both(state, tokens, gradient):
        out, pull = jax.vjp(forward, state, tokens)
        return out, pull(gradient)

    run = jax.jit(both, compiler_options=FAST)
    with jax.default_matmul_precision("highest"):
        out, (weights, inputs) = run(state, tokens, case["in/grad_output"])
    found = {
        "out/output": out,
        "grad/encoder_hidden_states": inputs,
        "grad/queries": weights["queries"][...],
    }
    for key, value in found.items():
        limit = (1e-5 if key.startswith("out/") else 1e-4) * np.abs(case[key]).max()
        np.testing.assert_allclose(value, case[key], atol=limit, rtol=0, err_msg=key)
    case.check_all_read()


def test_tokens_behind_the_mask_and_rows_without_tokens():
    graph, state = make(dataclasses.replace(TINY, layers=1))
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 6))
    mask = jnp.asarray([[True] * 3 + [False] * 2, [False] * 5])
    compiled = jax.jit(lambda s, x, m: nnx.merge(graph, s)(x, m), compiler_options=FAST)
    run = lambda tokens, mask=None: compiled(state, tokens, mask)  # noqa: E731
    found = run(tokens, mask)
    np.testing.assert_allclose(found[:1], run(tokens[:1, :3]), atol=1e-6)
    np.testing.assert_array_equal(found, run(tokens.at[0, 3:].add(9.0), mask))
    assert found.shape == (2, 3, 8) and np.isfinite(found).all()


def test_dropout_needs_a_key_and_remat_changes_nothing():
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 6))

    def gradients(**changes):
        graph, state = make(dataclasses.replace(TINY, layers=1, **changes))
        total = lambda s, key: (nnx.merge(graph, s)(tokens, key=key) ** 3).sum()  # noqa: E731
        run = jax.jit(jax.value_and_grad(total), compiler_options=FAST)
        return lambda key=None: run(state, key)

    plain, dropping = gradients(), gradients(dropout=0.3, remat=True)
    without = dropping()
    for a, b in zip(jax.tree.leaves(plain()), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    some = [float(dropping(jax.random.key(seed))[0]) for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2] and some[0] != float(without[0])
    kept = drop(jnp.ones(10000), 0.25, jax.random.key(0))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)} and abs(kept.mean() - 1) < 0.03


def test_sizes_that_don_t_fit_are_named():
    with pytest.raises(ValueError, match="width 8 doesn't divide over 3 heads"):
        dataclasses.replace(TINY, heads=3)
    with pytest.raises(ValueError, match="dropout 1.0"):
        dataclasses.replace(TINY, dropout=1.0)


def test_full_size_and_names_of_dimensions():
    model = nnx.eval_shape(lambda: Perceiver(PerceiverConfig(), rngs=build.rngs(0)))
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    crossing = {path[1] for path in flat if "cross_attn" in path}
    assert crossing == {0, 2, 4, 6, 8, 10}
    kernels = {path: v for path, v in flat.items() if path[-1] == "kernel"}
    assert all(v.get_metadata()["logical"] for v in kernels.values())
    assert flat["layers", 0, "cross_attn", "k_proj", "kernel"].shape == (1024, 768)
