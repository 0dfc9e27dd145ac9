"""Batches from data files, with and without a feature cache."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from metamorph_jax.convert import specs
from metamorph_jax.convert.vit import export_vit
from metamorph_jax.data.config import CacheConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes import metamorph as recipe
from tests.recipes.metamorph.tiny import TINY, change, make, sums_of


def write_data(folder, n=6):
    from PIL import Image

    r = np.random.default_rng(0)
    lines = []
    for i in range(n):
        Image.fromarray(r.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
        question = {"from": "human", "value": "<image>\nwhat is it?"}
        turns = [question, {"from": "gpt", "value": "noise"}]
        if i % 2:
            turns = [{"from": "human", "value": "draw it"}, {"from": "gpt", "value": "<image>"}]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


def data_config(tmp_path, count=6, **options):
    source = SourceConfig(str(write_data(tmp_path, count)), "pairs")
    return recipe.Data((source,), **options)


def test_a_tower_that_is_trained_has_no_feature_cache(tmp_path):
    data = data_config(tmp_path, cache=CacheConfig(features=str(tmp_path / "cache")))
    with pytest.raises(ConfigError, match="train_tower has no use for config.data.cache.features"):
        recipe.open_data(data, dataclasses.replace(TINY, train_tower=True), Shard(1))


@pytest.mark.golden  # takes the small tokenizer from there
def test_data_with_and_without_a_feature_cache(tmp_path, golden_root):
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    data = data_config(tmp_path, row=RowConfig(length=64, images=2))
    options = {"vocab_size": specs.tokenizer(tokenizer).convert_tokens_to_ids("<image_start>")}
    cfg = dataclasses.replace(TINY, tokenizer=tokenizer, llm_options=options)
    model = make(cfg)
    folder = tmp_path / "tower"
    folder.mkdir()
    save_file(dict(export_vit(model.vision.tower)), folder / "model.safetensors")
    cfg = change(cfg, dict(weights=str(folder)))
    plain = recipe.open_data(data, cfg, Shard(2))
    with_cache = dataclasses.replace(data, cache=CacheConfig(features=str(tmp_path / "cache")))
    cached = recipe.open_data(with_cache, cfg, Shard(2))
    assert list(plain.sources) == ["pairs"] and plain.skipped == {}
    state = plain.get_state()
    a, b = next(plain), next(cached)
    assert a.images.pixels is not None and a.images.features is None
    assert b.images.pixels is None and b.images.features.shape == (2, 2, 4, 32)
    assert (np.take_along_axis(a.image_slots, a.images.start, 1)[a.images.valid] % 4 == 0).all()
    assert (a.tokens >= model.image_start).any() and (a.visual_targets >= 0).any()
    np.testing.assert_array_equal(a.tokens, b.tokens)
    found = [sums_of(model, x)[0] for x in (a, b)]
    for kind in ("text", "visual"):
        np.testing.assert_allclose(found[0][kind], found[1][kind], rtol=1e-5)
    plain.set_state(state)
    np.testing.assert_array_equal(next(plain).tokens, a.tokens)
    plain.close()
    cached.close()


@pytest.mark.golden  # takes the small tokenizer from there
def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(tmp_path, golden_root):
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    data = data_config(tmp_path)
    start = specs.tokenizer(tokenizer).convert_tokens_to_ids("<image_start>")
    cfg = dataclasses.replace(TINY, tokenizer=tokenizer, llm_options={"vocab_size": start - 3})
    message = f"<image_start> has id {start} in the tokenizer, {start - 3} in the model"
    with pytest.raises(ConfigError, match=message):
        recipe.open_data(data, cfg, Shard(1))


@pytest.mark.golden  # takes the small tokenizer from there
def test_no_row_has_more_visual_targets_than_the_head_takes(tmp_path, golden_root):
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    data = data_config(
        tmp_path, 12, row=RowConfig(length=256, images=8), order=OrderConfig(epochs=1)
    )
    vocab = specs.tokenizer(tokenizer).convert_tokens_to_ids("<image_start>")
    cfg = dataclasses.replace(TINY, tokenizer=tokenizer, llm_options={"vocab_size": vocab})

    def targets(limit):
        limited = dataclasses.replace(cfg, max_visual_targets=limit)
        batches = recipe.open_data(data, limited, Shard(2))
        return [n for b in batches for n in (b.visual_targets >= 0).sum(1).tolist()]

    assert max(targets(0)) > 5 and sum(targets(0)) == 6 * 4
    assert max(targets(5)) == 4 and sum(targets(5)) == 6 * 4
    with pytest.raises(ConfigError, match="max_visual_targets is 3, but an image has 4"):
        targets(3)
