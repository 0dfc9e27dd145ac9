"""Prompts files, options and folders of results that want to break `generate` and `chat`.

Everything is checked before a model loads: the one here only counts its loads and echoes prompts.
"""

import itertools
import json
import os
import types

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.chat import Markers
from metamorph_jax.sampling import trained
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.sampling.results import Reply, TextPart
from tests.hostile.harness import check


class Echo:
    """A generator that answers with the prompt and some control characters."""

    image_decoder, image_start = None, ()
    tokenizer = types.SimpleNamespace(decode=lambda ids: "", eos_token_id=None)
    chat = types.SimpleNamespace(markers=Markers(), tokenizer=tokenizer, close=None, stops=())
    prompts = Prompts(chat, None, None, 100)

    def policy(self, text):
        return text

    def policy_of(self, options, requests=()):
        return options.text(())

    def check(self, options):
        pass

    def set_steps(self, steps):
        pass

    def replies(self, requests, options, failed, stream=None):
        for request in requests:
            yield request, Reply((TextPart(f"{request.prompt}\x1b[2J\r", (1,)),), True)


@pytest.fixture
def loads(monkeypatch):
    found = []
    monkeypatch.setattr(trained, "load_generator", lambda *_, **__: found.append(1) or Echo())
    return found


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_text("")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\nhttp://localhost/x\n")
    (tmp_path / "w").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    return tmp_path


def words(*more):
    return ["generate", "--workdir", "w", *more]


# ---- prompts files

VALUES = (
    None, True, 0, -1, 10**4000, 1e308, float("nan"), "", " ", "\0", "\ud800", "\x1b[2J", "\u202e",
    "x\nmetamorph: nothing wrong", "../a.png", "/dev/zero", "/dev/stdin", "pipe.png", "pipe.mp4",
    "text.png", "empty.png", "text.mp4", "playlist.mp4", "gone.png", ".", "a" * 5000, [], [[]],
    [""], ["a.png"], ["a.png", 3], {}, {"a": []}, "<image>", "<video>", "<image>" * 100,
    "<|image|>", "https://localhost/a.png", "file:///etc/passwd",
)  # fmt: skip
KEYS = ("id", "prompt", "image", "images", "video", "think", "surprise\x1b", "\ud800")
LINES = (
    b"", b"\n\n\n", b"{", b"}", b"[]", b"null", b"3", b'"x"', b"\xff\xfe{\0", b"\0" * 1000,
    b'{"prompt": "caf\xe9"}', b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "x"}{"prompt": "y"}', b'{"prompt": "x"',
    b'{"prompt": "\\ud83d"}', b'{"prompt": NaN}', b"\xef\xbb\xbf" * 2,
    b'{"prompt": "' + b"x" * 3_000_000 + b'"}', b'{"prompt": "\x1b"}', b"#" * 40_000_000,
)  # fmt: skip


def test_values_of_every_key(folder, loads):
    """Each line is answered or named; none ends the others."""
    file, bad = folder / "p.jsonl", 0
    for key, value in itertools.product(KEYS, VALUES):
        record = {"prompt": "hello", key: value}
        lines = [record, {"id": "good", "prompt": "fine"}]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = check(words("--prompts", file), folder)
        assert "good: fine" in found.out, (key, value, found.err)
        assert found.out.replace("\n", "").isprintable(), repr(found.out)
        bad += found.code == 2
    assert 200 < bad < len(KEYS) * len(VALUES)


@pytest.mark.parametrize("raw", LINES, ids=lambda raw: repr(raw[:20]))
def test_lines_that_are_not_prompts(folder, loads, raw):
    file = folder / "p.jsonl"
    file.write_bytes(raw)
    check(words("--prompts", file), folder, code=2, naming="p.jsonl")
    assert not loads
    file.write_bytes(b'{"prompt": "first"}\n' + raw)
    check(words("--prompts", file), folder)


def test_files_that_are_not_files(folder, loads):
    os.truncate(os.open(folder / "sparse", os.O_CREAT | os.O_WRONLY), 2**40)
    for name in ("gone", ".", "pipe.png", "sparse", "/dev/zero", "/dev/full", "a.png", "a\0b", ""):
        check(words("--prompts", name), folder, code=2)
    assert not loads


# ---- options

NUMBERS = ("", "nan", "inf", "-inf", "-1", "0", "1e400", "x", "0x1", "9" * 30, "1.5", "\x1b[2J")
NUMERIC = ("temperature", "top-k", "top-p", "max-new-tokens", "min-new-tokens", "samples", "beams",
           "repetition-penalty", "length-penalty", "seed", "batch-size", "context", "guidance",
           "steps")  # fmt: skip
MESHES = ("=", "tensor", "tensor=0", "tensor=-2", "tensor=1,tensor=1", ",", "tensor=x", "\x1b=1")


