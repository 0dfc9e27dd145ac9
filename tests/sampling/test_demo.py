"""The demo's engine: turns of visitors, two models, limits, and what is said of bad files."""

import argparse
import copy
import itertools
import types

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.sampling import generate
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.demo import command
from metamorph_jax.sampling.demo.engine import Engine, Limits, Settings, Turn
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request

SHORT = Settings(max_new_tokens=6)


class Painter:
    """Stands in for an image decoder: one colour, of guidance and seed."""

    sampling = types.SimpleNamespace(guidance=2.0)

    def draw(self, features, guidance, seed):
        return np.full((8, 8, 3), [10 * guidance, seed % 251, len(features)], np.uint8)


@pytest.fixture(scope="module")
def models(generator):
    """A model that draws, and one that writes only, over the same weights."""
    painter, writer = copy.copy(generator), copy.copy(generator)
    painter.image_decoder = Painter()
    writer.policy = lambda text: text
    return {"painter": painter, "writer": writer}


def last(replies):
    return list(replies)[-1]


def test_turns_are_those_of_a_conversation(models, image_files):
    """Of both models, each seeing its own replies; what comes last is the whole."""
    engine = Engine(models, Options(min_new_tokens=6))
    files = (str(image_files / "a.png"),)
    asked = [Turn("What is it?", files), Turn("Are you sure?")]
    got = [last(engine.ask("me", turn, SHORT)) for turn in asked]
    for place, generator in enumerate(models.values()):
        talk = Conversation(generator, Options(6, min_new_tokens=6))
        for turn, said in zip(asked, got, strict=True):
            expected = talk.say(Request("0", turn.text, turn.files)).text
            assert said[place].parts == (expected,) and not said[place].note
    streamed = [said[0].parts for said in engine.ask("you", asked[0], SHORT)]
    assert len(streamed) > 1 and streamed[-1] == got[0][0].parts
    for (sooner,), (later,) in itertools.pairwise(streamed):
        assert later.startswith(sooner)
    assert engine.longest == 80 and engine.guidance() == 2.0 and engine.draws


def test_drawings_and_other_answers(models):
    engine = Engine(models)
    drawn, written = last(engine.ask("me", Turn("A cat", draw=True), Settings(0.0, 3.0, 7, 8)))
    assert isinstance(drawn.parts[0], Image.Image) and drawn.parts[0].getpixel((0, 0))[0] == 30
    assert all(isinstance(part, str) for part in written.parts)  # it can't, and writes
    warm = Settings(1.0, None, 7, 8)
    first = last(engine.ask("me", Turn("Why?"), warm))
    other = last(engine.again("me", warm))
    assert first != other and last(engine.again("me", SHORT))[1].parts
    talks = engine._visitors["me"].talks
    assert [talk.turns for talk in talks.values()] == [2, 2]  # each answer took one back
    engine.clear("me")
    assert "no turn" in last(engine.again("me", warm))[0].note
    cut = last(engine.ask("me", Turn("A cat", draw=True), Settings(max_new_tokens=3)))[0]
    assert "cut off" in cut.parts[0]


def test_what_can_t_be_answered_is_said_and_changes_nothing(models, image_files, tmp_path):
    engine = Engine(models, limits=Limits(1, pixels=600, images=2, characters=40))
    good, broken = str(image_files / "a.png"), str(image_files / "c.png")
    wide, half = str(tmp_path / "wide.png"), str(tmp_path / "half.png")
    Image.new("RGB", (50, 50)).save(wide)
    (tmp_path / "half.png").write_bytes((image_files / "a.png").read_bytes()[:200])
    last(engine.ask("me", Turn("Hello"), SHORT))
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    for turn, why in (
        (Turn("x", (str(tmp_path / "large.png"),)), "large.png is larger than 1 MB"),
        (Turn("x" * 41), "41 characters; at most 40"),
        (Turn("x", (good,) * 3), "3 images in one turn; at most 2"),
        (Turn("x", (broken,)), "c.png"),
        (Turn("x", (wide,)), "50x50, at most 600 pixels"),
        (Turn("x", (half,)), "half.png"),
        (Turn("<image>"), "Not answered"),
        (Turn(" ", draw=True), "what is to be drawn"),
    ):
        notes = [said.note for said in last(engine.ask("me", turn, SHORT))]
        assert all(why in note for note in notes), (turn, notes)
        assert str(tmp_path) not in notes[0] and str(image_files) not in notes[0]
    assert [engine.can_read(f) for f in (good, broken, wide, half)] == [True, False, False, False]
    assert [talk.turns for talk in engine._visitors["me"].talks.values()] == [1, 1]
    assert not last(engine.ask("me", Turn("And now?"), SHORT))[0].note
    full = [last(engine.ask("me", Turn(f"{k} " * 20), SHORT))[0].note for k in range(6)]
    assert "clear the conversation" in full[-1]


def test_only_so_many_conversations_are_kept(models):
    engine = Engine({"writer": models["writer"]}, visitors=1)
    last(engine.ask("me", Turn("Hello"), SHORT))
    assert not last(engine.ask("you", Turn("Hello"), SHORT))[0].note
    assert list(engine._visitors) == ["you"]
    again = last(engine.ask("me", Turn("Hello"), SHORT))[0]
    assert "begins anew" in again.note and again.parts
    assert not last(engine.ask("me", Turn("Hello"), SHORT))[0].note


def test_the_command_s_options(monkeypatch, models):
    def parsed(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        args = parser.parse_args(["--workdir", "runs/vpit", *words])
        args.overrides = {}
        return args

    for words, why in (
        (("--port", "0"), "--port must be"),
        (("--beside-decoder", "x"), "--beside, which is not given"),
        (("--guidance", "1", "2"), "one scale"),
        (("--most-megabytes", "0"), "--most-megabytes"),
        (("--most-megapixels", "65"), "at most 64"),
        (("--visitors", "0"), "--visitors"),
    ):
        with pytest.raises(UserError, match=why):
            command.check(parsed(*words))
    loaded = []
    monkeypatch.setattr(generate, "load", lambda args: loaded.append(args) or models["painter"])
    args = parsed("--beside", "other/vpit", "--beside-decoder", "d", "--max-new-tokens", "500")
    command.check(args)
    engine = Engine(command.load(args))
    assert list(engine.models) == ["vpit", "vpit (2)"]
    assert [(a.workdir, a.decoder) for a in loaded] == [("runs/vpit", None), ("other/vpit", "d")]
    assert args.host == "127.0.0.1"
    assert command.start(args, engine) == Settings(0.0, 2.0, 0, 500)
    assert command.start(parsed("--guidance", "4"), engine) == Settings(0.0, 4.0, 0, 80)
