"""Likelihoods of answers equal those of the training forward pass, whatever the batch."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import sharding
from metamorph_jax.convert import load
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.sampling import likelihood
from metamorph_jax.sampling.requests import Request, as_sample
from metamorph_jax.types import Batch, Images

ANSWERS = ("yes", "A rather long answer, with several words", "no")


@pytest.fixture(scope="module")
def trained(generator, workdir):
    """text of a request, answer -> (log-probability, tokens) by the training forward pass."""
    import jax

    recipe, cfg, _ = load.open_run(workdir)
    mesh = sharding.mesh_of(generator.loop.weights)
    model = load.load_model(recipe, cfg, mesh, workdir=workdir)
    prompts = generator.prompts

    def score(request: Request, answer: str, closing: bool = False):
        turns = [*as_sample(request).turns, ("assistant", answer)]
        encoded, P = prompts.chat.conversation(turns), prompts.views.tokens
        places = [read_place(*prompts.views.plan(None)) for _ in request.images]
        row = build_row(encoded.ids, encoded.labels, places, P, prompts.length)
        pixels = [prompts.views.pixels(Image.open(p).convert("RGB")) for p in request.images]
        one = lambda x: np.asarray(x)[None]  # noqa: E731
        images = Images(np.zeros((1, 0), bool), one(np.zeros(0, np.int32)), None)
        if pixels:
            images = Images(np.ones((1, len(pixels)), bool), one(row.view_starts), np.stack(pixels))
        batch = Batch(
            one(row.tokens), one(row.positions), one(np.ones_like(row.tokens)),
            one(row.text_targets), one(row.image_slots), one(row.visual_targets), one(row.tokens),
            images,
        )  # fmt: skip
        hidden = model.hidden(batch)[0][0]
        table, added = model.llm.head_tables()
        logits = np.asarray(hidden) @ np.concatenate([np.asarray(table), np.asarray(added).T], 1)
        each = np.asarray(jax.nn.log_softmax(logits))
        targets = row.text_targets[row.text_targets >= 0]
        each = each[np.flatnonzero(row.text_targets >= 0), targets]
        # The last target is the token that closes the answer.
        return (each.sum(), len(each)) if closing else (each[:-1].sum(), len(each) - 1)

    return score


@pytest.mark.parametrize("closing", [False, True])
def test_equal_to_the_training_forward_pass(generator, trained, image_files, closing):
    requests = [
        Request("a", "Is it red?", (str(image_files / "a.png"),)),
        Request("b", "Is it?"),
        Request("c", "Look <image> twice: is it blue?", (str(image_files / "b.jpg"),)),
    ]
    answers = {"a": ANSWERS, "b": ANSWERS[:1], "c": ANSWERS[::-1]}  # of different numbers

    def failed(request, error):
        raise error

    pairs = generator.likelihoods(requests, answers, failed, batch_size=2, closing=closing)
    found = {request.id: one for request, one in pairs}
    assert found.keys() == answers.keys()
    for request in requests:
        assert len(found[request.id]) == len(answers[request.id])
        for answer, got in zip(answers[request.id], found[request.id], strict=True):
            total, tokens = trained(request, answer, closing)
            assert got.tokens == tokens
            np.testing.assert_allclose(got.total, total, rtol=1e-5, atol=1e-4)
            assert got.mean == got.total / tokens


def test_what_cannot_be_compared_is_said_and_left_out(generator, image_files):
    broken = Request("broken", "x", (str(image_files / "c.png"),))
    long, *others = (Request(id, "x") for id in ("long", "none", "image", "good"))
    requests = [dataclasses.replace(long, prompt="x " * 200), broken, *others]
    answers = dict.fromkeys([r.id for r in requests], ("a", "b"))
    answers |= {"none": (), "image": ("<image>",)}
    errors = {}
    pairs = generator.likelihoods(requests, answers, lambda r, e: errors.update({r.id: str(e)}))
    assert [request.id for request, _ in pairs] == ["good"]
    assert "context of 160" in errors["long"] and "no answers" in errors["none"]
    assert "must be text" in errors["image"] and "unknown_format" in errors["broken"]


class Merging:
    """A tokenizer of characters in which "1", "2" and "12" are tokens."""

    unk_token_id = None
    added_tokens_decoder = {}

    def convert_tokens_to_ids(self, token):
        return {"<|im_start|>": 1, "<|im_end|>": 2}.get(token)

    def encode(self, text, add_special_tokens=False):
        ids = []
        while text:
            size = 2 if text.startswith("\n1") else 1
            ids.append(1000 + sum(map(ord, text[:size])) * size)
            text = text[size:]
        return ids


def test_answers_that_merge_with_the_prompt(smollm2):
    """What answers share ends where their ids first differ, even inside of the header."""
    chat = Chat(Merging(), "chatml")
    prompt, blocks = likelihood.split(chat, [("user", "?")], ("1x", "2"))
    whole = [chat.conversation([("user", "?"), ("assistant", a)]) for a in ("1x", "2")]
    for block, one in zip(blocks, whole, strict=True):
        ids = np.concatenate([prompt, block.ids])
        np.testing.assert_array_equal(ids, one.ids[: len(ids)])
        scored = np.flatnonzero(one.labels >= 0)
        scored = scored[one.ids[scored] != chat.close]
        np.testing.assert_array_equal(len(prompt) + np.flatnonzero(block.scored), scored)
    assert blocks[0].ids[0] != blocks[1].ids[0]
