import dataclasses
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.data.chat import SENTINEL
from metamorph_jax.data.config import (
    CacheConfig,
    DataConfig,
    InputSpec,
    OrderConfig,
    ReadingConfig,
    RowConfig,
)
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.packing import FirstFit, PackedIterator, Size, assemble
from metamorph_jax.data.stream import ROW_FIELDS
from metamorph_jax.data.views import AnyRes, Single
from metamorph_jax.errors import TooManyBadSamples
from metamorph_jax.types import TEXT

P = 2


class Stream:
    """Items of given (text, images) sizes; None is a bad one. Tokens of item n are all n + 1."""

    sources = [types.SimpleNamespace(name="s")]

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, n):
        if self.sizes[n] is None:
            return {"index": n, "source": 0, "bad": "missing", "detail": f"file {n}"}
        text, k = self.sizes[n]
        length = text + k * P
        slots = np.full(length, -1, np.int32)
        slots[text:] = np.arange(k * P)
        targets = np.full(length, -1, np.int32)
        targets[:text] = n + 1
        visual = np.full(length, -1, np.int32)
        visual[text - 1 : -1] = slots[text:]
        return {
            "index": n, "source": 0, "misnamed": 0,
            "tokens": np.full(length, n + 1, np.int32), "positions": np.arange(length),
            "text_targets": targets, "image_slots": slots, "visual_targets": visual,
            "view_starts": text + P * np.arange(k),
            "cache": np.full(k, -1), "pixels": np.full((k, 1, 1, 3), n + 1, np.uint8),
        }  # fmt: skip


SPEC = InputSpec(Single(P, Preprocess(1)))


def rows_of(length=32, images=4, **kw):
    return DataConfig(row=RowConfig(length=length, images=images, **kw))


def iterator(sizes, config, rows=2, targets=0):
    stream = Stream(sizes)
    spec = dataclasses.replace(SPEC, visual_targets=targets)
    start = lambda n: iter([stream[k] for k in range(n, len(stream))])  # noqa: E731
    return PackedIterator(stream, start, config, spec, rows)


sizes = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 24), st.integers(0, 4))), max_size=60
)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 5), st.sampled_from(["first_fit", "pad"]),
       st.sampled_from([0, 8, 11]))  # fmt: skip
def test_every_sample_once_and_whole(sizes, B, open_rows, mode, limit):
    config = rows_of(open_rows=open_rows, packing=mode)
    seen = []
    for batch in iterator(sizes, config, B, limit):
        assert batch.tokens.shape == (B, 32) and batch.images.pixels.shape == (B, 4, 1, 1, 3)
        for b in range(B):
            segments = batch.segments[b]
            used = 0
            for s in range(1, segments.max() + 1):
                (where,) = np.nonzero(segments == s)
                assert (np.diff(where) == 1).all()
                n = int(batch.tokens[b, where[0]]) - 1
                text, k = sizes[n]
                assert len(where) == text + k * P and (batch.tokens[b, where] == n + 1).all()
                assert batch.positions[b, where].tolist() == list(range(len(where)))
                slots = batch.image_slots[b, where]
                assert slots.tolist() == [-1] * text + [used * P + i for i in range(k * P)]
                visual = batch.visual_targets[b, where[text - 1 : -1]]
                assert visual.tolist() == slots[text:].tolist()
                assert (batch.images.pixels[b, used : used + k] == n + 1).all()
                assert batch.images.valid[b, used : used + k].all()
                starts = where[text] + P * np.arange(k) if k else []
                assert batch.images.start[b, used : used + k].tolist() == list(starts)
                used += k
                seen.append(n)
            assert batch.images.valid[b].sum() == used
            assert not limit or (batch.visual_targets[b] >= 0).sum() <= limit
            empty = segments == 0
            assert (batch.text_targets[b, empty] == -1).all()
            assert (batch.image_slots[b, empty] == -1).all()
            if mode == "pad":
                assert segments.max() <= 1
    assert sorted(seen) == [n for n, size in enumerate(sizes) if size is not None]


TILES = AnyRes(4, Preprocess(2), ((2, 4), (4, 2), (4, 4)))


class Tiles(Stream):
    """Items of (text, sizes of images) whose images are in tiles; each pixel names its view."""

    def __getitem__(self, n):
        text, images = self.sizes[n]
        plans = [TILES.plan(size) for size in images]
        ids = np.array([n + 1] * text + [SENTINEL] * len(images) + [n + 1])
        rule = lambda labels, sentinels: np.arange(len(sentinels)) % 2 == 1  # noqa: E731
        row = build_row(ids, ids, [read_place(*plan) for plan in plans], 4, 10**6, rule)
        views = sum(count for count, _ in plans)
        pixels = np.zeros((views, 2, 2, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = n + 1, np.arange(views)[:, None, None]
        item = {name: getattr(row, name) for name in ROW_FIELDS}
        return item | {"index": n, "source": 0, "cache": np.full(views, -1), "pixels": pixels}


side = st.integers(1, 9)
tiled = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.tuples(side, side), max_size=3)), max_size=20
)


