"""Replies as files and on the terminal."""

import io

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax.errors import UserError, WeightError
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder.config import pixels
from metamorph_jax.sampling.image_decoder import ImageDecoder
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import (
    ImagePart,
    Output,
    Reply,
    Stream,
    TextPart,
    describe,
    printable,
    stem,
)
from metamorph_jax.sampling.segments import Result, Text, VisualTokens

BLACK = np.zeros((4, 4, 3), np.uint8)


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


def test_no_two_ids_share_files(tmp_path):
    ids = ["cat/1", "cat_1", "cat_1 ", "Cat_1", "x" * 90 + "a", "x" * 90 + "b", "é", "è", "", ".",
           "cat_1_image0", "猫" * 60, "a\0", "con", "-x"]  # fmt: skip
    names = {stem(i, sample).lower() for i in ids for sample in (0, 1)}
    assert len(names) == 2 * len(ids)
    assert all(name.isascii() and len(name) < 100 for name in names)
    assert stem("cat_1") == "cat_1"  # a plain one names its files itself
    tokens = ImagePart(np.zeros((1, 2), np.float32), True, {7.5: BLACK, 7.5000001: BLACK})
    out = Output(tmp_path, {})
    out.open()
    for i in ids[:2]:
        out.write(Request(i, "Draw"), Reply((tokens,), True))
    assert len(list(tmp_path.glob("*.png"))) == 4 and len(list(tmp_path.glob("*.npy"))) == 2
    again = Output(tmp_path, {})
    assert all(again.has(Request(i, "Draw")) for i in ids[:2])
    assert not again.has(Request("cat_1", "Draw", sample=1))
    next(tmp_path.glob("cat_1_image0*.png")).unlink()
    assert not again.has(Request("cat_1", "Draw"))  # its file is gone


def test_what_a_terminal_is_shown():
    assert printable("a\tb\nc\x1b[2J\r é") == "a\tb\nc\\x1b[2J\\r é"
    long = "x" * 1000 + "\x1b" * 5
    assert printable(long) == "x" * 1000 + "\\x1b" * 5


class Drawing(nnx.Module):
    """A drawing model that gives the features' mean in every pixel, times the guidance."""

    def __init__(self):
        made = decoder.create(pixels(2, 1, side=16, width=64), nnx.Rngs(0))
        self.decoder, self.cfg = made.decoder, made.cfg

    def draw(self, features, noise, sampler, *, steps, guidance):
        return features.mean((1, 2))[:, None, None, None] * guidance + noise * 0


def test_an_image_that_is_not_finite_is_never_kept(generator, monkeypatch):
    drawing, P_C = ImageDecoder(Drawing(), 4), (1, 2)
    assert drawing.draw(np.full(P_C, 0.5, np.float32), 1.0, 0).min() == 128
    with pytest.raises(WeightError, match="not finite, so it is not drawn"):
        drawing.draw(np.full(P_C, np.nan, np.float32), 1.0, 0)
    with pytest.raises(WeightError, match="guidance 1e.38.* damaged"):
        drawing.draw(np.full(P_C, 1e5, np.float32), 1e38, 0)
    for steps in (1001, 0, -3):
        with pytest.raises(UserError, match=f"--steps .*: {steps} steps"):
            ImageDecoder(Drawing(), steps)
    # One such image is that request's fault, not the others'.
    results = {"bad": np.nan, "good": 0.5}
    monkeypatch.setattr(
        generator, "loop",
        lambda rows, *_, **__: [
            Result((VisualTokens(np.full(P_C, results[name], np.float32), True),),
                   *(np.zeros(0, np.int32),) * 3, False)
            for name in results
        ],
    )  # fmt: skip
    monkeypatch.setattr(generator, "prompt", lambda *_: (np.zeros((3, 4)), np.zeros(3, int)))
    requests, told = [Request(name, "Draw") for name in results], []
    for one in (drawing, None):  # nor are visual tokens, where nothing is drawn
        monkeypatch.setattr(generator, "image_decoder", one)
        replies = generator.replies(requests, Options(8), lambda r, e: told.append((r.id, str(e))))
        assert [request.id for request, _ in replies] == ["good"]
    assert [name for name, _ in told] == ["bad"] * 2
    assert all("not finite" in why for _, why in told)


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
