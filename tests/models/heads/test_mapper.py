"""The mapper of vokens: its numbers against the reference, its ablations, its names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import mapper as published
from metamorph_jax.errors import WeightError
from metamorph_jax.models import build
from metamorph_jax.models.heads.mapper import Mapper, MapperConfig
from metamorph_jax.nn.sincos import table_1d
from tests.recipes.minigpt5 import golden

TINY = MapperConfig(
    width=12, vokens=3, inner=8, heads=2, encoder_layers=2, decoder_layers=1, mlp_width=16,
    queries=5,
)  # fmt: skip


def config_of(fields: dict) -> MapperConfig:
    """Of the case; fields that have no meaning here must say what this module does."""
    assert fields["activation"] == "relu" and fields["norm_first"] is True
    assert fields["fc"] == "Linear -> exact GELU -> Linear"
    return MapperConfig(
        width=fields["llm_hidden"],
        vokens=fields["vokens"],
        inner=fields["d_model"],
        heads=fields["nhead"],
        encoder_layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"],
        mlp_width=fields["dim_feedforward"],
        queries=fields["queries"],
        norm_eps=fields["layer_norm_eps"],
    )


def abstract(cfg: MapperConfig) -> Mapper:
    return nnx.eval_shape(lambda: Mapper(cfg, rngs=build.rngs(0)))


def make(cfg: MapperConfig):
    """Graph and random state, without the compilation of every initialiser."""
    graph, shapes = nnx.split(abstract(cfg))
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype)  # noqa: E731
    return graph, jax.tree.map(fill, shapes)


@pytest.mark.golden
def test_equals_the_reference_with_gradients(golden_root):
    case = golden.Case(golden_root, "mapper")
    model = abstract(config_of(case.config))
    published.load_mapper(model, case.weights())
    graph, state = nnx.split(model)

    def loss(state, states):
        mapper = nnx.merge(graph, state)
        features = mapper.features(states)
        mapped = mapper(states).context
        found = {"out.fc": features, "out.encoder_memory": mapper.encoder(features),
                 "out.mapped": mapped, "out.null_condition": mapper.null_condition().context,
                 "out.mse": jnp.mean((mapped - case["in.target"]) ** 2)}  # fmt: skip
        return found["out.mse"], found

    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (weights, inputs), found = run(state, case["in.voken_hidden"])
    for key, value in found.items():
        np.testing.assert_allclose(value, case[key], rtol=1e-4, atol=1e-5, err_msg=key)
    made = published.export_mapper(nnx.merge(graph, weights))  # gradients by published names
    gradients = {
        "out.grad_voken_hidden": inputs,
        "out.grad_t2i_decoder_prompt": made["t2i_decoder_prompt"],
        "out.grad_fc0_weight": made["fc.0.weight"],
        "out.grad_enc0_in_proj_weight":
            made["llm_to_t2i_mapping.encoder.layers.0.self_attn.in_proj_weight"],
    }  # fmt: skip
    for key, value in gradients.items():
        np.testing.assert_allclose(value, case[key], rtol=1e-3, atol=1e-5, err_msg=key)
    case.check_all_read()


@pytest.mark.golden
def test_published_tensors_in_and_out(golden_root):
    case = golden.Case(golden_root, "mapper")
    tensors, model = case.weights(), abstract(config_of(case.config))
    published.load_mapper(model, tensors)
    out = dict(published.export_mapper(model))
    assert sorted(out) == sorted(tensors) == sorted(published.published(model.cfg))
    for key, value in out.items():
        assert value.tobytes() == tensors[key].tobytes() and value.shape == tensors[key].shape, key


def test_full_size():
    """Names, shapes and numbers of values of the three published parts."""
    model = abstract(MapperConfig())
    out = published.export_mapper(model)
    assert sorted(out) == sorted(published.published(model.cfg))
    sizes = {}
    for key in out:
        part = key.split(".")[0]
        sizes[part] = sizes.get(part, 0) + int(np.prod(out.shape_of(key)))
    assert sizes == {"fc": 5_244_928, "llm_to_t2i_mapping": 117_575_680,
                     "t2i_decoder_prompt": 78_848}  # fmt: skip
    shapes = {
        "fc.0.weight": (1024, 4096),
        "t2i_decoder_prompt": (1, 77, 1024),
        "llm_to_t2i_mapping.encoder.layers.3.self_attn.in_proj_weight": (3072, 1024),
        "llm_to_t2i_mapping.decoder.layers.3.multihead_attn.in_proj_bias": (3072,),
        "llm_to_t2i_mapping.decoder.layers.0.linear1.weight": (4096, 1024),
        "llm_to_t2i_mapping.decoder.norm.weight": (1024,),
    }
    assert {key: out.shape_of(key) for key in shapes} == shapes
    kernels = [v for path, v in nnx.to_flat_state(nnx.state(model.encoder, nnx.Param))
               if path[-1] == "kernel"]  # fmt: skip
    assert kernels and all(v.get_metadata()["logical"] for v in kernels)


def test_what_is_missing_and_left_over_is_named():
    graph, state = make(TINY)
    tensors = dict(published.export_mapper(nnx.merge(graph, state)))
    lost = "llm_to_t2i_mapping.encoder.layers.1.self_attn.in_proj_weight"
    del tensors[lost], tensors["fc.2.bias"]
    tensors["llm_to_t2i_mapping.decoder.layers.7.norm1.bias"] = np.zeros(8, np.float32)
    with pytest.raises(WeightError) as error:
        published.load_mapper(abstract(TINY), tensors)
    for name in ("encoder.layers.1.self_attn.q_proj.weight", "fc.2.bias", "layers.7.norm1.bias"):
        assert name in str(error.value)


@pytest.mark.parametrize("changes", [{"kind": "mlp"}, {"learned_queries": False},
                                     {"kind": "mlp", "learned_queries": False}])  # fmt: skip
def test_ablations(changes):
    """Without encoder and decoder, and with fixed queries: same shapes, and names for all of it."""
    cfg = dataclasses.replace(TINY, **changes)
    graph, state = make(cfg)
    model = nnx.merge(graph, state)
    states = np.random.default_rng(1).normal(size=(2, 3, 12)).astype(np.float32)
    found = jax.jit(lambda s, x: nnx.merge(graph, s)(x).context)(state, states)
    assert found.shape == (2, 5, 8) and not np.allclose(found[0], found[1])
    leaves = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert ("queries" in leaves) is cfg.learned_queries
    assert ("encoder" in leaves) is ("spread" not in leaves) is (cfg.kind == "transformer")
    if not cfg.learned_queries:
        np.testing.assert_array_equal(model.table()[0], table_1d(5, 8))
    out = dict(published.export_mapper(model))
    assert sorted(out) == sorted(published.published(cfg))
    again = abstract(cfg)
    published.load_mapper(again, out)
    for key, value in published.export_mapper(again).items():
        np.testing.assert_array_equal(value, out[key])


def test_remat_changes_nothing_and_dtype_is_kept():
    states = np.random.default_rng(1).normal(size=(2, 3, 12)).astype(np.float32)

    def gradients(**changes):
        graph, state = make(dataclasses.replace(TINY, encoder_layers=1, **changes))
        total = lambda s: jnp.sum(nnx.merge(graph, s)(states).context ** 2)  # noqa: E731
        return jax.jit(jax.grad(total))(state)

    plain, again = gradients(), gradients(remat=True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    graph, state = make(dataclasses.replace(TINY, dtype="bfloat16"))
    assert jax.eval_shape(nnx.merge(graph, state), states).context.dtype == jnp.bfloat16


def test_sizes_that_don_t_fit_are_named():
    with pytest.raises(ValueError, match="inner 8 doesn't divide over 3 heads"):
        dataclasses.replace(TINY, heads=3)
    with pytest.raises(ValueError, match="'linear' is none of transformer, mlp"):
        dataclasses.replace(TINY, kind="linear")
