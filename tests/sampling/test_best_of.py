"""The best of several samples: what is kept, what it scores, and what can't be asked for."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from flax import nnx

from metamorph_jax import cli, config
from metamorph_jax.convert import load
from metamorph_jax.models.heads.visual_flow import FlowConfig
from metamorph_jax.recipes.metamorph import decoding
from metamorph_jax.sampling import best_of, generate, trained
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.likelihood import Likelihood
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request

# The start of an image, its four visual tokens and another token; six rows, compiled once.
SIX = Options(6, batch_size=6)


class Painter:
    """An image decoder that notes what it is asked to draw."""

    sampling = types.SimpleNamespace(guidance=2.0)

    def __init__(self):
        self.asked = []

    def draw(self, features, guidance, seed):
        self.asked.append((features, seed))
        return np.zeros((2, 2, 3), np.uint8)


@pytest.fixture(scope="module")
def sampler(workdir):
    """A generator with a head that samples, whose replies begin with an image."""
    recipe, cfg, values = load.open_run(workdir)
    data = config.build(recipe.Data, values["data"], "config.data")
    cfg = dataclasses.replace(cfg, head="flow", flow=FlowConfig(width=16, depth=1, steps=2))
    model = recipe.create(cfg, nnx.Rngs(0))
    out = model.head.out.kernel  # zeros; then all samples would be alike
    out[...] = nnx.initializers.normal(1.0)(jax.random.key(0), out.shape)
    made = decoding.generator(model, cfg, data)
    decode, (start,) = made.decode, made.image_start

    def begins_with_an_image(embeds, *args, **prompts):
        return decode(embeds, *args, forced_ids=np.full((len(embeds), 1), start), **prompts)

    made.decode = begins_with_an_image
    return made


def says(images, question, answers, batch_size):
    """Log-likelihoods of answers that depend on an image and on the question."""
    yes = -1 - np.abs(images[:, 0, 0] - len(question) / 100)
    return [[Likelihood(float(y), 1), *[Likelihood(-1.0, 1)] * (len(answers) - 1)] for y in yes]


def test_the_sample_that_is_confirmed_is_kept_and_drawn(sampler, monkeypatch):
    """It is the reply that the same sample is by itself, wherever it is in a batch."""
    monkeypatch.setattr(sampler, "likelihoods_about", says)
    monkeypatch.setattr(sampler, "image_decoder", Painter())
    requests = [Request("a", "Draw."), Request("b", "Draw it.", confirm=("Is it?", "Is it so?"))]
    kept = sampler.generate(requests, dataclasses.replace(SIX, best_of=3))
    drawn, sampler.image_decoder.asked = sampler.image_decoder.asked, []
    single = [dataclasses.replace(r, sample=k) for r in requests[::-1] for k in range(3)]
    replies = [reply for _, reply in sampler.replies(single, SIX, pytest.fail)]
    seeds = [seed for _, seed in sampler.image_decoder.asked]
    for n, (request, reply, (features, seed)) in enumerate(zip(requests, kept, drawn, strict=True)):
        mine = slice(3 - 3 * n, 6 - 3 * n)
        alone = replies[mine]
        images = np.stack([one.image_parts[0].features for one in alone])
        asked = reply.candidates.questions
        assert asked == best_of.questions(request)
        scores = best_of.scores(sampler, images, asked, 3)
        np.testing.assert_allclose(reply.candidates.scores, scores, atol=1e-5)
        k = int(np.argmax(scores))
        assert reply.candidates.kept == k and len({*scores.round(4)}) == 3
        np.testing.assert_allclose(reply.image_parts[0].features, images[k], atol=1e-5)
        assert [part.text for part in reply.segments[1:]] == [p.text for p in alone[k].segments[1:]]
        np.testing.assert_array_equal(features, reply.image_parts[0].features)
        assert seed == seeds[mine][k]
    heard = []
    options = dataclasses.replace(SIX, best_of=6)
    (told,) = sampler.generate(requests[:1], options, stream=lambda new: heard.extend(new.tolist()))
    assert heard[:5] == [*sampler.image_start, *[-1] * 4]
    assert told.candidates.scores[:3] == kept[0].candidates.scores


def test_a_score_is_that_of_reading_an_image(sampler, image_files):
    """Visual tokens of a file score as the file does, and scores of questions add up."""
    file = image_files / "a.png"
    (loaded,) = sampler.prompts.images.load([_ref(file)])
    features = sampler.reader.see(sampler.prompts.views.pixels(loaded))
    asked = ("Is it red?", "Look at <image>: is it a circle?")
    requests = [Request(question, question, (str(file),)) for question in asked]
    answers = dict.fromkeys(asked, (*best_of.YES, *best_of.NO))
    expected = 0.0
    for _, found in sampler.likelihoods(requests, answers, pytest.fail, batch_size=2):
        p = np.exp([answer.total for answer in found])
        expected += np.log(p[:2].sum() / p.sum())
    images = np.concatenate([features, 9 * features, features])
    scores = best_of.scores(sampler, images, asked, batch_size=2)
    np.testing.assert_allclose(scores[[0, 2]], expected, rtol=1e-5)
    assert abs(scores[1] - expected) > 1e-3


def _ref(file):
    from metamorph_jax.data.sources.base import ImageRef

    return ImageRef(str(file))


def test_samples_without_an_image_are_not_chosen(sampler, monkeypatch):
    monkeypatch.setattr(sampler, "likelihoods_about", says)
    cut = dataclasses.replace(SIX, max_new_tokens=3, best_of=6)
    (reply,) = sampler.generate([Request("a", "Draw.")], cut)
    assert reply.candidates.scores == (None,) * 6 and reply.candidates.kept == 0
    assert not reply.image_parts[0].complete


def test_what_cannot_be_asked_for(sampler, generator, monkeypatch):
    request, two = Request("a", "Draw."), dataclasses.replace(SIX, best_of=2)
    with pytest.raises(ValueError, match="nothing varies"):  # this head regresses
        generator.generate([request], two)
    generator.check(dataclasses.replace(two, temperature=0.5))
    text = lambda _: dataclasses.replace(SIX, best_of=1).text(())  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "policy", text)
        with pytest.raises(ValueError, match="writes text only"):
            sampler.check(two)
    with monkeypatch.context() as patch:
        patch.setattr(sampler.reader, "_project", None)
        with pytest.raises(ValueError, match="has no tower"):
            sampler.check(two)
    with pytest.raises(ValueError, match="leave best_of at 1"):
        Conversation(sampler, two)
    with pytest.raises(ValueError, match="1 to 64, not 65"):
        Options(best_of=65)
    with pytest.raises(ValueError, match="give one of them"):
        Options(best_of=2, beams=2)
    failed = {}
    long = dataclasses.replace(request, confirm=("Is it? " * 90,))
    assert not [*sampler.replies([long], two, lambda r, e: failed.update({r.id: str(e)}))]
    assert "the context has 160" in failed["a"]


def test_the_command(sampler, workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trained, "load_generator", lambda *_, **__: sampler)
    monkeypatch.setattr(sampler, "likelihoods_about", says)
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [{"prompt": "Draw."}, {"prompt": "Draw.", "confirm": "Is it <image>?"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    words = ["--prompts", file, "--out", out, "--max-new-tokens", 6, "--best-of", 3]
    words += ["--confirm", "Is it red?", "--confirm", "Is it a circle?"]
    assert _run(workdir, *words) == 0
    assert "1: sample" in capsys.readouterr().err
    records = [one["candidates"] for one in json.loads((out / "segments.json").read_text())]
    assert [one["questions"] for one in records] == [
        ["Is it red?", "Is it a circle?"], ["Is it <image>?"]
    ]  # fmt: skip
    for one in records:
        assert one["scores"][one["kept"]] == max(one["scores"]) and len(one["scores"]) == 3
    assert _run(workdir, *words) == 0
    assert "2 of 2 were done before" in capsys.readouterr().err
    with pytest.raises(cli.UserError, match="other settings .best_of."):
        _run(workdir, *words, "--best-of", 2)
    with pytest.raises(cli.UserError, match="--confirm goes with --best-of"):
        _run(workdir, "--prompt", "x", "--confirm", "Is it?")


def _run(workdir, *words):
    import argparse

    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    args = parser.parse_args(["--workdir", str(workdir), *map(str, words)])
    args.overrides = {}
    return generate.run(args)
