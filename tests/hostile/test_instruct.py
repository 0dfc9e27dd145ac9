"""Contexts, annotations, replies, journals and options that want to break `data generate`.

The endpoint is a function: what it says depends on the test, and nothing is sent anywhere.
"""

import errno
import itertools
import json
import os
import random

import pytest

from metamorph_jax import endpoint
from metamorph_jax.endpoint import Completion, Limits, Usage
from metamorph_jax.instruct import journal
from tests.hostile.benchmarks import changed, places, put
from tests.hostile.harness import check, damaged

GOOD = "Question:\nWhat is it?\n===\nAnswer:\nA thing.\n===\n"
CONTEXT = {"id": "1", "image": "1.png", "captions": ["A thing."],
           "instances": [{"category": "thing", "bbox": [0, 0, 0.5, 1]}]}  # fmt: skip
COCO = {"images": [{"id": k, "file_name": f"{k}.png", "width": 8, "height": 6} for k in (1, 2)],
        "annotations": [{"id": k, "image_id": k, "caption": "A thing.", "category_id": 3,
                         "bbox": [0, 0, 4, 3]} for k in (1, 2)],
        "categories": [{"id": 3, "name": "thing"}]}  # fmt: skip
VALUES = (
    None, True, 0, -1, 10**30, 1e308, float("nan"), "", " ", "\0", "\ud800", "\x1b[2J", "../1.png",
    "/etc/passwd", "https://localhost/a.png", "a" * 5000, [], [[]], {}, {"a": []}, ["x", 3],
    "<image>", ["<image>"], [[0, 0, 1]], ...,
)  # fmt: skip


class Client:
    """Says `text`; counts what it is asked."""

    url, limits, price, cost = "http://localhost", Limits(concurrency=1), None, None

    def __init__(self, text=GOOD):
        self.text, self.asked, self.usage = text, 0, Usage()

    def complete(self, messages, **_):
        self.asked += 1
        return Completion(self.text, 3, 4)


@pytest.fixture
def client(monkeypatch):
    made = Client()
    monkeypatch.setattr(endpoint, "open_endpoint", lambda *_: made)
    return made


@pytest.fixture
def folder(tmp_path):
    for name in ("photos/1.png", "photos/2.png"):
        put(tmp_path, name, 0)
    (tmp_path / "c.jsonl").write_text(json.dumps(CONTEXT) + "\n")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    return tmp_path


def words(*more, kind="conversation", out="o"):
    return ["data", "generate", "--kind", kind, "--model", "m", "--out", out, *more]


# ---- what is known of images


def test_values_of_every_key_of_a_line(folder, client):
    """A line is used or counted, and the good one beside it is always used."""
    file, used = folder / "c.jsonl", 0
    good = json.dumps(CONTEXT | {"id": "good"})
    ways = [way for way in places(CONTEXT) if way]
    pairs = random.Random(0).sample([*itertools.product(ways, VALUES)], 150)
    for number, (way, value) in enumerate(pairs):
        file.write_text(f"{json.dumps(changed(CONTEXT, way, value))}\n{good}\n")
        out = f"o{number}"
        found = check(words("--contexts", file, out=out), folder, code=0)
        made = json.loads((folder / out / "conversation.json").read_text())
        assert made[-1]["id"] == "good" and made[-1]["image"] == "1.png"
        assert len(made) == 2 or "left out: 1" in found.out, (way, value, found.out)
        assert all(not os.path.isabs(one["image"]) and ".." not in one["image"] for one in made)
        used += len(made) == 2
    assert 10 < used < 100


def test_values_of_every_key_of_annotations(folder, client):
    file, dice = folder / "coco.json", random.Random(0)
    for number, way in enumerate([way for way in places(COCO) if 1 not in way]):
        for value in dice.sample(VALUES[: None if way else -1], 5):
            file.write_text(json.dumps(changed(COCO, way, value)))
            out = f"o{number}"
            check(words("--captions", file, "--instances", file, "--image-prefix", "photos",
                        "--redo", kind="reasoning", out=out), folder)  # fmt: skip


def test_files_that_are_not_files(folder, client):
    os.mkfifo(folder / "pipe")
    whole = json.dumps(COCO).encode()
    (folder / "big.jsonl").write_bytes(b"x" * 2**25)
    for name in ("gone", "photos", "pipe", "/dev/zero", "a\0b", "", "big.jsonl"):
        for option in ("--contexts", "--captions"):
            check(words(option, name), folder, code=2)
    for name, data in damaged(whole, 60, 10, 0):
        (folder / "bad.json").write_bytes(data)
        check(words("--captions", "bad.json", out=name.replace(" ", "")), folder)
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONTEXT).encode() + b"\r\n")
    check(words("--contexts", "bom.jsonl"), folder, code=0)


# ---- replies

