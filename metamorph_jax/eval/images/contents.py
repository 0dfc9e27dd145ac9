"""Images whose contents we made, and a judge that knows them: what other judges are checked with.

An image is a light background with coloured shapes that don't touch each other. Places follow
GenEval's rule: one object is left of another where the offset of their centres, less a tenth of
both sizes, points that way by more than half of its length.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from metamorph_jax.eval.images.geneval import RELATIONS, Check

COLORS = {
    "red": (220, 30, 30), "orange": (250, 140, 20), "yellow": (240, 220, 40),
    "green": (40, 160, 60), "blue": (40, 70, 220), "purple": (130, 40, 170),
    "pink": (250, 130, 190), "brown": (120, 70, 30), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUND = (235, 235, 235)
_TENTH, _HALF = 0.1, 0.5


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape in an image: `x`, `y` its centre and `size` its height and width, in pixels."""

    name: str
    color: str
    x: float
    y: float
    size: float


def draw(things: Iterable[Thing], side: int = 224) -> Image.Image:
    """The image of these things."""
    image = Image.new("RGB", (side, side), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for thing in things:
        half, color = thing.size / 2, COLORS[thing.color]
        left, top, right, bottom = (thing.x - half, thing.y - half, thing.x + half, thing.y + half)
        if thing.name == "circle":
            pen.ellipse((left, top, right, bottom), fill=color)
        elif thing.name == "square":
            pen.rectangle((left, top, right, bottom), fill=color)
        elif thing.name == "triangle":
            pen.polygon([(left, bottom), (right, bottom), (thing.x, top)], fill=color)
        else:
            arm = thing.size / 6
            pen.rectangle((thing.x - arm, top, thing.x + arm, bottom), fill=color)
            pen.rectangle((left, thing.y - arm, right, thing.y + arm), fill=color)
    return image


def png(things: Iterable[Thing], side: int = 224) -> bytes:
    """The bytes of their image as a file."""
    file = io.BytesIO()
    draw(things, side).save(file, "PNG")
    return file.getvalue()


def scatter(
    kinds: Sequence[tuple[str, str]], rng: np.random.Generator, side: int = 224
) -> list[Thing]:
    """Things of these (name, color) at random places of a 3 x 3 grid, at most nine."""
    cells = rng.permutation(9)[: len(kinds)]
    cell, out = side / 3, []
    for (name, color), at in zip(kinds, cells, strict=True):
        size = cell * rng.uniform(0.55, 0.75)
        move = (cell - size) / 2 * rng.uniform(-0.8, 0.8, 2)
        row, column = divmod(int(at), 3)
        x, y = (column + 0.5) * cell + move[0], (row + 0.5) * cell + move[1]
        out.append(Thing(name, color, float(x), float(y), float(size)))
    return out


def relations(one: Thing, other: Thing) -> set[str]:
    """Those of `RELATIONS` that `one` is in to `other`."""
    offset = np.array([one.x - other.x, one.y - other.y])
    margin = _TENTH * (one.size + other.size)
    moved = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    length = np.linalg.norm(offset)
    if not length:
        return set()
    x, y = moved / length
    left, right, above, below = RELATIONS
    holds = {left: x < -_HALF, right: x > _HALF, above: y < -_HALF, below: y > _HALF}
    return {name for name, so in holds.items() if so}


def holds(check: Check, things: Sequence[Thing]) -> bool:
    """Whether a check is true of an image with these things."""
    own = [thing for thing in things if thing.name == check.name]
    if check.kind == "color":
        return any(thing.color == check.color for thing in own)
    if check.kind == "position":
        others = [thing for thing in things if thing.name == check.other]
        return any(check.relation in relations(a, b) for a in own for b in others)
    return len(own) >= check.count and (check.most is None or len(own) <= check.most)


class ExactJudge:
    """A judge (`judging.ImageJudge`) that knows what is in each image.

    Args:
        contents: file -> its things.
        checks: all that it may be asked.
    """

    def __init__(self, contents: Mapping[str, Sequence[Thing]], checks: Iterable[Check]):
        self._contents = contents
        self._checks = {check.question: check for check in checks}

    def __call__(self, images: Sequence[str], questions: Sequence[str]) -> np.ndarray:
        pairs = zip(images, questions, strict=True)
        return np.array([float(holds(self._checks[q], self._contents[i])) for i, q in pairs])
