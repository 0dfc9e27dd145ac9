"""Sizes, configuration errors and parameter names of the published models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.names import to_torch_dict
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig, CLIPTextModel
from metamorph_jax.models.diffusion.dit import DiT, DiTConfig, depth_to_space, space_to_depth
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig


def count(make):
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(p.size for p in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "make, millions",
    [
        (lambda: UNet(UNetConfig.small(), nnx.Rngs(0)), 92.24),
        (lambda: UNet(UNetConfig.sd15(), nnx.Rngs(0)), 859.52),
        (lambda: UNet(UNetConfig.sd21(), nnx.Rngs(0)), 865.91),
        (lambda: AutoencoderKL(VAEConfig.sd15(), nnx.Rngs(0)), 83.65),
        (lambda: CLIPTextModel(CLIPTextConfig.sd15(), nnx.Rngs(0)), 123.06),
        (lambda: CLIPTextModel(CLIPTextConfig.sd21(), nnx.Rngs(0)), 340.39),
    ],
)
def test_full_sizes_have_the_published_number_of_parameters(make, millions):
    assert round(count(make) / 1e6, 2) == millions


def test_tiny_unet_has_the_library_s_parameters():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    cfg = UNetConfig.tiny()
    names = ["in_channels", "out_channels", "block_out_channels", "down_block_types"]
    names += ["up_block_types", "layers_per_block", "cross_attention_dim", "norm_num_groups"]
    theirs = diffusers.UNet2DConditionModel(
        **{k: getattr(cfg, k) for k in names}, attention_head_dim=cfg.num_heads
    )
    ours = to_torch_dict(UNet(cfg, nnx.Rngs(0)))
    assert {k: v.shape for k, v in ours.items()} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize(
    "cls, fields, word",
    [
        (UNetConfig, {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        (UNetConfig, {"brand_new": 1}, "brand_new=1"),
        (UNetConfig, {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        (UNetConfig, {"attention_head_dim": [1, 2]}, "num_heads"),
        (VAEConfig, {"use_quant_conv": False}, "use_quant_conv"),
        (VAEConfig, {"down_block_types": ["Other"] * 4}, "down_block_types"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(cls, fields, word):
    with pytest.raises(ValueError, match=word.replace("[", r"\[")):
        cls.from_dict(fields)


def test_bfloat16_computes_and_returns_float32():
    unet = UNet(UNetConfig.tiny(dtype="bfloat16"), nnx.Rngs(0))
    graph, state = nnx.split(unet)
    run = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))
    y = run(state, jnp.ones((1, 8, 8, 4)), jnp.int32(3), jnp.ones((1, 5, 32)))
    assert y.shape == (1, 8, 8, 4) and y.dtype == jnp.float32 and jnp.isfinite(y).all()


def test_transformer_denoiser_reads_time_and_context():
    cfg = DiTConfig.tiny()
    graph, state = nnx.split(DiT(cfg, nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    state = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), state)
    run = jax.jit(lambda *a: nnx.merge(graph, state)(*a))
    x = jax.random.normal(next(keys), (2, 8, 8, 3))
    context = jax.random.normal(next(keys), (2, 4, 32))
    y = run(x, jnp.array([5, 500]), context)
    assert y.shape == x.shape
    assert not np.allclose(y, run(x, jnp.array([6, 500]), context)[0], atol=1e-4)
    assert not np.allclose(y, run(x, jnp.array([5, 500]), 0 * context), atol=1e-4)


def test_space_to_depth_and_back():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = space_to_depth(jnp.asarray(x), 2)
    np.testing.assert_array_equal(y[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(depth_to_space(y, 2), x)
