import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.data.chat import IGNORE, SENTINEL
from metamorph_jax.data.interleave import build_row

START, END = 50, 51


def naive(ids, labels, P, limit):
    """The rule walked one token at a time: [(token, label, slot, answer)], kept pictures."""
    row, picture, full = [], 0, False
    for k, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if full:
            break
        if token != SENTINEL:
            row.append((token, label if label >= 0 else -1, -1, False))
            continue
        if len(row) + P > limit:
            full = True
            continue
        answer = k > 0 and labels[k - 1] == START
        row += [(0, -1, picture * P + i, answer) for i in range(P)]
        picture += 1
    return row[:limit], picture


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
@given(samples(), st.integers(1, 5), st.integers(1, 40))
def test_equals_naive_walk(sample, P, limit):
    ids, labels = sample
    want, pictures = naive(ids, labels, P, limit)
    row = build_row(np.array(ids, int), np.array(labels, int), P, limit, START)
    n = len(want)
    assert len(row) == n and len(row.kept) == pictures
    assert row.tokens.tolist() == [w[0] for w in want]
    assert row.positions.tolist() == list(range(n))
    assert row.image_slots.tolist() == [w[2] for w in want]
    assert row.text_targets.tolist() == [w[1] for w in want[1:]] + [-1] * (n > 0)
    assert row.visual_targets.tolist() == [w[2] if w[3] else -1 for w in want[1:]] + [-1] * (n > 0)
    firsts = [w[3] for w in want if w[2] >= 0 and w[2] % P == 0]
    assert row.answers.tolist() == firsts


def test_picture_first_or_after_a_picture_is_context():
    ids = np.array([SENTINEL, SENTINEL, START, SENTINEL, END])
    row = build_row(ids, ids, 2, 99, START)
    assert row.answers.tolist() == [False, False, True]


def test_dangling_start():
    ids = np.array([1, START, SENTINEL, END])
    labels = np.array([IGNORE, START, SENTINEL, END])
    assert build_row(ids, labels, 4, 5, START).text_targets.tolist() == [START, -1]
    cut = build_row(ids, labels, 4, 5, START, mask_dangling_start=True)
    assert cut.text_targets.tolist() == [-1, -1] and len(cut.kept) == 0
    whole = build_row(ids, labels, 4, 7, START, mask_dangling_start=True)
    assert whole.text_targets[0] == START


def test_turns():
    ids = np.array([9, START, SENTINEL, END, 1, 2, 3, 4, 5])
    labels = np.array([IGNORE] * 4 + [IGNORE, 2, 3, 4, 5])
    turns = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    row = build_row(ids, labels, 2, 99, START, turns)
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
    """Labels, masks, flags and which pictures are targets, for every packing case."""
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
        row = build_row(
            one, None if labels is None else labels[b][mask[b]], P, info["max_length"],
            special["image_start"],
        )  # fmt: skip
        rows.append(row)
        targets += [stack + k for k in row.kept[row.answers]]
        stack += max(int((one == special["image_placeholder"]).sum()), 1)  # 1: the dummy picture
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
