"""The decoder recipe: its loss, its filters, and that it learns to draw from its features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metamorph_jax import config as configs
from metamorph_jax.convert import diffusion, export, hf, peft
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import lora
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.dit import DiTConfig
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.schedule import PREDICTIONS, Schedule
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder import DecoderConfig, DecoderRecipe
from metamorph_jax.sampling.diffusion import DDIM, draw
from metamorph_jax.train.state import trained_filter
from metamorph_jax.types import DecoderBatch
from tests.convert.conftest import make as published

# Compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PROJECTOR = ProjectorConfig(input_dim=6, hidden_dim=16, output_dim=32)

STAGE = trained_filter(decoder.STAGES["decoder"](decoder.Config()))


def fast(f):
    return jax.jit(f, compiler_options=FAST)


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
    np.testing.assert_array_equal(recipe.context(batch.features), recipe.projector(batch.features))
    recipe.set_statistics(batch.features, batch.image)
    x = recipe.latents(batch.image, jax.random.key(0))
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(recipe.picture(x), batch.image / 255, atol=1e-5)


def test_stages_train_what_they_name():
    recipe = DecoderRecipe(latent_config(), nnx.Rngs(0))
    for stage, parts in {"projector": {"projector"}, "decoder": {"projector", "denoiser"}}.items():
        chosen = nnx.state(recipe, trained_filter(decoder.STAGES[stage](decoder.Config())))
        assert {path[0] for path, _ in nnx.to_flat_state(chosen)} == parts


def test_latent_recipe_trains_and_draws():
    cfg = latent_config(min_snr=5.0, noise_offset=0.1)
    recipe, batch = DecoderRecipe(cfg, nnx.Rngs(0)), batch_of(latent_config(), B=2)
    graph, train, rest = nnx.split(recipe, STAGE, ...)

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
    graph, train, rest = nnx.split(recipe, STAGE, ...)
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


# ---- from the weights of Stable Diffusion


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """unet/ and vae/ of a tiny random Stable Diffusion, saved by diffusers."""
    folder = tmp_path_factory.mktemp("sd")
    for part in ("unet", "vae"):
        published(f"sd-{part}").save_pretrained(folder / part)
    return folder


def sd_config(folder, **kw):
    """A config as a config file has it: one table."""
    parts = {}
    for name, part, read in (
        ("denoiser", "unet", diffusion.unet_from_hf),
        ("vae", "vae", diffusion.vae_from_hf),
    ):
        parts[name] = dataclasses.asdict(read(hf.read_config(folder / part)))
    projector = dict(input_dim=32, hidden_dim=16, output_dim=32)
    table = dict(
        decoder=dict(projector=projector, context_length=7, **parts),
        vision=dict(tower="siglip-tiny", tokens=4),
        sd_weights=str(folder),
    )
    return configs.build(decoder.Config, table | kw, "config.model")


def outputs(unet, vae):
    """One step of the UNet, one decoded picture."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    context = jax.random.normal(jax.random.key(1), (2, 7, 32))
    (graph, state), t = nnx.split((unet, vae)), jnp.array([3, 700])

    def run(state):
        unet, vae = nnx.merge(graph, state)
        return unet(x, t, context), vae.decode(x)

    return fast(run)(state)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_sd_weights(sd_folder, from_scratch):
    """The recipe's parts compute what the loader's own do; from scratch, only the autoencoder."""
    cfg = sd_config(sd_folder, unet_from_scratch=from_scratch)
    model = decoder.create(cfg, nnx.Rngs(0))
    random = nnx.clone(model.denoiser)
    decoder.load_pretrained(model, cfg)
    unet, vae = (diffusion.load_part(sd_folder, part) for part in ("unet", "vae"))
    found = outputs(model.denoiser, model.vae)
    expected = outputs(random if from_scratch else unet, vae)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sd_weights_of_another_structure(sd_folder):
    """Four heads have the shapes of two."""
    cfg = sd_config(sd_folder)
    denoiser = dataclasses.replace(cfg.decoder.denoiser, num_heads=(4, 4))
    wrong = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, denoiser=denoiser))
    message = r"config\.model\.decoder\.denoiser: num_heads is \(4, 4\), in .*json \(2, 2\)$"
    with pytest.raises(ConfigError, match=message):
        decoder.load_pretrained(decoder.create(wrong, nnx.Rngs(0)), wrong)


# ---- adapters


