"""The kind of record that MM-Interleaved is fine-tuned on, where a conversation alone won't do.

`python -m metamorph_jax.recipes.mm_interleaved.prepare` makes rows of official files; most of them
are conversations as every recipe reads them (`data/sources/kinds.py`). Those of kind `augmented` ask
for more, with these keys of the record, all of them optional:

    "tiles": [2, 3]   frames of 128 pixels that each image has one below the other, 0 for an image
                      that is none of these clips; one is taken by chance
    "flip": true      with probability 0.5, all images are mirrored, boxes with them, and in the text
                      "left" and "right" change places
    "crop": true      a part of the one image by chance, which has all boxes whole; not where the
                      text has words for directions
    "square": true    images are stretched to squares, so that no box is cut off

A box in the text is "(x1,y1)(x2,y2)", three digits each: 0 to 999 of the image's width and height.
The reference flips ADE20K upside down, and not the image to draw; here both are mirrored.
"""  # noqa: E501

import dataclasses
import re

import numpy as np

from metamorph_jax.data import images
from metamorph_jax.data.sets.stories import box_of
from metamorph_jax.data.sources.base import ImageRef, Turn
from metamorph_jax.data.sources.kinds import Files, Kind, conversation
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown

WHOLE = 999
AREA, ASPECT = (0.5, 1.0), (3 / 4, 4 / 3)  # of a crop, before it grows around the boxes
_BOX = re.compile(r"\((\d{3}),(\d{3})\)\((\d{3}),(\d{3})\)")
_SIDE = re.compile(r"(?<![a-z])(left|right)(?=(?:most|-?hand|wards?)?(?![a-z]))", re.IGNORECASE)
_DIRECTION = re.compile(
    r"(?<![a-z])(left|right|top|bottom|upper|lower|middle|cent(er|re)|corner|above|below|under|over"
    r"|front|back|behind|near|far|close|closest|edge)(most|-?hand|wards?)?(?![a-z])",
    re.IGNORECASE,
)
Box = tuple[float, float, float, float]


def by_name_only(record: dict) -> bool:
    """The kind is asked for by the record or its source."""
    return False


def augmented(record: dict, files: Files, rng: np.random.Generator):
    """The record's conversation and images, changed as its keys say."""
    turns, refs = conversation(record, files, rng)
    refs = _one_tile(record.get("tiles"), refs, rng)
    if _asks(record, "crop"):
        turns, refs = cropped(turns, refs, rng)
    if _asks(record, "flip") and rng.random() < 0.5:
        turns, refs = mirrored(turns, refs)
    if _asks(record, "square"):
        refs = tuple(dataclasses.replace(ref, square=True) for ref in refs)
    return turns, refs


def _asks(record: dict, key: str) -> bool:
    value = record.get(key, False)
    if not isinstance(value, bool):
        raise BadSample("bad_record", f"`{key}` is {shown(value, 40)}, expected true or false")
    return value


def _one_tile(tiles, refs: tuple[ImageRef, ...], rng: np.random.Generator) -> tuple[ImageRef, ...]:
    """The images; of each clip one frame."""
    if tiles is None:
        return refs
    whole = isinstance(tiles, list) and all(type(n) is int and 0 <= n <= 10_000 for n in tiles)
    if not whole or len(tiles) != len(refs):
        raise BadSample("bad_record", f"`tiles` must have a number for each of {len(refs)} images")
    return tuple(
        dataclasses.replace(ref, box=box_of(int(rng.integers(n)))) if n else ref
        for n, ref in zip(tiles, refs, strict=True)
    )


def mirrored(turns: tuple[Turn, ...], refs: tuple[ImageRef, ...]):
    """Turns and images of the mirrored scene."""

    def box(found: re.Match) -> str:
        x1, y1, x2, y2 = map(int, found.groups())
        return written((WHOLE - x2, y1, WHOLE - x1, y2))

    def side(found: re.Match) -> str:
        other = "right" if found[0].lower() == "left" else "left"
        return other.upper() if found[0].isupper() else (
            other.capitalize() if found[0][0].isupper() else other
        )  # fmt: skip

    changed = tuple((role, _SIDE.sub(side, _BOX.sub(box, text))) for role, text in turns)
    return changed, tuple(dataclasses.replace(ref, mirror=not ref.mirror) for ref in refs)


def cropped(turns: tuple[Turn, ...], refs: tuple[ImageRef, ...], rng: np.random.Generator):
    """Turns and image of a part of the scene; what they were where that would change its meaning.

    The part is drawn by chance (`AREA`, `ASPECT`) and then grows around the boxes of the text.

    Raises:
        BadSample: the image can't be read.
    """
    text = " ".join(text for _, text in turns)
    if len(refs) != 1 or _DIRECTION.search(text):
        return turns, refs
    (ref,) = refs
    ((width, height),) = images.sizes(refs)
    boxes = [tuple(map(int, found)) for found in _BOX.findall(text)]
    scale = np.array([width, height, width, height]) / WHOLE
    part = _grown(_part(width, height, rng), [np.array(box) * scale for box in boxes])
    left, top = part[:2]
    size = part[2] - left, part[3] - top

    def moved(found: re.Match) -> str:
        corners = np.array(found.groups(), np.float64) * scale - np.array([left, top, left, top])
        return written(thousandths(corners, size))

    changed = tuple((role, _BOX.sub(moved, text)) for role, text in turns)
    x, y = (ref.box or (0, 0))[:2]
    place = part[0] + x, part[1] + y, part[2] + x, part[3] + y
    return changed, (dataclasses.replace(ref, box=place),)


def _part(width: int, height: int, rng: np.random.Generator) -> Box:
    """A part of an image, in pixels."""
    area = width * height * rng.uniform(*AREA)
    aspect = np.exp(rng.uniform(*np.log(ASPECT)))
    w = min(max(int(round(np.sqrt(area * aspect))), 1), width)
    h = min(max(int(round(np.sqrt(area / aspect))), 1), height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _grown(part: Box, boxes: list[np.ndarray]) -> tuple[int, int, int, int]:
    """The smallest part, in whole pixels, that has this one and the boxes."""
    corners = np.array([part, *boxes])
    left, top = np.floor(corners[:, :2].min(0)).astype(int)
    right, bottom = np.ceil(corners[:, 2:].max(0)).astype(int)
    return int(left), int(top), int(right), int(bottom)


def thousandths(box, size: tuple[float, float]) -> tuple[int, int, int, int]:
    """A box in pixels as parts of 999, cut to whole numbers, inside the image."""
    wholes = (WHOLE * v / size[k % 2] for k, v in enumerate(box))
    return tuple(min(max(int(v), 0), WHOLE) for v in wholes)


def written(box: tuple[int, int, int, int]) -> str:
    """A box as text: (010,020)(500,600)."""
    return "({:03d},{:03d})({:03d},{:03d})".format(*box)


KINDS = {"augmented": Kind(by_name_only, augmented)}
