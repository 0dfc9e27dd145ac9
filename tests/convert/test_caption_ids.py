"""Captions in ids of a published tokenizer of CLIP, against what pipelines ask it for."""

import numpy as np
import pytest

from metamorph_jax.data import tokenizers
from metamorph_jax.data.caption_ids import CaptionIds
from metamorph_jax.data.sources.base import ImageRef, Sample


@pytest.mark.parametrize("text", ["a kite", "A  KITE", "abcdefghijklmnopq", "a"])
def test_ids_are_those_of_pipelines(text, tokenizer_folder):
    """Start, text, end, padding; a long caption keeps its end."""
    tokenizer = tokenizers.load(tokenizer_folder)
    wanted = tokenizer(text, padding="max_length", max_length=8, truncation=True)["input_ids"]
    ids = CaptionIds(tokenizer, 8, tokenizer.pad_token_id).of(text)
    assert ids.tolist() == list(wanted) and ids.dtype == np.int32
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0] == start and end in ids
    other = CaptionIds(tokenizer, 8, 5).of(text)
    last = ids.tolist().index(end) + 1
    assert other[:last].tolist() == ids[:last].tolist() and (other[last:] == 5).all()


def test_images_without_captions(tokenizer_folder):
    refs = ImageRef("a.png"), ImageRef("b.png", caption="b")
    sample = Sample("", "", (), refs)
    captions = CaptionIds(tokenizers.load(tokenizer_folder), 8)
    assert (captions(sample, 0) == -1).all() and captions(sample, 1)[0] > 0
    assert ImageRef("b.png") == refs[1] and ImageRef("b.png").key() == refs[1].key()
