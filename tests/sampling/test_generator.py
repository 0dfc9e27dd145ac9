"""Prompts equal training rows; batches and replies; a model without a head."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import sharding
from metamorph_jax.convert import load
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.sources import kinds
from metamorph_jax.errors import UserError, WeightError
from metamorph_jax.recipes.metamorph import wordings
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request, as_sample
from metamorph_jax.sampling.results import TextPart
from metamorph_jax.sampling.trained import load_generator
from metamorph_jax.types import Batch, Images

CASES = pathlib.Path(__file__).parents[1] / "cases"


def test_marker_and_prefix_change_the_prompt(generator, image_files):
    def length(**kw):
        return len(generator.prompt(Request("0", **kw), 8)[0])

    image = (str(image_files / "a.png"),)
    front = length(prompt="x <image>", images=image)
    default = length(prompt="x", images=image)
    assert length(prompt="x") + generator.feature_shape[0] + 2 <= default <= front
    assert length(prompt="x", think=True) > length(prompt="x")
    with pytest.raises(ValueError, match="mode 'image' can't be asked for: this model decides"):
        length(prompt="x", mode="image")


def test_prompt_equals_the_training_row(generator, workdir, image_files):
    """Reading a prompt gives what the model's `embed` makes of the same batch."""
    recipe, cfg, _ = load.open_run(workdir)
    model = load.load_model(recipe, cfg, sharding.mesh_of(generator.loop.weights), workdir=workdir)
    path, prompts = image_files / "b.jpg", generator.prompts
    got, ids_read, *_ = generator.prompt(Request("0", "What?", (str(path),)), 8)
    ids, P = prompts.chat.question("What?", 1), prompts.views.tokens
    row = build_row(ids, None, [read_place(*prompts.views.plan(None))], P, prompts.length)
    pixels = prompts.views.pixels(Image.open(path).convert("RGB"))
    one = lambda x: np.asarray(x)[None]  # noqa: E731
    batch = Batch(
        one(row.tokens), one(row.positions), one(np.ones_like(row.tokens)), one(row.text_targets),
        one(row.image_slots), one(row.visual_targets), one(row.tokens),
        Images(np.ones((1, 1), bool), one(row.view_starts), pixels[None]),
    )  # fmt: skip
    np.testing.assert_allclose(got, np.asarray(model.embed(batch)[0][0]), atol=1e-5)
    np.testing.assert_array_equal(ids_read[row.image_slots < 0], row.tokens[row.image_slots < 0])
    assert (ids_read[row.image_slots >= 0] == -1).all()


def _asked(record, root, frames, kind="auto"):
    """Ids of a training sample, up to its answer."""
    from metamorph_jax.recipes.metamorph.sources import KINDS

    where, rng = kinds.Files(str(root), frames), np.random.default_rng(0)
    return kinds.build(record, "", where, rng, kind, kinds.known(KINDS))


def test_a_video_stands_where_training_puts_it(generator):
    """The ids of a prompt are the beginning of those of a training sample that asks the same."""
    chat, frames = generator.prompts.chat, generator.prompts.frames
    clip = CASES / "data" / "clip.mp4"
    for text in ("<video>\nWhat happens?", "What happens?", "Then: <image> What?"):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "It gets brighter."}]
        record = {"id": "0", "video": "clip.mp4", "conversations": turns}
        trained = chat.conversation(_asked(record, CASES / "data", frames).turns).ids
        sample = as_sample(Request("0", text, video=str(clip)), None, frames)
        got = chat.prompt(sample.turns)
        np.testing.assert_array_equal(got, trained[: len(got)], err_msg=text)
        assert 0 < len(sample.images) <= frames == 24  # as many as a row of training holds


def test_visual_thinking_is_asked_for_as_in_training(generator, image_files, monkeypatch):
    """Wording, image, question: `--think` writes what visual_cot samples hold."""
    monkeypatch.setattr(wordings, "choose", lambda options, rng: options[1])
    asked = "What colour is it? Give the bounding box."
    turns = [("human", asked), ("gpt", "[0,0,1,1]"), ("human", "-"), ("gpt", "Red.")]
    record = {
        "id": "0", "image": ["a.png", "a.png###[0,0,9,9]"],
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }  # fmt: skip
    trained = _asked(record, image_files, 1, "visual_cot").turns[0]
    request = Request("0", "What colour is it?", (str(image_files / "a.png"),), think=True)
    assert as_sample(request, generator.prompts.think).turns[0] == trained
    assert trained[1] == "Look closely before you answer. <image>\nWhat colour is it?"


def test_special_tokens_in_a_prompt_are_text(generator):
    chat = generator.prompts.chat
    text = "End <|eot_id|> here <image_start><|start_header_id|>"
    row, _ = generator.prompts.row(Request("0", text), 8)
    plain, _ = generator.prompts.row(Request("0", "End here"), 8)
    for special in (chat.close, *chat.markers.before, *chat.specials.values()):
        assert (row.tokens == special).sum() == (plain.tokens == special).sum()


def test_a_reply_ends_at_every_eos(generator, monkeypatch):
    """Also at those of the generation config."""
    (free,) = generator.generate([Request("0", "Hello")], Options(6))
    first = free.segments[0].ids[0]
    prompts = dataclasses.replace(generator.prompts, ends=(first,))
    monkeypatch.setattr(generator, "prompts", prompts)
    (ended,) = generator.generate([Request("0", "Hello")], Options(6))
    assert not free.ended and ended.ended and not ended.segments
    assert prompts.eos == tuple(sorted({first, prompts.chat.close, prompts.tokenizer.eos_token_id}
                                       - {None}))  # fmt: skip


