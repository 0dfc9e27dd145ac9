"""`metamorph chat`: one conversation, whose turns are appended to the cache."""

import argparse
import copy
import io

import numpy as np
import pytest

from metamorph_jax.data.chat import Chat
from metamorph_jax.errors import UserError
from metamorph_jax.sampling import chat, generate
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart


def test_a_next_turn_continues_the_ids_of_training(smollm2):
    turns = [("user", "Hello"), ("assistant", "Good day."), ("user", " And <|im_end|>\n?")]
    for template in ("chatml", "smollm2"):
        written = Chat(smollm2, template)
        for closed in (True, False):
            answer = [*written.encode("Good day."), *([written.close] * closed)]
            after = written.next_prompt(turns[2][1], closed)
            so_far = [*written.prompt(turns[:1]), *answer, *after]
            np.testing.assert_array_equal(so_far, written.prompt(turns))


def test_a_turn_sees_all_before_it(generator, image_files):
    """The second reply is that of one prompt which holds the first turn and its reply."""
    conversation = Conversation(generator, Options(6, min_new_tokens=6))
    image = (str(image_files / "a.png"),)
    first = conversation.say(Request("0", "What is it?", image))
    second = conversation.say(Request("0", "Are you sure?"))
    loop, written = generator.loop, generator.prompts.chat
    start, *_ = generator.prompt(Request("0", "What is it?", image), 6)
    ids = [i for part in first.segments for i in part.ids]
    assert all(isinstance(part, TextPart) for part in first.segments) and len(ids) == 6
    more = loop.embed(np.array([*ids, *written.next_prompt("Are you sure?", False)]))
    policy = generator.policy(Options(6, min_new_tokens=6).text(generator.prompts.eos))
    (whole,) = loop([np.concatenate([start, more])], 6, policy)
    got = [i for part in second.segments for i in part.ids]
    np.testing.assert_array_equal(got, whole.ids)
    assert conversation.turns == 2 and conversation.used == len(start) + len(more) + 5
    with pytest.raises(ValueError, match="has room for"):
        conversation.say(Request("0", "x " * 150))
    assert conversation.turns == 2  # and it goes on
    assert conversation.say(Request("0", "And now?")).text


@pytest.fixture
def talk(monkeypatch, generator, capsys):
    """(what was typed, more options) -> (exit error or None, out, err); counts loads."""
    loads = []
    monkeypatch.setattr(generate, "load", lambda args: loads.append(1) or generator)

    def run(typed, *words):
        parser = argparse.ArgumentParser()
        chat.add_arguments(parser)
        args = parser.parse_args(["--workdir", "w", "--max-new-tokens", "6", *map(str, words)])
        args.overrides = {}
        data = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            error = None
            assert chat.run(args) == 0
        except UserError as raised:
            error = str(raised)
        heard = capsys.readouterr()
        return error, heard.out, heard.err

    run.loads = loads
    return run


def test_a_pipe(talk, image_files):
    """Many prompts, one model; faults are named and the conversation goes on."""
    a, broken = image_files / "a.png", image_files / "c.png"
    typed = f"Hello\n/image {a}\nWhat is <image>?\n\n/reset\n//Bye\n/quit\nnever\n"
    error, out, err = talk(typed)
    assert error is None and not err and talk.loads == [1] and out.count("\n") >= 3
    typed = b"/imag x\n/image\n/image gone.png\n/image " + str(broken).encode()
    typed += b"\n<image>\n\xff\xfe?\n/video x.png\n/draw \nOnce more \x1b[2J\n"
    error, out, err = talk(typed)
    assert error == "8 lines were not answered, for the reasons above"
    told = ["no command /imag", "/image needs", "gone.png", "c.png", "1 markers, 0 images",
            "surrogate", "not the name of a video", "/draw needs a text"]  # fmt: skip
    lines = err.splitlines()
    assert len(lines) == 8 and all(a in b for a, b in zip(told, lines, strict=True)), err
    error, out, err = talk("x " * 300 + "\nshort\n")
    assert "1 lines" in error and "shorten the prompt" in err and out
    assert talk("")[0] is None


def test_a_turn_can_be_taken_back(generator, image_files):
    """What follows is what would have followed; options may change from turn to turn."""
    short, long = Options(6), Options(20, temperature=0.7, seed=3)

    def talked(*turns):
        conversation = Conversation(generator, short)
        for text, options in turns:
            conversation.change(options)
            reply = conversation.say(Request("0", text))
        return conversation, reply

    conversation, _ = talked(("Hello", short), ("Who are you?", long))
    assert conversation.turns == 2
    conversation.undo()
    conversation.change(short)
    after = conversation.say(Request("0", "And now?"))
    _, expected = talked(("Hello", short), ("And now?", short))
    assert after == expected
    for _ in range(2):
        conversation.undo()
    assert conversation.turns == conversation.used == 0
    with pytest.raises(ValueError, match="no turn to take back"):
        conversation.undo()
    conversation.change(long)
    first = conversation.say(Request("0", "Hello"))
    conversation.undo()
    assert conversation.say(Request("0", "Hello")) == first
    conversation.undo()
    assert conversation.say(Request("0", "Hello", sample=1)) != first


def test_draw_makes_the_reply_begin_with_an_image(talk, generator):
    """In the first turn and in a later one; the turns after it are free again."""
    options = Options(8)
    conversation = Conversation(generator, options)
    plain = conversation.say(Request("0", "A cat"))
    assert not plain.image_parts  # this model writes text by itself
    for _ in range(2):
        drawn = conversation.say(Request("0", "A cat"), draw=True)
        assert isinstance(drawn.segments[0], ImagePart) and drawn.segments[0].complete
        after = conversation.say(Request("0", "And?"))
        assert not isinstance(after.segments[0], ImagePart)
        conversation = Conversation(generator, options)
    error, out, err = talk("/draw a cat\n")
    assert error is None and out.startswith("[image 0]") and "there is no --decoder" in out
    writer = copy.copy(generator)
    writer.policy = lambda text: text
    with pytest.raises(ValueError, match="writes text only"):
        Conversation(writer).say(Request("0", "A cat"), draw=True)


def test_drawn_images_are_saved_and_named(talk, generator, tmp_path, monkeypatch):
    P, C = generator.feature_shape
    features, whole = np.zeros((P, C), np.float32), np.zeros((16, 16, 3), np.uint8)
    replies = [{2.0: whole}, {2.0: whole}, {}]

    def say(self, request, stream, draw):
        return Reply((ImagePart(features, True, replies.pop(0)),), True)

    monkeypatch.setattr(Conversation, "say", say)
    out = tmp_path / "drawn"
    _, said, _ = talk("draw\n", "--out", out)
    assert said.strip() == f"[{out}/reply1_image0_scale2.png]"
    _, said, _ = talk("draw\ndraw\n", "--out", out)  # nothing of an earlier one is overwritten
    assert f"[{out}/reply2_image0_scale2.png]" in said and "there is no --decoder" in said
    assert (out / "reply2_image0_scale2.png").is_file() and len(list(out.glob("*.png"))) == 2
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in talk("draw\n", "--out", file)[0]
