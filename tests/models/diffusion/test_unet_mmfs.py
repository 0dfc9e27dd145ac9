"""The UNet that looks at feature maps, against the reference and itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.names import load_torch_dict
from metamorph_jax.models import build
from metamorph_jax.models.diffusion import decoder as diffusion
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.unet_mmfs import MMFSNet, UNetMMFS, UNetMMFSConfig, skips_of
from metamorph_jax.types import Conditioning
from tests.recipes.mm_interleaved import golden

# Sampling by products ("dense") compiles faster than by gathers.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
GROUPS = 4  # of the golden set's UNet, which neither descriptor nor weights tell


def nhwc(x):
    """Channels last, of an array whose last three axes are c, h, w."""
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def config_of(case) -> UNetMMFSConfig:
    """Of the whole model's descriptor, with what it leaves to the weights' shapes."""
    size, about = case.config, case.config["mmfs_unet"]
    weights = {k: v["shape"] for k, v in case.about["params"].items() if ".decoder.unet." in k}
    shape = lambda end: next(v for k, v in weights.items() if k.endswith(end))  # noqa: E731
    crossing = [bool(re.search(rf"down_blocks\.{i}\.attentions", " ".join(weights)))
                for i in range(len(size["unet"]))]  # fmt: skip
    unet_cfg = UNetConfig(
        sample_size=about["grid_size"],
        block_out_channels=tuple(size["unet"]),
        down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossing),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossing)
        ),
        layers_per_block=sum("down_blocks.0.resnets" in k and "conv1.weight" in k for k in weights),
        cross_attention_dim=shape("attn2.to_k.weight")[1],
        num_heads=(size["heads_u"],) * len(size["unet"]),
        use_linear_projection=len(shape("proj_in.weight")) == 2,
        norm_num_groups=GROUPS,
    )
    return UNetMMFSConfig(
        unet=unet_cfg, value_width=size["img_dim"], inner_width=about["attn_dim"],
        heads=about["heads"], points=about["points"],
        sides=tuple(about["spatial_shapes_for_scale"]),
        middle_base=about["base_shapes_per_resolution"][-1], method="dense",
    )  # fmt: skip


@pytest.mark.golden
def test_residual_network_equals_the_reference(golden_root):
    case = golden.Case(golden_root, "unet_mmfs_net")
    cfg = config_of(golden.Case(golden_root, "end_to_end_train"))
    assert [b for _, b in skips_of(cfg.unet)] == case.about["base_spatial_shape_per_block"]
    assert cfg.middle_base == case.about["base_spatial_shape_mid"]
    net = nnx.eval_shape(lambda: MMFSNet(cfg, build.rngs(0)))
    load_torch_dict(net, case.weights("image_decoder.decoder.mmfs_module."))
    graph, state = nnx.split(net)
    count = len(net.mmfs_down_blocks)
    skips = [nhwc(case[f"in/down_{i}"]) for i in range(count)]
    maps = tuple(nhwc(case[f"in/feat_{i}"]) for i in range(len(cfg.sides)))
    mask = jnp.asarray(case["in/mask"] > 0)

    def run(state, skips, middle, maps):
        net = nnx.merge(graph, state)
        first = net.mmfs_down_blocks[0](skips[0], maps, mask)
        return *net(skips, middle, net.project(maps), mask), first

    run = jax.jit(run, compiler_options=FAST)
    with jax.default_matmul_precision("highest"):
        edited, middle, first = run(state, skips, nhwc(case["in/mid"]), maps)
    found = {f"out/down_{i}": x for i, x in enumerate(edited)}
    found |= {"out/mid": middle, "out/block0_residual": first}
    for key, value in found.items():
        wanted = nhwc(case[key])
        np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=key)
    case.check_all_read()


@pytest.mark.golden
def test_prediction_equals_the_reference_for_images_without_an_image_before(golden_root):
    """The others need the finest map of the visual tokenizer, which the set leaves out: they are
    compared with the whole model's."""
    case = golden.Case(golden_root, "end_to_end_train")
    cfg = config_of(case)
    model = nnx.eval_shape(lambda: UNetMMFS(cfg, build.rngs(0)))
    weights = case.weights("image_decoder.decoder.")
    load_torch_dict(model.unet, weights, prefix="unet.")
    load_torch_dict(model.mmfs_module, weights, prefix="mmfs_module.")
    graph, state = nnx.split(model)
    alone = ~case["mid/image_mmfs_mask"].any(1)
    n, side = alone.sum(), 2 * case["mid/ms_1"].shape[-1]
    maps = tuple(
        jnp.zeros((n, 1, max(1, side >> k), max(1, side >> k), cfg.value_width))
        for k in range(len(cfg.sides))
    )
    condition = Conditioning(
        jnp.asarray(case["mid/unet_condition"][alone]), None, maps, jnp.zeros((n, 1), bool)
    )
    run = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a), compiler_options=FAST)
    x, t = nhwc(case["mid/noisy_latents"][alone]), case["mid/timesteps"][alone]
    with jax.default_matmul_precision("highest"):
        found = run(state, x, t, condition)
    wanted = nhwc(case["mid/unet_pred"][alone])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


