"""Replies as files and on the terminal."""

import io

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder.config import pixels
from metamorph_jax.sampling.generator import Options
from metamorph_jax.sampling.image_decoder import ImageDecoder
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import Output, Reply, Stream, TextPart, describe, printable, stem
from metamorph_jax.sampling.segments import Result, Text, VisualTokens


def test_drawing(generator, tmp_path, monkeypatch):
    """Images are drawn per guidance scale; the same seed draws the same."""
    P, C = generator.feature_shape
    cfg = pixels(C, P, side=16, width=64)
    image_decoder = ImageDecoder(decoder.create(cfg, nnx.Rngs(0)), steps=2)
    monkeypatch.setattr(generator, "image_decoder", image_decoder)
    features = np.random.default_rng(0).normal(size=(P, C)).astype(np.float32)
    none = np.zeros(0, np.int32)
    segments = Text.of([65, 66]), VisualTokens(features, True), VisualTokens(features[:2], False)
    result = Result(segments, none, features, none, True)
    options = Options(guidance=(1.5, 3.0))
    reply = generator.reply(result, options, 0)
    record, files = describe(reply, "a/b")
    name = stem("a/b")
    drawn = [f"{name}_image0_scale1.5.png", f"{name}_image0_scale3.png"]
    assert [f for f in files if f.endswith("png")] == drawn
    assert files[drawn[0]].shape == (16, 16, 3) and files[drawn[0]].dtype == np.uint8
    assert [s.get("complete") for s in record["segments"]] == [None, True, False]
    assert record["text"].endswith("[image 0][image 1]") and record["ended"] == "eos"
    again = describe(generator.reply(result, options, 0), "a/b")[1]
    np.testing.assert_array_equal(files[drawn[0]], again[drawn[0]])
    out = Output(tmp_path / "out", {})
    out.open()
    out.write(Request("a/b", "draw"), reply)
    assert Image.open(tmp_path / "out" / drawn[1]).size == (16, 16)
    (image,) = reply.images
    np.testing.assert_array_equal(np.asarray(image), files[drawn[0]])
    reply.save(tmp_path / "saved", "one")
    assert (tmp_path / "saved" / "one.json").is_file()
    assert Image.open(tmp_path / "saved" / "one_image0_scale1.5.png").size == (16, 16)
    assert not generator.reply(result, options, 0, draw=False).images
    reply = generator.reply(result, Options(), 0)  # guidance as the decoder's config says
    assert [*describe(reply, "a")[1]] == ["a_image0.npy", "a_image0_scale7.5.png", "a_image1.npy"]


def test_a_folder_with_results_keeps_its_settings(tmp_path):
    Output(tmp_path, {"seed": 0}).open()
    out = Output(tmp_path, {"seed": 1})  # nothing was made with the other seed
    out.open()
    out.write(Request("0", "draw"), Reply((TextPart("no", (1,)),), True))
    Output(tmp_path, {"seed": 1})
    with pytest.raises(UserError, match="other settings .seed"):
        Output(tmp_path, {"seed": 2})


def test_a_stream_keeps_split_characters_back(generator):
    written = io.StringIO()
    stream = Stream(generator, written)
    chat = generator.prompts.chat
    for token in chat.encode("naïve ☂ text"):
        stream([token])
        assert "\ufffd" not in written.getvalue()
    stream([*chat.markers.before, -1, -1, *chat.markers.after])
    stream.end()
    assert written.getvalue() == "naïve ☂ text[image 0]\n"
