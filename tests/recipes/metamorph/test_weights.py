"""Weights from folders, and the start of the connector."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert.llama import export_llama
from metamorph_jax.convert.vit import export_vit
from metamorph_jax.models.connectors.mlp import calibrate
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.published import export_metamorph
from metamorph_jax.types import Images
from tests.recipes.metamorph.tiny import TINY, change, make, make_batch


def test_calibrated_connector_speaks_at_the_scale_of_text():
    model = make(dataclasses.replace(TINY, llm_options={"width": 128}))
    r = np.random.default_rng(0)
    x = 3 + 0.01 * r.normal(size=(500, 32)) * r.uniform(0.1, 2, 32)
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    table = np.asarray(model.llm.embed_tokens.embedding[...])
    calibrate(model.connector, x, table.std())
    out = np.asarray(model.project(x))
    np.testing.assert_allclose(out.std(0).mean(), table.std(), rtol=1e-3)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-4)
    unit = out / np.linalg.norm(out, axis=-1, keepdims=True)
    assert abs(np.mean(unit[::2] * unit[1::2]) * out.shape[-1]) < 0.1  # no common direction


def test_initialize_measures_valid_pictures_only():
    a, b = make(), make()
    batch = make_batch()
    recipe.initialize(a, [batch])
    twice = lambda x, y: np.concatenate([x, y], axis=1)  # noqa: E731
    old = batch.images
    images = Images(
        valid=twice(old.valid, ~old.valid),
        start=twice(old.start, old.start),
        pixels=twice(old.pixels, 255 * np.ones_like(old.pixels)),
    )
    recipe.initialize(b, [dataclasses.replace(batch, images=images)])
    for x, y in zip(a.connector.linears, b.connector.linears, strict=True):
        np.testing.assert_allclose(x.kernel[...], y.kernel[...], rtol=1e-3, atol=1e-4)


def llama_fields(cfg) -> dict:
    return dict(model_type="llama", vocab_size=cfg.vocab_size, hidden_size=cfg.width,
                intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.layers,
                num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
                head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
                tie_word_embeddings=cfg.tied)  # fmt: skip


def same(a, b, path=()):
    for (name, x), (_, y) in zip(
        nnx.to_flat_state(nnx.state(a)), nnx.to_flat_state(nnx.state(b)), strict=True
    ):
        if name[: len(path)] == path:
            np.testing.assert_array_equal(x[...], y[...], err_msg=str(name))


def test_weights_from_folders(tmp_path):
    model = make(seed=1)
    llm, tower, whole = (tmp_path / n for n in ("llm", "tower", "whole"))
    for folder in (llm, tower, whole):
        folder.mkdir()
    tensors = export_llama(model.llm)
    V = model.llm.cfg.vocab_size
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:V]
    keys = sorted(tensors)
    for k in range(2):  # in shards
        save_file({n: tensors[n] for n in keys[k::2]}, llm / f"model-{k}.safetensors")
    (llm / "config.json").write_text(json.dumps(llama_fields(model.llm.cfg)))
    save_file(dict(export_vit(model.vision.tower)), tower / "model.safetensors")
    save_file(dict(export_metamorph(model)), whole / "model.safetensors")

    cfg = change(TINY, dict(weights=str(tower)), llm="auto", llm_weights=str(llm))
    other = make(cfg)
    recipe.load_pretrained(other, cfg)
    same(model, other, ("vision",))
    same(model, other, ("llm", "layers"))
    mean = tensors["model.embed_tokens.weight"].mean(0)
    np.testing.assert_allclose(other.llm.embed_tokens.added[...], [mean, mean], atol=1e-6)

    cfg = dataclasses.replace(TINY, weights=str(whole))
    other = make(cfg)
    recipe.load_pretrained(other, cfg)
    same(model, other)
    with pytest.raises(FileNotFoundError, match="hf:owner/name"):
        recipe.load_pretrained(other, dataclasses.replace(TINY, llm_weights="no/such/folder"))
    with pytest.raises(ValueError, match="auto"):
        recipe.llm_config(dataclasses.replace(TINY, llm="auto"))
