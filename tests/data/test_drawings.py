"""Images to draw inside rows: tokens in their stead, captions, and moments from a cache."""

import dataclasses

import numpy as np
import pytest

from metamorph_jax.data import cache, pipeline
from metamorph_jax.data.chat import SENTINEL, Chat
from metamorph_jax.data.config import (
    CacheConfig,
    DataConfig,
    DrawingSpec,
    InputSpec,
    LatentSpec,
    OrderConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import build_row, in_answers, read_place, text_place
from metamorph_jax.data.show import lines
from metamorph_jax.data.sources.base import IMAGE, ImageRef
from metamorph_jax.data.views import Single
from metamorph_jax.errors import ConfigError, MissingFile
from metamorph_jax.recipe import Shard
from tests.data.conftest import Ends, conversation, make_image, write_jsonl

SHAPE, SCALE = (4, 4, 2), 0.5


def spec_of(latents=True, identity="vae 1"):
    latents = LatentSpec(SHAPE, SCALE, identity) if latents else None
    drawings = DrawingSpec(
        3, in_answers, Preprocess(8), (901, 902, 903), (1,), latents=latents
    )  # fmt: skip
    return InputSpec(Single(2, Preprocess(8)), drawings=drawings)


@pytest.fixture
def config(tmp_path):
    """Two records, of which the second draws two images."""
    for k in range(4):
        make_image(k).save(tmp_path / f"{k}.png")
    write_jsonl(tmp_path / "a.jsonl", [
        {"image": ["0.png", "1.png"], "conversations": conversation(f"{IMAGE} again", IMAGE)},
        {"image": ["2.png", "3.png"], "conversations": conversation("two", f"{IMAGE} and {IMAGE}")},
    ])  # fmt: skip
    return DataConfig(
        sources=(SourceConfig(str(tmp_path / "a.jsonl")),),
        row=RowConfig("vokens", length=300, images=2, packing="pad"),
        order=OrderConfig(epochs=2, shuffle=False),
        cache=CacheConfig(drawings=str(tmp_path / "cache")),
    )


def moments_of(pixels):
    """Stands in for an autoencoder: of one colour, and of a variance that differs by the pixel."""
    colour = pixels.reshape(len(pixels), -1, 3).mean(1) / 127.5 - 1
    mean = np.broadcast_to(colour[:, None, None, :2], (len(pixels), *SHAPE))
    return np.concatenate([mean, np.zeros_like(mean)], -1)


def test_tokens_without_labels():
    """Of the tokens in an image's stead, those that are not learnt have no label; in a question,
    none has."""
    places = [text_place((7, 8, 9), (1, 2)), read_place(1, np.arange(2)), text_place((5, 6))]
    ids = np.array([1, SENTINEL, 2, SENTINEL, SENTINEL, 3])
    row = build_row(ids, ids, places, 2, 20, in_answers)
    assert row.tokens.tolist() == [1, 7, 8, 9, 2, 0, 0, 5, 6, 3]
    assert row.text_targets.tolist() == [7, -1, -1, 2, -1, -1, 5, 6, 3, -1]
    labels = np.where(np.arange(6) < 2, -100, ids)
    row = build_row(ids, labels, places, 2, 20, in_answers)
    assert row.text_targets.tolist() == [-1, -1, -1, 2, -1, -1, 5, 6, 3, -1]
    assert in_answers(labels, np.array([1, 3, 4])).tolist() == [False, True, True]
    assert build_row(ids, ids, places, 2, 3, in_answers).tokens.tolist() == [1]


def test_moments_from_a_cache(config):
    """Batches hold latents in place of pixels: mean + deviation * noise, times the scale; the noise
    is another one in every epoch, and the same when the sample is read again."""
    spec, calls = spec_of(), []

    def make():
        calls.append(1)
        return moments_of

    sources = pipeline.open_sources(config)
    with pytest.raises(MissingFile, match="no cache in"):
        pipeline.make_pipeline(config, spec, Chat(Ends(), "vokens"), sources, Shard(2))
    for _ in range(2):
        pipeline.fill_drawing_cache(config, spec, sources, make)
    assert len(calls) == 1
    chat = Chat(Ends(), "vokens")
    batches = pipeline.make_pipeline(config, spec, chat, sources, Shard(2))
    state = batches.get_state()
    first, second = next(batches), next(batches)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches).drawings.latents, first.drawings.latents)
    assert first.drawings.pixels is None and first.drawings.latents.shape == (2, 3, *SHAPE)
    assert first.drawings.valid.tolist() == [[True, False, False], [True, True, False]]
    assert (first.drawings.latents[0, 0] != second.drawings.latents[0, 0]).all()
    noise = first.drawings.latents[0, 0] / SCALE - moments_of(pixels_of(config, 1))[0, ..., :2]
    assert 0.3 < noise.std() < 2 and abs(noise.mean()) < 1
    wanted = pipeline.batch_spec(config, spec, 2).drawings
    assert wanted.latents.shape == first.drawings.latents.shape and wanted.pixels is None


