"""The UNet that looks at feature maps, against the reference and itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.names import load_torch_dict
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.unet_mmfs import MMFSNet, UNetMMFSConfig, skips_of
from tests.recipes.mm_interleaved import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def nhwc(x):
    """Channels last, of an array whose last three axes are c, h, w."""
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def config_of(case, **unet) -> UNetMMFSConfig:
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
        **unet,
    )
    return UNetMMFSConfig(
        unet=unet_cfg, value_width=size["img_dim"], inner_width=about["attn_dim"],
        heads=about["heads"], points=about["points"],
        sides=tuple(about["spatial_shapes_for_scale"]),
        middle_base=about["base_shapes_per_resolution"][-1],
    )  # fmt: skip


@pytest.mark.golden
def test_residual_network_equals_the_reference(golden_root):
    case = golden.Case(golden_root, "unet_mmfs_net")
    cfg = config_of(golden.Case(golden_root, "end_to_end_train"))
    assert [b for _, b in skips_of(cfg.unet)] == case.about["base_spatial_shape_per_block"]
    assert cfg.middle_base == case.about["base_spatial_shape_mid"]
    net = nnx.eval_shape(lambda: MMFSNet(cfg, nnx.Rngs(0)))
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
