"""Rows of documents one after another, cut where they end: `row.packing="concat"`."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.data.chat import Markers
from metamorph_jax.data.concat import Concat, part
from metamorph_jax.data.config import (
    DataConfig,
    DrawingSpec,
    InputSpec,
    OrderConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import no_image
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.data.sources.kinds import Documents
from metamorph_jax.data.views import AnyRes, Single
from metamorph_jax.errors import ConfigError

GOLDEN = "mm_interleaved/packing.json"
BOS, EOS, SOI = 1, 2, 3
P = 3


def document(index, tokens, images, soi=SOI, tokens_per_image=P):
    """A document as `SampleStream` has it; its images are the numbers `images`."""
    tokens = np.array(tokens, np.int32)
    starts = np.flatnonzero(tokens == soi).astype(np.int32) + 1
    assert len(starts) == len(images)
    slots = np.full(len(tokens), -1, np.int32)
    for k, at in enumerate(starts):
        slots[at : at + tokens_per_image] = np.arange(tokens_per_image) + k * tokens_per_image
    targets = np.full(len(tokens), -1, np.int32)
    targets[:-1] = np.where(slots[1:] < 0, tokens[1:], -1)
    pixels = np.broadcast_to(
        np.array(images, np.int32)[:, None, None, None], (len(images), 1, 1, 3)
    )
    drawn = targets[starts - 2] == soi
    return {
        "index": index, "source": 0, "tokens": tokens, "text_targets": targets,
        "positions": np.arange(len(tokens), dtype=np.int32), "image_slots": slots,
        "visual_targets": np.full(len(tokens), -1, np.int32), "view_starts": starts,
        "cache": np.full(len(starts), -1), "pixels": pixels,
        "drawing_starts": starts[drawn] - 1, "drawings": pixels[drawn],
    }  # fmt: skip


def row_of(pieces):
    """(tokens, images, begins of documents) of a row of pieces."""
    tokens = np.concatenate([piece["tokens"] for piece in pieces])
    images = [int(k) for piece in pieces for k in piece["pixels"][:, 0, 0, 0]]
    begins, at = [], 0
    for piece in pieces:
        if piece.get("piece", (0, 0))[0] == 0:
            begins.append(at)
        at += len(piece["tokens"])
    return tokens, images, np.array(begins, int)


def pytest_generate_tests(metafunc):
    import pathlib

    if "case" in metafunc.fixturenames:
        root = pathlib.Path(metafunc.config.getoption("--golden-root"))
        metafunc.parametrize("case", range(len(json.loads((root / GOLDEN).read_text()))))


@pytest.mark.golden
def test_rows_of_the_reference(case, golden_root):
    """Every row of every case, its images, and where the document of each image begins."""
    case = json.loads((golden_root / GOLDEN).read_text())[case]
    soi, many = case["soi"], sum(len(given["image_keys"]) for given in case["inputs"])
    level = {"image": "image", "sample": "document"}[case["truncation_level"]]
    most = case["max_num_images"] if case["max_num_images"] > 0 else many
    n = case["num_img_token"]
    packer, rows = Concat(case["num_total_token"], most, level, 1, n, n), []
    for k, one in enumerate(case["inputs"]):
        keys = [int(key) for key in one["image_keys"]]
        rows += packer.add(document(k, one["text_ids"], keys, soi, n))
    assert len(rows) == len(case["outputs"])
    for pieces, want in zip(rows, case["outputs"], strict=True):
        tokens, images, begins = row_of(pieces)
        assert tokens.tolist() == want["text_ids"]
        assert images == want["image_keys"]
        assert len(images) == want["meta"]["image_cnt"]
        places = np.flatnonzero(tokens == soi)
        nearest = [int(begins[begins < at].max(initial=0)) for at in places]
        assert nearest == want["nearest_bos_idxs"]
        assert (
            sum(at - bos < 2 for at, bos in zip(places, nearest, strict=True))
            == (want["meta"]["uncond_image_cnt"])
        )


class Stream:
    """Documents in place of a `SampleStream`: each a list of texts' lengths and images (0)."""

    sources = [types.SimpleNamespace(name="s")]
    chat = types.SimpleNamespace(markers=Markers((SOI,)))

    def __init__(self, documents):
        self.documents, number = [], 10
        for index, parts in enumerate(documents):
            tokens, images = [BOS], []
            for length in parts:
                tokens += [SOI, *[0] * P] if length == 0 else [100 + index] * length
                images += [] if length else [number + len(images)]
            self.documents.append(document(index, [*tokens, EOS], images))
            number += len(images)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, n):
        return dict(self.documents[n])