# ---- a small UNet on pixels


def small(**unet) -> UNetMMFSConfig:
    sizes = dict(
        sample_size=4, in_channels=12, out_channels=12, block_out_channels=(16,), num_heads=(2,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    return UNetMMFSConfig(
        UNetConfig.tiny(**(sizes | unet)), value_width=8, inner_width=8, heads=2, points=2,
        sides=(8, 4), relative_rows=3, method="dense",
    )  # fmt: skip


def random_decoder(cfg: UNetMMFSConfig):
    """(graph, state) of a decoder of 8 x 8 pixels, with no weight at zero."""
    whole = diffusion.DiffusionConfig(cfg, vae=None, patch=2)
    made = nnx.eval_shape(lambda: diffusion.DiffusionDecoder(whole, rngs=build.rngs(0)))
    graph, shapes = nnx.split(made)
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / max(1, x.size) ** 0.25, x.dtype), shapes
    )


def maps_of(rng, B, M):
    """With sides other than the nominal ones."""
    return tuple(jnp.asarray(rng.normal(size=(B, M, s, s, 8)), jnp.float32) for s in (6, 3))


def test_guidance_shares_the_maps_and_reads_what_the_mask_shows():
    graph, state = random_decoder(small())
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, context, null = normal(2, 8, 8, 3), normal(2, 5, 32), normal(1, 5, 32)
    maps = maps_of(rng, 2, 2)

    @functools.partial(jax.jit, static_argnames="shared", compiler_options=FAST)
    def predict(state, maps, mask, shared):
        model = nnx.merge(graph, state)
        condition = Conditioning(context, None, maps, mask)
        other = Conditioning(null) if shared else Conditioning(null.repeat(2, 0), None, maps, mask)
        prepare = model.denoiser.prepare if shared else lambda condition: condition
        return diffusion.guided(model.denoise, condition, other, 3.0, prepare)(x, 7.0)

    both = jnp.asarray([[True, True], [False, True]])
    found = np.asarray(predict(state, maps, both, True))
    # Projected once for both halves, or as raw maps of each half: the same.
    np.testing.assert_allclose(predict(state, maps, both, False), found, atol=1e-4)
    changed = tuple(m.at[:, 0].multiply(-1.0) for m in maps)
    other = np.asarray(predict(state, changed, both, True))
    np.testing.assert_allclose(other[1], found[1], atol=1e-5)
    assert np.abs(other[0] - found[0]).max() > 1e-3
    swapped = np.asarray(predict(state, tuple(m[:, ::-1] for m in maps), both, True))
    assert np.abs(swapped[0] - found[0]).max() > 1e-3  # the latest image is another one


