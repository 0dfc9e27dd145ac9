"""How clean a shape is: real images of easy-vqa, and shapes painted with one thing wrong."""

import numpy as np
import pytest

from metamorph_jax.convert import packages
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.quickstart import evaluate, page, shapes
from metamorph_jax.quickstart.run import GOALS

SIDE = 64
GROUND = np.array([245, 238, 250], np.float32)
PLACES = {"circle": (30, 25, 10), "rectangle": (20, 22, 41, 37), "triangle": (30, 40, 20)}


def painted(color: int, *parts) -> np.ndarray:
    """uint8[SIDE, SIDE, 3]; parts: (shape, parameters of `shapes.paint`)."""
    cover = np.max([shapes.paint(s, np.array(at, float), SIDE, SIDE) for s, at in parts], axis=0)
    return mixed(color, cover)


def mixed(color: int, cover: np.ndarray) -> np.ndarray:
    """An image of a colour where `cover` is 1."""
    cover = cover[..., None]
    return np.round(cover * shapes.RGB[color] + (1 - cover) * GROUND).astype(np.uint8)


def overlap_and_count(images: list, color, shape) -> tuple[np.ndarray, list[int]]:
    n = len(images)
    found = shapes.measure(np.stack(images), np.full(n, color), np.full(n, shape))
    return found.overlap, found.count.tolist()


def test_real_images_fit(tmp_path):
    if not packages.installed("easy-vqa"):
        pytest.skip(packages.PACKAGES["easy-vqa"].pip)
    data = qdata.prepare(tmp_path, train_images=24, test_images=48)
    found = evaluate.measure_real(data)
    assert len(found.overlap) == 48 and found.summary()["one_shape"] == 1
    assert found.overlap.min() > 0.96 and found.summary()["overlap"] > 0.98
    _, pixels, color, shape = qdata.labelled_images(data, "test")
    for k, limit in enumerate((0.97, 0.99, 0.97)):
        chosen = np.flatnonzero(shape == k)[:8]
        assert (
            np.median(shapes.measure(pixels[chosen], color[chosen], shape[chosen]).overlap) > limit
        )
    # The wrong kind fits worse.
    turned = shapes.measure(pixels[::6], color[::6], (shape[::6] + 1) % 3)
    assert turned.overlap.max() < 0.96


@pytest.mark.parametrize("shape", range(len(qdata.SHAPES)))
def test_painted_shapes_fit_in_every_colour_at_any_place(shape):
    name = qdata.SHAPES[shape]
    at = PLACES[name]
    moved = tuple(v - 14.5 * (k == 0) for k, v in enumerate(at))  # some reach over the edge
    images = [painted(c, (name, (at, moved)[c % 2])) for c in range(len(qdata.COLORS))]
    for color, image in enumerate(images):
        overlap, count = overlap_and_count([image], color, shape)
        assert overlap[0] > 0.97 and count == [1], qdata.COLORS[color]


def test_a_bite_a_second_shape_and_a_wrong_colour_are_seen():
    name, color = "rectangle", qdata.COLORS.index("blue")
    whole = painted(color, (name, (20, 20, 40, 40)))
    bitten = whole.copy()
    bitten[20:30, 20:30] = GROUND
    two = painted(color, (name, (20, 20, 40, 40)), (name, (50, 50, 58, 58)))
    speck = painted(color, (name, (20, 20, 40, 40)), (name, (50, 50, 53, 53)))
    other = painted(qdata.COLORS.index("yellow"), (name, (20, 20, 40, 40)))
    empty = mixed(color, np.zeros((SIDE, SIDE)))
    images = [whole, bitten, two, speck, other, empty]
    overlap, count = overlap_and_count(images, color, qdata.SHAPES.index(name))
    assert count == [1, 1, 2, 1, 1, 0]
    assert overlap[0] > 0.99
    # Three quarters are left. The best rectangle is the whole one.
    assert overlap[1] == pytest.approx(0.75, abs=0.02)
    assert overlap[2] == pytest.approx(400 / 464, abs=0.02)
    assert overlap[3] == pytest.approx(400 / 409, abs=0.01)
    assert overlap[4] == overlap[5] == 0


def test_texture_and_faint_fringes_are_no_part_of_the_shape():
    color, rng = qdata.COLORS.index("gray"), np.random.default_rng(0)
    image = painted(color, ("circle", PLACES["circle"])).astype(np.float32)
    image += rng.normal(0, 4, image.shape)
    image[14:36, 42:44] -= (0, 25, 0)
    overlap, count = overlap_and_count(
        [np.clip(image, 0, 255).astype(np.uint8)], color, qdata.SHAPES.index("circle")
    )
    assert overlap[0] > 0.97 and count == [1]


def test_the_report_shows_them_beside_those_of_real_images():
    result = dict.fromkeys(GOALS, 0.5) | {
        "overlap": 0.91,
        "real": {"overlap": 0.987, "one_shape": 1},
        "best_of": {},
    }
    found = {t.name: t for t in page.targets(result, {"vpit": 60}, GOALS)}
    (overlap,) = [t for name, t in found.items() if name.startswith("Overlap")]
    assert overlap.value == 0.91 and overlap.reached and "real images: 98.7 %" in overlap.note
    one = found["Drawings with exactly one connected shape"]
    assert not one.reached and "real images: 100.0 %" in one.note


def test_requests_without_a_whole_image_have_no_shape():
    color, shape = np.array([1, 1]), np.array([0, 0])
    image = painted(1, ("circle", PLACES["circle"]))
    drawn = np.stack([[image, image], [image, image]])
    found = evaluate.measure_shapes(drawn, np.array([[True] * 2, [False] * 2]), color, shape)
    assert found.count.tolist() == [[1, 1], [0, 0]] and not found.overlap[1].any()
    assert found.summary()["one_shape"] == 0.5


def test_the_spread_is_that_of_centres_and_sizes():
    """Four circles of radius 6 and 10 around two centres that are 20 pixels apart in x; one image
    shows nothing."""
    images = [painted(1, ("circle", (x, 30, r))) for x in (20, 40) for r in (6, 10)]
    images.append(np.full((SIDE, SIDE, 3), GROUND, np.uint8))
    found = shapes.measure(np.stack(images), np.ones(5, int), np.zeros(5, int))
    assert np.isnan(found.box[4]).all() and found.overlap[4] == 0
    np.testing.assert_allclose(found.box[1], (10, 20, 30, 40), atol=1)
    summary = found.summary()
    assert summary["place_spread"] == pytest.approx(5, abs=0.3)  # 10 in x, 0 in y
    assert summary["size_spread"] == pytest.approx(4, abs=0.5)
    nothing = shapes.Measures(np.zeros(1), np.zeros(1, int), np.full((1, 4), np.nan)).summary()
    assert nothing["place_spread"] == nothing["size_spread"] == 0
