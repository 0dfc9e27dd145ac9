"""The whole tiny model against the reference: training with gradients, and the splice of images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.convert.mapper import export_mapper
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.vae import Posterior
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.recipes.minigpt5.decoding import VokenPolicy
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.train.state import trained_filter
from tests.recipes.minigpt5 import golden, reference

pytestmark = pytest.mark.golden
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_generate_tests(metafunc):
    if "train" in metafunc.fixturenames:
        metafunc.parametrize("train", golden.names(metafunc.config, "train_"), indirect=True,
                             scope="module")  # fmt: skip


def close(found, wanted, rtol=1e-4, name=""):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-5, err_msg=name)


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


@pytest.fixture(scope="module")
def train(request, golden_root):
    return golden.Case(golden_root, request.param)


@functools.cache
def of_system(root, name):
    """(config, model) with the weights of this case."""
    system = golden.Case(root, name)
    cfg = reference.config(system)
    return cfg, reference.model(system, cfg)


# ---- training


@functools.cache
def step(root, name):
    """The compiled training step of a system: (batch, draws) -> (everything in between, gradients
    by dotted name)."""
    cfg, model = of_system(root, name)
    stage = recipe.STAGES["uas" if cfg.lora is None else "mls"](cfg)
    pattern = rf"{stage}|llm\.embed_tokens\.embedding"  # whose gradient is given, too
    graph, trained, rest = nnx.split(model, trained_filter(pattern), ...)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(trained, batch, draws):
        def total(trained):
            model = nnx.merge(graph, trained, rest)
            found = {"states": model.hidden(batch)}
            condition = model.conditions(found["states"], batch.drawings.start, draws["kept"])
            text, _ = losses.text_loss_of(found["states"], *model.llm.head_tables(), batch)
            schedule, t = cfg.decoder.schedule, draws["t"]
            noisy = sch.add_noise(schedule, draws["x0"], draws["noise"], t)
            predicted = model.decoder.denoise(noisy, t, condition)
            plain = jnp.square(predicted - draws["noise"]).mean((1, 2, 3))
            weighted = plain * sch.min_snr_weight(schedule, t, cfg.decoder.min_snr)
            captions = batch.drawings.captions[:, 0]
            error = jnp.square(
                condition.context - model.caption_features(captions, draws["kept"])
            ).mean((1, 2))  # fmt: skip
            sums = {
                "text": text,
                "image": jnp.where(draws["snr"], weighted, plain),
                "caption": jnp.where(captions[:, 0] >= 0, error, 0.0),
            }
            valid = batch.drawings.valid[:, 0]
            counts = model.loss_counts(batch)
            means = {k: jnp.sum(jnp.where(valid, x, 0.0) if k != "text" else x)
                     / jnp.maximum(counts[k], 1) for k, x in sums.items()}  # fmt: skip
            found |= means | {"condition": condition.context, "noisy": noisy}
            found["predicted"] = predicted
            found["logits"] = model.llm.logits(found["states"])
            found["loss"] = sum(model.loss_weights[k] * x for k, x in means.items())
            return found["loss"], found

        grads, found = jax.grad(total, has_aux=True)(trained)
        return found, nnx.merge(graph, grads, rest)

    encode = jax.jit(lambda x: model.decoder.vae.moments(x), compiler_options=FAST)
    return functools.partial(run, trained), encode


def placed(valid, flat):
    """[B, ...] of what the case has for those rows with vokens."""
    out = np.zeros((len(valid), *flat.shape[1:]), flat.dtype)
    out[valid] = flat
    return out


def draws_of(case, cfg, batch, encode) -> dict:
    """The random numbers of a case, at the rows that they belong to, and the latents."""
    valid = batch.drawings.valid[:, 0]
    shape, B = cfg.decoder.sample_shape, len(valid)
    found = {"kept": np.ones(B, bool), "t": np.zeros(B, np.int32), "snr": case.about["snr_loss"]}
    found |= {name: np.zeros((B, *shape), np.float32) for name in ("x0", "noise")}
    if not valid.any():
        return found
    if batch.drawings.pixels is None:
        moments = np.moveaxis(case["in.output_image_feature"], 1, -1)[valid]
    else:
        moments = encode(batch.drawings.pixels[:, 0] / 127.5 - 1)[valid]
    mean, logvar = jnp.split(moments, 2, axis=-1)
    latents = Posterior(mean, logvar).sample(np.moveaxis(case["in.vae_eps"], 1, -1))
    uniform = np.array(case.about["cfg_uniform_draws_in_order"])
    found["kept"][valid] = uniform >= cfg.drop_condition
    found["x0"] = placed(valid, np.asarray(latents) * cfg.decoder.vae.scaling_factor)
    found["noise"] = placed(valid, np.moveaxis(case["in.noise"], 1, -1))
    found["t"] = placed(valid, case["in.timesteps"].astype(np.int32))
    return found


@functools.cache
def computed(case, root):
    system = case.about["weights"].removesuffix(".safetensors")
    cfg, _ = of_system(root, system)
    batch = reference.batch(case, cfg, root)
    run, encode = step(root, system)
    draws = draws_of(case, cfg, batch, encode)
    # Without pixels, whether a case has them or not, so that it is compiled once.
    drawings = dataclasses.replace(batch.drawings, pixels=None)
    return batch, *run(dataclasses.replace(batch, drawings=drawings), draws)


def test_losses(train, golden_root):
    _, found, _ = computed(train, golden_root)
    for name in ("text", "image", "caption"):
        if f"out.{name}_loss" in train.arrays:
            close(found[name], train[f"out.{name}_loss"], name=name)
        else:
            assert name == "caption" and found[name] == 0
    close(found["loss"], train["out.loss"])


def test_inside(train, golden_root):
    """Every array between batch and losses."""
    batch, found, _ = computed(train, golden_root)
    states, logits = train["out.llm_last_hidden"], train["out.llm_logits"]
    real = batch.segments[:, : states.shape[1]] > 0
    close(np.asarray(found["states"])[:, : real.shape[1]][real], states[real])
    close(np.asarray(found["logits"])[:, : real.shape[1]][real], logits[real])
    valid = batch.drawings.valid[:, 0]
    if not valid.any():
        return
    vokens = train["out.voken_hidden"]
    at = batch.drawings.start + np.arange(vokens.shape[1])
    kept = np.array(train.about["cfg_uniform_draws_in_order"]) >= recipe.Config().drop_condition
    mine = np.take_along_axis(np.asarray(found["states"]), at[..., None], 1)[valid]
    close(np.where(kept[:, None, None], mine, 0), vokens)
    close(np.asarray(found["condition"])[valid], train["out.mapped"])
    close(channels_first(found["noisy"])[valid], train["out.noisy_latents"])
    close(channels_first(found["predicted"])[valid], train["out.unet_pred"])


def test_gradients(train, golden_root):
    """Of the new rows, of the mapper and of adapters; old rows get none in the reference, and are
    not trained here."""
    _, _, grads = computed(train, golden_root)
    V = grads.llm.cfg.vocab_size
    embed, head = grads.llm.embed_tokens, grads.llm.lm_head
    near = functools.partial(close, rtol=1e-3)
    near(np.concatenate([embed.embedding[...], embed.added[...]]),
         train["out.unmasked_grad.embed_tokens"])  # fmt: skip
    for name, holder in (("embed_tokens", embed), ("lm_head", head)):
        wanted = train[f"out.grad.{name}"]
        assert not wanted[:V].any()
        near(holder.added[...], wanted[V:], name=name)
    mapper = export_mapper(grads.mapper)
    for key in train.arrays:
        name = key.removeprefix("out.grad.")
        if ".lora_" in key:
            near(reference.of_adapter(grads, name), train[key], name=key)
        elif name in mapper:
            near(mapper[name], train[key], name=key)


def test_every_array_is_read(train):
    train.check_all_read()


# ---- images in prompts


@pytest.mark.parametrize("name", ["image_splice"])
def test_splice(name, golden_root):
    case = golden.Case(golden_root, name)
    cfg, model = of_system(golden_root, case.about["weights"].removesuffix(".safetensors"))
    tokens, labels, slots, real = reference.spliced(case, cfg)
    images = np.moveaxis(case["in.images"], 1, -1)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(images):
        visual = model.project(model.visual_features(images))
        text = model.llm.embed_tokens(tokens)
        return visual, place_visual(text, visual.reshape(1, -1, visual.shape[-1]), slots)

    visual, embeds = run(images)
    close(visual, case["out.image_embeds"])
    close(embeds, case["out.inputs_embeds"])
    np.testing.assert_array_equal(labels, case["out.labels"])
    np.testing.assert_array_equal(real, case["out.attention_mask"])
    case.check_all_read()


# ---- decoding


@pytest.mark.parametrize("name", ["generate_forced"])
def test_generation(name, golden_root):
    """The states of every step, and what the image is drawn from, with its null condition. The
    reference reads all vokens in one step, which is the second one."""
    case = golden.Case(golden_root, name)
    cfg, model = of_system(golden_root, case.about["weights"].removesuffix(".safetensors"))
    graph, rest = nnx.split(model)
    llm, kept = take_over(nnx.merge(graph, jax.tree.map(lambda x: x, rest)).llm)
    loop = Loop(llm, kept, keeps_states=True)
    first, *_, placeholder = reference.voken_and_placeholder(cfg)
    policy = VokenPolicy(TextPolicy(), first, cfg.vokens, llm.cfg.width)

    fast = functools.partial(jax.jit, compiler_options=FAST)
    visual = fast(lambda x: model.project(model.visual_features(x)))(
        np.moveaxis(case["in.image"], 1, -1)
    )
    bos, *reply = case["out.sequence"].tolist()
    (ids,) = case["in.prompt_ids"]
    (at,) = np.flatnonzero(ids == placeholder)
    before, after = loop.embed(np.array([bos, *ids[:at]])), loop.embed(ids[at + 1 :])
    prompt = np.concatenate([before, np.asarray(visual[0]), after])

    assert reply[0] == first
    forced = [first, *[-1] * (cfg.vokens - 1), *reply[1:]]
    state = loop.prefill([prompt], len(forced), policy, forced_ids=np.array([forced]))
    state = loop.advance(state, policy)
    (result,) = loop.results(state, policy)
    steps = len([key for key in case.arrays if key.startswith("out.step")])
    wanted = np.concatenate([case[f"out.step{k}_last_hidden"][0] for k in range(steps)])
    assert int(state.length[0]) == len(wanted)
    close(np.asarray(state.states)[0, : len(wanted)], wanted)
    image, text = result.segments
    assert image.complete and text.ids.tolist() == reply[1:]
    draws = fast(lambda x: (model.mapper(x).context, model.mapper.null_condition().context))
    condition, null = draws(image.features[None])
    close(condition, case["out.prompt_embeds"])
    close(null, case["out.negative_prompt_embeds"])
    assert cfg.sampling.guidance == case.about["guidance_scale"]
    case.check_all_read()
