"""Views and slots of images, against what LLaVA's reference computed (tests/golden/llava)."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metamorph_jax.data import images
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.views import AnyRes, Single
from metamorph_jax.types import NEWLINE
from tests.data.conftest import make_image

TABLE, PIXELS = "llava/anyres/table.json", "llava/preprocess/desc.json"


def read(root, name):
    return json.loads((pathlib.Path(root) / name).read_text())


def pytest_generate_tests(metafunc):
    root = metafunc.config.getoption("--golden-root")
    rows = read(root, TABLE)["rows"]
    boxed = [r for r in rows if "resize_pad_content_box_xyxy" in r]  # not of the largest images
    for name, found in (("row", rows), ("boxed", boxed)):
        if name in metafunc.fixturenames:
            ids = [f"{r['pinpoints']}-{r['size'][0]}x{r['size'][1]}" for r in found]
            metafunc.parametrize(name, found, ids=ids)
    if "array" in metafunc.fixturenames:
        arrays = read(root, PIXELS)["arrays"]
        metafunc.parametrize("array", arrays, ids=[a["key"] for a in arrays])
    if "canvas" in metafunc.fixturenames:
        metafunc.parametrize("canvas", read(root, PIXELS)["anyres"], ids=lambda c: c["image"])


def any_res(table, row, merge="spatial_unpad"):
    side = row["best_resolution"][0] // row["grid_wh"][0]
    grids = tuple(map(tuple, table["pinpoints"][row["pinpoints"]]))
    return AnyRes((side // table["patch_size"]) ** 2, Preprocess(side, "crop"), grids, merge)


@pytest.mark.golden
def test_plan_golden(row, golden_root):
    """Canvas, kept rows and columns, newlines and numbers of tokens of every size."""
    table = read(golden_root, TABLE)
    views = any_res(table, row)
    size, P = tuple(row["size"]), views.tokens
    s = round(P**0.5)
    assert list(views.canvas(size)) == row["best_resolution"]
    columns, rows = row["grid_wh"]
    H, W = row["feature_hw_before"]
    assert (rows * s, columns * s) == (H, W)
    count, slots = views.plan(size)
    assert count == 1 + columns * rows and len(slots) == row["n_tokens_unpad"]
    assert slots[:P].tolist() == list(range(P))
    h, w = row["feature_hw_after"]
    kept = slots[P:].reshape(h, w + 1)
    assert (kept[:, -1] == NEWLINE).all()
    top, bottom = row.get("kept_rows", (0, h))
    left, right = row.get("kept_cols", (0, w))
    assert (bottom - top, right - left) == (h, w)
    for y in range(h):
        for x in range(w):
            Y, X = top + y, left + x
            tile = 1 + (Y // s) * columns + X // s
            assert kept[y, x] == tile * P + (Y % s) * s + X % s
    for merge, name in (("spatial", "n_tokens_spatial_no_unpad"), ("flat", "n_tokens_flat")):
        whole = any_res(table, row, merge)
        assert sorted(whole.plan(size)[1].tolist()) == list(range(row[name]))


@pytest.mark.golden
def test_padded_golden(boxed, golden_root):
    """Where the image lies in its canvas; the rest is black."""
    views = any_res(read(golden_root, TABLE), boxed)
    image = Image.new("RGB", tuple(boxed["size"]), (255, 255, 255))
    assert list(views.padded(image).getbbox()) == boxed["resize_pad_content_box_xyxy"]


@pytest.mark.golden
def test_pixels_golden(array, golden_root):
    """Every array of the reference's processors: padded, centre-cropped, and in tiles."""
    d = read(golden_root, PIXELS)
    folder = golden_root / "llava/preprocess"
    with np.load(folder / "pixels.npz") as z:
        want = np.moveaxis(z[array["key"]], -3, -1)
    image = Image.open(folder / array["image"]).convert("RGB")
    mean, std = tuple(d["image_mean"]), tuple(d["image_std"])
    mode = {"pad": "pad", "square": "crop", "anyres": "crop"}[array["aspect"]]
    process = Preprocess(array["size"], mode, mean=mean, std=std)
    views = Single(1, process)
    if array["aspect"] == "anyres":
        views = AnyRes(16, process, tuple(map(tuple, d["anyres_pinpoints"])))
        assert views.plan(image.size)[0] == len(want)
    got = views.pixels(image)
    want = want.reshape(got.shape)
    if want.dtype == np.uint8:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(process.normalise(got), want, atol=1e-6)


@pytest.mark.golden
def test_canvas_golden(canvas, golden_root):
    d, folder = read(golden_root, PIXELS), golden_root / "llava/preprocess"
    image = Image.open(folder / canvas["image"]).convert("RGB")
    (side,) = {a["size"] for a in d["arrays"] if a["aspect"] == "anyres"}
    views = AnyRes(1, Preprocess(side, "crop"), tuple(map(tuple, d["anyres_pinpoints"])))
    assert list(views.canvas(image.size)) == canvas["best"]
    assert views.plan(image.size)[0] == 1 + canvas["n_tiles"]
    stem = canvas["image"].removesuffix(".png")
    want = Image.open(folder / f"{stem}_anyres_padded.png").convert("RGB")
    np.testing.assert_array_equal(np.asarray(views.padded(image)), np.asarray(want))
    square = Image.open(folder / f"{stem}_square.png").convert("RGB")
    padded = images.pad_to_square(image, tuple(d["background"]))
    np.testing.assert_array_equal(np.asarray(padded), np.asarray(square))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_every_slot_is_a_token_of_a_view_and_none_is_read_twice(w, h):
    views = AnyRes(16, Preprocess(56))
    with pytest.raises(ValueError, match="multiples of 56"):
        AnyRes(16, Preprocess(56), ((60, 56),))
    views = AnyRes(16, Preprocess(56), ((56, 112), (112, 56), (112, 112), (168, 56)))
    count, slots = views.plan((w, h))
    used = slots[slots >= 0]
    assert set(slots[slots < 0].tolist()) <= {NEWLINE}
    assert len(set(used.tolist())) == len(used) and used.max() < count * 16


def test_a_single_view_needs_no_size():
    views = Single(4, Preprocess(8))
    count, slots = views.plan()
    assert (count, slots.tolist(), views.needs_size) == (1, [0, 1, 2, 3], False)
    assert Single(2, newline=True).plan()[1].tolist() == [0, 1, NEWLINE]
    assert views.pixels(make_image(0)).shape == (1, 8, 8, 3)


def test_the_picture_in_the_docstring():
    views = AnyRes(4, Preprocess(2, "crop"), ((4, 4),))
    count, slots = views.plan((4, 2))
    assert count == 5
    assert slots.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, -2, 12, 13, 16, 17, -2]


def test_options_that_fit_no_grid():
    with pytest.raises(ValueError, match="5 tokens of a view are not a square"):
        AnyRes(5, Preprocess(56), ((56, 112),))
    with pytest.raises(ValueError, match="merge 'best'"):
        AnyRes(4, Preprocess(56), ((56, 112),), "best")
