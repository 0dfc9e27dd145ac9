"""The whole tiny model against the reference: training, text, scores and drawing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.models.diffusion import decoder as diffusion
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.samplers import DDPM
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved.keys import export_mm_interleaved
from metamorph_jax.sampling import beam, likelihood
from metamorph_jax.sampling.beam import Beams
from metamorph_jax.sampling.likelihood import Block
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop, RowImages
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.train.state import trained_filter
from tests.recipes.mm_interleaved import golden, reference

pytestmark = pytest.mark.golden
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_generate_tests(metafunc):
    for fixture, prefix in (("train", "end_to_end_train"), ("drawn", "end_to_end_generate")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, golden.names(metafunc.config, prefix), indirect=True,
                                 scope="module")  # fmt: skip


def close(found, wanted, tolerance=1e-4, name=""):
    """Within a share of the largest number."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name
    )


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


@pytest.fixture(scope="module")
def train(request, golden_root):
    return golden.Case(golden_root, request.param)


@functools.cache
def _reference(case):
    cfg = reference.config(case)
    return cfg, reference.model(case, cfg)


SETTINGS = ("mixed", "pairs")


@functools.cache
def computed(case):
    """(loss parts, intermediate values, gradients of the total) of each dataset setting."""
    cfg, model = _reference(case)
    batches = [reference.batch(case, cfg, name) for name in SETTINGS]
    batch, valid = batches[0], batches[0].drawings.valid.reshape(-1)
    graph, trained, rest = nnx.split(model, trained_filter(recipe.STAGES["pretrain"](cfg)), ...)
    noise = dict(noise=case["in/noise"], latents=case["mid/scaled_latents"])
    noise = {k: np.moveaxis(v, 1, -1) for k, v in noise.items()}
    kept = case["in/uncond_uniform"][:, 0, 0] >= cfg.drop_context
    t, (scaled, where) = case["in/timesteps"], (noise, np.flatnonzero(valid))

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(trained, rest, targets):
        def total(trained):
            model = nnx.merge(graph, trained, rest)
            reading = model.hidden(batch)
            seen = reading._asdict()
            condition, counted = model.conditions(batch, reading)
            at = batch.drawings.start
            begin = jnp.take_along_axis(reading.starts, at, axis=1)
            seen["features"] = model.context.features(reading.states, at, begin)
            condition = jax.tree.map(lambda x: x[where], condition)
            chosen = diffusion.choose(kept, condition, model.context.null_condition())
            seen |= {"condition": condition, "chosen": chosen}
            x0, noise = scaled["latents"], scaled["noise"]
            seen["noisy"] = sch.add_noise(cfg.decoder.schedule, x0, noise, t)
            seen["predicted"] = model.decoder.denoise(seen["noisy"], t, chosen)
            _, each = model.decoder.losses_at(x0, noise, t, chosen)
            seen["image"] = (each * counted.reshape(-1)[where]).sum() / len(where)
            tables, bias = model.llm.head_tables(), model.llm.head_bias()
            text, _, _ = losses.text_loss(reading.states, *tables, targets, 64, bias)
            seen["text"] = text / (targets >= 0).sum()
            seen["logits"] = model.llm.logits(reading.states)
            weights = model.loss_weights
            return weights["text"] * seen["text"] + weights["image"] * seen["image"], seen

        return jax.value_and_grad(total, has_aux=True)(trained)

    found = {}
    for name, one in zip(SETTINGS, batches, strict=True):
        (loss, seen), grads = run(trained, rest, one.text_targets)
        found[name] = {"loss": loss, **seen, "grads": nnx.merge(graph, grads, rest)}
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses(train, setting):
    found = computed(train)[setting]
    close(found["text"], train[f"out/{setting}/loss_txt"])
    close(found["image"], train[f"out/{setting}/loss_img"])
    close(found["loss"], train[f"out/{setting}/loss"])


def by_image(found, batch):
    """What belongs to each image [B, I, ...], as the reference's flat list."""
    return np.asarray(found)[batch.images.valid]