def config(length=20, images=3, **row):
    row = RowConfig(length=length, images=images, packing="concat", **row)
    return DataConfig(row=row, order=OrderConfig())


SPEC = InputSpec(Single(P, Preprocess(1)), drawings=DrawingSpec(3, no_image, Preprocess(1)))


def iterator(documents, rows=2, **row):
    stream = Stream(documents)
    start = lambda n: iter([stream[k] for k in range(n, len(stream))])  # noqa: E731
    return PackedIterator(stream, start, config(**row), SPEC, rows)


documents = st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 7, 30]), max_size=6), max_size=15)
levels = st.sampled_from(["image", "document"])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(documents, levels)
def test_nothing_is_lost_and_no_image_divided(texts, level):
    stream, packer = Stream(texts), Concat(20, 3, level, 1, P, P)
    rows = [row for k in range(len(stream)) for row in packer.add(stream[k])]
    rows += packer.flush()
    assert not packer.waiting
    whole = [token for item in stream.documents for token in item["tokens"]]
    assert [token for row in rows for token in row_of(row)[0]] == whole
    every = [image for item in stream.documents for image in item["pixels"][:, 0, 0, 0]]
    assert [image for row in rows for image in row_of(row)[1]] == every
    for row in rows:
        tokens, images, _ = row_of(row)
        assert 0 < len(tokens) <= 20 and len(images) <= 3
        for piece in row:
            at = piece["view_starts"]
            assert (piece["tokens"][at - 1] == SOI).all()
            assert (piece["image_slots"] >= 0).sum() == P * len(at)
            assert piece["image_slots"].max(initial=-1) == P * len(at) - 1
            np.testing.assert_array_equal(piece["image_slots"][at], P * np.arange(len(at)))
            shown = dict(zip(at - 1, piece["pixels"][:, 0, 0, 0], strict=True))
            drawn = zip(piece["drawing_starts"], piece["drawings"][:, 0, 0, 0], strict=True)
            assert all(shown[start] == image for start, image in drawn)
            targets = piece["text_targets"]
            assert (targets[:-1][targets[:-1] >= 0] == piece["tokens"][1:][targets[:-1] >= 0]).all()
            assert targets[-1] == -1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(documents, levels, st.integers(0, 6), st.booleans())
