"""`metamorph_jax.load` and what it gives."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import metamorph_jax
from metamorph_jax import api
from metamorph_jax.errors import UserError
from metamorph_jax.sampling.generator import Options


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


def test_a_chat_has_the_options_of_generate(generator):
    conversation = api.Model(generator).chat(max_new_tokens=4, temperature=0.5)
    assert conversation.options == Options(4, 0.5, batch_size=1) and conversation.turns == 0
    with pytest.raises(ValueError, match="the prompt is empty"):
        api.Model(generator).generate(" ")


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, metamorph_jax; "
        "found = {'jax', 'torch', 'flax', 'numpy', 'transformers'} & set(sys.modules); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "load" in metamorph_jax.__all__
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        metamorph_jax.unload  # noqa: B018
