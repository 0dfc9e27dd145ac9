"""Masks, null conditions and guidance of the diffusion decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.diffusion import decoder as decoder_module
from metamorph_jax.models.diffusion.decoder import (
    DiffusionConfig,
    DiffusionDecoder,
    alike,
    choose,
    guided,
    zeros_like,
)
from metamorph_jax.models.diffusion.dit import DiTConfig
from metamorph_jax.models.diffusion.samplers import DDIM, DPMSolverPP
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.types import Conditioning

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
DENOISERS = {
    "unet": UNetConfig.tiny(in_channels=3, out_channels=3),
    "dit": DiTConfig.tiny(num_context=5),
    "dit grid": DiTConfig.tiny(grid_context=True),
}


def make(denoiser="unet", **changes) -> DiffusionDecoder:
    """With no weight at zero, so that the condition reaches the images."""
    cfg = DiffusionConfig(**(dict(denoiser=DENOISERS[denoiser], vae=None) | changes))
    graph, params, rest = nnx.split(DiffusionDecoder(cfg, rngs=nnx.Rngs(0)), nnx.Param, ...)
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    move = lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(move, params), rest)


def context_of(P=5, B=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, P, 32)), jnp.float32)


def drawer(model, guidance):
    graph, state = nnx.split(model)
    noise = model.noise(jax.random.key(0), 2)

    def run(state, condition, null):
        model = nnx.merge(graph, state)
        return model.sample(condition, null, DDIM(), steps=2, guidance=guidance, noise=noise)

    compiled = jax.jit(run, compiler_options=FAST)
    return lambda condition, null=None: np.asarray(compiled(state, condition, null))


@pytest.mark.parametrize(("denoiser", "guidance"), [("unet", 3.0), ("dit", 1.0), ("dit grid", 1.0)])
def test_a_masked_token_does_not_change_the_image(denoiser, guidance):
    P = 4 if denoiser == "dit grid" else 5
    draw, context = drawer(make(denoiser), guidance), context_of(P)
    mask = jnp.asarray(np.arange(P) < P - 2)[None].repeat(2, 0)
    other = context.at[:, P - 2 :].add(7.0)

    def images(context, mask):
        condition = Conditioning(context, mask)
        return draw(condition, zeros_like(condition) if guidance != 1 else None)

    np.testing.assert_array_equal(images(context, mask), images(other, mask))
    assert np.abs(images(context, None) - images(other, None)).max() > 1e-3
    assert np.abs(images(context, mask) - images(context.at[:, 0].add(1.0), mask)).max() > 1e-4


@pytest.mark.parametrize("denoiser", ["unet", "dit"])
def test_masked_tokens_are_as_if_they_were_not_there(denoiser):
    draw, context = drawer(make(denoiser), 1.0), context_of(5)
    mask = jnp.asarray([[True] * 3 + [False] * 2] * 2)
    found = draw(Conditioning(context, mask))
    np.testing.assert_allclose(found, draw(Conditioning(context[:, :3])), atol=1e-5)


def test_the_null_condition_is_an_argument():
    """Guidance 0 draws the null condition, whatever it is, with one row for all images or each."""
    model, condition = make(), Conditioning(context_of())
    plain, off, on = (drawer(model, g) for g in (1.0, 0.0, 3.0))
    nulls = [zeros_like(condition), Conditioning(context_of(seed=1))]
    for null in nulls:
        np.testing.assert_allclose(off(condition, null), plain(null), atol=1e-5)
    assert np.abs(on(condition, nulls[0]) - on(condition, nulls[1])).max() > 1e-3
    one = Conditioning(nulls[1].context[:1])
    repeated = Conditioning(nulls[1].context[:1].repeat(2, 0))
    np.testing.assert_array_equal(on(condition, one), on(condition, repeated))
    with pytest.raises(ValueError, match="guidance 3.0 needs a null condition"):
        on(condition)


def test_a_condition_with_a_mask_meets_a_null_one_without():
    condition = Conditioning(context_of(), jnp.asarray([[True] * 4 + [False]] * 2))
    null = Conditioning(jnp.zeros((1, 5, 32)))
    for first, second in (alike(condition, null), alike(null, condition)[::-1]):
        assert first.mask.shape == second.mask.shape == (2, 5)
    a, b = alike(condition, null)
    assert a.mask is not None and not a.mask.all() and b.mask.all()
    kept = choose(jnp.asarray([True, False]), condition, null)
    np.testing.assert_array_equal(kept.context[0], condition.context[0])
    np.testing.assert_array_equal(kept.mask, [[True] * 4 + [False], [True] * 5])
    assert not kept.context[1].any()
    with pytest.raises(ValueError, match="context of the condition"):
        alike(condition, Conditioning(jnp.zeros((1, 4, 32))))
    maps = Conditioning(condition.context, maps=(jnp.ones((2, 1, 4, 4, 8)),))
    with pytest.raises(ValueError, match="maps of the condition"):
        alike(maps, Conditioning(condition.context))
    assert not zeros_like(maps).maps[0].any()


def test_guidance_doubles_the_batch_only_when_it_is_on():
    seen, prepared = [], []

    def denoise(x, t, condition):
        seen.append((x.shape, t.shape, condition.context.shape))
        return x * condition.context.mean((1, 2))[:, None, None, None]

    def prepare(condition):
        prepared.append(condition.context.shape)
        return dataclasses.replace(condition, context=2 * condition.context)

    x, condition = jnp.ones((2, 3, 3, 1)), Conditioning(jnp.full((2, 5, 4), 0.25))
    plain = guided(denoise, condition, None, 1, prepare)
    strong = guided(denoise, condition, zeros_like(condition), 3.0, prepare)
    for t in (7.0, 6.0):
        np.testing.assert_allclose(plain(x, jnp.float32(t)), 0.5)
        np.testing.assert_allclose(strong(x, jnp.float32(t)), 1.5)  # 0 + 3 * (0.5 - 0)
    assert seen[0] == ((2, 3, 3, 1), (2,), (2, 5, 4))
    assert seen[1] == ((4, 3, 3, 1), (4,), (4, 5, 4))
    assert prepared == [(2, 5, 4), (4, 5, 4)]


def test_losses_are_one_number_for_each_image():
    model = make(velocity_cap=5.0, schedule=Schedule(prediction_type="sample"))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    condition, key = Conditioning(context_of(B=3)), jax.random.key(1)
    null = Conditioning(context_of(B=1, seed=2))
    run = jax.jit(
        lambda c, drop: model.losses(images, c, key, null=null, drop=drop),
        static_argnames="drop", compiler_options=FAST,
    )  # fmt: skip
    loss, error = run(condition, drop=0.0)
    assert loss.shape == error.shape == (3,) and (loss >= error).all()
    # A condition that is always dropped is the null one.
    dropped, _ = run(condition, drop=1.0)
    always, _ = run(Conditioning(null.context.repeat(3, 0)), drop=0.0)
    np.testing.assert_allclose(dropped, always, rtol=1e-5)
    assert np.abs(loss - dropped).min() > 1e-6
    some, _ = run(condition, drop=0.5)
    assert {bool(a == b) for a, b in zip(some, loss, strict=True)} <= {True, False}
    for a, b, c in zip(some, loss, dropped, strict=True):
        assert np.isclose(a, b, rtol=1e-5) or np.isclose(a, c, rtol=1e-5)
    with pytest.raises(ValueError, match="null one must be given"):
        model.losses(images, condition, key, drop=0.1)


def test_several_noises_of_an_image_give_the_mean_of_their_losses(monkeypatch):
    """Images and conditions are repeated together: row i belongs to image i mod 2."""
    model = make(noise_draws=3, schedule=Schedule(prediction_type="sample"))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    condition, seen = Conditioning(context_of(), mask), []

    def losses_at(x0, noise, t, condition):
        seen.append((x0, noise, t, condition))
        each = jnp.arange(1.0, 7.0)
        return each, 10 * each

    monkeypatch.setattr(model, "losses_at", losses_at)
    loss, error = model.losses(images, condition, jax.random.key(1))
    np.testing.assert_allclose(loss, [3, 4])  # (1 + 3 + 5) / 3, (2 + 4 + 6) / 3
    np.testing.assert_allclose(error, [30, 40])
    ((x0, noise, t, repeated),) = seen
    assert len(set(np.asarray(t).tolist())) > 1
    assert len(np.unique(np.asarray(noise)[:, 0, 0, 0])) == 6
    for row in range(6):
        np.testing.assert_array_equal(x0[row], x0[row % 2])
        np.testing.assert_array_equal(repeated.context[row], condition.context[row % 2])
        np.testing.assert_array_equal(repeated.mask[row], mask[row % 2])
    assert np.abs(x0[0] - x0[1]).max() > 0.1


def test_latents_pass_through_the_autoencoder():
    cfg = DiffusionConfig(UNetConfig.tiny(), VAEConfig.tiny())
    model = DiffusionDecoder(cfg, rngs=nnx.Rngs(0))
    assert cfg.sample_shape == (8, 8, 4) and cfg.image_side == 16 and not cfg.from_pure_noise
    assert model.limits() is None
    images = np.zeros((2, 16, 16, 3), np.uint8)
    x = model.encode(images, jax.random.key(0))
    assert x.shape == (2, 8, 8, 4)
    assert model.decode(x).shape == images.shape
    model.set_statistics(images)  # latents are scaled already
    assert not model.pixel_mean[...].any()
    condition = Conditioning(context_of(B=2))
    drawn = model.sample(
        condition, None, DPMSolverPP(), steps=1, guidance=1, noise=model.noise(jax.random.key(1), 2)
    )
    assert drawn.shape == images.shape and drawn.min() >= 0 and drawn.max() <= 1


def test_pixels_stay_within_their_limits():
    model = make("dit", schedule=Schedule(prediction_type="sample"))
    assert model.cfg.from_pure_noise
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    model.set_statistics(images)
    low, high = model.limits()
    x = model.encode(images, jax.random.key(0))
    assert (x >= low - 1e-5).all() and (x <= high + 1e-5).all()
    np.testing.assert_allclose(model.decode(x), images / 255, atol=1e-6)


def test_encoded_images_are_taken_as_they_are(monkeypatch):
    cfg = DiffusionConfig(DENOISERS["unet"], vae=None)
    model = nnx.eval_shape(lambda: DiffusionDecoder(cfg, rngs=build.rngs(0)))
    model.pixel_mean.set_raw_value(jnp.zeros(3))
    model.pixel_scale.set_raw_value(jnp.full(3, 2.0))
    monkeypatch.setattr(DiffusionDecoder, "denoise", lambda self, x, t, condition: 0.5 * x)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    key, condition = jax.random.key(1), Conditioning(context_of())
    encoded = model.encode(images, key)  # pixels need no key
    wanted, _ = model.losses(images, condition, key)
    np.testing.assert_allclose(model.losses(encoded, condition, key)[0], wanted, rtol=1e-6)
    x0, noise = jnp.ones((2, 2, 2, 3)), jnp.zeros((2, 2, 2, 3))
    t = jnp.asarray([0, 999])
    at = model.losses_at(x0, noise, t, condition)[0]
    np.testing.assert_allclose(at, 0.25 * cfg.schedule.alphas_cumprod[np.asarray(t)], rtol=1e-5)


@pytest.mark.parametrize(("images", "turns"), [(3, 1), (4, 1), (5, 5), (8, 2), (12, 3), (14, 7)])
def test_images_are_encoded_in_turns(images, turns):
    """Of 512 x 512 pixels, four at a time; of small ones, all at once."""
    assert decoder_module._turns(images, 512 * 512) == turns
    assert decoder_module._turns(images, 64 * 64) == 1


def test_encoding_in_turns_changes_no_number(monkeypatch):
    """It takes the memory of a turn, and each image has its own noise as before."""
    unet = UNetConfig.tiny()
    model = DiffusionDecoder(DiffusionConfig(unet, VAEConfig.tiny()), rngs=build.rngs(0))
    graph, state = nnx.split(model)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    found, memory = [], []
    for most in (2**20, 2 * 32 * 32):
        monkeypatch.setattr(decoder_module, "_PIXELS_AT_ONCE", most)
        encode = lambda state, x: nnx.merge(graph, state).encode(x, jax.random.key(3))  # noqa: E731
        program = jax.jit(encode).lower(state, pixels).compile()
        found.append(program(state, pixels))
        memory.append(program.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert memory[1] < 0.6 * memory[0]