def test_inside(train):
    """Every array between images and losses."""
    cfg, model = _reference(train)
    found, batch = computed(train)["mixed"], reference.batch(train, cfg, "mixed")
    real, at = batch.segments > 0, batch.drawings.start
    for k, x in enumerate(found["maps"][1:], 1):
        close(channels_first(by_image(x, batch)), train[f"mid/ms_{k}"], name=f"ms_{k}")
    close(by_image(found["visual"], batch), train["mid/vis_embed"])
    close(np.asarray(found["embeds"])[real], train["mid/mm_embeds"][real])
    seen = train["mid/cross_attention_mask"] > 0
    np.testing.assert_array_equal(np.asarray(found["visible"])[real], seen[real])
    begin = np.take_along_axis(np.asarray(found["starts"]), at, 1)
    np.testing.assert_array_equal(by_image(begin, batch), train["in/nearest_bos_idxs"])
    close(np.asarray(found["states"])[real], train["mid/llm_last_hidden"][real])
    close(np.asarray(found["logits"])[real], train["out/text_logits"][real])
    context, mask = (by_image(x, batch) for x in found["features"])
    wanted = train["mid/context_attention_mask"] > 0
    n = wanted.shape[1]
    np.testing.assert_array_equal(mask[:, :n], wanted)
    assert not mask[:, n:].any()
    close(context[:, :n][wanted], train["mid/context_features"][wanted])
    close(found["condition"].context, train["mid/resampled_condition"])
    np.testing.assert_array_equal(found["condition"].maps_mask, train["mid/image_mmfs_mask"] > 0)
    close(found["chosen"].context, train["mid/unet_condition"])
    close(channels_first(found["noisy"]), train["mid/noisy_latents"])
    close(channels_first(found["predicted"]), train["mid/unet_pred"])
    drawn = train["in/image_tensors_dec_16x16"].mean() * 2 - 1
    close(drawn, train["in/image_tensors_dec_normalised_mean"])
    np.testing.assert_array_equal(train["mid/timesteps"], train["in/timesteps"])


def test_gradients(train):
    """Of every trained tensor its norm, of some all of it."""
    grads = computed(train)["mixed"]["grads"]
    exported = export_mm_interleaved(grads, frozen_bias=0.0)
    norms, names = train.about["grad_norms"], [k for k in train.arrays if k.startswith("grad/")]
    found = {k: np.linalg.norm(np.asarray(exported[k], np.float64)) for k in norms}
    largest = max(norms.values())
    for key, wanted in norms.items():
        assert abs(found[key] - wanted) < 1e-3 * wanted + 1e-6 * largest, (key, found[key], wanted)
    for name in names:
        close(exported[name.removeprefix("grad/")], train[name], 1e-3, name)


def test_every_array_is_read(train):
    train.check_all_read()


# ---- decoding, of the model and with the images of the case that has its weights


@pytest.fixture(scope="module")
def drawn(request, golden_root):
    case = golden.Case(golden_root, request.param)
    same = [
        name
        for name, entry in case.entries.items()
        if entry.get("weight_seed") == case.about["weight_seed"] and "config" in entry
    ]
    assert len(same) == 1
    case.base = golden.Case(golden_root, same[0])
    return case


@functools.cache
def decoder(case):
    """(loop, function from ids and numbers of images to a prompt and its images)."""
    cfg, model = _reference(case.base)
    images = reference.pixels(case.base, cfg)
    graph, weights = nnx.split(model)
    read = jax.jit(lambda w, x: nnx.merge(graph, w).vision(x), compiler_options=FAST)
    visual, maps = read(weights, images)
    special = case.base.config["special_tokens"]
    soi = np.asarray(model.soi[...])
    # With variables of its own, as their values are taken away.
    copy = nnx.merge(graph, jax.tree.map(lambda x: x, weights))
    loop = Loop(*take_over(copy.llm))
    maps = tuple(np.asarray(x) for x in maps[len(maps) - cfg.insert.levels :])

    def prompt(ids, numbers):
        here = ids == special["image_token_id"]
        embeds = loop.embed(np.where(here, 0, ids))
        embeds[ids == special["soi_token_id"]] += soi
        embeds[here] = np.asarray(visual)[numbers].reshape(-1, embeds.shape[1])
        starts = np.flatnonzero(ids == special["soi_token_id"]) + 1
        return embeds, RowImages(tuple(x[numbers] for x in maps), starts)

    return loop, prompt


