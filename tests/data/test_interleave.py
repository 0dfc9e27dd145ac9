import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.data.chat import IGNORE, SENTINEL
from metamorph_jax.data.interleave import AfterSupervisedStart, build_row, read_place, text_place
from metamorph_jax.data.views import Single
from metamorph_jax.types import NEWLINE

START, END = 50, 51
RULE = AfterSupervisedStart(START)


def build(ids, labels, P, limit, **kw):
    """A row in which every image is one view of P tokens."""
    places = [read_place(*Single(P).plan())] * list(ids).count(SENTINEL)
    return build_row(ids, labels, places, P, limit, RULE, **kw)


def naive(ids, labels, places, P, limit):
    """The rule walked one token at a time: [(token, label, slot, predicted)], kept images, views.

    `places`: of each image, its slots (from its own first view), and its number of views.
    """
    row, image, view = [], 0, 0
    for k, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token != SENTINEL:
            row.append((token, label if label >= 0 else -1, -1, False))
            continue
        slots, views = places[image]
        if len(row) + len(slots) > limit:
            break
        answer = k > 0 and labels[k - 1] == START
        row += [(0, -1, s + view * P if s >= 0 else s, answer and s >= 0) for s in slots]
        image, view = image + 1, view + views
    return row[:limit], image, view


@st.composite
def samples(draw):
    ids, labels = [], []
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.integers(0, 3))
        on = draw(st.booleans())
        new = [[draw(st.integers(1, 40))], [SENTINEL], [START, SENTINEL, END], [START]][kind]
        ids += new
        labels += new if on else [IGNORE] * len(new)
    return ids, labels


@settings(max_examples=300, deadline=None)
@given(samples(), st.integers(1, 5), st.integers(1, 40), st.data())
def test_equals_naive_walk(sample, P, limit, data):
    """With single views, and with images of several views whose tokens are partly read."""
    ids, labels = sample
    count = ids.count(SENTINEL)
    whole = [(list(range(P)), 1)] * count
    partly = st.integers(1, 3).flatmap(
        lambda views: st.tuples(
            st.lists(st.integers(0, views * P - 1), unique=True, max_size=views * P).map(
                lambda slots: [x for s in slots for x in (s, NEWLINE)[: 1 + s % 2]]
            ),
            st.just(views),
        )
    )
    chosen = data.draw(st.one_of(st.just(whole), st.lists(partly, min_size=count, max_size=count)))
    want, images, views = naive(ids, labels, chosen, P, limit)
    places = [read_place(v, np.array(slots, np.int32)) for slots, v in chosen]
    row = build_row(np.array(ids, int), np.array(labels, int), places, P, limit, RULE)
    n = len(want)
    assert len(row) == n and len(row.image_starts) == images and len(row.view_starts) == views
    assert row.tokens.tolist() == [w[0] for w in want]
    assert row.positions.tolist() == list(range(n))
    assert row.image_slots.tolist() == [w[2] for w in want]
    assert row.text_targets.tolist() == [w[1] for w in want[1:]] + [-1] * (n > 0)
    assert row.visual_targets.tolist() == [w[2] if w[3] else -1 for w in want[1:]] + [-1] * (n > 0)
    view = 0
    for k, (slots, number) in enumerate(chosen[:images]):
        start = row.image_starts[k]
        for v in range(number):
            inside = [i for i, s in enumerate(slots) if s >= 0 and s // P == v]
            assert row.view_starts[view + v] == start + min(inside, default=0)
        view += number
    firsts = [ids[k - 1] == labels[k - 1] == START if k else False
              for k, token in enumerate(ids) if token == SENTINEL]  # fmt: skip
    assert row.predicted.tolist() == firsts[:images]


def test_image_first_or_after_an_image_is_context():
    ids = np.array([SENTINEL, SENTINEL, START, SENTINEL, END])
    row = build(ids, ids, 2, 99)
    assert row.predicted.tolist() == [False, False, True]


def test_ids_in_an_image_s_stead():
    """An image that is drawn, not read: its tokens are text, supervised as its sentinel is."""
    ids = np.array([7, SENTINEL, 8, SENTINEL, 9])
    places = [text_place([30, 31]), read_place(*Single(2).plan())]
    row = build_row(ids, ids, places, 2, 99)
    assert row.tokens.tolist() == [7, 30, 31, 8, 0, 0, 9]
    assert row.image_slots.tolist() == [-1, -1, -1, -1, 0, 1, -1]
    assert row.text_targets.tolist() == [30, 31, 8, -1, -1, 9, -1]
    assert row.image_starts.tolist() == [1, 4] and row.view_starts.tolist() == [4]
    labels = np.array([7, IGNORE, 8, SENTINEL, 9])
    assert build_row(ids, labels, places, 2, 99).text_targets.tolist()[:3] == [-1, -1, 8]
    with pytest.raises(ValueError, match="2 images in the text, places for 1"):
        build_row(ids, ids, places[:1], 2, 99)


def test_dangling_start():
    ids = np.array([1, START, SENTINEL, END])
    labels = np.array([IGNORE, START, SENTINEL, END])
    assert build(ids, labels, 4, 5).text_targets.tolist() == [START, -1]
    cut = build(ids, labels, 4, 5, mask_dangling=[START])
    assert cut.text_targets.tolist() == [-1, -1] and len(cut.image_starts) == 0
    whole = build(ids, labels, 4, 7, mask_dangling=[START])
    assert whole.text_targets[0] == START


def test_turns():
    ids = np.array([9, START, SENTINEL, END, 1, 2, 3, 4, 5])
    labels = np.array([IGNORE] * 4 + [IGNORE, 2, 3, 4, 5])
    turns = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    row = build(ids, labels, 2, 99, turns=turns)
    assert row.turns.tolist() == [0] * 5 + [1, 1, 2, 2, 2]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    # 3 is not predicted from the last token of turn 1, which turn 2 does not see.
    assert row.text_targets.tolist() == [-1] * 5 + [2, -1, 4, 5, -1]


# ---- golden ------------------------------------------------------------------------------------


def _cases(config):
    root = pathlib.Path(config.getoption("--golden-root"))
    return json.loads((root / "metamorph/meta.json").read_text())["arrays"]["packing.npz"]["cases"]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(_cases(metafunc.config)))