def test_numbers_of_every_option(folder, loads):
    refused = 0
    for option, value in itertools.product(NUMERIC, NUMBERS):
        for command in (words("--prompt", "x"), ["chat", "--workdir", "w"]):
            if command[0] == "chat" and option in (
                "samples",
                "batch-size",
                "beams",
                "length-penalty",
            ):
                continue
            before = len(loads)
            found = check([*command, f"--{option}={value}"], folder)
            refused += found.code == 2
            assert (len(loads) > before) == (found.code == 0), (option, value)
    assert refused > 150


def test_options_that_contradict_each_other(folder, loads):
    one = ("--prompt", "x")
    for more in (
        (), ("--prompt", "x", "--prompts", "y"), ("--prompts", "y", "--image", "a.png"),
        (*one, "--checkpoint", "c"), (*one, "--config", "c"), (*one, "--decoder", "d"),
        (*one, "--guidance", "1", "1"), (*one, "--samples", "3"), ("--prompt", ""),
        ("--prompt", "\ud800"), (*one, "--image", ""), (*one, "--video", "a.png"),
        (*one, "--image", "gone\x1b.png"), (*one, "--image", "pipe.png"), (*one, "--think=yes"),
        (*one, "--max-new-tokens", "9", "--min-new-tokens", "10"), (*one, "--surprise\x1b"),
        (*one, "--context", "8", "--max-new-tokens", "8"), (*one, "--mode", "video"),
        (*one, "--rounds", "2"), (*one, "--mode", "both", "--rounds", "9" * 9),
        *((*one, "--mesh", mesh) for mesh in MESHES),
        *((*one, "--out", out) for out in ("a.png", "a.png/x", "pipe.png", "x\0y")),
        (*one, "--decoder", "a.png", "--out", "o"), (*one, "--decoder", "gone", "--out", "o"),
    ):  # fmt: skip
        found = check(words(*more), folder)
        assert found.code == 2 and not loads, (more, found.err)
    check(["generate", "--prompt", "x"], folder, code=2)


# ---- results of an earlier start

SETTINGS = ("{}", "[]", "{", "\ud800", "", '{"seed": "1"}', "[" * 10_000, None)
RESULTS = (
    "x", "{}", "[]", "null", "{", "\0", '{"id": "0"}', '{"request": 3}', "[" * 10_000 + "\n",
    '{"request": {"id": [], "sample": 0}}', '{"request": {"id": "0", "sample": {}}}\n',
    '{"id": "0", "request": {"id": "0", "sample": 0}, "segments": 3}\n', '{"id": "\\ud800"}\n',
)  # fmt: skip


def test_folders_of_results(folder, loads):
    """Damaged lines are made again, foreign files are never touched."""
    command = words("--prompt", "x", "--out", "o")
    out = folder / "o"
    check(command, folder, code=0)
    kept, settings = (out / "results.jsonl").read_text(), (out / "settings.json").read_text()
    for damaged in RESULTS:
        (out / "results.jsonl").write_text(damaged)
        found = check(command, folder, code=0)
        assert ("damaged lines" in found.err) == damaged.endswith("\n"), damaged
        assert (out / "results.jsonl").read_text() == kept
    for other in SETTINGS:
        (out / "settings.json").unlink()
        if other is not None:
            (out / "settings.json").write_bytes(other.encode("utf-8", "surrogatepass"))
        check(command, folder, code=2, naming="o")
        assert (out / "results.jsonl").read_text() == kept
    (out / "settings.json").write_text(settings)
    before = len(loads)
    assert "1 of 1 were done before" in check(command, folder, code=0).err
    assert len(loads) == before


# ---- chat


def test_what_is_typed(folder, loads):
    lines = [f"/image {v}" for v in VALUES if isinstance(v, str)]
    lines += [f"/video {v}" for v in VALUES if isinstance(v, str)]
    lines += ["/", "/x\x1b", "/quit now"]
    typed = "\n".join(line.replace("\ud800", "?").replace("\n", " ") for line in lines)
    found = check(["chat", "--workdir", "w"], folder, stdin=typed, code=2)
    assert "lines were not answered" in found.err and len(loads) == 1


def test_lines_without_end_and_drawing_without_a_decoder(folder, loads, monkeypatch):
    """A line of megabytes is read in parts; what can't be drawn or read leaves the chat going."""
    from metamorph_jax.sampling import chat, conversation

    said = []

    def say(self, request, stream, draw):
        said.append(request.prompt)
        if draw:
            raise ValueError("this model draws nothing\x1b[2J")
        return Reply((TextPart(request.prompt[:9], (1,)),), True)

    monkeypatch.setattr(conversation.Conversation, "say", say)
    monkeypatch.setattr(chat, "LONGEST_LINE", 1000)
    lines = ["x" * 10_000, "/image " + "y" * 10_000, "/draw", "/draw \0", "/draw " + "z" * 500,
             "/draw a dog", "/image a.png", "/image a.png a.png", "/reset now", "//",
             "\r"]  # fmt: skip
    found = check(["chat", "--workdir", "w"], folder, stdin="\n".join(lines) + "\n", code=2)
    assert "lines were not answered" in found.err and len(loads) == 1
    assert "/draw needs a text" in found.err and not (folder / "chat").exists()
    assert max(map(len, said)) <= 1000 and "a dog" in said
