import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.data.packing import FirstFit, PackedIterator, PackOptions, assemble
from metamorph_jax.errors import TooManyBadSamples

P = 2


class Stream:
    """Items of given (text, pictures) sizes; None is a bad one. Tokens of item n are all n + 1."""

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
            "cache": np.full(k, -1), "pixels": np.full((k, 1, 1, 3), n + 1, np.uint8),
        }  # fmt: skip


def options(B=2, L=32, I=4, **kw):
    return PackOptions(B, L, I, P, pixel_shape=(1, 1, 3), **kw)


def iterator(sizes, o):
    stream = Stream(sizes)
    return PackedIterator(stream, lambda n: iter([stream[k] for k in range(n, len(stream))]), o)


sizes = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 24), st.integers(0, 4))), max_size=60
)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 5), st.sampled_from(["first_fit", "pad"]),
       st.sampled_from(["left", "right"]), st.sampled_from([0, 8, 11]))  # fmt: skip
def test_every_sample_once_and_whole(sizes, B, open_rows, mode, side, limit):
    o = options(B, open_rows=open_rows, mode=mode, side=side, visual_targets_per_row=limit)
    seen = []
    for batch in iterator(sizes, o):
        assert batch.tokens.shape == (B, 32) and batch.pixels.shape == (B, 4, 1, 1, 3)
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
                assert (batch.pixels[b, used : used + k] == n + 1).all()
                assert batch.image_valid[b, used : used + k].all()
                used += k
                seen.append(n)
            assert batch.image_valid[b].sum() == used
            assert not limit or (batch.visual_targets[b] >= 0).sum() <= limit
            empty = segments == 0
            assert (batch.text_targets[b, empty] == -1).all()
            assert (batch.image_slots[b, empty] == -1).all()
            if mode == "pad":
                assert segments.max() <= 1
            if side == "left" and not empty.all():
                assert segments[-1] > 0
    assert sorted(seen) == [n for n, size in enumerate(sizes) if size is not None]


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 8))
def test_resume_is_exact(sizes, steps):
    o = options(open_rows=3, visual_targets_per_row=9)
    whole = list(iterator(sizes, o))
    it = iterator(sizes, o)
    steps = min(steps, len(whole))
    for _ in range(steps):
        next(it)
    state = it.get_state()
    other = iterator(sizes, o)
    other.set_state(state)
    rest = list(other)
    assert len(rest) == len(whole) - steps
    for a, b in zip(rest, whole[steps:], strict=True):
        for name in ("tokens", "segments", "image_slots", "pixels"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert other.counts["s/missing"] == sizes.count(None)


def test_too_many_bad():
    it = iterator([(3, 0)] + [None] * 5, options(max_bad_in_a_row=5))
    with pytest.raises(TooManyBadSamples, match=r"file 5.*s/missing: 5"):
        next(it)


def test_visual_targets_fill_a_row_too():
    """Four samples of one picture: as many of them share a row as its visual targets allow."""
    for limit, expected in ((0, [4]), (3 * P, [3, 1]), (2 * P + 1, [2, 2]), (P, [1, 1, 1, 1])):
        o = options(1, I=8, visual_targets_per_row=limit)
        assert [int(b.segments.max()) for b in iterator([(3, 1)] * 4, o)] == expected
    packer = FirstFit(32, 8, 3, targets=5)
    with pytest.raises(ValueError, match="6 visual targets does not fit into a row of 32, 8 and 5"):
        packer.add("sample", 10, 3, 6)


def test_padding_batches():
    it = iterator([(3, 1)], options(padding_batches=True))
    assert next(it).segments.max() == 1
    for _ in range(3):
        assert next(it).segments.max() == 0


def test_changed_layout_is_refused():
    a = PackedIterator(Stream([]), lambda n: iter(()), options(), layout="a")
    b = PackedIterator(Stream([]), lambda n: iter(()), options(), layout="b")
    with pytest.raises(ValueError, match="layout changed"):
        b.set_state(a.get_state())


def test_features_and_turns():
    o = PackOptions(1, 8, 2, P, feature_width=3, turns=True)
    item = {**Stream([(2, 1)])[0], "cache": np.array([5]), "turns": np.array([0, 1, 1, 1])}
    rows = np.arange(6 * P * 3, dtype=np.float32).reshape(6, P, 3)
    batch = assemble([[item]], o, rows)
    np.testing.assert_array_equal(batch.features[0, 0], rows[5])
    assert batch.pixels is None and batch.turns[0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("length,images,goal", [(4096, 24, 0.99), (2048, 16, 0.98)])
def test_useful_positions(length, images, goal):
    """On the length mixture of the baselines: log-normal text, 64 + 2 positions a picture."""
    rng = np.random.default_rng(0)
    n = 20_000
    text = np.maximum(np.exp(np.log(150) + 0.8 * rng.standard_normal(n)).astype(int), 8)
    kind = rng.random(n)
    pictures = np.select(
        [kind < 0.3, kind < 0.8, kind < 0.9], [0, 1, rng.integers(2, 4, n)], rng.integers(4, 11, n)
    )
    sizes = np.minimum(text + 66 * pictures, length)
    packer = FirstFit(length, images, 16)
    rows = []
    for size, k in zip(sizes.tolist(), pictures.tolist(), strict=True):
        rows += packer.add(size, size, k)
    assert np.mean([sum(r) for r in rows]) / length >= goal