def prompts(case, prompt):
    """The embeddings and images of the case's prompts, which take its first images in order."""
    rows, first = [], 0
    lists = (case["in/prompt_ids"], case["in/prompt_mask"], case["in/prompt_num_images"])
    for ids, mask, count in zip(*lists, strict=True):
        rows.append(prompt(ids[mask > 0], np.arange(first, first + count)))
        first += count
    return zip(*rows, strict=True)


def test_text(drawn):
    """Greedy and by beams: ids, with BOS before and pads behind them."""
    loop, prompt = decoder(drawn)
    embeds, images = prompts(drawn, prompt)
    special = drawn.base.config["special_tokens"]
    eos = (special["eos_token_id"], special["soi_token_id"])
    names = [k for k in drawn.arrays if k.startswith("out/text_ids_")]
    assert names
    for name in names:
        beams, least = map(int, re.fullmatch(r".*beams(\d+)_min(\d+)", name).groups())
        wanted = drawn[name]
        # The reference counts the BOS of its ids.
        policy, budget = TextPolicy(eos=eos, min_new_tokens=max(least - 1, 0)), wanted.shape[1] - 1
        if beams == 1:
            found = loop(embeds, budget, policy, images=images)
        else:
            found = beam.search(
                loop, embeds, budget, policy, Beams(beams, start_counts=True), images=images
            )
        for one, row in zip(found, wanted, strict=True):
            ids = [special["bos_token_id"], *map(int, one.ids)]
            if beams > 1 and one.ended:  # the reference's beams write the first id that ends a row
                ids[-1] = eos[0]
            assert row.tolist() == ids + [special["pad_token_id"]] * (len(row) - len(ids)), name


def test_scores_of_options(drawn):
    loop, prompt = decoder(drawn)
    embeds, images = prompt(drawn["in/score_context"], np.arange(1))
    options, masks = drawn["in/score_options"], drawn["in/score_options_mask"] > 0
    blocks = [Block(o[m].astype(np.int32), np.ones(m.sum(), bool))
              for o, m in zip(options, masks, strict=True)]  # fmt: skip
    ((*found,),) = likelihood.of_batch(loop, [embeds], [blocks], [images])
    close([one.total for one in found], drawn["out/scores"].reshape(-1))


class Recorded(DDPM):
    """Ancestral sampling with given noise: float32[steps, B, h, w, c]."""

    def __init__(self, noise):
        super().__init__()
        object.__setattr__(self, "noise", noise)

    def integrate(self, *args, **options):
        return super().integrate(*args, fresh=lambda k: self.noise[k], **options)


def test_drawing(drawn):
    """The last image of each row, whose context begins at the row's first column."""
    cfg, model = _reference(drawn.base)
    batch = reference.batch(drawn.base, cfg, SETTINGS[0])
    numbers = drawn["in/target_image_idxs"]
    columns = batch.drawings.start[batch.images.valid][numbers][:, None]
    which = np.argwhere(batch.images.valid)[numbers]
    assert (which[:, 0] == np.arange(len(columns))).all()  # one image of each row
    noise = {k: np.moveaxis(drawn[k], 1, -1) for k in drawn.arrays if k.endswith("latents")}
    fresh = jnp.stack([np.moveaxis(drawn[f"in/step_noise_{k}"], 1, -1)
                       for k in range(drawn.about["steps"])])  # fmt: skip
    sampler = Recorded(fresh)
    table = sampler.table(cfg.decoder.schedule, drawn.about["steps"])
    np.testing.assert_array_equal(table.t, drawn["mid/timesteps"])
    graph, weights = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=FAST)
    def draw(weights):
        model = nnx.merge(graph, weights)
        reading = model.hidden(batch)
        condition = model.context(reading.states, columns, jnp.zeros_like(columns))
        before = which[:, 1:] - 1
        maps = tuple(x[which[:, :1], before] for x in reading.maps)
        condition = dataclasses.replace(condition, maps=maps, maps_mask=before >= 0)
        return model.decoder.sample(
            condition, model.context.null_condition(), sampler, steps=drawn.about["steps"],
            guidance=drawn.about["guidance"], noise=noise["in/initial_latents"],
        )  # fmt: skip

    close(channels_first(draw(weights)), drawn["out/image"])


def test_every_array_of_decoding_is_read(drawn):
    drawn.check_all_read()
