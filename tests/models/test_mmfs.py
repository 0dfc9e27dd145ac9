"""MMFS against the golden set of MM-Interleaved, and what its options must not change."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.names import load_torch_dict, to_torch_dict
from metamorph_jax.models import mmfs
from metamorph_jax.models.build import rngs
from metamorph_jax.models.mmfs import MMFS, MMFSConfig
from tests.recipes.mm_interleaved import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_generate_tests(metafunc):
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", golden.names(metafunc.config, "mmfs_"))


def close(found, expected, tolerance, name):
    """Within `tolerance` of the array's largest entry, as the set's README suggests."""
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=name)


def split_maps(flat, sides):
    """Maps [..., s, s, C], one a side, of flat: [..., T, C]."""
    parts = np.split(flat, np.cumsum([s * s for s in sides])[:-1], axis=-2)
    return tuple(
        x.reshape(*flat.shape[:-2], s, s, flat.shape[-1]) for s, x in zip(sides, parts, strict=True)
    )


def config_of(c) -> MMFSConfig:
    return MMFSConfig(
        width=c["d_query"], value_width=c["d_value"], out_width=c["d_out"],
        inner_width=int(c["ratio"] * c["d_model"]), heads=c["heads"], points=c["points"],
        sides=tuple(c["spatial"]), base=c["base"], relative_rows=c["maxn"],
    )  # fmt: skip


@pytest.mark.golden
def test_outputs_and_gradients(case_name, golden_root):
    case = golden.Case(golden_root, case_name)
    c, cfg = case.config, config_of(case.config)
    np.testing.assert_array_equal(
        case["in/spatial_shapes_per_image"], [[s, s] for s in c["actual"]]
    )
    if c["ref"] != "center":
        np.testing.assert_allclose(mmfs.centres(*c["ref"]), case["in/reference_points"], atol=1e-6)
    weights = case.weights()
    scale = np.array(cfg.sides) / cfg.base
    np.testing.assert_allclose(weights.pop("scale_ratios"), scale, rtol=1e-6)
    model = nnx.eval_shape(lambda: MMFS(cfg, rngs=rngs(0)))
    load_torch_dict(model, weights)
    for name, array in to_torch_dict(model).items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    queries, mask = case["in/query"], case["in/attention_mask"]
    if mask.ndim == 3:  # the reference hands in the prompt's rows while it decodes
        mask = mask[:, -queries.shape[1] :]
    graph, state = nnx.split(model)

    @partial(jax.jit, compiler_options=FAST)
    def run(state, queries, flat, d_out):
        def forward(state, queries, flat):
            model = nnx.merge(graph, state)
            values = model.project(split_maps(flat, c["actual"]))
            return model(queries, values, mask, case["in/reference_points"])

        out, back = jax.vjp(forward, state, queries, flat)
        model = nnx.merge(graph, state)
        values = model.project(split_maps(flat, c["actual"]))
        samples = model.samples(queries, values, mask, case["in/reference_points"])
        return out, samples, back(d_out)

    with jax.default_matmul_precision("highest"):
        out, (locations, attention, _), (d_state, d_queries, d_flat) = run(
            state, queries, case["in/input_flatten"], case["in/grad_output"]
        )
    close(out, case["out/output"], 1e-5, "output")
    close(locations, case["mid/sampling_locations"], 1e-5, "locations")
    close(attention, case["mid/attention_weights"], 1e-5, "weights")
    found = to_torch_dict(nnx.merge(graph, d_state))
    found = {f"grad/w/{k}": v for k, v in found.items()}
    found |= {"grad/query": d_queries, "grad/input_flatten": d_flat}
    for name in (k for k in case.arrays if k.startswith("grad/")):
        close(found[name], case[name], 1e-4, name)
    case.check_all_read()


def small(**options) -> MMFSConfig:
    return MMFSConfig(16, 8, 16, 8, 2, 3, (4, 2), 4, relative_rows=6, **options)


def build(cfg) -> MMFS:
    """With random weights in every part."""
    model, rng = nnx.eval_shape(lambda: MMFS(cfg, rngs=rngs(0))), np.random.default_rng(1)
    fill = lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(fill, nnx.state(model)))
    return model


def call(model, queries, maps, *masks):
    """The outputs with each of these masks, compiled together."""
    graph, state = nnx.split(model)

    @partial(jax.jit, compiler_options=FAST)
    def run(state, queries, maps):
        model = nnx.merge(graph, state)
        values = model.project(maps)
        return [model(queries, values, mask) for mask in masks]

    return run(state, queries, maps)


def inputs(Q=7, M=4):
    rng = np.random.default_rng(0)
    maps = tuple(rng.normal(size=(2, M, s, s, 8)).astype(np.float32) for s in (4, 2))
    return rng.normal(size=(2, Q, 16)).astype(np.float32), maps, rng.random((2, Q, M)) < 0.5


@pytest.mark.parametrize("recent", [1, 2])
def test_the_latest_images_are_all_that_count(recent):
    """The numbers of all images where no query sees more than `recent`, else of a mask that hides
    the older ones."""
    queries, maps, mask = inputs()
    newest = mask & (np.cumsum(mask[..., ::-1], -1)[..., ::-1] <= recent)
    assert (newest != mask).any()
    (expected,) = call(build(small()), queries, maps, newest)
    for method in ("gather", "dense"):
        few = build(small(recent=recent, method=method))
        for found in call(few, queries, maps, newest, mask):
            np.testing.assert_allclose(found, expected, atol=5e-5)


def test_who_sees_nothing_gets_the_ignore_token():
    queries, maps, mask = inputs()
    model = build(small())
    mask[0, 3] = False
    (out,) = call(model, queries, maps, mask)
    np.testing.assert_allclose(out[0, 3], model.output_proj(model.ignore_token[0, 0, 0]), atol=1e-5)


def test_hidden_places_for_images_change_nothing():
    queries, maps, mask = inputs()
    model = build(small())
    more = tuple(np.concatenate([x, 9 + x[:, :2]], 1) for x in maps)
    (out,) = call(model, queries, maps, mask)
    (wider,) = call(model, queries, more, np.pad(mask, [(0, 0), (0, 0), (0, 2)]))
    np.testing.assert_allclose(out, wider, atol=1e-5)


def test_a_mask_of_rows_is_one_for_all_queries():
    queries, maps, mask = inputs()
    each = np.repeat(mask[:, :1], queries.shape[1], 1)
    np.testing.assert_allclose(*call(build(small()), queries, maps, mask[:, 0], each), atol=1e-5)


def test_size_of_the_published_module():
    block = nnx.eval_shape(lambda: mmfs.LLMBlock(MMFSConfig(), rngs=rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(block)))
    assert abs(count - 36.3e6) < 0.1e6, count
