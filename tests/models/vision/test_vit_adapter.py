"""The ViT-Adapter against the golden set, around other towers, and its full size by eval_shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import names
from metamorph_jax.convert.vit_adapter import export_adapter, load_adapter, rename
from metamorph_jax.models import build
from metamorph_jax.models.vision import vit, vit_adapter
from metamorph_jax.models.vision.vit_adapter import AdapterConfig, ViTAdapter
from tests.recipes.mm_interleaved import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PRIOR, FIRST = "adapter_spm.", "adapter_interactions.0."
PARTS = {
    "prior": (vit_adapter.SpatialPrior, "prior.", PRIOR),
    "injector": (vit_adapter.Injector, "interactions.0.injector.", FIRST + "injector."),
    "extractor": (vit_adapter.Extractor, "interactions.0.extractor.", FIRST + "extractor."),
}


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def close(got, want, tolerance=1e-5):
    """Within the README's tolerance, relative to the largest value."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        cases = golden.names(metafunc.config, "adapter_")
        metafunc.parametrize("name", cases)


def nchw(x):
    return jnp.moveaxis(x, -1, 1)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def square(shape) -> int:
    (H, W), *_ = np.asarray(shape).tolist()
    assert H == W
    return H


def config_of(about: dict) -> AdapterConfig:
    fields = {"heads": "heads", "points": "points", "n_points": "points", "inplanes": "prior_width",
              "conv_inplane": "prior_width", "deform_ratio": "value_ratio",
              "cffn_ratio": "mlp_ratio", "ln_eps": "norm_eps"}  # fmt: skip
    return AdapterConfig(**{ours: about[k] for k, ours in fields.items() if k in about})


def tower_of(about: dict, grid: int) -> vit.ViTConfig:
    """A tower with this grid; a descriptor of a part says nothing of its layers."""
    patch = about.get("patch", 1)
    return vit.ViTConfig(
        "clip", grid * patch, patch, about["dim"], about.get("inter", 1), about.get("layers", 1),
        about["heads"], class_token=True, patch_bias=False, pre_norm=True,
        activation=about.get("hidden_act", "quick_gelu"),
        norm_eps=about.get("layer_norm_eps", 1e-5),
    )  # fmt: skip


def part(case, kind: str, grid: int):
    """One part of the adapter with the case's weights."""
    cls, ours, theirs = PARTS[kind]
    cfg, tower = config_of(case.config), tower_of(case.config, grid)
    made = nnx.eval_shape(lambda: cls(cfg, tower, rngs=build.rngs(0)))
    names.load_torch_dict(
        made, case.weights(), rename=lambda key: rename(ours + key).removeprefix(theirs)
    )
    return made


def check_prior(case):
    grid = case["in/image"].shape[-1] // 16
    maps = fast(part(case, "prior", grid))(nhwc(case["in/image"]))
    for k, (got, side) in enumerate(zip(maps, vit_adapter.sides(grid), strict=True), 1):
        assert got.shape[1:3] == (side, side)
        close(nchw(got) if k == 1 else got.reshape(len(got), -1, got.shape[-1]), case[f"out/c{k}"])


def check_attention(case, kind: str):
    """Output, where it looks, with what weights, and the gradients of both inputs."""
    shapes = case["in/value_spatial_shapes"]
    x, c = case["in/x_vit_tokens"], case["in/c_spatial_tokens"]
    grid = square(shapes[1:] if kind == "injector" else shapes)
    module = part(case, kind, grid)
    attn, queries = module.attn, x if kind == "injector" else c
    assert attn.levels == tuple(map(tuple, shapes.tolist()))
    close(vit_adapter.centres(*attn.queries), case["in/reference_points"][0, :, 0])
    (locations, weights), got, gradients = fast(_attention)(
        module, queries, x, c, case["in/grad_output"]
    )
    close(locations, case["mid/sampling_locations"])
    close(weights, case["mid/attention_weights"])
    close(got, case["out/output"])
    for name, gradient in zip("xc", gradients, strict=True):
        close(gradient, case[f"grad/{name}"], 1e-3)


def _attention(module, queries, x, c, cotangent):
    got, back = jax.vjp(module, x, c)
    return module.attn.sampling(module.query_norm(queries)), got, back(cotangent)


