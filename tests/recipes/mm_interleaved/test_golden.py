"""The whole tiny model against the reference: training, text, scores and drawing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import losses
from metamorph_jax.models.diffusion import decoder as diffusion
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved import documents
from metamorph_jax.recipes.mm_interleaved.keys import export_mm_interleaved
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
            seen = {}
            states, seen["visible"], seen["starts"], maps = model.hidden(batch)
            states, condition, counted = model.conditions(batch)
            condition = jax.tree.map(lambda x: x[where], condition)
            chosen = diffusion.choose(kept, condition, model.context.null_condition())
            seen |= {"states": states, "condition": condition, "chosen": chosen, "maps": maps}
            _, each = model.decoder.losses_at(scaled["latents"], scaled["noise"], t, chosen)
            x = model.decoder.denoise  # the prediction itself
            seen["image"] = (each * counted.reshape(-1)[where]).sum() / len(where)
            tables, bias = model.llm.head_tables(), model.llm.head_bias()
            text, _, _ = losses.text_loss(states, *tables, targets, 64, bias)
            seen["text"] = text / (targets >= 0).sum()
            seen["logits"] = model.llm.logits(states)
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