def test_resume_is_exact(texts, level, steps, crossing):
    row = dict(cut_at=level, crossing=crossing)
    whole = list(iterator(texts, **row))
    it = iterator(texts, **row)
    steps = min(steps, len(whole))
    for _ in range(steps):
        next(it)
    other = iterator(texts, **row)
    other.set_state(json.loads(json.dumps(it.get_state())))
    rest = list(other)
    assert len(rest) == len(whole) - steps
    for a, b in zip(rest, whole[steps:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    list(it)
    assert other.counts == it.counts and other.get_state() == it.get_state()


def test_batches_isolated_and_crossing():
    """Two documents and the begin of a third; its tail is a document of its own."""
    texts = [[4, 0], [2, 0], [0, 1, 0], [9]]
    batch = next(iterator(texts, rows=2, images=2, length=22))
    crossing = next(iterator(texts, rows=2, images=2, length=22, crossing=True))
    for field in ("tokens", "text_targets", "image_slots"):
        np.testing.assert_array_equal(getattr(batch, field), getattr(crossing, field))
    assert batch.segments[0].tolist() == [1] * 10 + [2] * 8 + [3] + [0] * 3
    np.testing.assert_array_equal(crossing.segments, np.minimum(batch.segments, 1))
    assert batch.positions[0, :19].tolist() == [*range(10), *range(8), 0]
    assert crossing.positions[0, :19].tolist() == [*range(19)]
    assert batch.drawings.start[0, :2].tolist() == [5, 13]
    assert batch.images.start[0, :2].tolist() == [6, 14]
    # The third document's first image moved to the next row, where nothing stands before it.
    assert batch.images.start[1, :2].tolist() == [1, 6]
    assert batch.drawings.start[1].tolist() == [5, 0, 0]
    assert batch.drawings.valid.sum(1).tolist() == [2, 1]


def test_a_document_longer_than_a_row_is_cut_at_its_image():
    """Where the document can't move, the published code fails on an empty row."""
    stream = Stream([[10, 0, 3, 0, 3, 0]])
    packer = Concat(13, 3, "document", 1, P, P)
    rows = packer.add(stream[0]) + packer.flush()
    assert [len(row_of(row)[0]) for row in rows] == [11, 13, 6]
    (tail,) = rows[1]
    assert tail["piece"] == (11, 24) and tail["drawing_starts"].tolist() == [7]
    again = part(part(stream[0], 11, 30, P), 0, 13, P)
    jax.tree.map(np.testing.assert_array_equal, tail, again)


def test_rows_without_images_are_dropped_and_counted():
    it = iterator([[30], [30], [3, 0]], rows=1)
    batches = list(it)
    assert it.counts == {"rows/without_images": 3} and len(batches) == 1
    assert (batches[0].tokens[0] == SOI).sum() == 1


def test_every_source_has_its_rows():
    """Each with its own limits; an interrupted run resumes with what waits of all of them."""
    pairs = Documents(cut_at="document", row_images=1)
    cfg = dataclasses.replace(
        config(images=2), sources=(SourceConfig("a"), SourceConfig("b", documents=pairs))
    )
    texts = [[1, 0], [2, 0], [3, 0]] * 5
    stream = Stream(texts)
    stream.sources = [types.SimpleNamespace(name=name) for name in "ab"]
    for n, item in enumerate(stream.documents):
        item["source"] = n % 2

    def begin():
        start = lambda n: iter([stream[k] for k in range(n, len(stream))])  # noqa: E731
        return PackedIterator(stream, start, cfg, SPEC, 2)

    whole, it = list(begin()), begin()
    counts = {0: [], 1: []}
    for batch in whole:
        for sources, segments, valid in zip(
            batch.sources, batch.segments, batch.images.valid, strict=True
        ):
            if (segments > 0).any():
                (source,) = set(sources[segments > 0].tolist())
                counts[source].append(int(valid.sum()))
    assert sum(counts[0]) == 8 and max(counts[0]) == 2
    assert sum(counts[1]) == 7 and max(counts[1]) == 1
    next(it)
    other = begin()
    other.set_state(json.loads(json.dumps(it.get_state())))
    assert len(it.get_state()["open"]) == 2
    for a, b in zip(other, whole[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_it_is_not_for():
    wrong = dict(
        needs_size=InputSpec(AnyRes(4, Preprocess(2), ((2, 4),))),
        places=dataclasses.replace(SPEC, drawings=DrawingSpec(2, no_image, Preprocess(1))),
        targets=dataclasses.replace(SPEC, visual_targets=9),
        ids=dataclasses.replace(SPEC, drawings=DrawingSpec(3, no_image, Preprocess(1), (7,))),
    )
    for spec in wrong.values():
        with pytest.raises(ConfigError, match=r'row.packing="concat"'):
            PackedIterator(Stream([]), lambda n: iter(()), config(), spec, 2)
    with pytest.raises(ConfigError, match="an image takes 4"):
        iterator([], length=3)
    with pytest.raises(ValueError, match="row.cut_at is 'text'"):
        RowConfig(cut_at="text")
    with pytest.raises(ValueError, match="row.crossing has no independent_turns"):
        RowConfig(crossing=True, independent_turns=True)