@settings(max_examples=100, deadline=None)
@given(tiled, st.integers(1, 3), st.integers(1, 5), st.sampled_from(["first_fit", "pad"]))
def test_rows_of_tiles(sizes, B, open_rows, mode):
    """Packed side by side, every slot still points into the views of its own image."""
    stream = Tiles(sizes)
    start = lambda n: iter([stream[k] for k in range(n, len(stream))])  # noqa: E731
    config = rows_of(length=100, images=15, open_rows=open_rows, packing=mode)
    it = PackedIterator(stream, start, config, InputSpec(TILES), B)
    for batch in it:
        images = batch.images
        for b, row in enumerate(it.last_rows):
            first = 0
            for segment, n in enumerate(row, 1):
                item = stream[n]
                (where,) = np.nonzero(batch.segments[b] == segment)
                views = np.arange(first, first + len(item["cache"]))
                assert images.valid[b, views].all()
                np.testing.assert_array_equal(images.pixels[b, views], item["pixels"])
                starts = item["view_starts"] + where[0]
                np.testing.assert_array_equal(images.start[b, views], starts)
                for name in ("image_slots", "visual_targets"):
                    own, here = item[name], getattr(batch, name)[b, where]
                    assert ((own < 0) == (here < 0)).all() and (here[own < 0] == own[own < 0]).all()
                    used = images.pixels[b, here[own >= 0] // 4, 0, 0]
                    assert (used[:, 0] == n + 1).all()
                    np.testing.assert_array_equal(used[:, 1], own[own >= 0] // 4)
                    np.testing.assert_array_equal(here[own >= 0] % 4, own[own >= 0] % 4)
                for view in views:  # `start` is the first column that reads the view, if one does
                    (columns,) = np.nonzero(batch.image_slots[b] // 4 == view)
                    assert not len(columns) or images.start[b, view] == columns[0]
                first += len(views)
            assert images.valid[b].sum() == first <= 15
            slots = batch.image_slots[b]
            assert len(set(slots[slots >= 0].tolist())) == (slots >= 0).sum()
            assert (batch.image_slots[b, batch.segments[b] == 0] == TEXT).all()


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 8))
def test_resume_is_exact(sizes, steps):
    o, most = rows_of(open_rows=3), 9
    whole = list(iterator(sizes, o, targets=most))
    it = iterator(sizes, o, targets=most)
    steps = min(steps, len(whole))
    for _ in range(steps):
        next(it)
    state = it.get_state()
    other = iterator(sizes, o, targets=most)
    other.set_state(state)
    rest = list(other)
    assert len(rest) == len(whole) - steps
    for a, b in zip(rest, whole[steps:], strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
    assert other.counts["s/missing"] == sizes.count(None)


def test_too_many_bad():
    it = iterator([(3, 0)] + [None] * 5, DataConfig(reading=ReadingConfig(max_bad_in_a_row=5)))
    with pytest.raises(TooManyBadSamples, match=r"file 5.*s/missing: 5"):
        next(it)


def test_visual_targets_fill_a_row_too():
    """Four samples of one image: as many of them share a row as its visual targets allow."""
    for limit, expected in ((0, [4]), (3 * P, [3, 1]), (2 * P + 1, [2, 2]), (P, [1, 1, 1, 1])):
        batches = iterator([(3, 1)] * 4, rows_of(images=8), 1, limit)
        assert [int(b.segments.max()) for b in batches] == expected
    packer = FirstFit(Size(32, 8, 5), 3)
    with pytest.raises(ValueError, match="visual_targets=6.* does not fit .*visual_targets=5"):
        packer.add("sample", Size(10, 3, 6))


def test_padding_batches():
    it = iterator([(3, 1)], DataConfig(order=OrderConfig(padding_batches=True)))
    assert next(it).segments.max() == 1
    for _ in range(3):
        assert next(it).segments.max() == 0


def test_changed_layout_is_refused():
    a, b = (
        PackedIterator(Stream([]), lambda n: iter(()), rows_of(), SPEC, 2, layout=text)
        for text in "ab"
    )
    with pytest.raises(ValueError, match="layout changed"):
        b.set_state(a.get_state())


def test_features_and_turns():
    config = DataConfig(
        row=RowConfig(length=8, images=2, independent_turns=True), cache=CacheConfig(features="f")
    )
    spec = InputSpec(Single(P), feature_width=3, tower="t")
    item = {**Stream([(2, 1)])[0], "cache": np.array([5]), "turns": np.array([0, 1, 1, 1])}
    rows = np.arange(6 * P * 3, dtype=np.float32).reshape(6, P, 3)
    batch = assemble([[item]], 1, config, spec, rows)
    np.testing.assert_array_equal(batch.images.features[0, 0], rows[5])
    assert batch.images.pixels is None and batch.turns[0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("length,images,goal", [(4096, 24, 0.99), (2048, 16, 0.98)])
def test_useful_positions(length, images, goal):
    """On the length mixture of the baselines: log-normal text, 64 + 2 positions an image."""
    rng = np.random.default_rng(0)
    n = 20_000
    text = np.maximum(np.exp(np.log(150) + 0.8 * rng.standard_normal(n)).astype(int), 8)
    kind = rng.random(n)
    held = np.select(
        [kind < 0.3, kind < 0.8, kind < 0.9], [0, 1, rng.integers(2, 4, n)], rng.integers(4, 11, n)
    )
    sizes = np.minimum(text + 66 * held, length)
    packer = FirstFit(Size(length, images), 16)
    rows = []
    for size, k in zip(sizes.tolist(), held.tolist(), strict=True):
        rows += packer.add(size, Size(size, k))
    assert np.mean([sum(r) for r in rows]) / length >= goal