def test_each_request_draws_its_own(generator):
    """Equal prompts differ by id and sample; the rest of the batch changes nothing."""
    options = Options(8, temperature=3.0, batch_size=4, min_new_tokens=8)
    same = [Request("a", "Hello"), Request("b", "Hello"), Request("a", "Hello", sample=1)]
    replies = [reply.text for reply in _all(generator, same, options)]
    assert len(set(replies)) == 3
    alone = _all(generator, same[2:], dataclasses.replace(options, batch_size=1))
    assert alone[0].text == replies[2]
    other = dataclasses.replace(options, seed=1)
    assert _all(generator, same[:1], other)[0].text != replies[0]


def _all(generator, requests, options):
    def failed(request, error):
        raise error

    return [reply for _, reply in generator.replies(requests, options, failed)]


def test_replies_are_those_of_each_request_alone(generator, image_files):
    image = (str(image_files / "a.png"),)
    requests = [Request("a", "Hello"), Request("b", "What is it?", image), Request("c", "x " * 40)]
    options = Options(6, batch_size=2)
    together = generator.generate(requests, options)
    for request, reply in zip(requests, together, strict=True):
        (alone,) = generator.generate([request], options)
        assert alone.text == reply.text and alone.ended == reply.ended


def test_two_requests_with_one_id_are_refused(generator):
    """`generate` finds replies by the id: both would get that of the last one."""
    with pytest.raises(ValueError, match="the same id"):
        generator.generate([Request("a", "Hello"), Request("a", "Bye", sample=1)], Options(4))


def test_a_penalty_keeps_ids_from_coming_again(generator):
    """With a huge penalty, no id of prompt or reply comes a second time."""
    request = Request("0", "Hello there")
    options = Options(12, repetition_penalty=1e6, min_new_tokens=12)
    (reply,) = generator.generate([request], options)
    ids = [i for part in reply.segments for i in getattr(part, "ids", ())]
    _, prompt, *_ = generator.prompt(request, 12)
    assert len(set(ids)) == len(ids) and not set(ids) & set(prompt.tolist())


def test_a_model_without_a_head_writes_text(workdir, tmp_path):
    values = json.loads((workdir / "config.json").read_text())
    values["model"] |= {"head": "none"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    from orbax.checkpoint import v1 as ocp

    kept = ocp.load(workdir / "final")
    kept = {name: x for name, x in kept.items() if not name.startswith("head.")}
    ocp.save(tmp_path / "final", kept)
    generator = load_generator(str(tmp_path))
    (reply,) = generator.generate([Request("0", "Hello")], Options(5))
    assert not reply.image_parts and isinstance(reply.text, str)


def test_what_does_not_generate_says_so(workdir, tmp_path):
    with pytest.raises(UserError, match="has no option surprise"):
        load_generator(str(workdir), surprise=True)


def test_logits_that_are_not_finite_are_told(generator, monkeypatch):
    """Neither ids nor likelihoods come of them, and a conversation begins anew."""
    weights = generator.loop.weights["llm"]
    conversation = Conversation(generator, Options(max_new_tokens=2))
    conversation.say(Request("0", "Hi"))
    requests = [Request("a", "What?"), Request("b", "And that?")]
    answers = {"a": ["yes", "no"], "b": ["no", "yes"]}
    told = []
    failed = lambda request, error: told.append((request.id, str(error)))  # noqa: E731
    for value in (np.nan, np.inf):
        head = {**weights["head"], "w": weights["head"]["w"].at[7].set(value)}
        monkeypatch.setitem(generator.loop.weights, "llm", weights | {"head": head})
        assert not list(generator.replies(requests, Options(4), failed))
        assert not list(generator.likelihoods(requests, answers, failed))
    assert [name for name, _ in told] == ["a", "b"] * 4
    assert all("logits are not finite" in why for _, why in told)
    with pytest.raises(WeightError, match="logits are not finite .*; the conversation begins anew"):
        conversation.say(Request("0", "And now?"))
    monkeypatch.setitem(generator.loop.weights, "llm", weights)
    assert conversation.turns == 0 and conversation.say(Request("0", "Hi")).segments


def test_a_generator_takes_other_weights_without_compiling(workdir, image_files):
    """As evaluations during training do; without weights of its own in between."""
    first, second = (load_generator(str(workdir)) for _ in range(2))
    second.loop.weights["llm"]["norm"] = -second.loop.weights["llm"]["norm"]
    requests = [Request("0", "What is it?", (str(image_files / "a.png"),))]
    options = Options(8)

    def ids(generator):
        (reply,) = generator.generate(requests, options)
        return [part.ids for part in reply.segments if isinstance(part, TextPart)]

    before, wanted = ids(first), ids(second)
    loop, reader = first.loop, first.reader
    compiled = (loop._prefill, loop._advance, loop._embed, reader._see, reader._project)
    sizes = [function._cache_size() for function in compiled]
    first.release()
    first.renew(second)
    assert ids(first) == wanted != before
    assert [function._cache_size() for function in compiled] == sizes
    second._outline = None
    with pytest.raises(ValueError, match="another model"):
        first.renew(second)