REPLIES = (
    "", " ", "\0", "\ud800", "\x1b[2J", "Question:", "Answer:\nx", "===", "Question:\n===\nAnswer:",
    "Question:\nQ\n===\nAnswer:\n<image>\n===\n", "Question:" * 20_000, "=" * 200_000,
    "```\n" * 50_000, "* " * 100_000, " " * 200_000 + "x", "Question" + " " * 200_000 + "x",
    "(" * 100_000, "I am sorry " * 20_000, "[0." * 50_000,
    "Question:\nQ\n===\nAnswer:\nAs an AI\n===\n", "\u202e\u200b", "Question：\nQ\nAnswer：\nA",
    GOOD.replace("\n", "\r\n"), GOOD * 1000, GOOD + "x" * 1_000_000,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["conversation", "detail", "reasoning", "captions"])
def test_replies(kind, folder, client):
    """Each is used, or set aside and counted; none is asked for again by the same command."""
    more = ("--images", "photos") if kind == "captions" else ("--contexts", "c.jsonl")
    for number, client.text in enumerate(REPLIES):
        argv = words(*more, kind=kind, out=f"{number}")
        found = check(argv, folder)
        assert found.code == 0 or "usable" in found.err or "caption" in found.err, found.err
        asked = client.asked
        check(argv, folder, code=found.code)
        assert client.asked == asked, repr(client.text[:30])


# ---- an earlier start, and the disk

LINES = (
    b"x", b"{}", b"[]", b"null", b"{", b"\0", b"[" * 10_000, b'{"id": "1"}', b'{"id": [1]}',
    b'{"id": "1", "prompt": "KEY"}', b'{"id": "1", "prompt": "KEY", "text": 3}', b"\xff\xfe",
    b'{"id": "1", "prompt": "KEY", "text": "x", "cut": "no"}', b'{"id": "1", "prompt": "KE',
    b'{"id": "1", "prompt": "KEY", "text": "\\ud800"}',
    b'{"id": "1", "prompt": "KEY", "text": "x", "attempt": 1.5}',
)  # fmt: skip


def test_replies_of_an_earlier_start(folder, client):
    argv, file = words("--contexts", "c.jsonl"), folder / "o" / "conversation_replies.jsonl"
    check(argv, folder, code=0)
    key = json.loads(file.read_text())["prompt"].encode()
    for line, end in itertools.product(LINES, (b"\n", b"")):
        file.write_bytes(line.replace(b"KEY", key) + end)
        before = client.asked
        check(argv, folder, code=0)
        assert client.asked == before + 1, line
        assert json.loads(file.read_bytes().splitlines()[-1])["text"] == GOOD
    file.unlink()
    os.mkfifo(file)
    check(argv, folder, code=2, naming="conversation_replies.jsonl")


def test_a_full_disk(folder, client, monkeypatch):
    argv = words("--contexts", "c.jsonl")

    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return lambda *_: None

    begin = journal.Journal.__init__

    def opened(self, path):
        begin(self, path)
        self._file.close()
        self._file = Full()

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "__init__", opened)
        found = check(argv, folder, code=2)
        assert "No space left" in found.err
    (folder / "o" / "conversation.json").mkdir()
    check(argv, folder, code=2, naming="conversation.json")
    (folder / "o" / "conversation.json").rmdir()
    asked = client.asked
    check(argv, folder, code=0)
    assert client.asked == asked  # the reply was kept


# ---- options

NUMBERS = ("", "nan", "inf", "-inf", "-1", "0", "1e400", "x", "9" * 30, "1.5", "\x1b[2J")


def test_options(folder, client):
    for option in (
        "limit",
        "temperature",
        "max-tokens",
        "seed",
        "concurrency",
        "tries",
        "timeout",
        "requests-per-minute",
        "batch-size",
    ):
        for number in NUMBERS:
            found = check(
                words("--contexts", "c.jsonl", f"--{option}={number}", "--dry-run"), folder
            )
            if number in ("nan", "inf", "-inf", "x", "") or (number == "-1" and option != "seed"):
                assert found.code == 2 or option == "batch-size", (option, number)
    for more in (
        (), ("--contexts", "c.jsonl", "--captions", "coco.json"), ("--images", "c.jsonl"),
        ("--contexts", "c.jsonl", "--workdir", "photos"), ("--shots", "photos"),
        ("--contexts", "c.jsonl", "--price", "nan", "1"), ("--image-prefix", "x"),
        ("--contexts", "c.jsonl", "--price", "-1", "1"), ("--contexts", "c.jsonl", "--config", "x"),
        ("--captions", "coco.json", "--image-prefix", "../.."), ("--contexts", "c.jsonl",
        "--shots", "photos"), ("--captions", "coco.json", "--image-prefix", "/etc"),
    ):  # fmt: skip
        check(words(*more, "--dry-run"), folder, code=2)
    assert not client.asked and not (folder / "o").exists()
    for out in ("c.jsonl", "c.jsonl/x", "a\0b", "", "gs://b/x"):
        check(words("--contexts", "c.jsonl", out=out), folder, code=2)
