"""The decoder recipe: its loss, its filters, and that it learns to draw from its features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import lora
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.samplers import DDIM
from metamorph_jax.models.diffusion.schedule import PREDICTIONS, Schedule
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder.config import pixels
from metamorph_jax.train.state import trained_filter
from metamorph_jax.types import Conditioning, DecoderBatch
from tests.recipes.decoder.tiny import (
    PROJECTOR,
    VISION,
    batch_of,
    fast,
    latent_config,
    make,
    pixel_config,
    shaken,
)

STAGE = trained_filter(decoder.STAGES["decoder"](decoder.Config()))


def test_loss_is_the_mean_square_against_the_target():
    """The denoiser starts at exactly zero, so the loss is the mean square of the target itself."""
    for prediction in PREDICTIONS:
        schedule = Schedule(prediction_type=prediction)
        model, batch = make(pixel_config(dict(schedule=schedule))), batch_of(pixel_config())
        key = jax.random.key(3)
        sums, metrics = model.loss_sums(batch, key)
        keys = jax.random.split(key, 5)
        x0 = batch.image / 127.5 - 1
        t = jax.random.randint(keys[1], (4,), 0, 1000)
        wanted = sch.target(schedule, x0, jax.random.normal(keys[2], x0.shape), t)
        expected = jnp.square(wanted).mean((1, 2, 3)).sum()
        np.testing.assert_allclose(sums["diffusion"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["mse"][0] / metrics["mse"][1], expected / 4, rtol=1e-5)
        assert model.loss_counts(batch)["diffusion"] == 4


def test_filled_up_samples_count_nothing():
    model, batch = make(pixel_config()), batch_of(pixel_config())
    short = dataclasses.replace(batch, valid=np.array([True, False, True, False]))
    whole, part = (model.loss_sums(b, jax.random.key(0))[0]["diffusion"] for b in (batch, short))
    assert model.loss_counts(short)["diffusion"] == 2 and 0 < part < whole


def test_noise_offset_is_part_of_the_target():
    batch = batch_of(pixel_config())
    plain = make(pixel_config()).loss_sums(batch, jax.random.key(0))[0]
    offset = make(pixel_config(dict(noise_offset=100.0))).loss_sums(batch, jax.random.key(0))[0]
    assert offset["diffusion"] > 100 * plain["diffusion"]


def test_a_dropped_condition_is_all_zeros():
    """With probability 1 the features no longer matter; with 0 they do."""
    for drop, same in ((1.0, True), (0.0, False)):
        cfg = pixel_config(drop_context=drop)
        model, batch = shaken(make(cfg)), batch_of(cfg)
        other = dataclasses.replace(batch, features=batch.features + 1)
        a, b = (model.loss_sums(x, jax.random.key(0))[0]["diffusion"] for x in (batch, other))
        assert (a == b) == same


def test_feature_noise_is_not_the_noise_of_the_images():
    """The recipe splits the key further than the diffusion decoder does, into keys of its own."""
    key = jax.random.key(5)
    wide = jax.random.key_data(jax.random.split(key, 7))
    np.testing.assert_array_equal(wide[:5], jax.random.key_data(jax.random.split(key, 5)))
    assert len(np.unique(wide, axis=0)) == 7
    cfg = pixel_config(feature_noise=3.0)
    noisy, batch = shaken(make(cfg)), batch_of(cfg)
    plain = shaken(make(pixel_config()))
    a, b = (m.loss_sums(batch, key)[0]["diffusion"] for m in (noisy, plain))
    assert np.isfinite(a) and a != b


def test_statistics_are_the_identity_until_set():
    cfg = pixel_config()
    model, batch = shaken(make(cfg)), batch_of(cfg)
    found = model.conditioning(batch.features)
    assert isinstance(found, Conditioning) and found.mask is None
    np.testing.assert_array_equal(found.context, model.projector(batch.features))
    decoder.initialize(model, [batch])
    x = model.decoder.encode(batch.image, jax.random.key(0))
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(model.decoder.decode(x), batch.image / 255, atol=1e-5)
    z = (batch.features - model.feature_mean[...]) * model.feature_scale[...]
    np.testing.assert_allclose(z.reshape(-1, 6).std(0), 1, atol=1e-5)


def test_stages_train_what_they_name():
    model = nnx.eval_shape(lambda: make(latent_config()))
    wanted = {"projector": {"projector"}, "decoder": {"projector", "denoiser"}}
    for stage, parts in wanted.items():
        chosen = nnx.state(model, trained_filter(decoder.STAGES[stage](decoder.Config())))
        paths = [path for path, _ in nnx.to_flat_state(chosen)]
        assert {model.param_group(path) for path in paths} == parts
    everything = nnx.to_flat_state(nnx.state(model))
    groups = {model.param_group(path) for path, _ in everything}
    assert groups >= {"projector", "denoiser", "vae"}


def test_latent_recipe_trains_and_draws():
    cfg = latent_config(dict(min_snr=5.0, noise_offset=0.1))
    model, batch = make(cfg), batch_of(cfg, B=2)
    graph, train, rest = nnx.split(model, STAGE, ...)

    @jax.jit
    def gradients(train, rest, batch, key):
        def loss(train):
            return nnx.merge(graph, train, rest).loss_sums(batch, key)[0]["diffusion"]

        return jax.grad(loss)(train)

    grads = gradients(train, rest, batch, jax.random.key(0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))

    @jax.jit
    def images(train, rest, features, noise):
        model = nnx.merge(graph, train, rest)
        return model.draw(features, noise, DDIM(), steps=3, guidance=2.0)

    found = images(train, rest, batch.features, model.decoder.noise(jax.random.key(0), 2))
    assert found.shape == batch.image.shape and found.min() >= 0 and found.max() <= 1


def test_unet_on_folded_pixels():
    unet = UNetConfig.tiny(in_channels=12, out_channels=12)
    cfg = pixel_config(dict(denoiser=unet, patch=2), context_length=7)
    model, batch = make(cfg), batch_of(cfg, B=1)
    assert cfg.decoder.image_side == 16
    assert np.isfinite(model.loss_sums(batch, jax.random.key(0))[0]["diffusion"])


def test_pixels_become_visual_tokens_with_a_tower():
    vision = VisionConfig("siglip-tiny", tokens=4)
    projector = dataclasses.replace(PROJECTOR, input_dim=32)
    cfg = pixel_config(vision=vision, projector=projector, with_tower=True)
    model = make(cfg)
    seen = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    batch = DecoderBatch(image=batch_of(cfg, B=2).image, pixels=jnp.asarray(seen))
    features = model.features(batch)
    assert features.shape == (2, 4, 32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
    given = dataclasses.replace(batch, pixels=None, features=features)
    a, b = (model.loss_sums(x, jax.random.key(0))[0]["diffusion"] for x in (batch, given))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    parts = {work.part for work in model.work(batch)}
    assert parts == {"tower", "projector", "denoiser"}


def test_work_names_weights_that_exist():
    model = nnx.eval_shape(lambda: make(latent_config()))
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    work = {w.part: w for w in model.work(batch_of(latent_config()))}
    assert set(work) == {"autoencoder", "projector", "denoiser"}
    assert all(w.forward > 0 for w in work.values())
    trained = {part for part, w in work.items() if w.weights}
    assert trained == {"projector", "denoiser"}
    assert all(any(n.startswith(work[part].weights) for n in names) for part in trained)


def test_wrong_sizes_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match="cross_attention_dim"):
        pixel_config(projector=dataclasses.replace(PROJECTOR, output_dim=8))
    with pytest.raises(ValueError, match="expected 12"):
        pixel_config(dict(denoiser=UNetConfig.tiny(), patch=2))
    table = dict(vision=dataclasses.asdict(VISION), projector=dict(input_dim=7))
    with pytest.raises(ConfigError, match="config.model: projector.input_dim is 7, .* 6 wide"):
        configs.build(decoder.Config, table, "config.model")
    batch = dataclasses.replace(batch_of(pixel_config()), features=None)
    with pytest.raises(ValueError, match="without a tower"):
        make(pixel_config()).loss_sums(batch, jax.random.key(0))


def test_it_learns_to_draw_the_colour_it_is_told():
    """Two features, two colours: after 100 steps the drawings have the asked colour."""
    cfg = pixels(features=6, tokens=4, side=8, width=64)
    denoiser = dataclasses.replace(cfg.decoder.denoiser, depth=1, patch=4)
    cfg = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, denoiser=denoiser))
    model = make(cfg)
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 64)
    colours = np.array([[230, 30, 30], [30, 30, 230]], np.uint8)
    image = np.broadcast_to(colours[kinds][:, None, None], (64, 8, 8, 3))
    features = np.where(kinds[:, None, None] == 0, 1.0, -1.0) + np.zeros((64, 4, 6))
    batch = DecoderBatch(image=image, features=features.astype(np.float32))
    model.set_statistics(batch.features, image)
    graph, train, rest = nnx.split(model, STAGE, ...)
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
    drawn = jax.jit(lambda train: nnx.merge(graph, train, rest).draw(
        batch.features[:8], noise, rule, steps=10, guidance=2.0,
    ))(train)  # fmt: skip
    red = np.asarray(drawn[..., 0].mean((1, 2)) > drawn[..., 2].mean((1, 2)))
    np.testing.assert_array_equal(red, kinds[:8] == 0)


# ---- adapters


def lora_config(**kw):
    options = dict(rank=2, alpha=4.0) | kw
    return latent_config(lora=configs.build(decoder.DecoderLora, options))


def names_of(model, stage):
    pattern = decoder.STAGES[stage](decoder.Config(lora=model.cfg.lora))
    chosen = nnx.to_flat_state(nnx.state(model, trained_filter(pattern)))
    return {".".join(map(str, path)) for path, _ in chosen}


def test_adapters_are_all_of_the_denoiser_that_trains():
    model = nnx.eval_shape(lambda: make(lora_config()))
    names = names_of(model, "decoder")
    adapted = {n for n in names if n.startswith("decoder.denoiser")}
    assert all(n.endswith(lora.LEAVES) for n in adapted)
    linears = {n.rpartition(".")[0] for n in adapted}
    assert linears == {name for name, _ in lora.adapters(model)} and len(linears) % 8 == 0
    assert all("attn1." in n or "attn2." in n for n in linears)
    assert names - adapted == {n for n in names_of(model, "projector")}
    assert {model.param_group(n.split(".")) for n in names} == {"lora", "projector"}
    alone = nnx.eval_shape(lambda: make(lora_config(train="")))
    assert names_of(alone, "decoder") == adapted


def test_adapters_learn_and_merge():
    """A fresh adapter changes nothing; after a step the merged model computes the same."""
    cfg = lora_config(dropout=0.2, train="")
    model, batch = make(cfg), batch_of(cfg, B=2)
    bare = make(dataclasses.replace(cfg, lora=None))
    for part in (model, bare):  # a new UNet's last layers are 0: nothing behind them can learn
        denoiser = part.decoder.denoiser
        for path, p in nnx.to_flat_state(nnx.state(denoiser)):
            if path[-1] == "kernel" and not p[...].any():
                p[...] = 0.1 * jax.random.normal(jax.random.key(3), p.shape)
                nnx.update(denoiser, nnx.from_flat_state([(path, p)]))
    graph, train, rest = nnx.split(model, trained_filter(decoder.STAGES["decoder"](cfg)), ...)
    graph_plain, plain = nnx.split(bare)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    condition = Conditioning(jax.random.normal(jax.random.key(2), (2, 7, 32)))

    def predict(model):
        graph, state = nnx.split(model.decoder.denoiser)
        run = fast(lambda s: nnx.merge(graph, s)(x, jnp.array([3, 700]), condition))
        return np.asarray(run(state))

    fresh = predict(model)
    np.testing.assert_array_equal(fresh, predict(nnx.merge(graph_plain, plain)))

    @fast
    def gradient(train, rest, key):
        loss = lambda t: nnx.merge(graph, t, rest).loss_sums(batch, key)[0]["diffusion"]  # noqa: E731
        return jax.grad(loss)(train)

    for i in range(2):  # B starts at zero, so A has a gradient from the second step on
        found = gradient(train, rest, jax.random.key(i))
        train = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), train, found)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(found))
    a, b = (gradient(train, rest, jax.random.key(k)) for k in (5, 5))
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)
    tuned = nnx.merge(graph, train, rest)
    merged = lora.merged(tuned)
    assert lora.is_plain(merged) and np.abs(predict(tuned) - fresh).max() > 1e-2
    np.testing.assert_allclose(predict(merged), predict(tuned), atol=1e-4)


def test_wrong_adapters():
    for options, message in (
        (dict(target=r"decoder\.vae\..*to_q"), r"no stage trains: decoder\.vae"),
        (dict(target="to_q"), "matches no linear"),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda o=options: make(lora_config(**o)))
