"""The row of the module's docstring, and two documents in two segments."""

import numpy as np
import pytest

from metamorph_jax.recipes.mm_interleaved import documents
from metamorph_jax.types import Images

BOS, EOS, SOI = 1, 2, 60
#          0  1    2  3  4  5    6  7  8    9   10  11   12 13 14   15 16
TOKENS = [BOS, 7, SOI, 0, 0, 8, SOI, 0, 0, EOS, BOS, 9, SOI, 0, 0, EOS, 0]
ONE = [1] * 16 + [0]
TWO = [1] * 10 + [2] * 6 + [0]
IMAGES = Images(np.array([[True, True, True, False]]), np.array([[3, 7, 13, 0]], np.int32))
AT = np.array([[2, 6, 12]], np.int32)


def starts(segments, bos):
    return documents.document_starts(np.array([TOKENS]), np.array([segments]), bos)


@pytest.mark.parametrize(("segments", "bos"), [(ONE, BOS), (TWO, -1), (TWO, BOS)])
def test_documents(segments, bos):
    found = np.asarray(starts(segments, bos))[0]
    assert found.tolist() == [0] * 10 + [10] * 6 + [16]


def test_without_bos_a_segment_is_one_document():
    assert np.asarray(starts(ONE, -1))[0].tolist() == [0] * 16 + [16]


def test_an_image_is_seen_from_its_first_token_to_the_end_of_its_document():
    seen = np.asarray(documents.visibility(starts(TWO, -1), IMAGES))[0]
    where = [np.flatnonzero(seen[:, k]).tolist() for k in range(4)]
    assert where == [[*range(3, 10)], [*range(7, 10)], [13, 14, 15], []]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_images_before_a_drawing_are_those_of_its_document(count):
    seen = documents.visibility(starts(TWO, -1), IMAGES)
    images, there = (np.asarray(x)[0] for x in documents.preceding_images(seen, AT, count))
    assert [i[t].tolist() for i, t in zip(images, there, strict=True)] == [[], [0], []]
    after = documents.preceding_images(seen, np.array([[9]], np.int32), count)
    images, there = (np.asarray(x)[0, 0] for x in after)
    assert images[there].tolist() == [0, 1][-count:]
