"""Ways to write a record that are read alike, and keys that are refused."""

import json
import pathlib

import pytest

from metamorph_jax.data.sources.schema import canonical
from metamorph_jax.errors import BadSample
from tests.data.conftest import conversation

SAID = conversation("<image>\nQ", "A")
READ = [{"from": "user", "value": "<image>\nQ"}, {"from": "assistant", "value": "A"}]
BASE = {"image": "a.png", "conversations": SAID}


def openai(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


@pytest.mark.parametrize(
    "record, image",
    [
        ({"image": "a.png", "conversations": SAID}, "a.png"),
        ({"images": ["a.png"], "conversations": SAID}, ["a.png"]),
        ({"images": "a.png", "conversations": SAID}, "a.png"),
        ({"image": "a.png", "images": "a.png", "conversations": SAID}, "a.png"),
        ({"image": None, "video": "a.mp4", "conversations": SAID}, "a.mp4"),
        ({"videos": ["a.mp4"], "image": "", "conversations": SAID}, ["a.mp4"]),
        ({"images": ["a.png"], "messages": openai("<image>\nQ", "A")}, ["a.png"]),
        ({"image": "a.png", "messages": openai([{"type": "image"}, {"type": "text", "text": "\nQ"}],
                                               "A")}, "a.png"),
        ({"messages": openai([{"type": "image_url", "image_url": {"url": "a.png"}},
                              {"type": "text", "text": "\nQ"}], "A")}, ["a.png"]),
        ({"messages": openai([{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nQ"}],
                             [{"type": "text", "text": "A"}])}, ["a.png"]),
        ({"image": "a.png", "conversations": [{"from": "Human", "value": "<image>\nQ"},
                                              {"from": "GPT", "value": "A"}]}, "a.png"),
    ],
)  # fmt: skip
def test_read_alike(record, image):
    assert canonical(record) == {"image": image, "conversations": READ}


def test_system_messages():
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
    want = {"system": "S", "conversations": turns}
    assert canonical({"system": "S", "conversations": conversation("Q", "A")}) == want
    assert canonical({"messages": openai("S", "Q", "A", first="system")}) == want
    with pytest.raises(BadSample, match="turn 0 is a system turn, expected it first only"):
        canonical({"system": "S", "messages": openai("T", "Q", "A", first="system")})


@pytest.mark.parametrize(
    "key, value",
    [
        ("width", 640), ("source", "coco"), ("image_id", "000000123"), ("image_size", [640, 480]),
        ("video_id", "k700"), ("num_images", 2), ("url", "http://a.b/c.jpg"), ("label", "cat"),
        ("question_id", 7), ("caption", "A cat on a mat."), ("score", 0.3), ("clip", 0.31),
        ("frames", 120), ("coco_url", "http://a.b/c.png"), ("file_name", "train/a.png"),
        ("fps", 30.0), ("task", "vqa"), ("model", ""), ("images_dropped", None), ("split", "train"),
        ("bbox", [1, 2, 3, 4]), ("answer", "A"), ("dataset", "x"), ("data_source", "y"),
        ("message_count", 4), ("Id", 3), ("language", "en"), ("category", ["a"]), ("metadata", {}),
    ],
)  # fmt: skip
def test_metadata_is_passed_over(key, value):
    assert canonical(BASE | {key: value})["conversations"] == READ


@pytest.mark.parametrize(
    "key, value, meant",
    [
        ("Image", "b.png", "image"), ("IMAGES", ["b"], "images"), ("imgae", "b", "image"),
        ("img", "b", "image"), ("image_path", "b", "image"), ("picture", "b", "image"),
        ("video_path", "b", "video"), ("Videos", ["b"], "videos"), ("conversation", SAID, "conv"),
        ("mesages", SAID, "messages"), ("system_prompt", "Be brief.", "system"),
        ("frames", ["b"], "im"),
        ("dialog", SAID, "conversations"), ("Kind", "vstar", "kind"),
    ],
)  # fmt: skip
def test_keys_that_look_like_content_are_refused(key, value, meant):
    with pytest.raises(BadSample, match=f"unknown_key: `{key}`: did you mean `{meant}"):
        canonical(BASE | {key: value})
    assert canonical(BASE | {key: value}, ignore=(key,))["conversations"] == READ


def test_paths_that_nothing_reads_are_refused():
    for key, value in (("mask", "b.png"), ("second", ["c.jpg"]), ("target", "d/e.MP4"),
                       ("audio", "f.wav")):  # fmt: skip
        with pytest.raises(BadSample, match=f"`{key}` names the file .* known are id, image"):
            canonical(BASE | {key: value})
    with pytest.raises(BadSample, match="turn 0: `image` names the file b.png"):
        canonical({"conversations": [SAID[0] | {"image": "b.png"}, SAID[1]]})


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"image": "a.png", "images": ["b.png"], "conversations": SAID}, "both `image` and"),
        ({"conversations": SAID, "messages": openai("Q", "A")}, "both `conversations` and"),
        ({"image": 7, "conversations": SAID}, "`image` is int, expected a path"),
        ({"image": ["a", None], "conversations": SAID}, "`image` is NoneType"),
        ({"conversations": "Q"}, "not a list of turns"),
        ({"conversations": [{"from": "narrator", "value": "Q"}]}, "turn 0 is by 'narr"),
        ({"messages": openai("Q", None)}, "turn 1 needs a text"),
        ({"messages": [{"role": "user", "content": "Q", "tool_calls": [1]}]}, "`tool_calls`"),
        ({"messages": [{"role": "assistant", "content": "Q", "weight": 0}]}, "`weight` is not"),
        ({"messages": openai([{"type": "input_audio"}], "A")}, "a part of type 'input_audio'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(record, reason):
    with pytest.raises(BadSample, match=reason):
        canonical(record)


def test_the_records_of_the_docs_are_read():
    text = (pathlib.Path(__file__).parents[2] / "docs/data.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```json\n")[1:]]
    decoder, found = json.JSONDecoder(), []
    for block in blocks:
        while block.strip():
            record, end = decoder.raw_decode(block := block.lstrip())
            found.append(canonical(record))
            block = block[end:]
    assert len(found) >= 5 and all(record["conversations"] for record in found)
