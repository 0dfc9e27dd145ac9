"""`metamorph_jax.load` and what it gives."""

import numpy as np
import pytest
from PIL import Image

import metamorph_jax
from metamorph_jax.errors import UserError


def test_load_and_generate(workdir, image_files, capsys):
    model = metamorph_jax.load(workdir)
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    options = {"max_new_tokens": 6, "temperature": 0.7, "seed": 3}
    reply = model.generate("What is it?", images=[image_files / "a.png", image], **options)
    assert reply.text and reply.images == []
    again = model.generate(
        "What is it?", images=[image_files / "a.png", image], stream=True, **options
    )
    assert again.text == reply.text
    assert capsys.readouterr().out.strip("\n") == reply.text.strip("\n")
    with pytest.raises(TypeError, match="surprise"):
        model.generate("x", surprise=1)
    with pytest.raises(UserError, match="config="):
        metamorph_jax.load("hf:owner/name")
