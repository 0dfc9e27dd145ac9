"""Rows of kind `augmented`: frames of clips, mirrored scenes, crops around boxes."""

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data import images
from metamorph_jax.data.sources import kinds
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.data.sources.kinds import Files
from metamorph_jax.errors import BadSample
from metamorph_jax.eval.scorers import boxes
from metamorph_jax.recipes.mm_interleaved import tuning_sources
from metamorph_jax.recipes.mm_interleaved.tuning_sources import KINDS, thousandths, written

SIZE = (200, 100)
BOX = (20, 30, 90, 80)


def record(text, answer, image="a.png", **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": "1", "image": image, "conversations": turns, "kind": "augmented", **more}


def build(record, root, seed=0):
    return kinds.build(record, "s", Files(str(root)), np.random.default_rng(seed),
                       kinds=kinds.known(KINDS))  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """An image that is white in BOX and black elsewhere, and a clip of three frames."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tiles = np.zeros((3 * 128, 128, 3), np.uint8)
    tiles += np.arange(3, dtype=np.uint8).repeat(128)[:, None, None]
    Image.fromarray(tiles).save(tmp_path / "clip.png")
    return tmp_path


def white(sample):
    """The box that is white in the image of a sample, in its pixels, and the image's size."""
    (image,) = images.load(sample.images)
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 128)
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), image.size


def test_written_boxes():
    assert written(thousandths(BOX, SIZE)) == "(099,299)(449,799)"
    assert written(thousandths((-3, 0, 200, 101), SIZE)) == "(000,000)(999,999)"


def test_nothing_is_changed_that_is_not_asked_for(root):
    sample = build(record(f"{IMAGE}left?", "(099,299)(449,799)"), root)
    assert sample.turns == (("user", f"{IMAGE}left?"), ("assistant", "(099,299)(449,799)"))
    assert not sample.images[0].mirror and sample.images[0].box is None


def test_mirrored(root):
    text = "the leftmost dog, RIGHT of a bright Left-hand copyright"
    row = record(f"{IMAGE}{text}", "(099,299)(449,799)", flip=True)
    samples = [build(row, root, seed) for seed in range(20)]
    mirrored = [sample for sample in samples if sample.images[0].mirror]
    assert 4 < len(mirrored) < 16
    (_, asked), (_, answer) = mirrored[0].turns
    assert asked == f"{IMAGE}the rightmost dog, LEFT of a bright Right-hand copyright"
    assert answer == "(550,299)(900,799)"
    box, size = white(mirrored[0])
    found = boxes.box_in(answer, "thousand", size)
    assert found == pytest.approx(box, abs=0.3)


def test_all_images_of_a_record_are_mirrored_together(root):
    row = record(f"{IMAGE}a street.", IMAGE, ["a.png", "a.png"], flip=True)
    pairs = {tuple(ref.mirror for ref in build(row, root, seed).images) for seed in range(12)}
    assert pairs == {(False, False), (True, True)}


def test_a_crop_has_the_whole_box(root):
    row = record(f"{IMAGE}the dog", "<box>(099,299)(449,799)</box>", crop=True)
    parts = set()
    for seed in range(30):
        sample = build(row, root, seed)
        box, size = white(sample)
        found = boxes.box_in(sample.turns[1][1], "thousand", size)
        assert found == pytest.approx(box, abs=1.2)
        assert (box[2] - box[0], box[3] - box[1]) == (70, 50)  # nothing of it is cut off
        parts.add(sample.images[0].box)
    assert len(parts) > 20 and all(0 <= x1 and x2 <= 200 and y2 <= 100 for x1, _, x2, y2 in parts)


@pytest.mark.parametrize("word", ["left", "the upper one", "in the centre", "behind"])
def test_what_has_a_direction_is_not_cropped(root, word):
    sample = build(record(f"{IMAGE}dog {word}", "(099,299)(449,799)", crop=True), root)
    assert sample.images[0].box is None


def test_square(root):
    sample = build(record(f"{IMAGE}a", "b", square=True), root)
    (image,) = images.load(sample.images)
    assert image.size == (200, 200) and images.sizes(sample.images) == [(200, 200)]


def test_one_frame_of_each_clip(root):
    row = record(f"{IMAGE}then", IMAGE, ["clip.png", "a.png"], tiles=[3, 0])
    seen = set()
    for seed in range(20):
        sample = build(row, root, seed)
        first, second = images.load(sample.images)
        assert first.size == (128, 128) and second.size == SIZE
        seen.add(np.asarray(first).max())
        assert np.asarray(first).min() == np.asarray(first).max()
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"flip": "yes"}, "`flip` is yes, expected true or false"),
        ({"tiles": [1, 2]}, "`tiles` must have a number for each of 1 images"),
        ({"tiles": [-1]}, "`tiles` must have"),
    ],
)
def test_records_that_are_wrong(root, more, message):
    with pytest.raises(BadSample, match=message):
        build(record(f"{IMAGE}a", "b", **more), root)


def test_the_kind_is_asked_for(root):
    plain = record(f"{IMAGE}a", "b", flip=True)
    del plain["kind"]
    assert build(plain, root).kind == "image"
    assert tuning_sources.KINDS.keys() == {"augmented"}
