"""How an image becomes views, each of which the tower makes P tokens of, and slots in the row."""

import dataclasses

import numpy as np
from PIL import Image

from metamorph_jax.data.images import Preprocess


@dataclasses.dataclass(frozen=True)
class Single:
    """One view, all of whose tokens are read.

    Attributes:
        tokens: P.
        preprocess: makes the view.
    """

    tokens: int
    preprocess: Preprocess = Preprocess()

    def plan(self, size: tuple[int, int] | None = None) -> tuple[int, np.ndarray]:
        """(number of views, int32[P] the visual tokens in reading order); `size` plays no role."""
        return 1, np.arange(self.tokens, dtype=np.int32)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8[1, h, w, 3] of an RGB image."""
        return self.preprocess(image)[None]
