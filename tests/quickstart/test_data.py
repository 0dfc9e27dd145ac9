"""easy-vqa as LLaVA files: on a small copy made here, and on the real package when installed."""

import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.convert import packages
from metamorph_jax.quickstart import data as qd


@pytest.fixture
def source(tmp_path):
    """Two of every colour x shape to train on, one to test on, in easy-vqa's layout."""
    root = tmp_path / "easy-vqa"
    for split, copies in (("train", 2), ("test", 1)):
        (root / split / "images").mkdir(parents=True)
        questions = []
        classes = [(c, s) for c in qd.COLORS for s in qd.SHAPES] * copies
        for n, (color, shape) in enumerate(classes):
            pixels = np.full((64, 64, 3), 240 + n % 8, np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{n}.png")
            questions += [
                ["what color is the shape?", color, n],
                [f"is there not a {shape} in the image?", "no", n],
                ["is there a red shape?", "yes" if color == "red" else "no", n],
            ]
        (root / split / "questions.json").write_text(json.dumps(questions))
    return root


@pytest.mark.parametrize(
    "question, kind",
    [
        ("what color is the rectangle?", "color"),
        ("what is the color of the shape?", "color"),
        ("what is the blue shape?", "shape"),
        ("what shape does the image contain?", "shape"),
        ("is there a red shape?", "is it this color?"),
        ("is no teal shape present?", "is it not this color?"),
        ("does the image contain a circle?", "is it this shape?"),
        ("does the image not contain a circle?", "is it not this shape?"),
    ],
)
def test_question_type(question, kind):
    assert qd.question_type(question) == kind
    assert kind in qd.QUESTION_TYPES


@pytest.mark.parametrize(
    "turns, labels",
    [
        ([("what is the blue shape?", "circle")], ("blue", "circle")),
        ([("what color is the triangle?", "teal")], ("teal", "triangle")),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], ("red", "circle")),
        ([("is there a circle?", "no"), ("is there not a triangle?", "yes")], (None, "rectangle")),
        ([("is there a red shape?", "no")], (None, None)),
        ([(f"is there a {c} shape?", "no") for c in qd.COLORS[1:]], (qd.COLORS[0], None)),
    ],
)
def test_image_labels(turns, labels):
    assert qd.image_labels(turns) == labels


def test_contradiction():
    with pytest.raises(ValueError, match="contradicting"):
        qd.image_labels([("what shape is present?", "circle"), ("is there a circle?", "no")])


def test_files(source, tmp_path):
    data = qd.prepare(tmp_path / "out", source)
    train = qd.read_jsonl(data.vqa_train)
    assert len(train) == 48
    first = train[0]
    assert first["image"] == "images/train/0.png" and (data.root / first["image"]).is_file()
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt"] * 3
    markers = [turn["value"].count("<image>") for turn in first["conversations"]]
    assert markers == [1, 0, 0, 0, 0, 0]

    drawn = qd.read_jsonl(data.draw_train)
    labels = json.loads(data.labels.read_text())["train"]
    assert len(drawn) == 48 - 2 * len(qd.HELD_OUT)
    for sample in drawn:
        color, shape = labels[sample["image"].split("/")[2].removesuffix(".png")]
        assert (color, shape) not in qd.HELD_OUT
        request, reply = (turn["value"] for turn in sample["conversations"])
        assert color in request and shape in request and reply.count("<image>") == 1

    questions = qd.read_jsonl(data.questions_test)
    assert len(questions) == 72 and {q["type"] for q in questions} <= set(qd.QUESTION_TYPES)
    numbers, pixels, color, shape = qd.labelled_images(data, "test")
    assert pixels.shape == (24, 64, 64, 3) and len(set(zip(color, shape, strict=True))) == 24
    assert numbers.tolist() == list(range(24))


def test_no_test_image_or_wording_in_training_files(source, tmp_path):
    data = qd.prepare(tmp_path / "out", source)
    for path in (data.vqa_train, data.draw_train):
        assert all(sample["image"].startswith("images/train/") for sample in qd.read_jsonl(path))
    seen = {sample["conversations"][0]["value"] for sample in qd.read_jsonl(data.draw_train)}
    requests = qd.read_jsonl(data.draw_test)
    assert len(requests) == len({(r["color"], r["shape"]) for r in requests}) == 24
    assert not seen & {request["prompt"] for request in requests}
    assert {(r["color"], r["shape"]) for r in requests if r["held_out"]} == set(qd.HELD_OUT)
    assert not set(qd.TRAIN_WORDINGS) & set(qd.TEST_WORDINGS)


def test_same_parameters_write_the_same_bytes_and_nothing_twice(source, tmp_path):
    def contents(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    a = qd.prepare(tmp_path / "a", source, seed=3)
    b = qd.prepare(tmp_path / "b", source, seed=3)
    assert contents(a.root) == contents(b.root)
    before = a.vqa_train.stat().st_mtime_ns
    qd.prepare(tmp_path / "a", source, seed=3)
    assert a.vqa_train.stat().st_mtime_ns == before
    qd.prepare(tmp_path / "a", source, seed=4)
    assert contents(a.root) != contents(b.root)


def test_interrupted_run_is_finished(source, tmp_path):
    whole = qd.prepare(tmp_path / "whole", source)
    cut = qd.prepare(tmp_path / "cut", source)
    cut.manifest.unlink()
    cut.draw_train.unlink()
    (cut.images / "train" / "3.png").unlink()
    qd.prepare(tmp_path / "cut", source)
    assert cut.draw_train.read_bytes() == whole.draw_train.read_bytes()
    assert (cut.images / "train" / "3.png").is_file()


def test_small_sets_keep_every_class(source, tmp_path):
    data = qd.prepare(tmp_path / "out", source, train_images=24, test_images=12)
    labels = json.loads(data.labels.read_text())
    assert len(labels["train"]) == 24 and len({tuple(v) for v in labels["train"].values()}) == 24
    assert len(labels["test"]) == 12


def test_real_package(tmp_path):
    if not packages.installed("easy-vqa"):
        pytest.skip(packages.PACKAGES["easy-vqa"].pip)
    data = qd.prepare(tmp_path, train_images=48, test_images=24)
    manifest = json.loads(data.manifest.read_text())
    assert manifest["counts"]["train"]["images"] == 48
    _, pixels, color, shape = qd.labelled_images(data, "train")
    # The label, read off the questions, agrees with the pixels: the rarest strong colour is it.
    assert len(set(zip(color, shape, strict=True))) == 24
    for image, c in zip(pixels, color, strict=True):
        flat = image.reshape(-1, 3).astype(int)
        shade = flat[np.abs(flat - flat[0]).sum(1) > 100].mean(0)
        name = qd.COLORS[c]
        dominant = {"red": 0, "green": 1, "blue": 2}.get(name)
        if dominant is not None:
            assert shade.argmax() == dominant, name
        if name == "black":
            assert shade.max() < 100