def lora_config(**kw):
    options = dict(rank=2, alpha=4.0) | kw
    return decoder.Config(
        latent_config(), recipe_vision(), lora=configs.build(decoder.DecoderLora, options)
    )


def recipe_vision():
    return VisionConfig("none", feature_width=6, tokens=4)


def names_of(model, stage):
    pattern = decoder.STAGES[stage](decoder.Config(lora=model.adapters))
    chosen = nnx.to_flat_state(nnx.state(model, trained_filter(pattern)))
    return {".".join(map(str, path)) for path, _ in chosen}


def test_adapters_are_all_of_the_denoiser_that_trains():
    model = nnx.eval_shape(lambda: decoder.create(lora_config(), nnx.Rngs(0)))
    names = names_of(model, "decoder")
    adapted = {n for n in names if n.startswith("denoiser")}
    assert all(n.endswith(lora.LEAVES) for n in adapted)
    linears = {n.rpartition(".")[0] for n in adapted}
    assert linears == {name for name, _ in lora.adapters(model)} and len(linears) % 8 == 0
    assert all("attn1." in n or "attn2." in n for n in linears)
    assert names - adapted == {n for n in names_of(model, "projector")}
    assert {model.param_group(n.split(".")) for n in names} == {"lora", "projector"}
    alone = nnx.eval_shape(lambda: decoder.create(lora_config(train=""), nnx.Rngs(0)))
    assert names_of(alone, "decoder") == adapted


def test_adapters_learn_and_merge():
    """A fresh adapter changes nothing; after a step the merged model computes the same."""
    cfg = lora_config(dropout=0.2, train="")
    model, batch = decoder.create(cfg, nnx.Rngs(0)), batch_of(cfg.decoder, B=2)
    bare = decoder.create(dataclasses.replace(cfg, lora=None), nnx.Rngs(0))
    for part in (model, bare):  # a new UNet's last layers are 0: nothing behind them can learn
        for path, p in nnx.to_flat_state(nnx.state(part.denoiser)):
            if path[-1] == "kernel" and not p[...].any():
                p[...] = 0.1 * jax.random.normal(jax.random.key(3), p.shape)
                nnx.update(part.denoiser, nnx.from_flat_state([(path, p)]))
    graph, train, rest = nnx.split(model, trained_filter(decoder.STAGES["decoder"](cfg)), ...)
    graph_plain, plain = nnx.split(bare)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    context = jax.random.normal(jax.random.key(2), (2, 7, 32))

    def predict(model):
        graph, state = nnx.split(model.denoiser)
        run = fast(lambda s: nnx.merge(graph, s)(x, jnp.array([3, 700]), context))
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


def test_sd_weights_go_beneath_adapters(sd_folder, tmp_path):
    """Published weights load into a UNet with adapters; merged, it is written as it came."""
    cfg = sd_config(sd_folder, lora=dict(rank=2))
    model = decoder.create(cfg, nnx.Rngs(0))
    decoder.load_pretrained(model, cfg)
    export.write_decoder(tmp_path / "out", lora.merged(model), "F32", 10**9)
    written, came = (hf.Tensors(f / "unet") for f in (tmp_path / "out", sd_folder))
    assert set(written) == set(came)
    for key in came:
        np.testing.assert_array_equal(written[key], came[key], err_msg=key)


def test_adapters_start_from_pefts_files(tmp_path):
    cfg, rng = lora_config(rank=2, alpha=4.0), np.random.default_rng(0)
    model = nnx.eval_shape(lambda: decoder.create(cfg, nnx.Rngs(0)))
    for _, linear in lora.adapters(model):
        for leaf in (linear.lora_a, linear.lora_b):
            leaf.set_raw_value(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32))
    peft.export_peft(model.denoiser, tmp_path)
    cfg = lora_config(rank=2, alpha=4.0, weights=str(tmp_path))
    again = nnx.eval_shape(lambda: decoder.create(cfg, nnx.Rngs(0)))
    decoder.load_pretrained(again, cfg)
    mine, theirs = peft.tensors(model.denoiser), peft.tensors(again.denoiser)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[k], theirs[k]) for k in mine)


def test_wrong_adapters():
    for options, message in (
        (dict(target=r"vae\..*to_q"), "no stage trains: vae"),
        (dict(target="to_q"), "matches no linear"),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda o=options: decoder.create(lora_config(**o), nnx.Rngs(0)))
