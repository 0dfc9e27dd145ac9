"""Prompts from a file, and where their images stand."""

import json

import pytest

from metamorph_jax.errors import BadSample
from metamorph_jax.sampling.requests import Request, as_sample, place, read_requests


def _place(prompt, images=0, video=""):
    return place(Request("0", prompt, ("x.png",) * images, video))


def test_place():
    assert _place("look") == "look"
    assert _place("look", 2) == "<image><image>\nlook"
    assert _place("a <image> b", 1) == "a <image> b"
    assert _place("look", 0, "a.mp4") == "<video>look"
    assert _place("look", 1, "a.mp4") == "<image><video>\nlook"
    with pytest.raises(BadSample, match="1 markers, 2 images"):
        as_sample(Request("0", "a <image> b", ("x.png", "y.png")))


def test_read_requests(tmp_path, capsys):
    """Good lines become requests, each bad one is named and counted."""
    lines = [
        {"prompt": "a"},
        {"id": 7, "prompt": "b", "image": "x.png", "think": True},
        {"id": "v", "prompt": "c", "images": ["x.png", "y.png"], "video": "z.mp4"},
        {"id": "v", "prompt": "again"},
        {"prompt": 3},
        {"prompt": "d", "picture": "x.png"},
        {"prompt": "d", "images": [3]},
        {"prompt": "d", "video": 3},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n{broken\n")
    found, bad = read_requests(str(file))
    x, y, z = (str(tmp_path / name) for name in ("x.png", "y.png", "z.mp4"))
    assert found == [
        Request("1", "a"),
        Request("7", "b", (x,), think=True),
        Request("v", "c", (x, y), z),
    ]
    said = capsys.readouterr().err.splitlines()
    assert bad == len(said) == 6
    for line, text in zip(
        said,
        ["4: id 'v' appears twice", "5: expected", "6: unknown key picture", "7: images must be",
         "8: video must be", "10: "],
        strict=True,
    ):  # fmt: skip
        assert f"{file}, line {text}" in line
