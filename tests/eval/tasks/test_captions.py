"""Captions: official files in small. The tools themselves are tested with the scorers."""

import json
import math

import pytest

from metamorph_jax.errors import FileError
from metamorph_jax.eval import tasks
from tests.eval.tasks.scripted import official, put, run

pytest.importorskip("pycocoevalcap", reason="scores of captions")
SPEC = "tokenizer=python"


def karpathy(name, split, *texts, **more):
    return {"filename": name, "split": split, "imgid": int(name[0]),
            "sentences": [{"raw": text} for text in texts], **more}  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    images = [
        karpathy(
            "1.jpg", "test", "A dog runs.", "A dog is running.", filepath="val2014", cocoid=10
        ),
        karpathy("2.jpg", "train", "A tree.", filepath="train2014", cocoid=20),
        karpathy("3.jpg", "test", "A red cat on a mat.", filepath="val2014", cocoid=30),
    ]
    return put(tmp_path, {"coco_caption/dataset_coco.json": {"images": images},
                          "coco_caption/val2014/1.jpg": b"x",
                          "coco_caption/val2014/3.jpg": b"x"})  # fmt: skip


def test_coco(coco, tmp_path):
    replies = {"10": "A dog\nruns. It is fast.", "30": "A blue car"}
    spec = f"coco_caption:{SPEC},first_sentence=true"
    result, model = run(spec, coco, replies, tmp_path / "out", resamples=20)
    assert model.asked["10"].prompt == "Describe the image briefly."
    assert official(result)[0] == [
        {"image_id": 10, "caption": "A dog runs"}, {"image_id": 30, "caption": "A blue car"}
    ]  # fmt: skip
    first, second = (record["score"] for record in result.records)
    assert first > second
    assert result.scores["CIDEr"] == pytest.approx(1000 * (first + second) / 2)
    # 4 of 6 words are right, and 6 are fewer than 3 and 6.
    assert result.scores["BLEU-1"] == pytest.approx(100 * 4 / 6 * math.exp(1 - 9 / 6))
    assert "METEOR" not in result.scores and "ROUGE-L" in result.scores
    low, high = result.intervals["CIDEr"]
    assert low == pytest.approx(1000 * second) and high == pytest.approx(1000 * first)


def test_files_as_mm_interleaved_has_them(tmp_path):
    """The same captions of the same images, from other files."""
    image = "val2014/COCO_val2014_000000000010.jpg"
    rows = [{"image": image, "caption": ["A dog runs.", "A dog is running."]}]
    flickr = {"images": [{"id": 1, "file_name": "1.jpg"}],
              "annotations": [{"image_id": 1, "caption": "A dog."}]}  # fmt: skip
    paragraphs = {"annotations": [{"image_id": 7, "caption": "A kite. The sky is blue.",
                                   "url": "https://x.test/VG_100K_2/7.jpg"}]}  # fmt: skip
    put(tmp_path, {
        "coco_caption/coco_karpathy_test.json": rows,
        "flickr30k/test1k.token.coco_format": json.dumps(flickr),
        "image2paragraph/annotations/paragraphs_coco.json": paragraphs,
        "image2paragraph/annotations/test_split.json": [7],
    })  # fmt: skip
    for name, id, place, count in (("coco_caption", "10", image, 2),
                                   ("flickr30k", "1", "flickr30k-images/1.jpg", 1),
                                   ("image2paragraph", "7", "VG_100K_2/7.jpg", 1)):  # fmt: skip
        (question,) = tasks.make(f"{name}:{SPEC}", tmp_path).questions()
        assert question.id == id and len(question.gold) == count
        assert question.images == (str(tmp_path / name / place),)


def test_flickr30k(tmp_path):
    images = [karpathy("1.jpg", "test", "A dog."), karpathy("2.jpg", "test", "A cat.")]
    put(tmp_path / "flickr30k", {"dataset_flickr30k.json": {"images": images},
                                 "flickr30k-images/1.jpg": b"x",
                                 "flickr30k-images/2.jpg": b"x"})  # fmt: skip
    result, _ = run(f"flickr30k:{SPEC}", tmp_path, {"1": "a dog", "2": "a cat"}, tmp_path / "out")
    assert result.scores["ROUGE-L"] == pytest.approx(100)


def test_nocaps_by_domain(tmp_path):
    domains = ["in-domain", "in-domain", "out-domain", "out-domain"]
    images = [{"id": k, "file_name": f"{k}.jpg", "domain": domain}
              for k, domain in enumerate(domains)]  # fmt: skip
    given = ["a dog", "a cat", "a zebra", "a tapir"]
    put(tmp_path / "nocaps", {
        "nocaps_val_4500_captions.json": {
            "images": images,
            "annotations": [{"image_id": k, "caption": text} for k, text in enumerate(given)],
        },
        **{f"val/{k}.jpg": b"x" for k in range(4)},
    })  # fmt: skip
    replies = {"0": "a dog", "1": "a cat", "2": "a car", "3": "a bus"}
    result, _ = run(f"nocaps:{SPEC}", tmp_path, replies, tmp_path / "out")
    assert result.scores["CIDEr out-domain"] == 0
    # "a" is in all captions of a domain and has no weight; the other words have all of it.
    assert result.scores["CIDEr in-domain"] > result.scores["CIDEr"] > 0


def test_nocaps_for_the_server(tmp_path):
    images = [{"id": 7, "file_name": "7.jpg"}]
    put(tmp_path / "nocaps", {"nocaps_test_image_info.json": {"images": images},
                              "test/7.jpg": b"x"})  # fmt: skip
    result, _ = run("nocaps:split=test", tmp_path, {"7": "a dog"}, tmp_path / "out")
    assert result.scores == {}
    assert official(result)[0] == [{"image_id": 7, "caption": "a dog"}]


def test_image2paragraph(tmp_path):
    def paragraph(key, text):
        return {"image_id": key, "url": f"https://x.org/a/VG_100K/{key}.jpg", "paragraph": text}

    put(tmp_path / "image2paragraph", {
        "paragraphs_v1.json": [paragraph(1, "old"), paragraph(2, "A cat."), paragraph(1, "A dog.")],
        "test_split.json": [2, 1], "VG_100K/1.jpg": b"x", "VG_100K/2.jpg": b"x",
    })  # fmt: skip
    spec = f"image2paragraph:{SPEC}"
    result, _ = run(spec, tmp_path, {"1": "A dog.", "2": "A cat."}, tmp_path / "out")
    assert [record["gold"] for record in result.records] == [["A cat."], ["A dog."]]
    put(tmp_path / "image2paragraph", {"test_split.json": [3]})
    with pytest.raises(FileError, match="has no paragraph of image 3"):
        list(tasks.make(spec, tmp_path).questions())
