"""What a prompt becomes before the language model reads it."""

import numpy as np
from PIL import Image

from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.views import Single
from metamorph_jax.sampling.requests import Request
from metamorph_jax.types import Batch, Images


def test_marker_and_prefix_change_the_prompt(speaker, pictures):
    def length(**kw):
        return speaker.prompt(Request("0", **kw), 8)

    picture = (str(pictures / "a.png"),)
    front = length(prompt="x <image>", images=picture)
    default = length(prompt="x", images=picture)
    assert len(length(prompt="x")) + speaker.decoder.P + 2 <= len(default) <= len(front)
    assert len(length(prompt="x", think=True)) > len(length(prompt="x"))


def test_prompt_equals_the_training_row(speaker, pictures):
    """Reading a prompt gives what `recipe.embed` makes of the same batch."""
    model = speaker.model
    path = pictures / "b.jpg"
    got = speaker.prompt(Request("0", "What?", (str(path),)), 8)
    ids = speaker.chat.question("What?", 1)
    P = speaker.decoder.P
    row = build_row(ids, None, [read_place(*Single(P).plan())], P, speaker.context)
    pixels = speaker.preprocess(Image.open(path).convert("RGB"))
    one = lambda x: np.asarray(x)[None]  # noqa: E731
    batch = Batch(
        one(row.tokens), one(row.positions), one(np.ones_like(row.tokens)), one(row.text_targets),
        one(row.image_slots), one(row.visual_targets), one(row.tokens),
        Images(np.ones((1, 1), bool), one(row.view_starts), pixels[None, None]),
    )  # fmt: skip
    np.testing.assert_allclose(got, np.asarray(model.embed(batch)[0][0]), atol=1e-5)
