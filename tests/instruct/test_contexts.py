"""What is known of images: COCO's files, JSON lines, and folders."""

import json
import os

import pytest

from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.instruct.contexts import Context, read_coco, read_folder, read_lines

IMAGES = [
    {"id": 9, "file_name": "000000000009.jpg", "width": 640, "height": 480},
    {"id": 25, "file_name": "000000000025.jpg", "width": 200, "height": 100},
]


def coco(tmp_path, captions, boxes=()):
    notes = [{"id": k, "image_id": i, "caption": c} for k, (i, c) in enumerate(captions)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": IMAGES, "annotations": notes}))
    notes = [{"id": k, "image_id": i, "category_id": c, "bbox": b, "segmentation": [[0, 1] * 9]}
             for k, (i, c, b) in enumerate(boxes)]  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dining table"}]
    value = {"images": IMAGES, "annotations": notes, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(value))
    return str(tmp_path / "captions.json"), str(tmp_path / "instances.json")


def test_coco(tmp_path):
    captions, instances = coco(
        tmp_path,
        [(9, "A cat.\n"), (25, " A  dog. "), (9, "One cat.")],
        [(9, 1, [64, 48, 128, 96.5]), (9, 2, [600, 0, 80, 480]), (25, 2, [0, 0, 66.6666, 50])],
    )
    bad = []
    first, second = read_coco(captions, instances, "train2017", bad.append)
    assert not bad
    assert first.image == "train2017/000000000009.jpg" and first.id == "9"
    assert first.text(boxes=True) == (
        "A cat.\nOne cat.\n\ncat: [0.1, 0.1, 0.3, 0.301]\ndining table: [0.938, 0.0, 1.0, 1.0]"
    )
    assert first.text(boxes=False) == "A cat.\nOne cat."
    assert second.text(boxes=True) == "A dog.\n\ndining table: [0.0, 0.0, 0.333, 0.5]"
    (alone, _) = read_coco(captions, None, "", bad.append)
    assert alone == Context("9", "000000000009.jpg", ("A cat.", "One cat."))


def test_coco_with_faults(tmp_path):
    captions, instances = coco(
        tmp_path, [(9, "A cat."), (9, None), (25, "See <image>")],
        [(9, 7, [0, 0, 1, 1]), (9, 1, [0, 0]), (404, 1, [0, 0, 1, 1]), (9, 1, "xyzw"),
         (9, 1, [10**400, 0, 1, 1])],
    )  # fmt: skip
    bad = []
    (only,) = read_coco(captions, instances, "", bad.append)
    assert only == Context("9", "000000000009.jpg", ("A cat.",))
    assert sorted(error.reason for error in bad) == ["bad_box"] * 5 + ["bad_record",
                                                                      "unknown_marker"]  # fmt: skip


@pytest.mark.parametrize("text, message", [
    ("[]", "holds a list, not an object; expected a file of COCO captions"),
    ('{"images": []}', "lacks lists of objects in `images`, `annotations`"),
    ('{"images": [1], "annotations": []}', "lacks lists of objects"),
    ("{", "is not JSON"),
])  # fmt: skip
def test_what_is_not_coco(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=message):
        read_coco(str(tmp_path / "a.json"), None, "", print)


def lines(tmp_path, *records):
    texts = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    bad = []
    return read_lines(str(tmp_path / "a.jsonl"), bad.append), bad


def test_lines_hold_what_records_write(tmp_path):
    context = Context("x/1", "a/b.jpg", ("A cat.",), (("cat", (0.0, 0.25, 1.0, 0.5)),))
    assert lines(tmp_path, context.record(), "", {"id": 2, "image": "c.jpg"}) == (
        [context, Context("2", "c.jpg")], [],
    )  # fmt: skip


@pytest.mark.parametrize("record, reason", [
    ("{", "bad_json"),
    ("[]", "bad_json"),
    ({"image": "a.jpg"}, "bad_record"),
    ({"id": True, "image": "a.jpg"}, "bad_record"),
    ({"id": 1}, "bad_record"),
    ({"id": 1, "image": "/a.jpg"}, "bad_path"),
    ({"id": 1, "image": "http://there/a.jpg"}, "bad_path"),
    ({"id": 1, "image": "../a.jpg"}, "path_outside_root"),
    ({"id": 1, "image": "a.jpg", "captions": "A cat."}, "bad_record"),
    ({"id": 1, "image": "a.jpg", "captions": [None]}, "bad_record"),
    ({"id": 1, "image": "a.jpg", "instances": ["cat"]}, "bad_record"),
    ({"id": 1, "image": "a.jpg", "instances": [{"category": "cat", "bbox": [1, 2, 3, 4]}]},
     "bad_box"),
    ({"id": 1, "image": "a.jpg", "instances": [{"category": "cat", "bbox": [0.5, 0, 0.1, 1]}]},
     "bad_box"),
    ({"id": 1, "image": "a.jpg", "instances": [{"bbox": [0, 0, 1, 1]}]}, "bad_box"),
])  # fmt: skip
def test_lines_that_are_left_out(tmp_path, record, reason):
    found, bad = lines(tmp_path, record, {"id": 7, "image": "b.jpg"}, {"id": "7", "image": "c.jpg"})
    assert [context.image for context in found] == ["b.jpg"]
    assert [error.reason for error in bad] == [reason, "repeated_id"]
    assert "a.jsonl, line 1" in bad[0].detail


def test_a_folder(tmp_path):
    for name in ("z.JPG", "b/a.png", "b/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    bad = []
    found = read_folder(str(tmp_path), bad.append)
    assert [(c.id, c.image) for c in found] == [(n, n) for n in ("z.JPG", "b/a.png", "b/c.webp")]
    assert [error.reason for error in bad] == ["bad_path"]
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingFile, match="none holds no images"):
        read_folder(str(tmp_path / "none"), print)
