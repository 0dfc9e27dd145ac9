"""What a LLaVA starts from: parts in folders of their own, and a connector at the scale of text."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert import llama, vit
from metamorph_jax.data.views import AnyRes, Single
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes import llava as recipe
from tests.recipes.llava.tiny import ANYRES, TINY, data_config, make, write

change = dataclasses.replace


@pytest.fixture(scope="module")
def model():
    return make(change(ANYRES, start_end=True), seed=1)


def same(a, b, part):
    for (name, x), (_, y) in zip(
        nnx.to_flat_state(nnx.state(a)), nnx.to_flat_state(nnx.state(b)), strict=True
    ):
        if name[: len(part)] == part:
            np.testing.assert_array_equal(x[...], y[...], err_msg=str(name))


def test_language_model_and_tower_from_folders(model, tmp_path):
    """The added rows are the mean of the others; what no file has stays as it is."""
    for name in ("llm", "tower"):
        (tmp_path / name).mkdir()
    fields = llama.config_to_hf(dataclasses.replace(model.llm.cfg, added_tokens=0))
    tensors = dict(llama.export_llama(model.llm))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][
        : model.llm.cfg.vocab_size
    ]
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(fields))
    save_file(dict(vit.export_vit(model.vision.tower)), tmp_path / "tower" / "model.safetensors")
    vision = change(ANYRES.vision, weights=str(tmp_path / "tower"))
    cfg = change(ANYRES, start_end=True, vision=vision, llm_weights=str(tmp_path / "llm"))
    other = make(cfg)
    newline = np.asarray(other.newline[...])
    recipe.load_pretrained(other, cfg)
    same(model, other, ("vision",))
    same(model, other, ("llm", "layers"))
    mean = tensors["model.embed_tokens.weight"].mean(0)
    np.testing.assert_allclose(other.llm.embed_tokens.added[...], [mean, mean], atol=1e-6)
    np.testing.assert_array_equal(other.newline[...], newline)
    wrong = change(cfg, llm_options={"vocab_size": 49152, "rope_theta": 5e5})
    with pytest.raises(ConfigError, match='config.model.llm="auto" follows the checkpoint'):
        recipe.load_pretrained(make(wrong), wrong)


def test_the_connector_starts_at_the_scale_of_text(tmp_path):
    """By the valid views of the first batches."""
    model = make(ANYRES)
    stream = recipe.open_data(data_config(write(tmp_path), length=512), ANYRES, Shard(1))
    batch = next(stream)
    stream.close()
    recipe.initialize(model, [batch])
    P = model.vision.feature_shape[0]
    found = model.project(model.batch_features(batch)).reshape(len(batch.images.valid[0]), P, -1)
    found = np.asarray(found)[batch.images.valid[0]].reshape(-1, found.shape[-1])
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    scale = np.asarray(model.llm.embed_tokens.embedding[...]).std()
    np.testing.assert_allclose(found.std(0).mean(), scale, rtol=1e-3)


@pytest.mark.parametrize(
    ("mode", "merge", "expected"),
    [
        ("tower", "flat", ("square", False)),
        ("square", "flat", ("square", False)),
        ("crop", "flat", ("crop", False)),
        ("pad", "spatial_unpad", ("pad", True)),
        ("anyres", "spatial", "spatial"),
    ],
)
def test_image_modes(mode, merge, expected):
    views = recipe.input_spec(change(ANYRES, image_mode=mode, merge=merge)).views
    assert views.preprocess.mean == TINY.vision.vit.mean
    if mode == "anyres":
        assert isinstance(views, AnyRes)
        assert (views.merge, views.grids) == (expected, ANYRES.grids)
    else:
        assert isinstance(views, Single) and (views.preprocess.mode, views.newline) == expected
