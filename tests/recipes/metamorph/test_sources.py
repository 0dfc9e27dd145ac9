"""MetaMorph's own kinds of records, and their wordings."""

import os
import time

import numpy as np
import pytest

from metamorph_jax.data.sources import ImageRef, RecordSource, kinds, video
from metamorph_jax.errors import BadSample
from metamorph_jax.recipes.metamorph import KINDS, sources, wordings
from tests.data.conftest import clip, conversation  # noqa: F401  (clip is a fixture)

TABLE = kinds.known(KINDS)


def rng(seed=0):
    return np.random.default_rng(seed)


def build(record, seed=0, root="/data", **kw):
    files = kinds.Files(root)
    return kinds.build(record, "s", files, rng(seed), kinds=TABLE, **kw).checked(70)


def test_recognise():
    cases = {
        "text": {},
        "image": {"image": "a.jpg"},
        "images": {"image": ["a.jpg", "b.jpg"]},
        "video_qa": {
            "image": "v/x.mp4",
            "id": "1",
            "conversations": [{"from": "user", "value": "Q"}],
        },
        "frame_prediction": {"image": "v/x.webm", "conversations": [{"from": "user", "value": ""}]},
    }
    assert set(cases) | {"vstar", "visual_cot"} == set(TABLE)
    for kind, record in cases.items():
        assert kinds.recognise(record, TABLE) == kind
    assert kinds.recognise({"image": None}, TABLE) == "text"
    assert kinds.recognise({"image": "v/x.webm"}, TABLE) == "frame_prediction"


def test_names_don_t_choose_the_task(clip):  # noqa: F811
    """A conversation is kept whatever ids and paths are called; `kind` says otherwise."""
    said = conversation("<image>\nWhat? Additional information to focus on: cup.", "A cup.")
    for record in (
        {"id": "vstar_1", "image": "visual_cot/a.jpg"},
        {"id": "k700_1", "image": ["visual_cot/a.jpg"]},
        {"id": "howto", "image": "v.mp4"},
    ):
        sample = build(record | {"conversations": said}, root=os.path.dirname(clip))
        assert sample.kind in ("image", "images", "video_qa")
        assert [text.replace("<image>", "") for _, text in sample.turns] == [
            said[0]["value"].replace("<image>", ""), "A cup."
        ]  # fmt: skip
        asked = record | {"conversations": said, "kind": "frame_prediction", "image": "v.mp4"}
        assert build(asked, root=os.path.dirname(clip)).kind == "frame_prediction"
    with pytest.raises(BadSample, match="unknown_kind: `kind` is 'vqa', expected one of auto, vst"):
        build({"kind": "vqa", "conversations": said})
    ignored = build({"kind": "vqa", "conversations": conversation("Q", "A")}, ignore=("kind",))
    assert ignored.kind == "text"


