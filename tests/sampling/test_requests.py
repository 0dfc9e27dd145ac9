"""Prompts from a file, and where their images stand."""

import dataclasses
import json
import os

import pytest
from PIL import Image

from metamorph_jax.errors import BadSample, FileError
from metamorph_jax.sampling.requests import Request, as_sample, place, read_requests


def _place(prompt, images=0, video=""):
    return place(Request("0", prompt, ("x.png",) * images, video))


def test_place():
    assert _place("look") == "look"
    assert _place("look", 2) == "<image><image>\nlook"
    assert place(Request("0", "look", ("x.png",)), lead="") == "<image>look"
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
        {"prompt": "d", "confirm": "Is it d?"},
        {"prompt": "d", "confirm": ["Is it d?", "Is <image> d?"]},
        {"prompt": "d", "confirm": [3]},
        {"prompt": "d", "confirm": "<image> or <image>?"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n{broken\n")
    found, bad = read_requests(str(file))
    x, y, z = (str(tmp_path / name) for name in ("x.png", "y.png", "z.mp4"))
    assert found == [
        Request("1", "a"),
        Request("7", "b", (x,), think=True),
        Request("v", "c", (x, y), z),
        Request("9", "d", confirm=("Is it d?",)),
        Request("10", "d", confirm=("Is it d?", "Is <image> d?")),
    ]
    said = capsys.readouterr().err.splitlines()
    assert bad == len(said) == 8
    for line, text in zip(
        said,
        ["4: id 'v' appears twice", "5: expected", "6: unknown key picture", "7: images must be",
         "8: video must be", "11: confirm must be", "12: a question to confirm", "14: "],
        strict=True,
    ):  # fmt: skip
        assert f"{file}, line {text}" in line


def test_mode_and_rounds(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "a", "mode": "both", "rounds": 3}, {"prompt": "b", "mode": "film"},
             {"prompt": "c", "rounds": True}, {"prompt": "d", "mode": ["text"]}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_requests(str(file)) == ([Request("1", "a", mode="both", rounds=3)], 3)


def test_a_literal_prompt_is_a_source(tmp_path):
    """Which no chat template is put around, see `data/chat_templates.py`."""
    image = tmp_path / "1.png"
    Image.new("RGB", (8, 8)).save(image)
    text = "Human:<Img><image></Img> Draw."
    request = Request("1", text, (str(image),), literal=True)
    made = as_sample(request)
    assert made.turns == (("source", text),) and made.images[0].path == str(image)
    with pytest.raises(BadSample, match="1 markers, 2 images"):
        as_sample(dataclasses.replace(request, images=request.images * 2))
    with pytest.raises(ValueError, match="no turns before"):
        as_sample(dataclasses.replace(request, before=(("system", "Hello."),)))


def test_annotations(tmp_path, capsys):
    """MM-Interleaved's annt.json: images at their sentences, before or after them."""
    good = {
        "sentences": ["A kite.", " It flies. ", "Down."], "images": ["k.png", "f.png", "g.png"],
        "sentence_ixs": [1, 0, 1], "image_first": [False, True, True],
        "generate_mode": "generate_both", "num_iter": 4,
    }  # fmt: skip
    plain = {"sentences": ["A", "B"], "images": ["k.png"], "sentence_ixs": [0], "id": "x"}
    wrong = {
        "expected an object": [],
        "unknown key picture": {"picture": "a"},
        "sentences must be a list of texts": {"sentences": "A"},
        "images must be a list of texts": {"images": [1]},
        "sentences must not have <image>": {"sentences": ["<image>", "B"]},
        "sentence_ixs must be a list of 1 numbers, one for each": {"sentence_ixs": [0, 1]},
        "sentence_ixs must be a list of 1 numbers": {"sentence_ixs": [True]},
        "sentence_ixs must be 0 to 1, of the sentences": {"sentence_ixs": [2]},
        "image_first must be true or false, or a list": {"image_first": "yes"},
        "generate_mode is 'film', expected generate_texts,": {"generate_mode": "film"},
        "generate_mode is \\[\\], expected": {"generate_mode": []},
        "num_iter must be a whole number of 0 to 1000": {"num_iter": -1},
        "id 'x' appears twice": {},
        "the prompt is empty": {"id": "y", "sentences": [], "images": [], "sentence_ixs": []},
    }
    records = [good, plain, *(plain | w if isinstance(w, dict) else w for w in wrong.values())]
    file = tmp_path / "annt.json"
    file.write_text(json.dumps(records))
    found, bad = read_requests(str(file))
    prompt = "<image>A kite.<image>It flies.<image>Down."
    paths = tuple(str(tmp_path / name) for name in ("f.png", "g.png", "k.png"))
    assert found == [
        Request("0", prompt, paths, mode="both", rounds=4),
        Request("x", "A<image>B", (str(tmp_path / "k.png"),)),
    ]
    assert as_sample(found[0]).turns == (("user", prompt),)
    said = capsys.readouterr().err.splitlines()
    assert bad == len(said) == len(wrong)
    for k, (line, why) in enumerate(zip(said, wrong, strict=True), 2):
        assert f"{file}, record {k}: {why.replace(chr(92), '')}" in line
    file.write_text("{}")
    with pytest.raises(FileError, match=f"{os.path.basename(file)} holds an object, not a list"):
        read_requests(str(file))
