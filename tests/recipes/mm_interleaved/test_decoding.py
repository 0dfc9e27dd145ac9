"""What rows write and draw, by the loop that all recipes share."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.errors import UserError
from metamorph_jax.models import build
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved.decoding import DrawingPolicy
from metamorph_jax.recipes.mm_interleaved.published import computing_in
from metamorph_jax.sampling import trained
from metamorph_jax.sampling.generator import Drawn
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.policy import Model, Step, TextPolicy
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import ImagePart
from metamorph_jax.sampling.segments import BROKEN, NOTHING
from metamorph_jax.sharding import make_mesh
from metamorph_jax.types import TEXT, Batch, Images
from tests.recipes.mm_interleaved.tiny import TINY, P, fast, make

EOS, SOI = 2, 9


class Scripted:
    """A language model that finds all ids equally likely, where its states are numbers."""

    def logits(self, weights, hidden):
        return jnp.zeros((10, 1)) + hidden.sum(0)

    def embed(self, weights, ids):
        return jnp.zeros((len(ids), 4))


def written(policy: DrawingPolicy, wants) -> list:
    """What a row emits that wants to write these ids: ids, "wait" and "stop"."""
    model = Model(Scripted(), None, {"soi": jnp.ones(4)})
    memory, out, wants = policy.init(1, jnp.full((1, 1), -1), 10), [], list(wants)
    while len(out) < 40:
        waits = bool(memory.starts[0])
        want = 0 if waits else wants.pop(0)
        step = Step(jnp.ones(1, bool), jnp.zeros(1, jnp.int32), None, jnp.array([want]))
        hidden = jnp.full((4, 1), jnp.nan if want == BROKEN else 0.0)
        memory, one = policy.emit(memory, hidden, step, model)
        assert bool(one.pause[0]) == waits == (int(one.ids[0]) == NOTHING)
        out.append("wait" if waits else int(one.ids[0]))
        assert bool((one.embed[0] == 1).all()) == (not waits and out[-1] == SOI)
        if one.stop[0]:
            return [*out, "stop"]
        if not (wants or memory.starts[0]):
            return out
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("mode", "rounds", "wants", "expected"),
    [
        ("", 0, [5, SOI, 6, EOS], [5, SOI, "wait", 6, EOS, "stop"]),
        ("", 0, [SOI, SOI, 6], [SOI, "wait", SOI, "wait", 6]),
        ("image", 0, [5], [SOI, "wait", "stop"]),
        ("both", 0, [5, 6, 7, 8, EOS], [5, 6, SOI, "wait", 8, EOS, "stop"]),
        ("both", 2, [5, EOS], [5, SOI, "wait", "stop"]),
        ("both", 3, [EOS, 5, EOS], [SOI, "wait", 5, EOS, "stop"]),
        ("both", 3, [EOS, 5, 6, 7], [SOI, "wait", 5, 6, 7, "stop"]),
    ],
)
def test_what_a_request_asks_for(mode, rounds, wants, expected):
    """Texts of at most two tokens; the last round is a text that ends as it likes."""
    policy = DrawingPolicy(TextPolicy(eos=(EOS,)), SOI, mode, rounds, turn_tokens=2)
    assert written(policy, wants) == expected


@pytest.mark.parametrize("mode", ["", "image", "both"])
def test_broken_logits_end_a_row(mode):
    policy = DrawingPolicy(TextPolicy(eos=(EOS,)), SOI, mode, 4)
    assert written(policy, [BROKEN]) == [BROKEN, "stop"]


# ---- with a model

DATA = DataConfig(row=RowConfig(template="document", length=64, images=4))


@pytest.fixture(scope="module")
def generator():
    return recipe.generator(make(), TINY, DATA)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "a.png"
    Image.radial_gradient("L").resize((40, 40)).convert("RGB").save(file)
    return str(file)


def test_states_are_those_of_training(generator, image):
    """Of a row with an image in its prompt and one in its reply, which are read one by one."""
    soi, options = generator.soi, Options(P + 8, guidance=(2.0,))
    prompt = generator.prompt(Request("a", "<image>A kite", (image,)), P + 8)
    policy = generator.policy_of(options)
    forced = np.array([[17, soi, 23, 29, 31]], np.int32)
    state = generator.loop.prefill(
        [prompt.embeds], forced.shape[1] + P, policy, forced_ids=forced, images=[prompt.images],
        places=2,
    )  # fmt: skip
    own, told = Drawn(3, prompt.images.each()), []
    state = generator.finish(state, policy, [own], options, lambda new: told.extend(new[0]))
    (result,) = generator.loop.results(state, policy)
    assert result.record.tolist() == forced[0].tolist() == told
    (drawn,) = own.images
    assert drawn[2.0].shape == (8, 8, 3) and drawn[2.0].std() > 0 and len(own.maps) == 2

    # The same row as a batch of training: what was emitted last was not read.
    before = prompt.ids
    tokens = np.concatenate([before, [17, soi], [-1] * P, [23, 29]])
    slots = np.where(tokens < 0, np.cumsum(tokens < 0) - 1, TEXT)
    views = generator.prompts.views.pixels
    shown = [views(Image.open(image).convert("RGB"))[0], views(Image.fromarray(drawn[2.0]))[0]]
    starts = [np.flatnonzero(before < 0)[0], len(before) + 2]
    row = lambda x: np.asarray(x, np.int32)[None]  # noqa: E731
    batch = Batch(
        tokens=row(np.maximum(tokens, 0)), positions=row(np.arange(len(tokens))),
        segments=row(np.ones(len(tokens))), text_targets=row(tokens * 0 - 1),
        image_slots=row(slots), visual_targets=row(tokens * 0 - 1), sources=row(tokens * 0),
        images=Images(np.ones((1, 2), bool), row(starts), np.stack(shown)[None]),
    )  # fmt: skip
    graph, weights = nnx.split(make())
    run = fast(lambda weights, batch: nnx.merge(graph, weights).hidden(batch).states)
    wanted = np.asarray(run(weights, batch))[0]
    assert int(state.length[0]) == len(tokens)
    found = np.asarray(state.states)[0, : len(tokens)]
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    reply = generator.reply(result, options, 3, own=own)
    assert [type(part) is ImagePart for part in reply.segments] == [False, True, False]
    assert reply.segments[1].complete and reply.segments[1].drawn == drawn


def test_new_weights_are_those_of_all_parts(generator, image):
    """An evaluation during training keeps the generator, and gives it the weights of each step."""
    asked = [Request("a", "<image>A kite", (image,), mode="image")]
    fresh = recipe.generator(make(seed=1), TINY, DATA)
    embeds = [one.prompt(asked[0], P + 2).embeds for one in (generator, fresh)]
    assert not np.allclose(*embeds)
    kept = recipe.generator(make(), TINY, DATA)
    kept.release()
    assert kept.painter.weights is None
    kept.renew(fresh)
    np.testing.assert_array_equal(kept.prompt(asked[0], P + 2).embeds, embeds[1])
    assert kept.painter.weights is fresh.painter.weights


def test_an_image_alone(generator, image):
    """Each request gets its own, whatever is drawn beside it."""
    asked = [Request("a", "A kite", mode="image"), Request("b", "A red", (), mode="image")]
    both = generator.generate(asked, Options(P + 2, batch_size=2))
    for reply in both:
        (part,) = reply.segments
        assert reply.ended and part.complete and part.features.shape == (0, 0)
    pixels = [next(iter(reply.segments[0].drawn.values())) for reply in both]
    assert (pixels[0] != pixels[1]).any() and pixels[0].shape == (8, 8, 3)
    (again,) = generator.generate(asked[1:], Options(P + 2, batch_size=2))
    np.testing.assert_allclose(
        next(iter(again.segments[0].drawn.values())).astype(int), pixels[1].astype(int), atol=1
    )
    # In another number of steps it is another image; each number is compiled once.
    compiled = generator.painter._draw._cache_size
    before = compiled()
    for steps, more in ((1, 1), (2, 1), (1, 1)):
        generator.set_steps(steps)
        (reply,) = generator.generate(asked[1:], Options(P + 2, batch_size=2))
        drawn = next(iter(reply.segments[0].drawn.values())).astype(int)
        assert (np.abs(drawn - pixels[1]).max() <= 1) == (steps == 2)
        assert generator.image_decoder.sampling.steps == steps and compiled() == before + more
    with pytest.raises(UserError, match=r"--steps .*: 1001 steps"):
        generator.set_steps(1001)
    generator.set_steps(2)
    # No room for the tokens of an image: it is cut off, and not drawn.
    (cut,) = generator.generate(asked[:1], Options(P))
    assert [part.complete for part in cut.segments] == [False] and not cut.images
    with pytest.raises(ValueError, match="not visual tokens that it could read again"):
        generator.check(Options(P, best_of=2))


def test_parts_are_kept_as_they_compute():
    """Beside the language model, too: in bfloat16 with the same numbers. The adapter's sampling
    offsets, the autoencoder, norms and biases stay float32."""
    cfg = computing_in(TINY, "bfloat16")
    denoiser = cfg.decoder.denoiser
    unet = dataclasses.replace(denoiser.unet, in_channels=4, out_channels=4)
    denoiser = dataclasses.replace(denoiser, unet=unet)
    cfg = dataclasses.replace(cfg, decoder=DiffusionConfig(denoiser, VAEConfig.tiny()))
    mesh = make_mesh(devices=jax.devices()[:1])
    beside, kept = {}, {}
    for weights in ("float32", "auto", "nf4"):
        dtype, _ = trained.reading(recipe, cfg, weights, "mm_interleaved")
        model = build.outline(lambda rngs: recipe.create(cfg, rngs), mesh, dtype)
        del model.llm
        leaves = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))}
        kept[weights] = {n for n, v in leaves.items() if v.dtype == jnp.bfloat16}
        beside[weights] = sum(v.size * v.dtype.itemsize for v in leaves.values())
    assert kept["auto"] == kept["nf4"] > kept["float32"]
    assert all(n.endswith(".kernel") for n in kept["auto"])
    exact = re.compile(r"vision\.adapter\..*\.sampling_offsets\..*|decoder\.vae\..*")
    assert not any(map(exact.fullmatch, kept["auto"]))
    names = ("decoder.denoiser.unet.conv_in", "vision.resampler", "context.proj", "vision.key_proj")
    assert all(any(n.startswith(part) for n in kept["auto"]) for part in names)
    assert beside["auto"] < 0.85 * beside["float32"]  # the autoencoder is a large part here
    # A kernel is rounded where it is used, or was before.
    model = make(cfg)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 64)), jnp.float32)
    at = jnp.array([[8]], jnp.int32)
    graph, values = nnx.split(model.context)
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if "kernel" in str(path) else x, values
    )
    run = fast(lambda v: nnx.merge(graph, v)(states, at, at * 0).context)
    np.testing.assert_array_equal(run(values), run(rounded))