def pixels_of(config, k):
    path = config.sources[0].path.replace("a.jsonl", f"{k}.png")
    return spec_of().drawings.preprocess(config.images.load([ImageRef(path)])[0])[None]


def test_moments_of_another_autoencoder(config):
    """Caches are kept apart by what makes the moments; a model without one has no use for them."""
    sources = pipeline.open_sources(config)
    pipeline.fill_drawing_cache(config, spec_of(), sources, lambda: moments_of)
    with pytest.raises(MissingFile, match="no cache in"):
        pipeline.open_drawing_cache(config, spec_of(identity="vae 2"))
    with pytest.raises(ConfigError, match=r"cache.drawings.*set the folder to \"\""):
        pipeline.open_drawing_cache(config, spec_of(latents=False))


def test_an_image_that_no_moments_are_of(config, tmp_path):
    sources = pipeline.open_sources(config)
    pipeline.fill_drawing_cache(config, spec_of(), sources, lambda: moments_of)
    make_image(9).save(tmp_path / "1.png")
    stream = pipeline.make_stream(config, spec_of(), Chat(Ends(), "vokens"), sources)
    assert stream[0]["bad"] == "not_in_drawing_cache" and "1.png" in stream[0]["detail"]
    assert stream.fixed_choices and stream[1]["drawings"].shape == (2, *SHAPE)
    assert isinstance(stream.drawing_cache, cache.ArrayCache)
    assert len(stream.drawing_cache) == 3  # the image of the question is not drawn


def test_rows_that_were_made_elsewhere(config, tmp_path):
    """They are kept where the image is the same; what is missing is computed."""
    sources, spec = pipeline.open_sources(config), spec_of()
    wanted = cache.moment_spec(spec.drawings)
    refs = [ImageRef(str(tmp_path / f"{k}.png")) for k in (1, 2)]
    rows = np.full((2, *wanted.shape), [[[[5]]], [[[6]]]], np.float32)
    for again in (rows, rows + 1):
        found = cache.put(config.cache.drawings, wanted, zip(refs, again, strict=True))
        assert len(found) == 2
    pipeline.fill_drawing_cache(config, spec, sources, lambda: moments_of)
    found = pipeline.open_drawing_cache(config, spec)
    assert len(found) == 3 and found.rows[0].min() == 5 and found.rows[1].max() == 6
    np.testing.assert_allclose(found.rows[2], moments_of(pixels_of(config, 3))[0], atol=1e-6)


def test_as_it_is_shown(config, tmp_path):
    """What is drawn is named, wherever it stands among images that are read."""
    turns = conversation("draw", f"here {IMAGE}", f"{IMAGE} more", "done")
    write_jsonl(tmp_path / "a.jsonl", [{"image": ["0.png", "1.png"], "conversations": turns}])
    config = dataclasses.replace(config, cache=CacheConfig())
    sources = pipeline.open_sources(config)
    stream = pipeline.make_stream(config, spec_of(), Chat(Ends(), "vokens"), sources)
    shown = [line.strip() for line in lines(stream, 0)][1:]
    assert [line.split()[0] for line in shown] == [
        "reads", "learns", "draws", "learns", "reads", "sees", "reads", "learns"
    ]  # fmt: skip
    assert shown[2] == "draws  0.png (3 tokens in its stead)"
    assert shown[5] == "sees   1.png (2 visual tokens)"