@pytest.mark.golden
def test_packing_golden(case, golden_root):
    """Labels, masks, flags and which images are targets, for every packing case."""
    meta = json.loads((golden_root / "metamorph/meta.json").read_text())
    info, special = meta["arrays"]["packing.npz"]["cases"][case], meta["special_ids"]
    P = meta["config"]["ntok"]
    with np.load(golden_root / "metamorph/packing.npz") as z:
        data = {k.split("/", 1)[1]: z[k] for k in z.files if k.startswith(case + "/")}
    ids, labels = data["input_ids"], data.get("labels")
    mask = data.get("attention_mask", np.ones_like(ids)).astype(bool)
    L = data["inputs_embeds"].shape[1]
    stack, targets, rows = 0, [], []
    for b in range(len(ids)):
        one = ids[b][mask[b]]
        count = int((one == special["image_placeholder"]).sum())
        row = build_row(
            one, None if labels is None else labels[b][mask[b]],
            [read_place(*Single(P).plan())] * count, P, info["max_length"],
            AfterSupervisedStart(special["image_start"]),
        )  # fmt: skip
        rows.append(row)
        targets += [stack + k for k in np.flatnonzero(row.predicted)]
        stack += max(count, 1)  # 1: the dummy image
    assert stack == info["n_images"] and max(len(r) for r in rows) == L

    for b, row in enumerate(rows):
        n = len(row)
        here = slice(L - n, L) if info["padding_side"] == "left" else slice(0, n)
        if "out_attention_mask" in data:
            got = np.zeros(L, int)
            got[here] = 1
            assert got.tolist() == data["out_attention_mask"][b].tolist()
        if "out_labels" in data:
            want = data["out_labels"][b][here]
            assert np.where(want < 0, -1, want)[1:].tolist() == row.text_targets[:-1].tolist()
        if "out_position_ids" in data:
            assert row.positions.tolist() == data["out_position_ids"][b][here].tolist()
        flags = np.zeros(L, int)
        flags[here][1:] = row.visual_targets[:-1] >= 0
        assert flags.tolist() == data["image_positions"][b].tolist()
    if "image_embeds" in data:
        want = data["image_embeds"][targets] if targets else data["image_embeds"][:0]
        np.testing.assert_array_equal(want, data["targets"])
    else:
        assert len(targets) == len(data["targets"])
