"""How an image becomes views, each of which the tower makes P tokens of, and slots in the row.

    plan((w, h))   -> (number of views, slots)      before a pixel is decoded
    pixels(image)  -> uint8[views, side, side, 3]   what the tower sees

A slot is a visual token of the image (view * P + token), or `NEWLINE`, in reading order. So the
length of a row is known from the sizes of its images alone.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
from PIL import Image

from metamorph_jax.data.images import Preprocess
from metamorph_jax.types import NEWLINE

Size = tuple[int, int]  # (width, height), as Pillow has it


class Views(Protocol):
    """What the data pipeline asks of `Single` and `AnyRes`.

    Attributes:
        tokens: P, visual tokens of a view.
        preprocess: makes the pixels of one view.
        needs_size: whether a plan depends on the size of the image; if not, `plan(None)` works.
    """

    tokens: int
    preprocess: Preprocess
    needs_size: bool

    def plan(self, size: Size | None) -> tuple[int, np.ndarray]: ...

    def pixels(self, image: Image.Image) -> np.ndarray: ...

    def fingerprint(self) -> str:
        """Text that differs whenever the pixels do; caches are keyed by it."""
        ...


@dataclasses.dataclass(frozen=True)
class Single:
    """One view, all of whose tokens are read.

    Attributes:
        tokens, preprocess: see `Views`.
        newline: one newline slot after the tokens.
    """

    tokens: int
    preprocess: Preprocess = Preprocess()
    newline: bool = False
    needs_size = False

    def plan(self, size: Size | None = None) -> tuple[int, np.ndarray]:
        """(1, int32[P] or int32[P + 1])."""
        slots = np.arange(self.tokens, dtype=np.int32)
        return 1, np.append(slots, np.int32(NEWLINE)) if self.newline else slots

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8[1, side, side, 3] of an RGB image."""
        return self.preprocess(image)[None]

    def fingerprint(self) -> str:
        return self.preprocess.fingerprint()


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """The whole image as one view, and tiles of it at a higher resolution (LLaVA 1.6).

    The image is scaled into the canvas of `grids` that loses least of it, centred on black, and cut
    into tiles. View 0 is the whole image, squashed to a square; the tiles follow, row by row. With
    "spatial_unpad", 2 x 2 tiles of 2 x 2 tokens each, and black below and above the image:

        view 0     views 1 to 4       unpadded, a newline at the end of every row
        0 1        4  5 | 8  9
        2 3        6  7 | 10 11        6  7 10 11 NEWLINE
                   -----------        12 13 16 17 NEWLINE
                   12 13 | 16 17
                   14 15 | 18 19      slots: 0 1 2 3 6 7 10 11 -2 12 13 16 17 -2

    Attributes:
        tokens, preprocess: see `Views`; P is a square number, `preprocess.size` the side of a tile.
        grids: (width, height) in pixels of the canvases to choose from, multiples of the side.
        merge: "spatial_unpad"; "spatial", the tiles' tokens as one map, row by row, padding
            included and without newlines; or "flat", tile by tile.

    The arithmetic is the reference's, rounding included (specification of LLaVA, "anyres"): sizes
    are rounded down when a canvas is chosen and unpadded, but up when the image is resized.
    """

    tokens: int
    preprocess: Preprocess
    grids: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    merge: str = "spatial_unpad"
    needs_size = True

    def __post_init__(self):
        if self.merge not in ("spatial_unpad", "spatial", "flat"):
            raise ValueError(f"merge {self.merge!r}: expected spatial_unpad, spatial or flat")
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"{self.tokens} tokens of a view are not a square grid")
        side = self.preprocess.size
        odd = [grid for grid in self.grids if grid[0] % side or grid[1] % side]
        if odd or not self.grids:
            raise ValueError(f"grids {odd or self.grids}: expected multiples of {side} pixels")

    def plan(self, size: Size) -> tuple[int, np.ndarray]:
        """(views, int32[n] slots) of an image of this size."""
        side, P = self.preprocess.size, self.tokens
        width, height = self.canvas(size)
        columns, rows = width // side, height // side
        views = 1 + columns * rows
        base, tiles = np.arange(P, dtype=np.int32), np.arange(P, views * P, dtype=np.int32)
        if self.merge == "flat":
            return views, np.concatenate([base, tiles])
        s = math.isqrt(P)
        grid = tiles.reshape(rows, columns, s, s).swapaxes(1, 2).reshape(rows * s, columns * s)
        if self.merge == "spatial_unpad":
            top, left = _margins(size, grid.shape)
            grid = grid[top : len(grid) - top, left : grid.shape[1] - left]
            grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return views, np.concatenate([base, grid.reshape(-1)])

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8[views, side, side, 3] of an RGB image."""
        side = self.preprocess.size
        canvas = self.padded(image)
        boxes = [
            (x, y, x + side, y + side)
            for y in range(0, canvas.height, side)
            for x in range(0, canvas.width, side)
        ]
        whole = image.resize((side, side), Image.Resampling.BICUBIC)
        views = [whole, *(canvas.crop(box) for box in boxes)]
        return np.stack([self.preprocess(view) for view in views])

    def canvas(self, size: Size) -> Size:
        """The grid that keeps most of an image's pixels; of equal ones, the one that wastes least.

        An image of no more than one tile gets two in a column: both keep all of it, and the first
        in the list wins.
        """

        def loss(grid: Size) -> tuple[int, int]:
            (w, h), (W, H) = size, grid
            scale = min(W / w, H / h)
            kept = min(int(w * scale) * int(h * scale), w * h)
            return -kept, W * H - kept

        return min(self.grids, key=loss)

    def padded(self, image: Image.Image) -> Image.Image:
        """The image scaled into its canvas, centred on black."""
        (w, h), (W, H) = image.size, self.canvas(image.size)
        if W / w < H / h:
            w, h = W, min(math.ceil(h * (W / w)), H)
        else:
            w, h = min(math.ceil(w * (H / h)), W), H
        canvas = Image.new("RGB", (W, H))
        canvas.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((W - w) // 2, (H - h) // 2))
        return canvas

    def fingerprint(self) -> str:
        return f"{self.preprocess.fingerprint()} anyres {self.grids}"


def _margins(size: Size, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a token map [H, W] that are padding, on either side."""
    (w, h), (H, W) = size, shape
    if w / h > W / H:
        return (H - int(h * (W / w))) // 2, 0
    return 0, (W - int(w * (H / h))) // 2
