"""Sizes, configuration errors and parameter names of the published models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.names import to_torch_dict
from metamorph_jax.models import build
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig, CLIPTextModel
from metamorph_jax.models.diffusion.dit import DiT, DiTConfig, depth_to_space, space_to_depth
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig, time_features
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig
from metamorph_jax.types import Conditioning
from tests.convert.conftest import ORACLE

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def count(make):
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(p.size for p in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "make, millions",
    [
        (lambda: UNet(UNetConfig.small(), build.rngs(0)), 92.24),
        (lambda: UNet(UNetConfig.sd15(), build.rngs(0)), 859.52),
        (lambda: UNet(UNetConfig.sd21(), build.rngs(0)), 865.91),
        (lambda: AutoencoderKL(VAEConfig.sd15(), build.rngs(0)), 83.65),
        (lambda: CLIPTextModel(CLIPTextConfig.sd15(), build.rngs(0)), 123.06),
        (lambda: CLIPTextModel(CLIPTextConfig.sd21(), build.rngs(0)), 340.39),
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
        (CLIPTextConfig, {"eos_token_id": -1}, "eos_token_id=-1"),
        (CLIPTextConfig, {"eos_token_id": [2]}, "eos_token_id=[2]"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(cls, fields, word):
    with pytest.raises(ValueError, match=word.replace("[", r"\[")):
        cls.from_dict(fields)


def test_bfloat16_computes_and_returns_float32():
    unet = UNet(UNetConfig.tiny(dtype="bfloat16"), nnx.Rngs(0))
    graph, state = nnx.split(unet)
    run = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))
    y = run(state, jnp.ones((1, 8, 8, 4)), jnp.int32(3), Conditioning(jnp.ones((1, 5, 32))))
    assert y.shape == (1, 8, 8, 4) and y.dtype == jnp.float32 and jnp.isfinite(y).all()


TIMESTEPS = np.array([0, 1, 641, 999], np.int32)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("width", [8, 24, 32, 96, 320])
def test_time_features_are_the_formula_s(width, shift):
    """In float32 as the library has it, its `exp` rounded correctly; and near the exact numbers."""
    half = width // 2
    x = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32)
    x = x / np.float32(half - shift)
    table = np.exp(x.astype(np.float64)).astype(np.float32)
    run = jax.jit(lambda t: time_features(t, width, freq_shift=shift))
    found = np.asarray(run(jnp.asarray(TIMESTEPS)))
    phase = (TIMESTEPS[:, None].astype(np.float32) * table).astype(np.float64)
    single = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
    np.testing.assert_allclose(found, single, atol=2e-7)
    freq = np.exp(-math.log(10000.0) * np.arange(half) / (half - shift))
    exact = np.concatenate([f(TIMESTEPS[:, None] * freq) for f in (np.cos, np.sin)], axis=1)
    # The exponent, of up to 9.2, is rounded three times: that much of the angle.
    error, angle = np.abs(found - exact), np.tile(TIMESTEPS[:, None] * freq, 2)
    assert (error <= 3 * 9.3 * 2.0**-24 * angle + 3e-7).all(), error.max()
    swapped = jax.jit(lambda t: time_features(t, width, False, shift))(jnp.asarray(TIMESTEPS))
    np.testing.assert_array_equal(swapped[:, half:], found[:, :half])
    assert "exp " not in str(jax.make_jaxpr(lambda t: time_features(t, width))(TIMESTEPS))


@pytest.mark.parametrize("width", [8, 12, 24, 32, 48, 96])
def test_time_features_are_the_library_s(width):
    torch = pytest.importorskip("torch", reason=ORACLE)
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    # Torch's float32 `exp` is rounded otherwise on some processors; in double it is not.
    angle = torch.from_numpy(TIMESTEPS)[:, None].float() * torch.exp(exponent.double()).float()
    theirs = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).numpy()
    np.testing.assert_allclose(time_features(TIMESTEPS, width), theirs, atol=1e-6)


@pytest.fixture(scope="module")
def tiny():
    """A UNet without weights at zero, and inputs for it."""
    graph, state = nnx.split(UNet(UNetConfig.tiny(), nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    state = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), state)
    x = jax.random.normal(next(keys), (2, 8, 8, 4))
    return nnx.merge(graph, state), x, Conditioning(jax.random.normal(next(keys), (2, 5, 32)))


def test_the_three_parts_make_the_whole(tiny):
    """An edit that changes nothing changes no number; one of a skip or the middle changes some."""
    unet, x, condition = tiny

    @jax.jit
    def in_parts(x, condition, skip_gain, mid_gain):
        ready = unet.prepare(condition)
        temb = unet.time(jnp.array([3, 700]), 2)
        y, skips = unet.down(x, temb, ready)
        kept = list(skips)
        skips = [s * skip_gain if i == 1 else s for i, s in enumerate(skips)]
        out = unet.up(unet.mid(y, temb, ready) * mid_gain, skips, temb, ready)
        assert len(skips) == len(kept) == 4  # conv_in, a map a level, one halving
        return out

    whole = jax.jit(lambda x, c: unet(x, jnp.array([3, 700]), c))(x, condition)
    same = in_parts(x, condition, 1.0, 1.0)
    np.testing.assert_allclose(same, whole, rtol=1e-6, atol=1e-6)
    assert np.abs(in_parts(x, condition, 1.1, 1.0) - whole).max() > 1e-3
    assert np.abs(in_parts(x, condition, 1.0, 1.1) - whole).max() > 1e-3


def test_prepared_conditions_give_equal_numbers(tiny):
    unet, x, condition = tiny
    run = jax.jit(lambda x, c: unet(x, jnp.int32(7), c))
    ready = jax.jit(unet.prepare)(condition)
    np.testing.assert_allclose(run(x, ready), run(x, condition), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no feature maps"):
        unet.prepare(Conditioning(condition.context, maps=(jnp.ones((2, 1, 4, 4, 8)),)))


def test_transformer_denoiser_reads_time_and_context():
    cfg = DiTConfig.tiny()
    graph, state = nnx.split(DiT(cfg, nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    state = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), state)
    run = jax.jit(lambda x, t, context: nnx.merge(graph, state)(x, t, Conditioning(context)))
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


def test_remat_changes_memory_but_no_number():
    sizes = dict(block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",),
                 up_block_types=("CrossAttnUpBlock2D",), num_heads=(2,))  # fmt: skip

    def gradients(remat):
        cfg = UNetConfig.tiny(**sizes, remat=remat)
        graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet(cfg, build.rngs(0))))
        rng = np.random.default_rng(0)
        state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 9, x.dtype), shapes)
        x, context = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 3, 32))
        loss = lambda s: (nnx.merge(graph, s)(x, 7, Conditioning(context)) ** 2).sum()  # noqa: E731
        found = [e.primitive.name for e in jax.make_jaxpr(loss)(state).eqns]
        step = jax.jit(jax.grad(loss), compiler_options=FAST)
        return sum(name in ("checkpoint", "remat2") for name in found), step(state)

    (none, plain), (some, again) = gradients(False), gradients(True)
    # Residual blocks (1 down, 2 middle, 2 up) and transformers (1, 1, 2) of one level.
    assert none == 0 and some == 5 + 4
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()))