def check_full(case):
    about = case.config
    adapter = nnx.eval_shape(
        lambda: ViTAdapter(
            dataclasses.replace(config_of(about), heads=0),
            tower_of(about, about["image"] // about["patch"]),
            rngs=nnx.Rngs(0),
        )
    )
    load_adapter(adapter, case.weights())
    graph, weights = nnx.split(adapter)
    run = fast(lambda weights, x: nnx.merge(graph, weights)(x))
    tokens, maps = run(weights, nhwc(case["in/pixel_values"]))
    close(tokens, case["out/last_hidden_state"], 1e-4)
    for k, x in enumerate(maps):
        close(nchw(x), case[f"out/ms_{k}"], 1e-4)


@pytest.mark.golden
def test_golden(name, golden_root):
    """What a case is shows in its inputs."""
    case = golden.Case(golden_root, name)
    if "in/image" in case.arrays:
        check_prior(case)
    elif "in/pixel_values" in case.arrays:
        check_full(case)
    else:
        check_attention(case, "injector" if "w/gamma" in case.arrays else "extractor")
    case.check_all_read()


CLIP = dataclasses.replace(vit.SIZES["clip-tiny"], layers=4, select_layer=-1)
TOWERS = {
    "siglip, odd grid, border": dataclasses.replace(
        vit.SIZES["siglip-tiny"], layers=5, input_size=43
    ),
    "dinov2 with registers, inner layer, bfloat16": dataclasses.replace(
        vit.SIZES["dinov2-tiny"], layers=3, select_layer=2, registers=3, dtype="bfloat16"
    ),
}
SMALL = AdapterConfig(prior_width=8)


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_towers(tower):
    """Shapes, and at first the tower's own tokens come out: gamma is zero."""
    shape = (2, tower.size, tower.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    @fast
    def compute(pixels):
        adapter = ViTAdapter(SMALL, tower, rngs=nnx.Rngs(0))
        return *adapter(pixels), adapter.tower.states(pixels)

    tokens, maps, plain = compute(pixels)
    own = tower.class_token
    plain = np.concatenate([plain[:, :own], plain[:, tower.front :]], axis=1)
    np.testing.assert_allclose(tokens.astype(np.float32), plain.astype(np.float32), atol=1e-5)
    g = tower.grid
    assert [x.shape for x in maps] == [
        (2, side, side, tower.width) for side in (4 * g, 2 * g, g, (g + 1) // 2)
    ]
    assert all(x.dtype == tower.dtype and np.isfinite(x.astype(np.float32)).all() for x in maps)


@pytest.mark.parametrize(("depth", "ends"), [(24, [6, 12, 18, 24]), (9, [2, 4, 7, 9]), (2, None)])
def test_stages(depth, ends):
    tower = dataclasses.replace(CLIP, layers=depth)
    adapter = nnx.eval_shape(lambda: ViTAdapter(SMALL, tower, rngs=build.rngs(0)))
    first, last = zip(*adapter.stages, strict=True)
    assert first == (0, *last[:-1]) and last[-1] == depth
    assert ends is None or list(last) == ends


def filled(make):
    """A module with random numbers in every weight."""
    module, rng = nnx.eval_shape(make), np.random.default_rng(1)
    graph, weights = nnx.split(module)
    made = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(made, weights))


def test_gradients_pass_through_the_frozen_tower():
    """To every weight of the adapter, the first injector's too; along one direction they are as the
    loss changes."""
    cfg, tower = SMALL, CLIP
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (1, tower.size, tower.size, 3), np.uint8)
    trained = nnx.All(nnx.Param, lambda path, _: path[0] != "tower")
    adapter = filled(lambda: ViTAdapter(cfg, tower, rngs=nnx.Rngs(0)))
    graph, weights, rest = nnx.split(adapter, trained, ...)

    @fast
    def compute(weights, rest):
        def loss(weights):
            tokens, maps = nnx.merge(graph, weights, rest)(pixels)
            return jnp.square(tokens).mean() + sum(jnp.square(x).mean() for x in maps)

        return jax.value_and_grad(loss)(weights)

    _, gradients = compute(weights, rest)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.asarray(gradient[...]).any(), path
    length = float(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients))) ** 0.5
    step = 1e-2 / length
    above, below = (
        float(compute(jax.tree.map(lambda w, g: w + part * g, weights, gradients), rest)[0])  # noqa: B023
        for part in (step / 2, -step / 2)
    )
    np.testing.assert_allclose((above - below) / step, length**2, rtol=0.02)


def test_recomputation():
    """The prior, four injectors and six extractors are recomputed, each by itself; with the
    tower's option, its four stages, too."""
    pixels = np.zeros((1, CLIP.size, CLIP.size, 3), np.uint8)

    def count(cfg, tower):
        made = nnx.eval_shape(lambda: ViTAdapter(cfg, tower, rngs=build.rngs(0)))
        graph, weights = nnx.split(made)
        traced = jax.make_jaxpr(lambda w: nnx.merge(graph, w)(pixels))(weights)
        return str(traced).count("policy=None")

    inside = count(SMALL, CLIP)  # sampling recomputes by itself
    assert count(dataclasses.replace(SMALL, remat=True), CLIP) == inside + 11
    assert count(SMALL, dataclasses.replace(CLIP, remat=True)) == inside + 4


