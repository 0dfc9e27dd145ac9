"""The decoder recipe: its loss, its filters, and that it learns to draw from its features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.dit import DiTConfig
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.schedule import PREDICTIONS, Schedule
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.recipes.decoder import DecoderConfig, DecoderRecipe
from metamorph_jax.sampling.diffusion import DDIM, draw
from metamorph_jax.types import DecoderBatch

PROJECTOR = ProjectorConfig(input_dim=6, hidden_dim=16, output_dim=32)


def pixel_config(**kw):
    parts = dict(projector=PROJECTOR, denoiser=DiTConfig.tiny(), vae=None, context_length=0)
    return DecoderConfig(**(parts | kw))


def latent_config(**kw):
    parts = dict(projector=PROJECTOR, denoiser=UNetConfig.tiny(), vae=VAEConfig.tiny())
    return DecoderConfig(**(parts | dict(context_length=7) | kw))


def batch_of(cfg, B=4, seed=0):
    rng = np.random.default_rng(seed)
    side = cfg.image_side
    return DecoderBatch(
        image=rng.integers(0, 256, (B, side, side, 3), dtype=np.uint8),
        features=rng.standard_normal((B, 4, 6)).astype(np.float32),
    )


def test_loss_is_the_mean_square_against_the_target():
    """The denoiser starts at exactly zero, so the loss is the mean square of the target itself."""
    for prediction in PREDICTIONS:
        cfg = pixel_config(schedule=Schedule(prediction_type=prediction))
        recipe, batch = DecoderRecipe(cfg, nnx.Rngs(0)), batch_of(pixel_config())
        key = jax.random.key(3)
        sums, metrics = recipe.loss_sums(batch, key)
        keys = jax.random.split(key, 5)
        x0 = batch.image / 127.5 - 1
        t = jax.random.randint(keys[1], (4,), 0, 1000)
        wanted = sch.target(cfg.schedule, x0, jax.random.normal(keys[2], x0.shape), t)
        expected = jnp.square(wanted).mean((1, 2, 3)).sum()
        np.testing.assert_allclose(sums["diffusion"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["mse"][0] / metrics["mse"][1], expected / 4, rtol=1e-5)
        assert recipe.loss_counts(batch)["diffusion"] == 4


def test_filled_up_samples_count_nothing():
    recipe, batch = DecoderRecipe(pixel_config(), nnx.Rngs(0)), batch_of(pixel_config())
    short = dataclasses.replace(batch, valid=np.array([True, False, True, False]))
    whole, part = (recipe.loss_sums(b, jax.random.key(0))[0]["diffusion"] for b in (batch, short))
    assert recipe.loss_counts(short)["diffusion"] == 2 and 0 < part < whole


def test_noise_offset_is_part_of_the_target():
    cfg = pixel_config(noise_offset=100.0)
    batch = batch_of(cfg)
    plain = DecoderRecipe(pixel_config(), nnx.Rngs(0)).loss_sums(batch, jax.random.key(0))[0]
    offset = DecoderRecipe(cfg, nnx.Rngs(0)).loss_sums(batch, jax.random.key(0))[0]
    assert offset["diffusion"] > 100 * plain["diffusion"]


def shaken(recipe):
    """The recipe with all parameters moved, so that none of its zero starts hides anything."""
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    graph, params, rest = nnx.split(recipe, nnx.Param, ...)
    move = lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(move, params), rest)


def test_a_dropped_condition_is_all_zeros():
    """With probability 1 the features no longer matter; with 0 they do."""
    for drop, same in ((1.0, True), (0.0, False)):
        cfg = pixel_config(drop_context=drop)
        recipe, batch = shaken(DecoderRecipe(cfg, nnx.Rngs(0))), batch_of(cfg)
        other = dataclasses.replace(batch, features=batch.features + 1)
        a, b = (recipe.loss_sums(x, jax.random.key(0))[0]["diffusion"] for x in (batch, other))
        assert (a == b) == same


def test_statistics_are_the_identity_until_set():
    cfg = pixel_config()
    recipe, batch = shaken(DecoderRecipe(cfg, nnx.Rngs(0))), batch_of(cfg)
    np.testing.assert_array_equal(
        recipe.context(batch.features), recipe.projector(batch.features)
    )
    recipe.set_statistics(batch.features, batch.image)
    x = recipe.latents(batch.image, jax.random.key(0))
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(recipe.picture(x), batch.image / 255, atol=1e-5)


def test_stages_train_what_they_name():
    recipe = DecoderRecipe(latent_config(), nnx.Rngs(0))
    for stage, parts in {"projector": {"projector"}, "decoder": {"projector", "denoiser"}}.items():
        chosen = nnx.state(recipe, recipe.trainable(stage))
        assert {path[0] for path, _ in nnx.to_flat_state(chosen)} == parts
    with pytest.raises(ValueError, match="stage='vpit'"):
        recipe.trainable("vpit")


def test_latent_recipe_trains_and_draws():
    cfg = latent_config(min_snr=5.0, noise_offset=0.1)
    recipe, batch = DecoderRecipe(cfg, nnx.Rngs(0)), batch_of(latent_config(), B=2)
    graph, train, rest = nnx.split(recipe, recipe.trainable("decoder"), ...)

    @jax.jit
    def gradients(train, rest, batch, key):
        def loss(train):
            return nnx.merge(graph, train, rest).loss_sums(batch, key)[0]["diffusion"]

        return jax.grad(loss)(train)

    grads = gradients(train, rest, batch, jax.random.key(0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    side = cfg.sample_side

    @jax.jit
    def pictures(train, rest, features, noise):
        recipe = nnx.merge(graph, train, rest)
        return draw(recipe, features, noise, DDIM(), steps=3, scale=2.0)

    noise = jax.random.normal(jax.random.key(0), (2, side, side, 4))
    images = pictures(train, rest, batch.features, noise)
    assert images.shape == batch.image.shape and images.min() >= 0 and images.max() <= 1


def test_unet_on_folded_pixels():
    unet = UNetConfig.tiny(in_channels=12, out_channels=12)
    cfg = pixel_config(denoiser=unet, patch=2, context_length=7)
    recipe, batch = DecoderRecipe(cfg, nnx.Rngs(0)), batch_of(cfg, B=1)
    assert cfg.image_side == 16
    assert np.isfinite(recipe.loss_sums(batch, jax.random.key(0))[0]["diffusion"])


def test_wrong_sizes_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match="cross_attention_dim"):
        pixel_config(projector=dataclasses.replace(PROJECTOR, output_dim=8))
    with pytest.raises(ValueError, match="expected 12"):
        pixel_config(denoiser=UNetConfig.tiny(), patch=2)
    recipe = DecoderRecipe(pixel_config(), nnx.Rngs(0))
    batch = dataclasses.replace(batch_of(pixel_config()), features=None)
    with pytest.raises(ValueError, match="without a tower"):
        recipe.loss_sums(batch, jax.random.key(0))


def test_it_learns_to_draw_the_colour_it_is_told():
    """Two features, two colours: after 100 steps the drawings have the asked colour."""
    cfg = DecoderConfig.pixels(features=6, tokens=4, side=8, width=64)
    denoiser = dataclasses.replace(cfg.denoiser, depth=1, patch=4)
    cfg = dataclasses.replace(cfg, denoiser=denoiser)
    recipe = DecoderRecipe(cfg, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 64)
    colours = np.array([[230, 30, 30], [30, 30, 230]], np.uint8)
    image = np.broadcast_to(colours[kinds][:, None, None], (64, 8, 8, 3))
    features = np.where(kinds[:, None, None] == 0, 1.0, -1.0) + np.zeros((64, 4, 6))
    batch = DecoderBatch(image=image, features=features.astype(np.float32))
    recipe.set_statistics(batch.features, image)
    graph, train, rest = nnx.split(recipe, recipe.trainable("decoder"), ...)
    optimizer = optax.adam(2e-3)
    state = optimizer.init(train)

    @jax.jit
    def step(train, state, key):
        def loss(train):
            return nnx.merge(graph, train, rest).loss_sums(batch, key)[0]["diffusion"] / 64

        value, grads = jax.value_and_grad(loss)(train)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(train, updates), state, value

    for i in range(100):
        train, state, _ = step(train, state, jax.random.key(i))
    noise = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    rule = DDIM(spacing="trailing", offset=0)
    picture = jax.jit(lambda train: draw(
        nnx.merge(graph, train, rest), batch.features[:8], noise, rule, steps=10, scale=2.0,
    ))(train)  # fmt: skip
    red = np.asarray(picture[..., 0].mean((1, 2)) > picture[..., 2].mean((1, 2)))
    np.testing.assert_array_equal(red, kinds[:8] == 0)