def test_dropped_conditions_keep_their_maps():
    condition = Conditioning(
        jnp.ones((2, 3, 4)), None, (jnp.ones((2, 1, 2, 2, 8)),), jnp.asarray([[True], [False]])
    )
    null = Conditioning(jnp.zeros((1, 3, 4)))
    found = diffusion.choose(jnp.asarray([True, False]), condition, null)
    assert found.context.any((1, 2)).tolist() == [True, False]
    assert found.maps is condition.maps and found.maps_mask is condition.maps_mask
    zeros = diffusion.zeros_like(condition)  # a null condition with maps of its own
    assert not diffusion.choose(jnp.asarray([False] * 2), condition, zeros).maps[0].any()


def test_gradients_reach_the_maps_that_are_seen_and_every_parameter():
    """With recomputed blocks."""
    graph, state = random_decoder(small(remat=True))
    rng = np.random.default_rng(1)
    x0, noise = jnp.asarray(rng.normal(size=(2, 2, 8, 8, 3)), jnp.float32)
    context, maps = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32), maps_of(rng, 2, 1)
    t, mask = jnp.asarray([3, 900]), jnp.asarray([[True], [False]])

    def loss(state, maps):
        model = nnx.merge(graph, state)
        return model.losses_at(x0, noise, t, Conditioning(context, None, maps, mask))[0].sum()

    weights, seen = jax.jit(jax.grad(loss, (0, 1)), compiler_options=FAST)(state, maps)
    for m in seen:
        assert np.abs(m[0]).max() > 1e-6 and not m[1].any()
    unused = {path[-1] for path, value in nnx.to_flat_state(weights) if not np.any(value[...])}
    assert unused == {"pixel_mean", "pixel_scale"}


def test_what_does_not_fit_is_named():
    model = nnx.eval_shape(lambda: UNetMMFS(small(), build.rngs(0)))
    context, rng = jnp.ones((1, 5, 32)), np.random.default_rng(0)
    for maps, words in (
        ((), r"maps of shapes \[\]; expected 2"),
        (maps_of(rng, 1, 1)[:1], "expected 2"),
        (maps_of(rng, 1, 3), "maps of 3 images a row, but relative_rows=3"),
    ):
        with pytest.raises(ValueError, match=words):
            model.prepare(Conditioning(context, None, maps))
    with pytest.raises(ValueError, match="sample_size 6 can't be halved 3 times"):
        UNetMMFSConfig(UNetConfig.sd21(sample_size=6))
    with pytest.raises(ValueError, match=r"block_out_channels \[18\]"):
        small(block_out_channels=(18,))


def test_full_size():
    """12 skips and the middle; MMFS sizes of the spec, computed in the UNet's dtype."""
    cfg = UNetMMFSConfig(UNetConfig.sd21(sample_size=64, dtype="bfloat16"))
    sizes = skips_of(cfg.unet)
    assert (
        sizes
        == [(320, 64)] * 3
        + [(320, 32)]
        + [(640, 32)] * 2
        + [(640, 16)]
        + [(1280, 16)] * 2
        + [(1280, 8)] * 3
    )
    assert skips_of(UNetConfig.sd21(sample_size=32))[-1] == (1280, 4)  # 256 pixels
    net = nnx.eval_shape(lambda: MMFSNet(cfg, build.rngs(0)))
    middle = net.mmfs_mid_block.mmfs
    assert middle.cfg.base == 8 and middle.attention_weights.kernel.shape == (1280, 16 * 4 * 9)
    maps = tuple(jax.ShapeDtypeStruct((2, 1, s, s, 1024), jnp.float32) for s in cfg.sides)
    values = nnx.eval_shape(lambda net, maps: net.project(maps), net, maps)
    assert len(values) == 13 and values[0].array.dtype == jnp.bfloat16
    assert values[0].array.shape == (2, 1, 64**2 + 32**2 + 16**2 + 8**2, 1024)