@pytest.mark.parametrize("letters", ["a", "###[", "focus on", "bounding box ", " "])
def test_long_texts_take_no_time(letters):
    text = letters * (200_000 // len(letters))
    start = time.monotonic()
    sources.before_sentence(text, "bounding box")
    record = {"image": ["a.jpg", f"a.jpg{text}"], "conversations": conversation(*"abcd")}
    with pytest.raises(BadSample):
        build(record, kind="visual_cot")
    build({"conversations": conversation(text + "x", text + "y")})
    assert time.monotonic() - start < 1


def test_before_sentence():
    for text, want in (
        ("<image>\nWhat? Please give the Bounding Box now. And more", "<image>\nWhat?"),
        ("a bounding box", ""), ("No box at all. ", "No box at all."), ("İ. x bounding box", "İ."),
    ):  # fmt: skip
        assert sources.before_sentence(text, "bounding box") == want


@pytest.mark.parametrize("reason,record", [
    ("bad_crop", {"kind": "visual_cot", "image": ["a", "b##[1]"],
                  "conversations": conversation(*"abcd")}),
    ("bad_record", {"kind": "visual_cot", "image": ["a", "b###[1,2,3,4]"], "conversations": []}),
    ("bad_record", {"kind": "vstar", "image": "a", "conversations": conversation("a", "b")}),
    ("bad_boxes", {"kind": "vstar", "image": "a", "conversations": conversation("a", "b"),
                   "target_instances": [{"name": "x" * 999, "bbox": [1, 2, 3, 4]}]}),
])  # fmt: skip
def test_bad_records(reason, record):
    with pytest.raises(BadSample) as e:
        build(record)
    assert e.value.reason == reason


def test_visual_cot():
    record = {
        "image": ["visual_cot/a.jpg", "visual_cot/a.jpg###[10, 20, 30, 40]"],
        "kind": "visual_cot",
        "conversations": conversation(
            "<image>\nWhat does the sign say? Please give the bounding box coordinate of the "
            "region that helps.", "[0.1, 0.2, 0.3, 0.4]", "<image>", "Stop."),
    }  # fmt: skip
    starts = set()
    for seed in range(60):
        sample = build(record, seed)
        human, gpt = (text for _, text in sample.turns)
        assert human.endswith("<image>\nWhat does the sign say?")
        assert gpt.endswith(" <image> Stop.")
        starts.add(human.split("<image>")[0])
    assert sample.images[1] == ImageRef("/data/visual_cot/a.jpg", box=(10, 20, 30, 40))
    assert len(starts) > 8
    assert (len(wordings.THINK_HUMAN), len(wordings.THINK_GPT), len(wordings.THINK_BOXES)) == (
        13, 16, 15)  # fmt: skip


def test_vstar():
    boxes = [{"name": n, "bbox": [1, 2, 3, 4]} for n in ("cup", "dog", "cat")]
    record = {
        "id": "1", "kind": "vstar", "image": "a.jpg", "target_instances": boxes,
        "conversations": conversation(
            "<image>\nWhat colour is the cup? Additional visual information to focus on: cup.",
            "It is red."),
    }  # fmt: skip
    sample = build(record)
    human, gpt = (text for _, text in sample.turns)
    assert human.endswith("<image>\nWhat colour is the cup?")
    assert "cup, dog, and cat" in gpt and "<image>" in gpt and gpt.endswith("It is red.")
    assert [m[0] for m in sample.images[1].marks] == ["cup", "dog", "cat"]
    assert len({i.key() for i in sample.images}) == 2


def test_frame_templates():
    """Markers fit the frames; every frame exists; each template comes up."""
    seen = set()
    for seed in range(400):
        n = 2 + seed % 7
        question, answer, which = wordings.frame_prediction(n, 0.5, rng(seed))
        assert (question + answer).count("<image>") == len(which)
        assert all(0 <= i < n for i in which)
        assert "{" not in question + answer
        if n > 2:
            seen.add(answer.split("<image>")[0])
    assert len(seen) == 7
    for seed in range(300):  # "order" shows the frames in order, and says nothing else
        question, answer, which = wordings.frame_prediction(6, 0.5, rng(seed))
        if "shuffled" in question:
            half = len(which) // 2
            assert which[half:] == sorted(which[:half]) and not any(c.isdigit() for c in answer)
    assert len(wordings.TWO_FRAMES) == 12
    assert sum("{step}" in q for q, _ in wordings.TWO_FRAMES) == 11


def test_random_step():
    info = video.VideoInfo(frames=100, fps=10.0)
    for seed in range(50):
        assert 0.2 <= sources.random_step(info, rng(seed)) <= 5.0


def test_frame_prediction(clip):  # noqa: F811
    root = os.path.dirname(clip)
    source = RecordSource("v", [{"id": "h", "image": "v.mp4"}], kinds.Files(root), kinds=TABLE)
    for seed in range(20):
        a, b = source.sample(0, rng(seed)), source.sample(0, rng(seed))
        assert a == b and len(a.images) >= 2
    assert len({source.sample(0, rng(seed)).turns for seed in range(20)}) > 5