def test_star():
    """Heads look into different directions, points go on from one another; or all stay."""
    offsets = vit_adapter.star(8, 2, 3).reshape(8, 2, 3, 2)
    np.testing.assert_allclose(offsets[0, 1], [(1, 0), (2, 0), (3, 0)], atol=1e-6)
    np.testing.assert_allclose(offsets[1, 0], [(1, 1), (2, 2), (3, 3)], atol=1e-6)
    np.testing.assert_allclose(offsets[6, 0, 1], (0, -2), atol=1e-6)
    tower = CLIP
    for star in (True, False):
        cfg = dataclasses.replace(SMALL, star_offsets=star)
        bias = vit_adapter.Injector(cfg, tower, rngs=nnx.Rngs(0)).attn.sampling_offsets.bias[...]
        assert bias.any() == star


@pytest.mark.parametrize("sizes", [(16, 32), (8, 4), (5, 3), (4, 4)])
def test_resize(sizes):
    """As torch resizes without antialiasing."""
    torch = pytest.importorskip("torch", reason="needs the oracle extra")
    n, m = sizes
    x = np.random.default_rng(0).normal(size=(2, n, n, 3)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.tensor(nchw(x).__array__()), size=(m, m), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(vit_adapter.resize(x, m), nhwc(want.numpy()), atol=1e-5)


def test_in_and_out():
    """Written under the published names and read again; another grid gets its own table."""
    cfg, tower = SMALL, CLIP
    adapter = filled(lambda: ViTAdapter(cfg, tower, rngs=nnx.Rngs(0)))
    tensors = dict(export_adapter(adapter, "encoder."))
    assert tensors["encoder.vision_model.adapter_up.weight"].shape == (32, 32, 2, 2)
    other = nnx.eval_shape(lambda: ViTAdapter(cfg, tower, rngs=build.rngs(0)))
    load_adapter(other, tensors, "encoder.")
    for key, value in export_adapter(other, "encoder.").items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)
    larger = dataclasses.replace(tower, input_size=48)
    other = nnx.eval_shape(lambda: ViTAdapter(cfg, larger, rngs=build.rngs(0)))
    load_adapter(other, tensors, "encoder.")
    table, before = (a.tower.position_embedding[...] for a in (other, adapter))
    assert table.shape == (37, 32)
    for ours, theirs in ((0, 0), (1, 1), (6, 4), (31, 13), (36, 16)):  # corners stay corners
        np.testing.assert_allclose(table[ours], before[theirs], atol=1e-5)
    lost, odd = "encoder.vision_model.adapter_spm.fc1.bias", "encoder.vision_model.adapter_odd"
    tower_key = "encoder.vision_model.pre_layrnorm.bias"
    wrong = {k: v for k, v in tensors.items() if k not in (lost, tower_key)} | {odd: np.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_adapter(adapter, wrong, "encoder.")
    for key in ("adapter_spm.fc1.bias", "adapter_odd", "pre_layrnorm.bias"):
        assert key in str(error.value)


def test_full_size():
    """Names and number of weights around CLIP-L at 224 pixels, of published shapes."""
    tower = dataclasses.replace(vit.SIZES["clip-l-224"], select_layer=-1)
    adapter = nnx.eval_shape(lambda: ViTAdapter(AdapterConfig(), tower, rngs=build.rngs(0)))
    found = export_adapter(adapter)
    shape = lambda key: found.shape_of(f"vision_model.{key}")  # noqa: E731
    assert shape("adapter_spm.conv4.0.weight") == (256, 256, 3, 3)
    assert shape("adapter_spm.fc2.weight") == (1024, 128, 1, 1)
    assert shape("adapter_interactions.2.injector.attn.sampling_offsets.weight") == (384, 1024)
    assert shape("adapter_interactions.2.injector.attn.attention_weights.bias") == (192,)
    assert shape("adapter_interactions.3.extra_extractors.1.attn.sampling_offsets.bias") == (128,)
    assert shape("adapter_interactions.0.extractor.ffn.dwconv.dwconv.weight") == (256, 1, 3, 3)
    assert not [k for k in found if "post_layernorm" in k]
    with pytest.raises(ValueError, match="don't divide"):
        AdapterConfig(value_ratio=0.3).value_width(1024, 16)
