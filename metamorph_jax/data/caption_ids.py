"""Captions of images to draw, in ids of an image decoder's text encoder (`DrawingSpec.caption`)."""

import dataclasses

import numpy as np

from metamorph_jax.data.sources.base import Sample


@dataclasses.dataclass(frozen=True)
class CaptionIds:
    """Ids of a caption as Stable Diffusion's pipelines make them: start, text, end, and padding.

    Attributes:
        tokenizer: of the transformers library, one of CLIP's.
        length: ids of a caption; a longer one is cut before its end id.
        padding: id behind the end.
    """

    tokenizer: object
    length: int
    padding: int = 0

    def __call__(self, sample: Sample, k: int) -> np.ndarray:
        """int32[length] of the caption of image k of a sample; -1 where it has none."""
        text = sample.images[k].caption
        return np.full(self.length, -1, np.int32) if not text else self.of(text)

    def of(self, text: str) -> np.ndarray:
        """int32[length] of a text."""
        found = self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
        ids = np.full(self.length, self.padding, np.int32)
        ids[: len(found)] = found
        return ids
