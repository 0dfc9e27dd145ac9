"""Referring expressions: box formats, overlap, and an official file in small."""

import pickle

import pytest

from metamorph_jax.errors import FileError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.scorers import boxes
from metamorph_jax.eval.tasks.base import Answer
from tests.eval.tasks.scripted import official, put, run


@pytest.mark.parametrize(
    "reply, form, box",
    [
        # 200 x 100 is padded by 50 above and below
        ("[0.5, 0.25, 1.0, 0.75]", "square", (100, 0, 200, 100)),
        ("It is at [0.50,0.00,1.00,1.00].", "unit", (100, 0, 200, 100)),
        ("(500,0)(999,999)", "thousand", (500 / 999 * 200, 0, 200, 100)),
        ("(100, 0), (200, 100)", "pixels", (100, 0, 200, 100)),
        ("the left one", "unit", None),
        ("[0.1, 0.2, 0.3]", "unit", None),
        ("a (red) one (1,2)(3,4)", "thousand", None),  # the first two pairs count
        ("(0,0)(nan,1)", "thousand", None),
    ],
)
def test_boxes_of_replies(reply, form, box):
    assert boxes.box_in(reply, form, (200, 100)) == (box and pytest.approx(box))


def test_iou():
    assert boxes.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert boxes.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert boxes.iou((3, 3, 1, 1), (1, 1, 3, 3)) == 0  # corners the wrong way round
    assert boxes.iou(boxes.NOTHING, boxes.NOTHING) == 0


def ref(number, split, *texts):
    return {"ref_id": number, "ann_id": 10 + number, "category_id": 1, "image_id": 42,
            "file_name": "COCO_train2014_000000000042_16.jpg", "split": split,
            "sentences": [{"sent_id": 100 * number + i, "sent": text, "raw": text}
                          for i, text in enumerate(texts)]}  # fmt: skip


REFS = [ref(1, "val", "left man", "man in red"), ref(2, "val", "dog"), ref(3, "testA", "woman")]
INSTANCES = {
    "images": [{"id": 42, "width": 200, "height": 100, "file_name": "x"}],
    "annotations": [{"id": 11, "bbox": [0, 0, 100, 100]}, {"id": 12, "bbox": [100, 0, 100, 100]}],
}


def test_refcoco(tmp_path):
    put(tmp_path / "refcoco", {
        "refs(unc).p": pickle.dumps(REFS, protocol=2), "instances.json": INSTANCES,
        "train2014/COCO_train2014_000000000042.jpg": b"x",
    })  # fmt: skip
    # right; half of it, which is enough; unparsable
    replies = {"100": "[0, 0, 0.5, 1]", "101": "[0, 0, 0.25, 1]", "200": "there"}
    result, model = run("refcoco:boxes=unit", tmp_path, replies, tmp_path / "out")
    assert model.asked["100"].prompt.endswith("this sentence describes. left man")
    assert result.scores == {"accuracy": pytest.approx(200 / 3), "IoU": pytest.approx(50)}
    assert result.unparsed == 1
    assert official(result)[0][1] == {"sent_id": 101, "ref_id": 1, "box": [0, 0, 50, 100]}


def test_as_mm_interleaved_asks(tmp_path):
    put(tmp_path / "refcoco", {"refs(unc).p": pickle.dumps(REFS), "instances.json": INSTANCES})
    task = tasks.make("refcoco:protocol=mm-interleaved", tmp_path)
    question = next(iter(task.questions()))
    assert question.prompt == (
        "<image>Provide the bounding box coordinate of the region this sentence describes. left "
        "man <box>"
    )
    record = task.record(question, Answer("(000,000)(499,999)</box>"))
    assert record["box"] == pytest.approx([0, 0, 499 / 999 * 200, 100]) and record["score"] == 1


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    put(tmp_path / "refcocog", {"refs(umd).p": pickle.dumps([Evil()]), "instances.json": INSTANCES})
    with pytest.raises(FileError, match="not a plain pickle: it wants to make a builtins.print"):
        list(tasks.make("refcocog", tmp_path).questions())


def test_a_split_without_expressions_is_an_error(tmp_path):
    put(tmp_path / "refcoco+", {"refs(unc).p": pickle.dumps(REFS), "instances.json": INSTANCES})
    with pytest.raises(FileError, match="no expressions of split test"):
        list(tasks.make("refcoco+:split=test", tmp_path).questions())
