"""Boxes in replies, and how well they overlap. A box is (x1, y1, x2, y2), corners in pixels."""

import math
import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
NOTHING: Box = (0.0, 0.0, 0.0, 0.0)
# Form -> of what its numbers are parts, and how much a whole is.
#   square   0 to 1 of the image padded to a square, as LLaVA 1.5 reads and writes
#   unit     0 to 1 of the image itself
#   thousand 0 to 999 of the image itself, "(x1,y1)(x2,y2)", read as MM-Interleaved's scorer does
#   pixels   pixels of the image
FORMS = ("square", "unit", "thousand", "pixels")
_WHOLE = 999
RIGHT = 0.5  # least IoU of a right box
_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = re.compile(
    rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*(?:,|\)\s*,?\s*\()\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]"
)


def box_in(reply: str, form: str, size: tuple[int, int]) -> Box | None:
    """The first box of a reply, None if there is none.

    Both "[x1, y1, x2, y2]" and "(x1,y1)(x2,y2)" are understood, but for the form "thousand": there
    the box is what the first two pairs of parentheses hold, and nothing where that is not two
    numbers each.

    Args:
        form: one of `FORMS`.
        size: (width, height) of the image in pixels.
    """
    if form == "thousand":
        numbers = _two_corners(reply)
    else:
        found = _FOUR.search(reply)
        numbers = found and tuple(float(number) for number in found.groups())
    return scaled(numbers, form, size) if numbers else None


def scaled(box: Box, form: str, size: tuple[int, int]) -> Box:
    """A box in pixels, from its numbers in one of the `FORMS`; arguments as of `box_in`."""
    x1, y1, x2, y2 = box
    width, height = size
    if form == "square":
        side = max(size)
        left, top = (side - width) // 2, (side - height) // 2
        return x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top
    across, down = {
        "unit": (width, height),
        "thousand": (width / _WHOLE, height / _WHOLE),
        "pixels": (1, 1),
    }[form]
    return x1 * across, y1 * down, x2 * across, y2 * down


def _two_corners(reply: str) -> Box | None:
    """The two numbers in each of the first two pairs of parentheses."""
    numbers = []
    for corner in re.findall(r"\((.*?)\)", reply, re.DOTALL)[:2]:
        try:
            x, y = map(float, corner.split(","))
        except ValueError:
            return None
        numbers += [x, y]
    whole = len(numbers) == 4 and all(map(math.isfinite, numbers))
    return tuple(numbers) if whole else None


def iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 if both are empty."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    either = _area(box) + _area(other) - both
    return both / either if either > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
