"""Results as files and on the terminal."""

import argparse
import io

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder.config import pixels
from metamorph_jax.sampling.image_decoder import ImageDecoder
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import Output, Voice, describe
from metamorph_jax.sampling.segments import Picture, Result, Text


def test_drawing(speaker, tmp_path):
    """Images are drawn per guidance scale; the same seed draws the same."""
    P, C = speaker.decoder.P, speaker.decoder.C
    cfg = pixels(C, P, side=16, width=64)
    image_decoder = ImageDecoder(decoder.create(cfg, nnx.Rngs(0)), steps=2)
    features = np.random.default_rng(0).normal(size=(P, C)).astype(np.float32)
    none = np.zeros(0, np.int32)
    segments = (
        Text(np.array([65, 66], np.int32)), Picture(features, True), Picture(features[:2], False)
    )  # fmt: skip
    result = Result(segments, none, features, none, True)
    args = argparse.Namespace(guidance=[1.5, 3.0], seed=0)
    request = Request("a/b", "draw")
    record, files = describe(speaker, image_decoder, request, result, args)
    drawn = ["a_b_picture0_scale1.5.png", "a_b_picture0_scale3.png"]
    assert [f for f in files if f.endswith("png")] == drawn
    assert files[drawn[0]].shape == (16, 16, 3) and files[drawn[0]].dtype == np.uint8
    assert [s.get("complete") for s in record["segments"]] == [None, True, False]
    args.guidance = None  # as the decoder's config says
    assert [f for f in describe(speaker, image_decoder, request, result, args)[1]] == [
        "a_b_picture0.npy", "a_b_picture0_scale7.5.png", "a_b_picture1.npy"
    ]  # fmt: skip
    args.guidance = [1.5]
    again = describe(speaker, image_decoder, request, result, args)[1]
    np.testing.assert_array_equal(files[drawn[0]], again[drawn[0]])
    out = Output(tmp_path / "out", {})
    out.write(request, record, files)
    assert Image.open(tmp_path / "out" / drawn[1]).size == (16, 16)


def test_a_folder_with_results_keeps_its_settings(tmp_path):
    Output(tmp_path, {"seed": 0})
    out = Output(tmp_path, {"seed": 1})  # nothing was made with the other seed
    out.write(Request("0", "draw"), {"id": "0"}, {})
    Output(tmp_path, {"seed": 1})
    with pytest.raises(UserError, match="other settings .seed"):
        Output(tmp_path, {"seed": 2})


def test_voice_keeps_split_characters_back(speaker):
    heard = io.StringIO()
    voice = Voice(speaker, heard)
    ids = speaker.chat.encode("naïve ☂ text")
    for token in ids:
        voice([token])
        assert "\ufffd" not in heard.getvalue()
    voice([speaker.decoder.start, -1, -1, speaker.decoder.end])
    voice.end()
    assert heard.getvalue() == "naïve ☂ text[picture 0]\n"
